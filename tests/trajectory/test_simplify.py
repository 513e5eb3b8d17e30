"""Semantic-guided Douglas-Peucker: what it keeps, against a naive recursion, and how fast."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trajectory.naive_simplification import simplify_naively
from tracevision_jax.errors import UserError
from tracevision_jax.records.sample import TimedWord
from tracevision_jax.trajectory.phrases import Phrase, RubricPhrases
from tracevision_jax.trajectory.simplify import (
    PLAIN_EPSILON_PX,
    phrase_of_points,
    plain,
    simplify,
    simplify_many,
    to_count,
    uniform,
)

SIZE = (480, 640)
CAPTION = "a dog near the red ball"
PHRASES = [Phrase("a dog", 0, 5, 4), Phrase("near", 6, 10, 2), Phrase("the red ball", 11, 23, 5)]


def spoken(*windows) -> list[TimedWord]:
    """The words of CAPTION in the windows of the phrases; None leaves a phrase unheard."""
    texts = ("a dog", "near", "the red ball")
    return [TimedWord(text, *map(float, w)) for text, w in zip(texts, windows, strict=True) if w is not None]


def random_trace(rng: np.random.Generator, count: int) -> np.ndarray:
    """A noisy walk with times that repeat now and then."""
    steps = np.cumsum(rng.normal(0, 0.02, (count, 2)), axis=0) + rng.random(2)
    return np.column_stack([np.clip(steps, -0.2, 1.2), np.cumsum(rng.integers(0, 3, count)) / 60])


def path_px(*places, size=SIZE) -> np.ndarray:
    """A trace through pixel places, one a second."""
    return np.array([(x / size[1], y / size[0], t) for t, (x, y) in enumerate(places)], np.float64)


def test_it_keeps_exactly_what_the_naive_recursion_keeps(rng):
    for count in (1, 2, 3, 10, 50, 400):
        for _ in range(10):
            points = random_trace(rng, count)
            cuts = rng.uniform(-0.1, points[-1, 2] + 0.1, 6)
            cuts[1:5] = np.round(cuts[1:5] * 60) / 60  # windows end on points' times, and may touch
            cuts.sort()
            windows = [
                (cuts[0], cuts[2]),
                None if rng.random() < 0.2 else (cuts[1], cuts[3]),
                (cuts[4], cuts[5]),
            ]
            expected = simplify_naively(points, windows, [4, 2, 5], SIZE)
            found = simplify(points, spoken(*windows), CAPTION, SIZE, PHRASES)
            assert found.tolist() == expected.tolist()


def test_many_at_once_equal_one_by_one(rng):
    traces = [random_trace(rng, int(count)) for count in rng.integers(1, 300, 30)] + [np.zeros((0, 3))]
    words = [spoken((0, 1), (1, 1.5), (2, 3))] * len(traces)
    sizes = [(int(h), int(w)) for h, w in rng.integers(50, 900, (len(traces), 2))]
    many = simplify_many(traces, words, [CAPTION] * len(traces), sizes, [PHRASES] * len(traces))
    for points, word, size, found in zip(traces, words, sizes, many, strict=True):
        assert found.tolist() == simplify(points, word, CAPTION, size, PHRASES).tolist()
    assert simplify_many([], [], [], []) == []


def test_the_tolerance_is_five_pixels_over_importance_over_five():
    words = [TimedWord("dog", 0.0, 2.0)]
    for importance, epsilon in ((5, 5.0), (4, 6.25), (3, 25 / 3), (2, 12.5), (1, 25.0)):
        phrases = [Phrase("dog", 0, 3, importance)]
        for height, kept in ((epsilon - 0.01, 2), (epsilon + 0.01, 3)):
            points = path_px((100, 100), (150, 100 + height), (200, 100))
            assert len(simplify(points, words, "dog", SIZE, phrases)) == kept


def test_the_tolerance_is_in_pixels_of_each_side():
    words = [TimedWord("dog", 0.0, 2.0)]
    points = np.array([[0.1, 0.5, 0.0], [0.5, 0.52, 1.0], [0.9, 0.5, 2.0]])
    phrases = [Phrase("dog", 0, 3, 5)]
    assert len(simplify(points, words, "dog", (200, 1000), phrases)) == 2  # 0.02 of 200 px
    assert len(simplify(points, words, "dog", (400, 1000), phrases)) == 3  # 0.02 of 400 px


def test_the_distance_is_from_the_line_and_not_from_the_stretch_between_its_ends():
    overshoot = path_px((100, 100), (300, 101), (200, 100))
    assert len(plain(overshoot, SIZE)) == 2


def test_where_ends_coincide_the_distance_is_from_their_place():
    loop = path_px((100, 100), (103, 100), (130, 100), (100, 100))
    assert plain(loop, SIZE)[:, 0].tolist() == (np.array([100, 130, 100]) / 640).tolist()


def test_ends_of_every_phrase_and_of_every_gap_are_kept():
    points = path_px(*[(10 * i, 100) for i in range(12)])
    keypoints = simplify(points, spoken((1, 3), (6, 6), (7, 9)), CAPTION, SIZE, PHRASES)
    assert keypoints[:, 2].tolist() == [0, 1, 3, 4, 5, 6, 7, 9, 10, 11]


def test_a_time_in_two_windows_belongs_to_the_first_phrase():
    windows = np.array([[1.0, 3.0], [3.0, 5.0], [2.0, 4.0], [np.nan, np.nan]])
    times = np.array([0.0, 1.0, 2.0, 3.0, 3.0, 4.0, 5.0, 6.0])
    assert phrase_of_points(times, windows).tolist() == [-1, 0, 0, 0, 0, 1, 1, -1]


def test_where_two_phrases_meet_in_one_place_it_is_kept_once():
    points = path_px((0, 0), (100, 100), (100, 100), (200, 0))
    keypoints = simplify(points, spoken((0, 1), None, (2, 3)), CAPTION, SIZE, PHRASES)
    assert keypoints[:, 2].tolist() == [0, 1, 3]


def test_points_outside_every_phrase_have_the_widest_tolerance():
    bump = path_px((100, 100), (150, 120), (200, 100))
    heard = simplify(bump, spoken(None, None, (0, 2)), CAPTION, SIZE, PHRASES)
    outside = simplify(bump, spoken(None, None, (8, 9)), CAPTION, SIZE, PHRASES)
    assert (len(heard), len(outside)) == (3, 2)


def test_a_trace_without_words_is_simplified_plainly(rng):
    points = random_trace(rng, 300)
    expected = plain(points, SIZE, PLAIN_EPSILON_PX).tolist()
    assert simplify(points, [], "", SIZE).tolist() == expected
    assert simplify(points, [], CAPTION, SIZE).tolist() == expected


def test_without_phrases_the_rule_based_scorer_is_asked(rng):
    points, words = random_trace(rng, 200), spoken((0, 1), (1, 2), (2, 3))
    given_phrases = simplify(points, words, CAPTION, SIZE, RubricPhrases().phrases(CAPTION))
    assert simplify(points, words, CAPTION, SIZE).tolist() == given_phrases.tolist()


def test_important_phrases_keep_more_points(rng):
    points, words = random_trace(rng, 400), [TimedWord("dog", 0.0, 100.0)]
    counts = [len(simplify(points, words, "dog", SIZE, [Phrase("dog", 0, 3, i)])) for i in range(1, 6)]
    assert counts == sorted(counts) and counts[0] < counts[-1]


@pytest.mark.parametrize("method", ["uniform", "plain", "semantic"])
def test_every_method_reaches_any_count_exactly(rng, method):
    points, words = random_trace(rng, 300), spoken((0, 1), (1, 2), (2.5, 4))
    for count in (17, 37, 120, 299, 300, 500):
        chosen = to_count(points, method, count, SIZE, words, CAPTION, PHRASES)
        assert len(chosen) == min(count, 300)
        assert (np.diff(chosen[:, 2]) >= 0).all()
        assert chosen[[0, -1]].tolist() == points[[0, -1]].tolist()


def test_at_the_count_of_a_tolerance_the_same_points_are_kept(rng):
    for _ in range(10):
        points, words = random_trace(rng, 200), spoken((0, 1), (1, 2), (2.5, 4))
        semantic = simplify(points, words, CAPTION, SIZE, PHRASES)
        again = to_count(points, "semantic", len(semantic), SIZE, words, CAPTION, PHRASES)
        assert again.tolist() == semantic.tolist()
        flat = plain(points, SIZE, 12.0)
        assert to_count(points, "plain", len(flat), SIZE).tolist() == flat.tolist()


def test_a_count_below_the_ends_of_the_phrases_is_refused():
    points = path_px(*[(10 * i, 100) for i in range(12)])
    with pytest.raises(UserError, match="keeps at least 10"):
        to_count(points, "semantic", 9, SIZE, spoken((1, 3), (6, 6), (7, 9)), CAPTION, PHRASES)
    with pytest.raises(UserError, match="at least"):
        uniform(points, 0)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"points": np.array([[0.1, 0.1, 1.0], [0.1, 0.1, 0.0]])}, "order of time"),
        ({"points": np.array([[0.1, np.nan, 1.0]])}, "not finite"),
        ({"points": np.array([[100.0, 5.0, 1.0]])}, "far outside"),
        ({"size": (0, 640)}, "at least 1 pixel"),
        ({"base_epsilon_px": 0.0}, "tolerance"),
        ({"base_epsilon_px": float("nan")}, "tolerance"),
        ({"phrases": [Phrase("cat", 2, 5, 3)]}, "characters say"),
        ({"words": [TimedWord("dog", 2.0, 1.0)]}, "ends at"),
    ],
)
def test_input_that_makes_no_sense_is_refused(change, reason):
    usual = {
        "points": path_px((0, 0), (9, 9)),
        "words": [],
        "caption": CAPTION,
        "size": SIZE,
        "phrases": PHRASES,
    }
    with pytest.raises(UserError, match=reason):
        simplify(**(usual | change))
    with pytest.raises(UserError, match="equally many"):
        simplify_many([path_px((0, 0))], [[]], [CAPTION], [])


def test_one_bad_order_is_found_among_many_traces():
    good, bad = path_px((0, 0), (9, 9)), path_px((0, 0), (9, 9))[::-1]
    # The second trace starts before the first one ends, which is no fault.
    assert len(simplify_many([good, good], [[], []], ["", ""], [SIZE, SIZE])) == 2
    with pytest.raises(UserError, match="order of time"):
        simplify_many([good, np.zeros((0, 3)), bad], [[], [], []], [""] * 3, [SIZE] * 3)


coordinates = st.one_of(st.floats(-2, 2), st.sampled_from([0.0, 0.5, 1.0, 5e-324, 0.1]))
rows = st.lists(st.tuples(coordinates, coordinates, st.floats(0, 4)), max_size=24)


@given(rows, st.lists(st.tuples(st.floats(0, 4), st.floats(0, 2)), min_size=3, max_size=3))
def test_any_trace_equals_the_naive_recursion_on_zero_length_segments_too(rows, spans):
    points = np.array(sorted(rows, key=lambda row: row[2]), np.float64).reshape(-1, 3)
    windows = [(start, start + length) for start, length in spans]
    found = simplify(points, spoken(*windows), CAPTION, SIZE, PHRASES)
    assert found.tolist() == simplify_naively(points, windows, [4, 2, 5], SIZE).tolist()


@given(rows, st.integers(1, 30))
def test_any_trace_reaches_any_count_without_repeating_a_point(rows, count):
    points = np.array(sorted(rows, key=lambda row: row[2]), np.float64).reshape(-1, 3)
    points[:, 2] = np.arange(len(points))
    if len(points) > 1 and count < 2:
        return
    assert len(to_count(points, "plain", count, SIZE)) == min(count, len(points))


def test_a_hundred_thousand_points_take_seconds_and_no_recursion():
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.normal(0, 0.002, (100_000, 2)), axis=0) % 1.0
    points = np.column_stack([walk, np.arange(100_000) / 60])
    start = time.process_time()
    assert 100 < len(plain(points, SIZE)) < 100_000
    assert time.process_time() - start < 10


def test_a_thousand_traces_of_400_points_take_at_most_a_second_of_one_core(rng):
    caption = "In the center there is a man holding a red ball, on the right a dog, and trees in the background."
    words = [TimedWord(word, i * 0.3, i * 0.3 + 0.3) for i, word in enumerate(caption.split())]
    traces = []
    for _ in range(500):
        points = random_trace(rng, 400)
        points[:, 2] = np.linspace(0, words[-1].end, 400)
        traces.append(points)
    phrases = [RubricPhrases().phrases(caption)] * len(traces)
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        simplify_many(traces, [words] * 500, [caption] * 500, [SIZE] * 500, phrases)
        best = min(best, time.process_time() - start)
    assert best < 0.5
