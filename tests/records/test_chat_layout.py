"""Token rows of conversations equal the chat template as transformers renders it, pads expanded."""

import dataclasses
import re

import numpy as np
import pytest

from tests.records.conftest import CONFIG
from tests.records.qwen_tokenizer import CHAT_TEMPLATE
from tracevision_jax.records.processor import Processor
from tracevision_jax.records.sample import Conversation, Sample, Turn
from tracevision_jax.records.vocabulary import Vocabulary

PROMPT = "You are a helpful assistant."
DIALOGUE = (
    ("user", "What is in this image?"),
    ("assistant", "A red circle, and a blue square."),
    ("user", "\n\n  Where is it? <|im_end|> naïve 日本"),
    ("assistant", "On the left."),
)


def rendered(vocabulary: Vocabulary, turns, kind: str, counts: list[int], prompt: bool) -> list[int]:
    """Ids that transformers gives: template, pads expanded, then the tokenizer. A typed special token would be read
    as one there, so it is hidden from it and put back as plain ids."""
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    first = next(message for message in messages if message["role"] == "user")
    first["content"] = [{"type": kind} for _ in counts] + first["content"]
    hidden = "\ue000"
    for message in messages:
        for item in message["content"]:
            if "text" in item:
                item["text"] = item["text"].replace("<|im_end|>", hidden)
    text = vocabulary.tokenizer.apply_chat_template(
        messages, chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=prompt
    )
    pad, left = f"<|{kind}_pad|>", iter(counts)
    text = re.sub(re.escape(pad), lambda match: pad * next(left), text)
    ids: list[int] = []
    for part in re.split(r"(<\|[a-z_]+\|>)", text):
        if part.startswith("<|"):
            ids.append(vocabulary.special(part))
        elif part:
            ids += vocabulary.encode(part.replace(hidden, "<|im_end|>"))
    whole = vocabulary.tokenizer(text)["input_ids"]
    if hidden not in text:
        assert ids == whole, "cutting at special tokens is what the tokenizer does itself"
    return ids


def encoded(vocabulary: Vocabulary, turns, sample: Sample, answer: bool = True) -> list[int]:
    processor = Processor(vocabulary, dataclasses.replace(CONFIG, system_prompt=PROMPT))
    made = Conversation("dialogue", tuple(Turn(role, (text,)) for role, text in turns))
    return processor.piece(sample, [made], answer).conversations[0].tokens.tolist()


def pictures(frames: int, rate: float = 0.0) -> Sample:
    pixels = np.random.default_rng(0).integers(0, 256, (frames, 24, 40, 3), np.uint8)
    return Sample("s", "test", pixels, frames_per_second=rate)


@pytest.fixture(params=["trained", "released"])
def any_vocabulary(request) -> Vocabulary:
    return request.getfixturevalue("vocabulary" if request.param == "trained" else "qwen")


@pytest.mark.parametrize("turns", [DIALOGUE[:2], DIALOGUE, (("system", "Be brief."), *DIALOGUE[:2])])
def test_text_and_a_picture_follow_the_chat_template(any_vocabulary, turns):
    assert encoded(any_vocabulary, turns, pictures(1)) == rendered(any_vocabulary, turns, "image", [15], False)


def test_several_pictures_stand_between_markers_of_their_own(any_vocabulary):
    expected = rendered(any_vocabulary, DIALOGUE[:2], "image", [15, 15, 15], False)
    assert encoded(any_vocabulary, DIALOGUE[:2], pictures(3)) == expected


def test_a_video_stands_between_one_pair_of_markers(any_vocabulary):
    # 8 frames become 2 patches a second each of 2 frames: 4 temporal patches of 3 x 4 units.
    sample = pictures(8, rate=2.0)
    ids = encoded(any_vocabulary, DIALOGUE[:2], sample)
    count = ids.count(any_vocabulary.special("<|video_pad|>"))
    assert count > 0
    assert ids == rendered(any_vocabulary, DIALOGUE[:2], "video", [count], False)


def test_a_prompt_ends_where_the_answer_begins(any_vocabulary):
    prompt = encoded(any_vocabulary, DIALOGUE, pictures(1), answer=False)
    assert prompt == rendered(any_vocabulary, DIALOGUE[:3], "image", [15], True)
    whole = encoded(any_vocabulary, DIALOGUE, pictures(1))
    assert whole[: len(prompt)] == prompt
