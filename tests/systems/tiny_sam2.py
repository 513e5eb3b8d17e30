"""SAM 2 at the smallest size that has all its parts, and a batch of clips for it."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from data_loaders.synthetic.videos import SyntheticVideos
from data_loaders.synthetic.videos_config import VideoConfig
from tracevision_jax.hosts.sam_presets import SegmentAnythingConfig
from tracevision_jax.records.clips import Clip, ClipBatch, ClipBucket, collate
from tracevision_jax.segmentation.sam_config import HeadsConfig, MaskDecoderConfig, MemoryConfig, PromptEncoderConfig
from tracevision_jax.systems.protocol import Params
from tracevision_jax.systems.sam2 import PromptingConfig, Sam2
from tracevision_jax.vision.sam_config import HieraConfig

SIDE, FRAMES, WIDTH = 32, 4, 16
BUCKET = ClipBucket(FRAMES, 2, SIDE)
PROMPTING = PromptingConfig(clicks=2)

CONFIG = SegmentAnythingConfig(
    HieraConfig(width=8, blocks=(1, 1, 1, 1), windows=(4, 2, 2, 1), global_blocks=(2,), background=2, fpn_width=WIDTH),
    HeadsConfig(
        PromptEncoderConfig(width=WIDTH, image_size=SIDE, mask_channels=8),
        MaskDecoderConfig(width=WIDTH, heads=2, mlp_width=16, layers=1, iou_hidden=8),
        MemoryConfig(
            width=WIDTH,
            memory_width=8,
            frames=3,
            max_pointers=3,
            fuser_layers=1,
            fuser_kernel=3,
            fuser_hidden=16,
            layers=1,
            mlp_width=16,
        ),
    ),
)


def tiny_sam2(prompting: PromptingConfig = PROMPTING) -> Sam2:
    """The system."""
    return Sam2(CONFIG, prompting)


def sam2_of_two_heads() -> Sam2:
    """A system whose image encoder a mesh can cut over heads; corrected by one click, it compiles sooner.

    Memories stay in float32: rounded to bfloat16, one that lies on an edge would fall to either side.
    """
    memory = dataclasses.replace(CONFIG.video_memory(), store_dtype="float32")
    config = SegmentAnythingConfig(
        dataclasses.replace(CONFIG.vision, heads=2), dataclasses.replace(CONFIG.heads, memory=memory)
    )
    return Sam2(config, dataclasses.replace(PROMPTING, clicks=1, remat=False))


def drawn(system: Sam2) -> Params:
    """Parameters drawn without compiling anything: std 1 / sqrt(fan-in), scales 1 +- 0.3, biases 0.1."""
    random = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise, name = random.standard_normal(leaf.shape, np.float32), path[-1].key
        if name == "kernel":
            inputs = leaf.shape[-4] if path[-2].key == "qkv" else math.prod(leaf.shape[:-1])
            return noise / inputs**0.5
        return 1 + 0.3 * noise if name == "scale" else 0.1 * noise if name == "bias" else noise

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(system.init, jax.random.key(0)))


def clip_batch(frames: int = FRAMES, rows: int = 4) -> ClipBatch:
    """Three clips, of two objects, of one, and of one whose last frame is missing, and a row of padding; and again."""
    videos = SyntheticVideos(0, 3, VideoConfig(height=SIDE, width=SIDE, frames=frames, objects=(2, 2), posts=(0, 0)))

    def clip(index: int, objects: int, length: int) -> Clip:
        video = videos.video(index)
        seen = np.argsort(~video.visible[0], kind="stable")[:objects]
        return Clip(str(index), video.frames[:length], np.moveaxis(video.masks[:length, seen], 1, 0))

    clips = [clip(0, 2, frames), clip(1, 1, frames), clip(2, 1, max(frames - 1, 1)), None]
    return collate([clips[row % len(clips)] for row in range(rows)], ClipBucket(frames, 2, SIDE))
