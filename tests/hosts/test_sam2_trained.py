"""A trained SAM 2 runs free here and in `transformers`, from the same files: the masks of 24 frames agree.

`sam2_demo_weights` is what the recipe `sam2_demo` trained, exported to the layout of Hugging Face in float16:

    tracevision train sam2_demo
    tracevision convert --from runs/sam2_demo/model --to tests/hosts/sam2_demo_weights --dtype float16

At random weights free running is chaotic: one ulp in a memory can turn a mask over. A trained model is not.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate
from transformers import Sam2VideoModel
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from configs.sam2_demo import SIDE_PX, VIDEOS
from data_loaders.synthetic.videos import SyntheticVideos
from tracevision_jax.inference.tracker import Tracker
from tracevision_jax.vision.sam_preprocess import IMAGENET_MEAN, IMAGENET_STD

WEIGHTS = Path(__file__).with_name("sam2_demo_weights")
FRAMES, HELD_OUT_SEED = 24, 1_000_007
AGREEMENT = 0.99
"""Least IoU of the masks of a frame."""


@pytest.fixture(scope="module")
def tracker() -> Tracker:
    return Tracker.load(WEIGHTS, dtype="float32")


def ours(tracker: Tracker, frames: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Masks (frames, objects, height, width) from those of the first frame."""
    with tracker.session(frames) as session:
        for number, mask in enumerate(masks, start=1):
            session.add(number, mask=mask)
        return np.stack([np.stack([one.masks[number] for number in session.objects]) for one in session.run()])


def theirs(frames: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """The same by the reference."""
    model = Sam2VideoModel.from_pretrained(WEIGHTS, dtype=torch.float32).eval()
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
    session = Sam2VideoInferenceSession((pixels - mean) / std, SIDE_PX, SIDE_PX, dtype=torch.float32)
    for number, mask in enumerate(masks):
        session.obj_id_to_idx(number)
        session.add_mask_inputs(number, 0, torch.from_numpy(mask)[None, None].float())
    session.obj_with_new_inputs = list(range(len(masks)))
    with torch.inference_mode():
        found = [out.pred_masks for out in model.propagate_in_video_iterator(session, start_frame_idx=0)]
    large = [interpolate(each.float(), (SIDE_PX, SIDE_PX), mode="bilinear")[:, 0] > 0 for each in found]
    return np.stack([each.numpy() for each in large])


@pytest.mark.parametrize("number", range(3))
def test_a_trained_model_tracks_as_the_reference_does(tracker, number):
    video = SyntheticVideos(HELD_OUT_SEED, 8, replace(VIDEOS, frames=FRAMES)).video(number)
    seen = [thing for thing in range(video.masks.shape[1]) if video.masks[0, thing].any()]
    first = video.masks[0, seen]
    here, there = ours(tracker, video.frames, first), theirs(video.frames, first)
    assert here.shape == there.shape == (FRAMES, len(seen), SIDE_PX, SIDE_PX)
    union = (here | there).sum((2, 3))
    agreement = np.where(union > 0, (here & there).sum((2, 3)) / np.maximum(union, 1), 1.0)
    true = (here & video.masks[:, seen]).sum() / (here | video.masks[:, seen]).sum()
    print(f"video {number}: least IoU {agreement.min():.4f}, mean {agreement.mean():.4f}; with the truth {true:.2f}")
    assert agreement.min() >= AGREEMENT, agreement.min(1)
    assert here[1:].any((2, 3)).mean() > 0.5 and true > 0.5, "masks of something, mostly of the objects"
