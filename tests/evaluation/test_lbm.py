"""LBM against its definition: a linear program a segment, hand examples, and what the definition implies."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.lbm import lbm_by_linear_programs, measure, random_pairs
from evaluation.metrics.lbm import (
    as_boxes,
    mean_over_batches,
    mean_over_traces,
    row_windows,
    trace_lbm,
    without_placeholders,
)

PREDICTION = [(0.1, 0.1, 0.3, 0.3), (0.5, 0.5, 0.7, 0.7)]
TRUTH = [
    (0.1, 0.1, 0.3, 0.3),
    (0.2, 0.2, 0.4, 0.4),
    (0.5, 0.5, 0.7, 0.7),
    (0.6, 0.6, 0.8, 0.8),
    (0, 0, 0.2, 0.2),
]


@pytest.mark.parametrize(("window", "value"), [(0, 0.05), (1, 0.0), (5, 0.0)])
def test_the_hand_example_has_its_published_values(window, value):
    assert trace_lbm(PREDICTION, TRUTH, window) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("window", [0, 1, 2, 7])
def test_random_pairs_have_the_linear_programs_value(rng, window):
    for prediction, truth in random_pairs(rng, 25, 90):
        expected = lbm_by_linear_programs(prediction, truth, window)
        assert trace_lbm(prediction, truth, window) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("predicted", "true"),
    [(1, 1), (1, 50), (20, 20), (20, 21), (21, 20), (21, 21), (41, 60), (19, 400), (60, 61)],
)
@pytest.mark.parametrize("window", [0, 1, 100])
def test_lengths_at_the_edges_of_segments_have_the_linear_programs_value(rng, predicted, true, window):
    prediction, truth = rng.random((predicted, 4)), rng.random((true, 4))
    expected = lbm_by_linear_programs(prediction, truth, window)
    assert trace_lbm(prediction, truth, window) == pytest.approx(expected, abs=1e-9)


def test_boxes_that_compete_for_one_column_have_the_linear_programs_value():
    """Rows that all prefer one column: taking each row's cheapest would be wrong from k = 1 on."""
    prediction, truth = np.full((4, 4), 0.5), np.zeros((4, 4))
    truth[1] = 0.5
    assert trace_lbm(prediction, truth, 1) == pytest.approx(lbm_by_linear_programs(prediction, truth, 1), abs=1e-9)
    assert trace_lbm(prediction, truth, 1) == pytest.approx(3 * 0.5 / 4)


@given(st.integers(1, 130), st.integers(0, 130), st.integers(0, 3))
def test_every_row_has_a_window_inside_its_segment_and_no_segment_is_infeasible(shorter, more, window):
    longer = shorter + more
    start, stop = row_windows(shorter, longer, window)
    assert (start < stop).all() and start.min() == 0 and stop.max() == longer
    disjoint_start, disjoint_stop = row_windows(shorter, longer, 0)
    assert (start <= disjoint_start).all() and (stop >= disjoint_stop).all()
    for first in range(0, shorter, 20):
        rows = slice(first, first + 20)
        assert (disjoint_stop[rows][:-1] == disjoint_start[rows][1:]).all()
        assert start[first] == math.floor(first * longer / shorter + 1e-9)


@given(st.integers(0, 2**32 - 1), st.integers(1, 45), st.integers(1, 45))
def test_a_wider_window_never_raises_the_value(seed, predicted, true):
    rng = np.random.default_rng(seed)
    prediction, truth = rng.random((predicted, 2)), rng.random((true, 4))
    values = [trace_lbm(prediction, truth, window) for window in (0, 1, 2, 50)]
    assert all(wide <= narrow + 1e-12 for narrow, wide in itertools.pairwise(values))
    assert values[-1] >= 0 and values[0] <= 1


@given(st.integers(0, 2**32 - 1), st.integers(1, 70))
def test_a_trace_matches_itself_at_no_cost(seed, length):
    trace = np.random.default_rng(seed).random((length, 2))
    assert trace_lbm(trace, trace, 0) == 0 and trace_lbm(trace, trace, 1) == 0


def test_a_point_is_a_box_of_zero_area():
    assert as_boxes([(0.25, 0.5)]).tolist() == [[0.25, 0.5, 0.25, 0.5]]
    assert trace_lbm([(0.2, 0.4)], [(0.1, 0.1, 0.3, 0.3)]) == pytest.approx((0.1 + 0.3 + 0.1 + 0.1) / 4)


def test_placeholders_are_dropped_from_the_truth_and_not_from_the_prediction():
    truth = [(0.1, 0.1, 0.3, 0.3, 0.04), (0, 0, 1, 1, 1)]
    assert without_placeholders(truth).shape == (1, 5)
    assert trace_lbm([(0.1, 0.1, 0.3, 0.3)], truth) == 0
    assert trace_lbm([(0, 0, 1, 1, 1)], [(0.1, 0.1, 0.3, 0.3, 0.04)]) == pytest.approx((0.1 + 0.1 + 0.7 + 0.7) / 4)
    assert trace_lbm([(0.1, 0.1, 0.3, 0.3)], [(0, 0, 1, 1)]) > 0, "four numbers: a true box of the whole picture"


def test_the_drop_of_placeholders_can_change_which_list_is_shorter(rng):
    prediction, kept = rng.random((30, 4)), np.column_stack([rng.random((25, 4)), np.full(25, 0.5)])
    truth = np.concatenate([np.tile([0, 0, 1, 1, 1], (10, 1)), kept])
    assert trace_lbm(prediction, truth, 1) == trace_lbm(prediction, kept[:, :4], 1)


def test_the_last_segment_weighs_as_much_as_a_full_one():
    prediction, truth = np.zeros((21, 4)), np.zeros((21, 4))
    prediction[20] = 0.8
    assert trace_lbm(prediction, truth) == pytest.approx(0.4)


@pytest.mark.parametrize("window", [0, 1])
def test_which_list_gives_the_rows_does_not_matter_when_both_are_equally_long(rng, window):
    """Windows are then symmetric squares, so the published tie rule (the prediction) cannot show."""
    first, second = rng.random((2, 47, 4))
    assert trace_lbm(first, second, window) == pytest.approx(trace_lbm(second, first, window), abs=1e-12)


def test_an_untraced_truth_has_no_value_and_leaves_the_mean_alone():
    assert math.isnan(trace_lbm([(0.5, 0.5)], []))
    assert math.isnan(trace_lbm([(0.5, 0.5)], [(0, 0, 1, 1, 1)]))
    assert mean_over_traces(np.array([0.25, np.nan, 0.75])) == 0.5


def test_the_two_dataset_means_differ_where_the_last_batch_is_smaller():
    values = np.concatenate([np.zeros(30), np.ones(1)])
    assert mean_over_traces(values) == pytest.approx(1 / 31)
    assert mean_over_batches(values) == pytest.approx(0.5)
    assert mean_over_batches(np.array([np.nan, np.nan, 0.5]), batch_size=2) == 0.5


def test_means_of_nothing_are_refused():
    with pytest.raises(ValueError, match="every ground truth is empty"):
        mean_over_traces(np.array([np.nan]))
    with pytest.raises(ValueError, match="every ground truth is empty"):
        mean_over_batches(np.array([np.nan]))


@pytest.mark.parametrize(
    ("prediction", "truth", "window", "reason"),
    [
        ([], [(0.1, 0.1)], 0, "empty prediction"),
        ([(0.1, 0.1)], [(0.1, 0.1)], -1, "negative"),
        ([(0.1, float("nan"))], [(0.1, 0.1)], 0, "not finite"),
        ([(0.1, float("inf"))], [(0.1, 0.1)], 1, "not finite"),
        ([(0.1, 0.1, 0.2)], [(0.1, 0.1)], 0, "2, 4 or 5 numbers"),
        ([0.1, 0.2], [(0.1, 0.1)], 0, "2, 4 or 5 numbers"),
    ],
)
def test_what_has_no_value_is_refused_with_the_reason(prediction, truth, window, reason):
    with pytest.raises(ValueError, match=reason):
        trace_lbm(prediction, truth, window)


def test_the_benchmark_shows_ours_at_least_ten_times_faster_and_equal():
    for record in measure(traces=12, longest=120):
        assert record["times_faster"] >= 10, record
        assert record["largest_difference"] < 1e-9, record
