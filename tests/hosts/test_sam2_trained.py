"""A trained SAM 2 runs free, as the reference does with the same weights: every frame from what it made of the last.

`sam2_demo_weights` is the model that the recipe `sam2_demo` trains, as `transformers` reads it:

    make tracking
    tracevision convert --from runs/sam2_demo/model --to tests/hosts/sam2_demo_weights --dtype float16
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxtyping import Bool
from transformers import Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from configs.sam2_demo import HELD_OUT_SEED, SIDE_PX, VIDEOS
from data_loaders.synthetic.videos import SyntheticVideos, Video
from evaluation.metrics.video import frame_counts, j_and_f
from tests.vision.sam_reference import channels_first
from tracevision_jax.inference.tracker import Tracker
from tracevision_jax.inference.tracker_loading import load_tracking_model
from tracevision_jax.segmentation.sam_config import hugging_face
from tracevision_jax.systems.sam2 import normalised

WEIGHTS = Path(__file__).parent / "sam2_demo_weights"
FRAMES = 24
NUMBERS = (9, 21, 29)
"""Of held-out videos: two objects, three, two; in each some hide or leave, and come back."""


@cache
def tracker() -> Tracker:
    """Ours, in float32, with the reference's choices where it departs from the authors' code."""
    config, params = load_tracking_model(WEIGHTS, dtype="float32")
    return Tracker(replace(config, heads=hugging_face(config.heads)), params)


@cache
def reference() -> Any:
    """The same weights there."""
    return Sam2VideoModel.from_pretrained(WEIGHTS, dtype=torch.float32).eval()


def drawn(number: int) -> Video:
    """A held-out video of the recipe's kind, longer than those it learned from."""
    return SyntheticVideos(HELD_OUT_SEED, 64, replace(VIDEOS, frames=FRAMES)).video(number)


def tracked_here(video: Video, by: Tracker) -> Bool[np.ndarray, "time objects side side"]:
    """Every object from its mask on the first frame."""
    with by.session(video.frames) as session:
        for number, mask in enumerate(video.masks[0], start=1):
            session.add(number, mask=mask)
        return np.stack([np.stack([each.masks[n] for n in session.objects]) for each in session.run()])


def tracked_there(video: Video) -> Bool[np.ndarray, "time objects side side"]:
    """The same by the reference."""
    model, side = reference(), video.frames.shape[1]
    pixels = channels_first(np.asarray(normalised(jnp.asarray(video.frames))))
    with torch.inference_mode():
        session = Sam2VideoInferenceSession(pixels, side, side, dtype=torch.float32)
        for number, mask in enumerate(video.masks[0]):
            session.obj_id_to_idx(number)
            session.add_mask_inputs(number, 0, torch.tensor(mask, dtype=torch.float32)[None, None])
        session.obj_with_new_inputs = list(range(video.masks.shape[1]))
        small = [out.pred_masks for out in model.propagate_in_video_iterator(session, start_frame_idx=0)]
    size = (side, side)
    large = [torch.nn.functional.interpolate(x.float(), size, mode="bilinear", align_corners=False) for x in small]
    return (torch.stack(large)[:, :, 0] > 0).numpy()


def jaccard(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """IoU of each frame of each object; 1 where both see nothing."""
    return np.asarray(j_and_f(frame_counts(found, true))[0])


@pytest.mark.parametrize("number", NUMBERS)
def test_a_trained_model_tracks_for_24_frames_as_the_reference_does(number):
    """Nothing is told but the first masks; the IoU of what both find, and that it is something."""
    video = drawn(number)
    ours, theirs = tracked_here(video, tracker()), tracked_there(video)
    assert ours.shape == theirs.shape == video.masks.shape == (FRAMES, len(video.objects), SIDE_PX, SIDE_PX)
    ious = jaccard(ours, theirs)
    truth = jaccard(ours, video.masks)
    print(f"video {number}: least IoU with the reference {ious.min():.4f}, mean with the truth {truth.mean():.3f}")
    assert ious.min() >= 0.99
    assert truth.mean() >= 0.5
    moved = jaccard(np.broadcast_to(video.masks[:1], video.masks.shape), video.masks).mean()
    assert truth.mean() > moved + 0.1, "masks follow the objects"


def test_a_perturbed_model_is_told_from_the_reference():
    """The comparison sees it when our memory is not the reference's."""
    video, whole = drawn(NUMBERS[0]), tracker()
    params = dict(whole.programs.params)
    encoder = params["memory_encoder"] = dict(params["memory_encoder"])
    encoder["projection"] = {name: 1.3 * x for name, x in encoder["projection"].items()}
    other = tracked_here(video, Tracker(whole.config, params))
    assert jaccard(other, tracked_there(video)).min() < 0.99
