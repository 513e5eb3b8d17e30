"""A small tokenizer for models that know synthetic scenes alone: a BPE trained on what is said about them.

    tokenizer = scene_tokenizer(480)

The same scenes and wording every time, so two runs have the same tokens.
"""

from collections.abc import Iterator

import numpy as np
from transformers import PreTrainedTokenizerFast

from data_loaders.synthetic.config import COLOURS, QUESTION_KINDS, SHAPES, SceneConfig
from data_loaders.synthetic.scenes import SyntheticScenes
from tracevision_jax.records import templates
from tracevision_jax.records.sample import PhrasePart

SEED = 999_999
SCENES = 150
CHAT = ("system\n", "user\n", "assistant\n", "You are a helpful assistant.")
"""What every conversation repeats."""


def scene_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `size` tokens."""
    from tracevision_jax.records.vocabulary import train_tokenizer

    return train_tokenizer(_texts(), size)


def _texts() -> Iterator[str]:
    """Narratives, questions and answers of a fixed set of scenes, in every wording."""
    config = SceneConfig(questions=QUESTION_KINDS, questions_per_scene=len(QUESTION_KINDS))
    for index in range(SCENES):
        sample = SyntheticScenes(SEED, SCENES, config)[index]
        rng = np.random.default_rng(index)
        tasks = sorted(sample.tasks) + ["trace_qa"] * 8
        for conversation in templates.build_all(sample, tasks, rng):
            yield from CHAT
            for part in (part for turn in conversation.turns for part in turn.parts):
                if isinstance(part, str | PhrasePart):
                    yield part if isinstance(part, str) else part.text
    for name in (*COLOURS, *SHAPES):
        yield from [f"a {name} {name}"] * SCENES
