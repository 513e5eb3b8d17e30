"""A SAM 2.1 so small that it compiles in seconds, with drawn parameters, and videos for it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tracevision_jax.hosts.sam import SegmentAnything
from tracevision_jax.hosts.sam_presets import SegmentAnythingConfig
from tracevision_jax.inference.tracker import Tracker
from tracevision_jax.segmentation.sam_config import HeadsConfig, MaskDecoderConfig, MemoryConfig, PromptEncoderConfig
from tracevision_jax.vision.sam_config import HieraConfig

SIDE_PX, WIDTH, BATCH = 32, 32, 8
BUCKETS = (2, 4)
HEIGHT, BREADTH = 24, 40
"""Of the videos' frames, pixels."""


@functools.cache
def config() -> SegmentAnythingConfig:
    """2 x 2 cells, masks of 8 x 8."""
    hiera = HieraConfig(8, 1, (1, 1, 1, 1), (8, 4, 2, 2), (2,), 7, 2, fpn_width=WIDTH)
    prompts = PromptEncoderConfig(width=WIDTH, image_size=SIDE_PX, mask_channels=8)
    decoder = MaskDecoderConfig(
        width=WIDTH,
        heads=2,
        mlp_width=32,
        layers=1,
        iou_hidden=16,
        object_score=True,
        high_resolution=True,
        iou_sigmoid=True,
        dynamic_multimask=True,
    )
    memory = MemoryConfig(
        width=WIDTH,
        memory_width=16,
        pointer_times=True,
        signed_pointer_times=True,
        occlusion_embedding=True,
        fuser_hidden=16,
        fuser_layers=1,
        layers=1,
        mlp_width=32,
    )
    return SegmentAnythingConfig(hiera, HeadsConfig(prompts, decoder, memory))


@functools.cache
def params() -> Any:
    """Drawn without compiling anything."""
    rng = np.random.default_rng(3)
    pixels = jax.ShapeDtypeStruct((1, SIDE_PX, SIDE_PX, 3), jnp.float32)
    shapes = jax.eval_shape(SegmentAnything(config()).init, jax.random.key(0), pixels)["params"]

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        drawn = rng.standard_normal(leaf.shape, np.float32)
        if name in ("scale", "bias"):
            drawn = drawn * 0.1 + (name == "scale")
        elif name == "kernel":
            drawn = drawn / np.sqrt(np.prod(leaf.shape[:-1]))
        return jnp.asarray(drawn, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def tracker() -> Tracker:
    """One for all tests, so that programs are compiled once."""
    return Tracker(config(), params(), batch=BATCH, buckets=BUCKETS)


def video(frames: int, seed: int = 0, height: int = HEIGHT, width: int = BREADTH) -> np.ndarray:
    """A bright disc that wanders over noise."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:height, :width]
    pictures = []
    for number in range(frames):
        picture = rng.integers(0, 90, (height, width, 3), np.uint8)
        x, y = width * (0.3 + 0.01 * (number % 40)), height * 0.5
        picture[(columns - x) ** 2 + (rows - y) ** 2 < (height / 5) ** 2] = (230, 200, 60)
        pictures.append(picture)
    return np.stack(pictures)


def disc(number: int = 0, height: int = HEIGHT, width: int = BREADTH) -> np.ndarray:
    """The disc's mask on a frame."""
    rows, columns = np.mgrid[:height, :width]
    x, y = width * (0.3 + 0.01 * (number % 40)), height * 0.5
    return (columns - x) ** 2 + (rows - y) ** 2 < (height / 5) ** 2
