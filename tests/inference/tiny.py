"""A TraceVision so small that it compiles in seconds, with drawn parameters, and samples for it."""

import functools
import math

import jax
import numpy as np

from tracevision_jax.hosts.qwen25vl import Qwen25VLConfig
from tracevision_jax.inference.engine import Engine
from tracevision_jax.language.config import LanguageConfig
from tracevision_jax.records.batch import Bucket
from tracevision_jax.records.encoded import Piece
from tracevision_jax.records.processor import Processor
from tracevision_jax.records.sample import Conversation, Sample, TracePart, Turn
from tracevision_jax.records.simplification import Simplification
from tracevision_jax.records.vocabulary import Vocabulary, train_tokenizer
from tracevision_jax.segmentation.pixel_decoder import PixelDecoderConfig
from tracevision_jax.systems.tracevision import TraceVision, tracevision_config
from tracevision_jax.vision.config import QwenVisionConfig
from tracevision_jax.vision.preprocess import VisionInputConfig

ROOMY = Bucket(tokens=160, frames=3, windows=4, conversations=9, points=8, masks=5)
"""Holds every prompt of `unlike_pieces`, with padding on every axis."""
WORDS = "a red circle and the blue square near a green star . Describe what it rests on ? user assistant system"


@functools.cache
def vocabulary() -> Vocabulary:
    return Vocabulary(train_tokenizer([WORDS], 300))


@functools.cache
def plain_host() -> Qwen25VLConfig:
    """The host without the system's tokens."""
    words = vocabulary()
    language = LanguageConfig(len(words.tokenizer), 32, 2, 4, 2, 8, 48, mrope_sections=(2, 1, 1))
    vision = QwenVisionConfig(32, width=16, heads=4, mlp_width=32, groups=2, window_blocks=1, patch=4, window_units=2)
    return Qwen25VLConfig(
        vision,
        language,
        image_token=words.special("<|image_pad|>"),
        video_token=words.special("<|video_pad|>"),
    )


@functools.cache
def system() -> TraceVision:
    decoder = PixelDecoderConfig(width=16, heads=2, mlp_width=32, token_hidden=16, grid=4, fine_upsamplings=1)
    config = tracevision_config(
        plain_host(),
        vocabulary().first_added,
        decoder,
        tvp={"heads": 4, "mlp_width": 32},
        processor={
            "system_prompt": "",
            "max_points": 6,
            "simplification": Simplification("none"),
            "slot_tokens": 64,
            "vision": VisionInputConfig(
                min_pixels=16 * 16,
                max_pixels=32 * 32,
                min_frames=2,
                video_min_pixels=16 * 16,
                video_max_pixels=32 * 32,
                video_total_pixels=4 * 32 * 32,
            ),
        },
    )
    return TraceVision(config)


@functools.cache
def params():
    """Drawn in numpy, which compiles nothing: matrices with std 1 / sqrt(fan-in), scales 1 +- 0.3, biases 0.1."""
    random = np.random.default_rng(0)

    def draw(path, leaf) -> np.ndarray:
        noise = random.standard_normal(leaf.shape, np.float32)
        *_, module, name = (key.key for key in path)
        if name == "scale":
            return 1 + 0.3 * noise
        if name != "kernel":
            return noise / leaf.shape[-1] ** 0.5 if name in ("embedding", "head") else 0.1 * noise
        inputs = {"q": (-3,), "k": (-3,), "v": (-3,), "place": (-3,), "qkv": (-4,), "o": (-3, -2), "proj": (-3, -2)}
        return noise / math.prod(leaf.shape[axis] for axis in inputs.get(module, (-2,))) ** 0.5

    shapes = jax.eval_shape(system().init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def host_params() -> dict:
    """Parameters of `plain_host`."""
    language = {name: tree for name, tree in params()["host"]["language"].items() if name != "added"}
    return {"vision": params()["host"]["vision"], "language": language}


@functools.cache
def engine() -> Engine:
    return Engine(system().config, params(), vocabulary())


@functools.cache
def processor() -> Processor:
    return Processor(vocabulary(), system().config.processor)


def sample(seed: int, frames: int = 1, height: int = 16, width: int = 16) -> Sample:
    pixels = np.random.default_rng(seed).integers(0, 256, (frames, height, width, 3), np.uint8)
    return Sample(str(seed), "noise", pixels, frames_per_second=2.0 if frames > 1 else 0.0)


def asked(text: str, seed: int, points: int = 0) -> Conversation:
    """A question, with a trace after it where points are asked for."""
    trace = [TracePart(np.random.default_rng(seed).random((points, 3)))] if points else []
    return Conversation("trace_qa", (Turn("user", (text, *trace)),))


def piece(seed: int, text: str = "a red circle ?", points: int = 0, **size: int) -> Piece:
    return processor().piece(sample(seed, **size), [asked(text, seed, points)], answer=False)


def unlike_pieces() -> list[Piece]:
    """Prompts with and without a trace, of several lengths, sizes of picture, and a video."""
    return [
        piece(0),
        piece(1, points=3),
        piece(2, "Describe what it rests on near the blue square and the green star ." * 3, points=5),
        piece(3, height=24, width=32),
        piece(4, "the star", points=2, frames=4, height=16, width=24),
        piece(5, "", height=20, width=12, points=1),
    ]


def forced_masks() -> list[list[int]]:
    """Each prompt's answer begins with none, one or two masks."""
    words = vocabulary()
    mask = [words.seg, *words.slots]
    return [[], mask, words.encode("the star") + mask, [*mask, *words.encode(" and "), *mask], mask, []]
