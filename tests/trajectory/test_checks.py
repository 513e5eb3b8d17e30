"""Traces as users hand them in: cleaned, or refused with a reason."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracevision_jax.errors import UserError
from tracevision_jax.trajectory.checks import ASSUMED_RATE_HZ, FARTHEST, check_trace, trace_from_json


def test_a_clean_trace_is_returned_as_it_is():
    points = np.array([[0.1, 0.2, 0.0], [0.3, 0.4, 0.5]])
    assert (check_trace(points) == points).all()


def test_one_point_is_a_trace():
    assert check_trace([[0.5, 0.5]]).shape == (1, 3)


def test_times_in_disorder_are_sorted_and_equal_ones_keep_their_order():
    points = check_trace([[0.1, 0, 2.0], [0.2, 0, 1.0], [0.3, 0, 2.0], [0.4, 0, 1.0]])
    assert points[:, 0].tolist() == [0.2, 0.4, 0.1, 0.3]


def test_missing_times_are_taken_to_be_60_hz():
    assert check_trace(np.zeros((61, 2)))[-1, 2] == 60 / ASSUMED_RATE_HZ == 1.0


def test_points_a_little_outside_the_image_are_kept_as_recorded():
    assert check_trace([[-0.1, 1.2, 0.0]]).tolist() == [[-0.1, 1.2, 0.0]]


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ([], "is empty"),
        (np.zeros((0, 3)), "is empty"),
        ([[0.1, np.nan, 0.0]], "index 0: .0.1, nan, 0."),
        ([[0.1, 0.2, 0.0], [np.inf, 0.0, 1.0]], "index 1"),
        ([[0.1, 0.2, np.nan]], "not finite"),
        ([[320, 240, 0.0]], "look like pixels"),
        ([[0.5, -2.5, 0.0]], "far outside"),
        ([[1, 2, 3, 4]], "shape 1x4"),
        (np.zeros((3, 40)), "transposed"),
        (np.zeros(3), "shape 3;"),
        ([[0.1, 0.2], [0.3]], "not a table of numbers"),
        ([["a", "b"]], "not a table of numbers"),
        ([[True, False]], "not a table of numbers"),
        ([[1j, 0]], "not a table of numbers"),
        ([[10**400, 0]], "not a table of numbers"),
        (None, "not a table of numbers"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_reason(points, reason):
    with pytest.raises(UserError, match=reason):
        check_trace(points)


def test_a_hundred_thousand_points_take_no_time():
    points = np.random.default_rng(0).random((100_000, 3))
    start = time.process_time()
    checked = check_trace(points)
    assert time.process_time() - start < 1
    assert (np.diff(checked[:, 2]) >= 0).all()


def test_the_message_names_the_trace_by_what_the_caller_calls_it():
    with pytest.raises(UserError, match=r"trace of a\.json"):
        check_trace([], "trace of a.json")


def test_json_of_every_usual_form_is_read_alike():
    rows = [[0.1, 0.2, 0.0], [0.3, 0.4, 0.5]]
    dicts = [{"x": x, "y": y, "t": t} for x, y, t in rows]
    for value in (
        rows,
        dicts,
        [dicts],
        [[dicts[1]], [dicts[0]]],
        {"traces": [dicts]},
        {"trace": rows},
        {"points": rows},
    ):
        assert trace_from_json(value).tolist() == rows, value
    assert trace_from_json([[x, y] for x, y, _ in rows])[:, :2].tolist() == [row[:2] for row in rows]
    assert trace_from_json([[rows[0]], [rows[1]]]).tolist() == rows


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "list of points, not NoneType"),
        ("0.1 0.2", "list of points, not str"),
        ({"strokes": []}, "has strokes"),
        ({"traces": []}, "is empty"),
        ([[]], "is empty"),
        ([{"x": 0.1}], 'point 0 .* has no "y"'),
        ([[0.1, 0.2], [0.1]], "point 1 .* must be"),
        ([[0.1, 0.2], [0.1, 0.2, 0.3]], "some points"),
        ([{"x": None, "y": 0.1}], "not a table of numbers"),
        ([0.1, 0.2], "point 0"),
    ],
)
def test_malformed_json_traces_are_refused_with_their_reason(value, reason):
    with pytest.raises(UserError, match=reason):
        trace_from_json(value)


numbers = st.one_of(st.floats(), st.floats(-1, 2), st.integers(-3, 3), st.none(), st.text(max_size=2), st.booleans())


@given(st.lists(st.lists(numbers, max_size=4), max_size=6))
def test_any_table_is_a_clean_trace_or_a_clear_error(rows):
    for read in (check_trace, trace_from_json):
        try:
            points = read(rows)
        except UserError as error:
            assert "trace" in str(error)
            continue
        assert points.dtype == np.float64 and points.shape[1] == 3 and len(points)
        assert np.isfinite(points).all() and (np.abs(points[:, :2]) <= FARTHEST).all()
        assert (np.diff(points[:, 2]) >= 0).all()


json_values = st.recursive(
    st.one_of(numbers, st.fixed_dictionaries({"x": numbers, "y": numbers}, optional={"t": numbers})),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["traces", "points", "z"]), inner, max_size=2),
    ),
    max_leaves=8,
)


@given(json_values)
def test_any_json_is_a_clean_trace_or_a_clear_error(value):
    try:
        points = trace_from_json(value)
    except UserError:
        return
    assert points.shape[1] == 3 and np.isfinite(points).all()
