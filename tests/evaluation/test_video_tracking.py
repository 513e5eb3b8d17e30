"""Held-out tracking: perfect, empty and still masks get the scores that the protocol gives them."""

import dataclasses

import numpy as np
import pytest

from evaluation.metrics import video
from evaluation.video_tracking import HeldOutTracking, track_scores
from tracevision_jax.records.clips import Clip, ClipBucket, collate

BUCKET = ClipBucket(frames=6, objects=2, side=32)


def moving(start: int, step: int, frames: int = 6) -> np.ndarray:
    """A square that moves to the right."""
    masks = np.zeros((frames, 32, 32), bool)
    for time in range(frames):
        masks[time, 8:20, start + step * time : start + step * time + 10] = True
    return masks


@pytest.fixture
def batches():
    def clip(*masks):
        return Clip("squares", np.zeros((len(masks[0]), 32, 32, 3), np.uint8), np.stack(masks))

    rows = [clip(moving(0, 2), moving(20, 0)), clip(moving(4, 1, frames=5)), None, None]
    return [collate(rows[:2], BUCKET), collate(rows[2:], BUCKET)]


def test_a_model_that_knows_the_truth_has_all_points_and_needs_its_memory(batches):
    def follow(params, batch, forget=False):
        return batch.masks if not forget else batch.masks & False

    values = HeldOutTracking(follow, batches)({}, 0)
    assert values["J&F"] == values["J"] == values["F"] == 1.0 and values["J-decay"] == 0.0
    assert values["J&F without memory"] == 0.0
    assert 0.4 < values["J&F of the first mask"] < 1.0


def test_scores_are_those_of_the_protocol_object_by_object(batches, rng):
    predicted = [batch.masks & (rng.random(batch.masks.shape) < 0.9) for batch in batches]
    ours = track_scores(predicted, batches).named()
    whole = [(0, 0, 6), (0, 1, 6), (1, 0, 5)]
    theirs = video.mean_scores(
        [video.object_scores(predicted[0][b, o, :t], batches[0].masks[b, o, :t]) for b, o, t in whole]
    ).named()
    for name, value in theirs.items():
        assert abs(ours[name] - value) < 1e-3, name


def test_padding_has_no_part_in_it(batches):
    def everywhere(params, batch, forget=False):
        return batch.masks | ~batch.real[..., None, None]

    assert HeldOutTracking(everywhere, batches)({}, 0)["J&F"] == 1.0


def test_without_an_object_there_is_nothing_to_say(batches):
    nothing = dataclasses.replace(batches[0], real=batches[0].real & False)
    assert HeldOutTracking(lambda *_: None, [nothing])({}, 0) == {}
