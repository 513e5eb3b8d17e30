"""Alignment of utterance times to caption words, and the per-word boxes that follow from it."""

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracevision_jax.errors import UserError
from tracevision_jax.records.sample import TimedWord
from tracevision_jax.trajectory.alignment import (
    MAX_WORDS,
    align_words,
    join_strokes,
    normal_word,
    windows_of,
    word_boxes,
    word_spans,
)


def timed(*texts: str) -> list[TimedWord]:
    """Utterances of one second each, one after another."""
    return [TimedWord(text, float(i), float(i + 1)) for i, text in enumerate(texts)]


def starts(caption: str, words: list[TimedWord]) -> list[float | None]:
    return [None if word.window is None else word.window[0] for word in align_words(caption, words)]


WORKED_WORDS = [
    TimedWord("In this image", 0.0, 0.4),
    TimedWord("a dog", 0.4, 0.8),
    TimedWord("uh", 1.0, 1.2),
    TimedWord("the sky", 1.5, 2.0),
]
WORKED_STROKES = (
    np.array([(0.10, 0.20, 0.00), (0.12, 0.22, 0.25), (0.30, 0.40, 0.50), (0.32, 0.44, 0.75)]),
    np.array([(0.80, 0.10, 1.50), (0.90, -0.02, 1.75), (1.03, 0.05, 2.00)]),
)


def test_the_worked_record_gives_the_windows_and_boxes_that_its_points_say():
    aligned = align_words("In this image a dog below the sky.", WORKED_WORDS)
    assert [(word.text, word.window) for word in aligned] == [
        ("In", (0.0, 0.4)),
        ("this", (0.0, 0.4)),
        ("image", (0.0, 0.4)),
        ("a", (0.4, 0.8)),
        ("dog", (0.4, 0.8)),
        ("below", None),
        ("the", (1.5, 2.0)),
        ("sky", (1.5, 2.0)),
    ]
    # Strokes are given in the wrong order: joining sorts them by time.
    boxes, missing = word_boxes(join_strokes(WORKED_STROKES[::-1]), windows_of(aligned))
    np.testing.assert_allclose(boxes[0], [0.10, 0.20, 0.12, 0.22])
    np.testing.assert_allclose(boxes[4], [0.30, 0.40, 0.32, 0.44])
    np.testing.assert_allclose(boxes[5], [0, 0, 1, 1])
    np.testing.assert_allclose(boxes[7], [0.80, 0.0, 1.0, 0.10])
    assert missing.tolist() == [False] * 5 + [True] + [False] * 2


def test_a_point_on_the_boundary_of_two_windows_is_in_both_boxes():
    points = np.array([[0.1, 0.1, 0.0], [0.5, 0.6, 1.0], [0.9, 0.9, 2.0]])
    boxes, _ = word_boxes(points, np.array([[0.0, 1.0], [1.0, 2.0]]))
    np.testing.assert_allclose(boxes, [[0.1, 0.1, 0.5, 0.6], [0.5, 0.6, 0.9, 0.9]])


def test_case_and_punctuation_do_not_matter():
    assert starts("The Dog, (a 'Big' one) — runs!", timed("the", "dog", "A", "big", "one", "RUNS")) == [
        0,
        1,
        2,
        3,
        4,
        5,
    ]


def test_apostrophes_of_either_kind_are_one_word():
    assert starts("the man\u2019s hat", timed("the", "man's", "hat")) == [0, 1, 2]


def test_fillers_shift_nothing():
    assert starts("a dog and the cat", timed("uh", "a", "um", "dog", "and", "uh", "the", "cat")) == [
        1,
        3,
        4,
        6,
        7,
    ]


def test_of_a_repeated_word_the_one_beside_its_neighbour_is_taken():
    assert starts("a dog", timed("a", "a", "dog")) == [1, 2]


def test_near_spellings_between_the_same_neighbours_match():
    assert starts("a gray sandwich here", timed("a", "grey", "sandwitch", "here")) == [0, 1, 2, 3]


def test_another_word_in_the_same_place_does_not_match():
    assert starts("a woman here", timed("a", "lady", "here")) == [0, None, 2]


def test_words_written_together_or_apart_match():
    assert starts("some grass land there", timed("some", "grassland", "there")) == [0, 1, 1, 2]
    windows = [word.window for word in align_words("some grassland there", timed("some", "grass", "land", "there"))]
    assert windows == [(0, 1), (1, 3), (3, 4)]
    assert starts("a t-shirt", timed("a", "t shirt")) == [0, 1, 1]


def test_scripts_without_spaces_align_character_by_character():
    aligned = align_words("一只狗在草地上。", [TimedWord("一只狗", 0.0, 1.0), TimedWord("草地", 2.0, 3.0)])
    assert [word.window for word in aligned] == [(0, 1)] * 3 + [None] + [(2, 3)] * 2 + [None]


def test_combining_marks_do_not_cut_words():
    assert [word.text for word in align_words("एक कुत्ता है", [])] == ["एक", "कुत्ता", "है"]


@pytest.mark.parametrize("caption", ["", "   ", "...!?", "\ud800"])
def test_a_caption_without_heard_words_has_no_window(caption):
    aligned = align_words(caption, timed("a", "dog"))
    assert all(word.window is None for word in aligned)
    assert windows_of(aligned).shape == (len(aligned), 2)


@pytest.mark.parametrize(
    "word", [TimedWord("a", math.nan, 1.0), TimedWord("a", 0.0, math.inf), TimedWord("a", 2.0, 1.0)]
)
def test_impossible_times_are_refused_with_the_word(word):
    with pytest.raises(UserError, match=r"timed word 0 .'a'."):
        align_words("a dog", [word])


def test_captions_too_long_to_align_are_refused_and_equal_ones_are_not():
    long = ["word"] * (MAX_WORDS + 1)
    assert len(align_words(" ".join(long), timed(*long))) == MAX_WORDS + 1
    with pytest.raises(UserError, match="too long to align"):
        align_words(" ".join(long), timed("other", *long))


def test_the_longest_caption_aligns_in_seconds():
    words = [f"w{i % 97}x{i % 89}" for i in range(10_000)]
    start = time.process_time()
    aligned = align_words(" ".join(words), timed(*words[::-1]))
    assert time.process_time() - start < 10
    assert len(aligned) == 10_000


def test_joining_no_strokes_gives_an_empty_trace():
    assert join_strokes(()).shape == (0, 3)
    boxes, missing = word_boxes(join_strokes(()), np.array([[0.0, 1.0]]))
    assert missing.all() and boxes.tolist() == [[0, 0, 1, 1]]


texts = st.lists(
    st.sampled_from(["a", "dog", "the", "Sky", "uh", "man's", "🐶", "狗", "कुत्ता", "grass", "land", ","]),
    max_size=12,
)


@given(texts, texts)
def test_windows_never_go_back_and_only_words_of_the_utterance_get_its_time(caption_words, spoken):
    caption = " ".join(caption_words)
    aligned = align_words(caption, timed(*spoken))
    assert [(word.start_char, word.end_char) for word in aligned] == word_spans(caption)
    windows = [word.window for word in aligned if word.window is not None]
    assert windows == sorted(windows)
    heard = {normal_word(word) for text in spoken for word in [text[a:b] for a, b in word_spans(text)]}
    for word in aligned:
        assert caption[word.start_char : word.end_char] == word.text
        if normal_word(word.text) not in heard:
            assert word.window is None


@given(st.lists(st.text(min_size=1, max_size=8), max_size=10))
def test_words_equal_to_the_caption_all_get_their_own_time(spoken):
    aligned = align_words(" ".join(spoken), timed(*spoken))
    owner = [index for index, text in enumerate(spoken) for _ in word_spans(text)]
    if len(owner) == len(aligned):  # a text that ends in an apostrophe may join with the next
        assert [word.window[0] for word in aligned if word.window] == owner


@given(
    st.lists(st.tuples(*[st.floats(-0.5, 1.5)] * 2, st.floats(0, 10)), max_size=30),
    st.lists(st.tuples(st.floats(0, 10), st.floats(0, 3)), max_size=8),
)
def test_boxes_equal_those_found_point_by_point(rows, spans):
    points = join_strokes([np.array(rows, np.float64).reshape(-1, 3)])
    windows = np.array([(start, start + length) for start, length in spans], np.float64).reshape(-1, 2)
    boxes, missing = word_boxes(points, windows)
    for (start, end), box, gone in zip(windows, boxes, missing, strict=True):
        inside = points[(points[:, 2] >= start) & (points[:, 2] <= end), :2].clip(0, 1)
        assert gone == (len(inside) == 0)
        expected = [0, 0, 1, 1] if gone else [*inside.min(0), *inside.max(0)]
        assert box.tolist() == list(expected)
