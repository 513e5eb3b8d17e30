"""Which keypoints a system is given of a trace, by method."""

import numpy as np
import pytest

from tracevision_jax.errors import UserError
from tracevision_jax.records.sample import TimedWord
from tracevision_jax.records.simplification import Simplification, simplify_trace
from tracevision_jax.trajectory.phrases import RubricPhrases
from tracevision_jax.trajectory.simplify import plain, simplify, to_count, uniform

SIZE = (100, 200)
WORDS = (
    TimedWord("a", 0.0, 0.2),
    TimedWord("red", 0.2, 0.6),
    TimedWord("circle", 0.6, 1.1),
    TimedWord("near", 1.2, 1.5),
    TimedWord("water", 1.5, 2.0),
)
CAPTION = "a red circle near water"
PROVIDER = RubricPhrases()


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    random = np.random.default_rng(0)
    places = np.clip(np.cumsum(random.normal(scale=0.02, size=(120, 2)), 0) + 0.5, 0, 1)
    return np.column_stack([places, np.linspace(0, 2, 120)])


def made(points, words=WORDS, **how) -> np.ndarray:
    return simplify_trace(points, words, SIZE, Simplification(**how), PROVIDER)


def test_each_method_is_the_one_of_trajectory_simplify(points):
    phrases = PROVIDER.phrases(CAPTION)
    assert (made(points, method="none") == points).all()
    assert (made(points) == simplify(points, WORDS, CAPTION, SIZE, phrases, 5.0)).all()
    assert (made(points, epsilon_px=2.0) == simplify(points, WORDS, CAPTION, SIZE, phrases, 2.0)).all()
    assert (made(points, method="plain", epsilon_px=3.0) == plain(points, SIZE, 3.0)).all()
    assert (made(points, method="uniform", keypoints=9) == uniform(points, 9)).all()
    semantic = to_count(points, "semantic", 30, SIZE, WORDS, CAPTION, phrases)
    assert (made(points, method="semantic", keypoints=30) == semantic).all()


def test_methods_choose_different_points_of_equal_number(points):
    chosen = {
        method: made(points, method=method, keypoints=30)[:, 2].tolist() for method in ("semantic", "plain", "uniform")
    }
    assert {len(times) for times in chosen.values()} == {30}
    assert len({tuple(times) for times in chosen.values()}) == 3


def test_other_methods_can_follow_the_number_that_the_semantic_one_leaves(points):
    count = len(made(points, epsilon_px=2.0))
    assert 10 < count < len(points)
    for method, expected in (("plain", to_count(points, "plain", count, SIZE)), ("uniform", uniform(points, count))):
        assert (made(points, method=method, epsilon_px=2.0, as_semantic=True) == expected).all()
    assert (made(points, epsilon_px=2.0, as_semantic=True) == made(points, epsilon_px=2.0)).all()


def test_without_words_semantic_is_plain(points):
    assert (made(points, (), epsilon_px=4.0) == plain(points, SIZE, 4.0)).all()
    assert (made(points, (), keypoints=12) == to_count(points, "plain", 12, SIZE)).all()


def test_uniform_needs_a_number():
    with pytest.raises(UserError, match="'uniform' needs a number of keypoints"):
        Simplification("uniform")
