"""Which checkpoints stay."""

import math

import pytest

from tracevision_jax.errors import UserError
from tracevision_jax.training.retention import CheckpointConfig, best_steps, faults, kept, score_of

STEPS = range(10, 110, 10)
SCORES = {20: 3.0, 40: 1.0, 60: 2.0, 80: 1.0, 100: math.nan}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CheckpointConfig(keep=3), {80, 90, 100}),
        (CheckpointConfig(keep=1, keep_every=30), {30, 60, 90, 100}),
        (CheckpointConfig(keep=1, keep_best=2, metric="a/b"), {40, 80, 100}),
        (CheckpointConfig(keep=1, keep_best=1, metric="a/b", best="max"), {20, 100}),
        (CheckpointConfig(keep=2, keep_every=50, keep_best=3, metric="a/b"), {40, 80, 60, 50, 90, 100}),
        (CheckpointConfig(keep=30), set(STEPS)),
    ],
)
def test_the_last_the_best_and_every_nth_are_kept(config, expected):
    assert kept(STEPS, SCORES, config) == expected


def test_of_equal_scores_the_earlier_is_better_and_one_that_is_not_finite_is_none():
    config = CheckpointConfig(keep_best=9, metric="a/b")
    assert best_steps(SCORES, config) == [40, 80, 60, 20]


def test_the_best_is_chosen_among_the_checkpoints_that_are_there():
    config = CheckpointConfig(keep=1, keep_best=1, metric="a/b")
    assert kept([20, 30, 90], SCORES, config) == {20, 90}


def test_the_metric_is_looked_up_by_evaluator_and_number():
    config = CheckpointConfig(keep_best=1, metric="held_out/loss")
    assert score_of(config, {"held_out": {"loss": 0.5}}) == 0.5
    with pytest.raises(UserError, match=r"'held_out/loss', and the evaluation gave held_out/los, boxes/iou"):
        score_of(config, {"held_out": {"los": 0.5}, "boxes": {"iou": 1.0}})


@pytest.mark.parametrize(
    ("config", "evaluation_every", "expected"),
    [
        (CheckpointConfig(keep=0), 0, "keep must be at least 1"),
        (CheckpointConfig(every=4, keep_every=6), 0, "must be a multiple"),
        (CheckpointConfig(keep_best=1), 5, "need each other"),
        (CheckpointConfig(metric="a/b"), 5, "need each other"),
        (CheckpointConfig(keep_best=1, metric="a/b"), 0, "needs evaluation.every"),
    ],
)
def test_a_configuration_that_cannot_be_is_named(config, evaluation_every, expected):
    (fault,) = faults(config, evaluation_every)
    assert expected in fault
    assert faults(CheckpointConfig(every=4, keep_every=8, keep_best=1, metric="a/b"), 3) == []
