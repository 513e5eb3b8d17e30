"""One TraceVision of a few thousand weights, and pieces that touch every part of it, for all tests of systems."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.records.conftest import TEXTS, VISION
from tracevision_jax.hosts.qwen25vl import Qwen25VLConfig
from tracevision_jax.language.config import LanguageConfig
from tracevision_jax.records.encoded import Piece
from tracevision_jax.records.processor import Processor
from tracevision_jax.records.sample import Conversation, MaskPart, Sample, TracePart, Turn
from tracevision_jax.records.simplification import Simplification
from tracevision_jax.records.vocabulary import Vocabulary, train_tokenizer
from tracevision_jax.segmentation.pixel_decoder import PixelDecoderConfig
from tracevision_jax.systems.tracevision import TraceVision, tracevision_config
from tracevision_jax.vision.config import QwenVisionConfig

# 32 wide, so that the norms over a quarter and an eighth of it are over channels enough to be well conditioned.
DECODER = PixelDecoderConfig(width=32, heads=2, mlp_width=12, layers=1, token_hidden=10, grid=3, fine_upsamplings=1)


def tiny_host(vocabulary: Vocabulary, **language) -> Qwen25VLConfig:
    sizes = LanguageConfig(len(vocabulary.tokenizer) + 3, 16, 2, 2, 1, 8, 24, mrope_sections=(2, 1, 1), **language)
    vision = QwenVisionConfig(16, width=8, heads=2, mlp_width=12, groups=2, window_blocks=1, patch=4, window_units=2)
    pads = {f"{kind}_token": vocabulary.special(f"<|{kind}_pad|>") for kind in ("image", "video")}
    return Qwen25VLConfig(vision, sizes, **pads)


@functools.cache
def tiny_vocabulary() -> Vocabulary:
    return Vocabulary(train_tokenizer(TEXTS * 3, 330))


@functools.cache
def tiny_system() -> TraceVision:
    words = tiny_vocabulary()
    rows = {"vision": VISION, "max_points": 6, "system_prompt": "", "simplification": Simplification("none")}
    return TraceVision(
        tracevision_config(
            tiny_host(words), words.first_added, DECODER, tvp={"heads": 2, "mlp_width": 20, "blocks": 1}, processor=rows
        )
    )


def drawn(system: TraceVision, seed: int = 0):
    """Parameters with nothing at its start value: matrices with std 1 / sqrt(fan-in), scales 1 +- 0.3, biases 0.1."""
    random = np.random.default_rng(seed)

    def draw(path, leaf) -> np.ndarray:
        noise = random.standard_normal(leaf.shape).astype(np.float32)
        name, parent = path[-1].key, path[-2].key
        if name == "scale":
            return 1 + 0.3 * noise
        if name == "kernel":
            inputs = int(np.prod(leaf.shape[:-1]))
            inputs //= leaf.shape[0] if any(key.key in ("layers", "groups") for key in path) else 1
            heads_out = parent in ("q", "k", "v", "qkv", "place") and leaf.ndim > 2
            return noise / np.sqrt(leaf.shape[-3 if parent != "qkv" else -4] if heads_out else inputs)
        return 0.5 + 0.1 * noise if name == "fusion" else noise * (0.1 if name == "bias" else 0.5)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(system.init, jax.random.key(0)))


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return tiny_vocabulary()


@pytest.fixture(scope="session")
def system() -> TraceVision:
    return tiny_system()


@pytest.fixture(scope="session")
def params(system):
    return jax.tree.map(jnp.asarray, drawn(system))


@pytest.fixture(scope="session")
def pieces(system, vocabulary) -> list[Piece]:
    """A picture with a mask, and with two traces; another with overlapping masks; a video with a trace and masks."""
    processor = Processor(vocabulary, system.config.processor)
    random = np.random.default_rng(0)

    def sample(frames: int, height: int, width: int) -> Sample:
        pixels = random.integers(0, 256, (frames, height, width, 3), np.uint8)
        return Sample(f"{frames}", "test", pixels, frames_per_second=2.0 if frames > 1 else 0.0)

    def trace(count: int) -> TracePart:
        return TracePart(random.random((count, 3)) * [1, 1, 2])

    def mask(frames: int) -> MaskPart:
        return MaskPart(random.random((frames, 24, 24)) > 0.5)

    def about(user: tuple, answer: tuple) -> Conversation:
        return Conversation("trace_qa", (Turn("user", user), Turn("assistant", answer)))

    return [
        processor.piece(
            sample(1, 24, 24),
            [about(("where ?",), ("red", mask(1))), about((trace(3), "or", trace(2)), ("a blue star",))],
        ),
        processor.piece(sample(1, 16, 24), [about(("all ?",), (mask(1), " and ", mask(1), mask(1)))]),
        processor.piece(sample(4, 16, 16), [about((trace(4),), (mask(4), " end"))]),
    ]


def with_rows(system: TraceVision, **changes) -> TraceVision:
    """The same network with rows laid out otherwise."""
    fields = {name: changes.pop(name) for name in list(changes) if name == "logit_chunk"}
    rows = dataclasses.replace(system.config.processor, **changes)
    return TraceVision(dataclasses.replace(system.config, processor=rows, **fields))
