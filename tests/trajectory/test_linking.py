"""Which keypoints belong to which phrase."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracevision_jax.records.sample import TimedWord
from tracevision_jax.trajectory.linking import link, subjects
from tracevision_jax.trajectory.phrases import RubricPhrases

CAPTION = "A red ring at the top. Below it there is a blue square. Um."
RUBRIC = RubricPhrases()


def spoken(caption: str, seconds: float = 1.0) -> list[TimedWord]:
    """One word a second, without pauses."""
    return [TimedWord(text, seconds * k, seconds * (k + 1)) for k, text in enumerate(caption.split())]


def at(*times: float) -> np.ndarray:
    return np.array([[0.1 * k, 0.5, time] for k, time in enumerate(times)])


def test_a_sentence_is_about_the_first_of_its_most_important_phrases():
    assert [subject.text for subject, _ in subjects(CAPTION, RUBRIC)][:2] == ["A red ring", "a blue square"]
    for subject, sentence in subjects(CAPTION, RUBRIC):
        assert CAPTION[sentence.start_char : sentence.end_char] == sentence.text
        assert sentence.start_char <= subject.start_char < subject.end_char <= sentence.end_char


def test_points_belong_to_the_sentence_in_whose_time_they_fall():
    links = link(at(-1.0, 0.0, 5.99, 6.0, 11.5, 40.0), spoken(CAPTION), RUBRIC)
    times = {one.phrase: one.points[:, 2].tolist() for one in links}
    assert times["A red ring"] == [-1.0, 0.0, 5.99]
    assert times["a blue square"] == [6.0, 11.5]


def test_a_sentence_without_points_is_left_out():
    assert [one.phrase for one in link(at(0.0, 1.0), spoken(CAPTION), RUBRIC)] == ["A red ring"]


@pytest.mark.parametrize("caption", ["", "...", " ! "])
def test_without_words_all_points_are_one_link_without_a_phrase(caption):
    (only,) = link(at(0.0, 3.0), spoken(caption), RUBRIC)
    assert only.phrase == "" and len(only.points) == 2


@given(st.text(max_size=80), st.lists(st.floats(-5, 50), min_size=1, max_size=12))
def test_no_point_is_lost_doubled_or_moved(caption, times):
    points = at(*sorted(times))
    links = link(points, spoken(caption), RUBRIC)
    assert np.array_equal(np.concatenate([one.points for one in links]), points)
