"""Vocabularies, a processor and scenes, made once for all tests of records."""

import dataclasses

import numpy as np
import pytest

from data_loaders.synthetic.config import QUESTION_KINDS, SceneConfig
from data_loaders.synthetic.scenes import SyntheticScenes
from tests.records.qwen_tokenizer import released_tokenizer
from tracevision_jax.records.processor import Processor
from tracevision_jax.records.processor_config import ProcessorConfig
from tracevision_jax.records.sample import Sample
from tracevision_jax.records.simplification import Simplification
from tracevision_jax.records.vocabulary import Vocabulary, train_tokenizer
from tracevision_jax.vision.preprocess import VisionInputConfig

TEXTS = [
    "You are a helpful assistant. system user assistant",
    "Where is the red circle? Describe what it rests on. Segment a small blue star and the gaze trajectory.",
    "(12,345), (678,9) 0 1 2 3 4 5 6 7 8 9",
]
VISION = VisionInputConfig(
    patch=4,
    window_units=2,
    min_pixels=16 * 16,
    max_pixels=40 * 40,
    min_frames=2,
    video_min_pixels=16 * 16,
    video_max_pixels=32 * 32,
    video_total_pixels=8 * 32 * 32,
)
"""Units of 8 pixels, windows of 16."""
CONFIG = ProcessorConfig(
    vision=VISION, mask_size=8, max_points=6, simplification=Simplification("none"), system_prompt=""
)


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    return Vocabulary(train_tokenizer(TEXTS * 3, 400))


@pytest.fixture(scope="session")
def digits(vocabulary: Vocabulary) -> Vocabulary:
    return dataclasses.replace(vocabulary, coordinates="digits")


@pytest.fixture(scope="session")
def qwen(shared_data) -> Vocabulary:
    """The released tokenizer; tests that use it skip where the ranks are not."""
    return Vocabulary(released_tokenizer(shared_data / "tokenizers" / "qwen.tiktoken"))


@pytest.fixture(scope="session")
def processor(vocabulary: Vocabulary) -> Processor:
    return Processor(vocabulary, CONFIG)


@pytest.fixture(scope="session")
def scenes() -> SyntheticScenes:
    """Scenes with one question of each kind."""
    config = SceneConfig(
        height=(32, 48), width=(32, 48), questions=QUESTION_KINDS, questions_per_scene=len(QUESTION_KINDS)
    )
    return SyntheticScenes(0, 6, config)


@pytest.fixture(scope="session")
def picture() -> Sample:
    """A picture of 3 x 5 units, each of one grey that counts them in raster order."""
    units = np.arange(15, dtype=np.uint8).reshape(3, 5) * 16
    pixels = np.repeat(np.repeat(units, 8, 0), 8, 1)[None, :, :, None].repeat(3, -1)
    return Sample("picture", "test", pixels)
