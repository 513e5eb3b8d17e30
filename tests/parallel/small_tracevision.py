"""TraceVision at a size that compiles in seconds, and a batch that touches every part of it."""

import jax
import numpy as np

from tracevision_jax.hosts.qwen25vl import Qwen25VLConfig
from tracevision_jax.language.config import LanguageConfig
from tracevision_jax.records.batch import Batch, Bucket
from tracevision_jax.records.collate import empty_batch
from tracevision_jax.segmentation.pixel_decoder import PixelDecoderConfig
from tracevision_jax.systems.tracevision import TraceVision, tracevision_config
from tracevision_jax.vision.config import QwenVisionConfig

BUCKET = Bucket(tokens=32, frames=1, windows=1, conversations=1, points=4, masks=1)


def small_system() -> TraceVision:
    """Widths and heads are multiples of 4, so that every axis of a mesh of eight can cut them."""
    language = LanguageConfig(128, 32, 2, 4, 2, 8, 64, mrope_sections=(2, 1, 1))
    vision = QwenVisionConfig(32, width=32, heads=4, mlp_width=64, groups=2, window_blocks=1, patch=4)
    decoder = PixelDecoderConfig(width=16, heads=2, mlp_width=32, token_hidden=32, grid=4, fine_upsamplings=1)
    host = Qwen25VLConfig(vision, language)
    return TraceVision(tracevision_config(host, first_added=100, decoder=decoder))


def small_batch(rows: int) -> Batch:
    """One conversation a row: 16 visual tokens, a trace of some points, a mask, text of unequal length."""
    config = small_system().config
    rng = np.random.default_rng(0)
    batch = jax.tree.map(np.array, empty_batch(rows, BUCKET, config.processor))
    batch.patches[:] = rng.normal(size=batch.patches.shape)
    batch.grid[:] = 8
    batch.frame_owner[:] = True
    for row in range(rows):
        length = int(rng.integers(26, BUCKET.tokens + 1))
        batch.tokens[row, :length] = rng.integers(0, 100, length)
        batch.segments[row, :length] = 1
        batch.positions[row, :length] = np.arange(length)[:, None]
        batch.targets[row, :length] = rng.integers(0, 120, length)
        batch.target_weights[row, 18:length] = 1
        batch.visual_index[row, 1:17] = np.arange(16)
        points = int(rng.integers(1, BUCKET.points + 1))
        batch.points[row, 0, :points] = rng.random((points, 3))
        batch.point_trace[row, 0, :points] = 1
        batch.masks[row, 0] = rng.random(batch.masks.shape[2:]) > 0.5
        batch.mask_group[row, 0] = 1
        batch.mask_slots[row, 0] = np.arange(20, 26)
    return batch
