"""Prompts in pixels of the frame: what is refused, how they add up, what becomes of them; results at its size."""

import numpy as np
import pytest
from pycocotools import mask as coco

from tests.inference import tracker_tiny as tiny
from tests.inference.test_tracker_session import session
from tracevision_jax.errors import UserError
from tracevision_jax.inference.tracker_prompts import Said, check_prompt, frame_prompts, together
from tracevision_jax.inference.tracker_results import Found, TrackedFrame
from tracevision_jax.segmentation.prompt_encoder import ABSENT
from tracevision_jax.vision.sam_preprocess import Fitting

SIZE = (24, 40)
FITTING = Fitting(24, 40, 32, 32, 32, padded=False)


def prompt(points=None, box=None, mask=None):
    return check_prompt(SIZE, points, box, mask, "object 1, frame 0")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give points, a box or a mask"),
        ({"points": [(40, 3)]}, r"the point \(40, 3\) is outside the frame of 40 x 24 px"),
        ({"points": [(3, -1)]}, "outside the frame"),
        ({"points": [(3, np.nan)]}, "must be 2 or 3 numbers"),
        ({"points": [(3,)]}, "must be 2 or 3 numbers"),
        ({"points": [(3, 4, 2)]}, "label is 1 .* or 0"),
        ({"points": ["ab"]}, "must be 2 or 3 numbers"),
        ({"points": 7}, "points must be a list"),
        ({"box": (0, 0, 41, 5)}, "reaches out of the frame of 40 x 24 px"),
        ({"box": (-1, 0, 4, 5)}, "reaches out"),
        ({"box": (9, 0, 4, 5)}, "empty or reversed"),
        ({"box": (9, 0, 9, 5)}, "empty or reversed"),
        ({"box": (1, 2, 3)}, "must be 4 numbers"),
        ({"mask": np.zeros((3, 3), bool)}, "the frame's size"),
        ({"mask": np.zeros(SIZE, np.float32)}, "booleans or integers"),
        ({"mask": np.ones(SIZE, bool), "box": (1, 2, 3, 4)}, "without points and box"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_object_and_the_frame(given, message):
    with pytest.raises(UserError, match=f"object 1, frame 0: .*{message}"):
        prompt(**given)


def test_places_become_places_of_the_square_with_the_box_first():
    arrays = frame_prompts({1: Said(prompt([(20, 12), (10, 6, 0)], (0, 0, 40, 24)), None)}, 2, FITTING, 8)
    np.testing.assert_allclose(arrays.points_px[1, :4], [(0, 0), (32, 32), (16, 16), (8, 8)])
    assert arrays.labels[1].tolist() == [2, 3, 1, 0, *[ABSENT] * 4]
    assert arrays.labels[0].tolist() == [ABSENT] * 8
    assert arrays.has_mask is not None and not arrays.has_mask.any()


def test_many_clicks_get_more_places():
    many = prompt([(number, number) for number in range(9)])
    assert frame_prompts({0: Said(many, None)}, 1, FITTING, 8).labels.shape == (1, 16)


def test_a_mask_and_earlier_logits_stand_in_their_rows():
    logits = np.full((8, 8), 3, np.float32)
    rows = {0: Said(prompt(mask=tiny.disc().astype(np.uint8) * 255), logits), 2: Said(prompt([(1, 1)]), logits)}
    arrays = frame_prompts(rows, 4, FITTING, 8)
    assert arrays.has_mask is not None and arrays.has_mask.tolist() == [True, False, False, False]
    assert arrays.has_earlier is not None and arrays.has_earlier.tolist() == [False, False, True, False]
    assert arrays.masks_binary is not None and arrays.masks_binary[0].mean() == pytest.approx(
        tiny.disc().mean(), abs=0.02
    )


def test_clicks_add_up_a_box_replaces_a_box_and_a_mask_everything():
    first = prompt([(1, 2)], (1, 1, 5, 5))
    both = together(first, prompt([(3, 4, 0)]))
    assert both.points_px.tolist() == [[1, 2], [3, 4]] and both.labels.tolist() == [1, 0]
    assert both.box_px is not None and both.box_px.tolist() == [1, 1, 5, 5]
    again = together(both, prompt(box=(2, 2, 6, 6)))
    assert again.box_px is not None and again.box_px.tolist() == [2, 2, 6, 6]
    masked = together(both, prompt(mask=tiny.disc()))
    assert masked.mask_binary is not None and not len(masked.points_px)
    assert together(masked, first) is first and together(None, first) is first


# What a session refuses


def test_a_frame_that_does_not_exist_is_refused():
    s = session()
    for frame, message in ((17, "has frames 0 to 16"), (-1, "0 or more"), (True, "0 or more")):
        with pytest.raises(UserError, match=message):
            s.add(1, frame=frame, points=[(1, 1)])
    for number in (0, -3, True):
        with pytest.raises(UserError, match="number must be 1 or more"):
            s.add(number, points=[(1, 1)])


def test_a_frame_of_a_stream_that_has_passed_is_refused():
    s = session(iter(np.zeros((17, 6, 8, 3), np.uint8)))
    s.add(1, points=[(1, 1)])
    for result in s.run():
        if result.frame == 15:
            with pytest.raises(UserError, match=r"frame 2.* has passed"):
                s.add(1, frame=2, points=[(1, 1)])
    with pytest.raises(UserError, match="cannot be tracked backwards"):
        next(s.run(reverse=True))
    with pytest.raises(UserError, match="is at frame 17"):
        next(s.run(start=3))


def test_an_empty_mask_begins_no_object_but_says_that_a_known_one_is_away():
    s = session()
    with pytest.raises(UserError, match="mask is empty"):
        s.add(1, mask=np.zeros((6, 8), bool))
    s.add(1, points=[(1, 1)])
    s.add(1, frame=3, mask=np.zeros((6, 8), bool))
    assert len(list(s.run())) == 17


def test_a_mask_that_vanishes_at_the_models_size_is_refused():
    s = session(np.zeros((2, 300, 300, 3), np.uint8))
    mask = np.zeros((300, 300), bool)
    mask[4, 4] = True
    with pytest.raises(UserError, match=r"1 px vanishes at the model's 32 x 32"):
        s.add(1, mask=mask)


def test_more_objects_than_any_bucket_are_refused():
    s = session()
    for number in range(1, 5):
        s.add(number, points=[(1, 1)])
    with pytest.raises(UserError, match="4 objects are tracked already"):
        s.add(5, points=[(1, 1)])
    s.remove(2)
    s.add(5, points=[(1, 1)])
    assert s.objects == [1, 3, 4, 5]


def test_nothing_to_track_nothing_to_remove_and_nowhere_to_begin_are_told():
    s = session()
    with pytest.raises(UserError, match="nothing to track"):
        next(s.run())
    with pytest.raises(UserError, match="no object 7 to remove"):
        s.remove(7)
    s.add(1, points=[(1, 1)])
    with pytest.raises(UserError, match="no frame 40"):
        next(s.run(start=40))
    with pytest.raises(UserError, match="frame 5 has no prompt"):
        s.preview(5)


def test_a_stream_without_objects_gives_its_frames():
    s = session(iter(np.zeros((5, 6, 8, 3), np.uint8)))
    assert [dict(result.found) for result in s.run()] == [{}] * 5


# Results


def found(value: float, there: float = 3.0) -> Found:
    logits = np.full((8, 8), -5, np.float32)
    logits[2:5, 1:4] = value
    return Found(logits, 0.5, there)


def test_results_are_given_at_the_frames_size():
    image = np.zeros((*SIZE, 3), np.uint8)
    result = TrackedFrame(3, image, {1: found(5), 2: found(9), 4: found(-6, -3.0)}, FITTING)
    assert result.masks[1].shape == SIZE and result.masks[1][12, 12] and not result.masks[1][2, 2]
    x1, y1, x2, y2 = result.boxes[1] or (0, 0, 0, 0)
    assert result.masks[1][y1:y2, x1:x2].sum() == result.masks[1].sum() and result.masks[1][y1].any()
    assert result.boxes[4] is None
    assert coco.decode(result.run_lengths[1]).sum() == result.masks[1].sum()  # pyright: ignore
    assert result.scores[1] > 0.9 > 0.1 > result.scores[4] and result.ious[1] == 0.5
    assert set(np.unique(result.ids)) == {0, 2}  # the higher logit wins everywhere
    with pytest.raises(UserError, match="object 300"):
        TrackedFrame(0, image, {300: found(5)}, FITTING).ids  # noqa: B018
