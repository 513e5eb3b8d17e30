"""The user's API: each task asks what its template asks, and gives back typed answers at the picture's size."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.inference import tiny
from tests.inference.tiny import ROOMY
from tracevision_jax.errors import UserError
from tracevision_jax.inference.engine import Sampling
from tracevision_jax.inference.rendering import draw_answer, draw_attention, frame_indices
from tracevision_jax.inference.tracevision import TraceVisionInference
from tracevision_jax.systems.tracevision import TraceVision

TRACE = [[0.1, 0.2, 0.0], [0.4, 0.5, 0.3], [0.9, 0.8, 0.6]]
PICTURE = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def model() -> TraceVisionInference:
    return TraceVisionInference(tiny.system(), tiny.params(), tiny.vocabulary(), buckets=[ROOMY])


@pytest.fixture
def asked(model, monkeypatch):
    """Texts of the prompts that reach the engine, instead of answers."""
    texts: list[str] = []

    def generate(pieces, *, max_new_tokens, force, sampling):
        tokens = pieces[0].conversations[0].tokens.tolist()
        texts.append(model.engine.vocabulary.decode([*tokens, *force]).replace("<|image_pad|>", ""))
        raise StopAsking

    monkeypatch.setattr(model.engine, "generate", generate)
    return texts


class StopAsking(Exception):
    pass


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (
            lambda m: m.describe(PICTURE, TRACE),
            "The user's gaze followed <traj><100><200><400><500><900><800></traj>. Describe what it rests on.",
        ),
        (
            lambda m: m.predict_trace(PICTURE, "a star"),
            'Where would the gaze go while saying "a star"? Give the trajectory.',
        ),
        (lambda m: m.segment(PICTURE, "the red star"), "Segment the red star."),
        (lambda m: m.segment(PICTURE, np.array(TRACE)[:, :2]), "Segment what <traj><100><200><400>"),
        (lambda m: m.locate(PICTURE, "the star"), "Where is the star? Answer with a box."),
        (lambda m: m.answer(PICTURE, "Is {B} red?", {"B": TRACE}), "Is <traj><100><200>"),
        (lambda m: m.answer(PICTURE, ["A?", "Yes.", "B?"]), "A?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>"),
    ],
)
def test_each_task_asks_what_its_template_asks(ask, text, model, asked):
    with pytest.raises(StopAsking):
        ask(model)
    assert asked[0].startswith("<|im_start|>user\n<|vision_start|><|vision_end|>") and text in asked[0]


def test_trajectories_boxes_and_what_a_trace_rests_on_are_begun_for_the_model(model, asked):
    for ask, end in (
        (lambda: model.predict_trace(PICTURE, "a star"), "assistant\n<traj>"),
        (lambda: model.locate(PICTURE, "a star"), "<|object_ref_start|>a star<|object_ref_end|><|box_start|>"),
        (lambda: model.segment(PICTURE, np.array(TRACE)), "assistant\n<|object_ref_start|>"),
        (lambda: model.segment(PICTURE, "a star"), "assistant\n"),
        (lambda: model.describe(PICTURE, TRACE), "assistant\n"),
    ):
        with pytest.raises(StopAsking):
            ask()
        assert asked[-1].endswith(end)


def test_predicted_points_and_boxes_lie_in_the_picture(model):
    points = model.predict_trace(PICTURE, "a star", max_new_tokens=24).points
    assert 1 <= len(points) <= 6 and ((points > 0) & (points < 1)).all()
    box = model.locate(PICTURE, "a star", max_new_tokens=24).box
    assert box is not None and (box[2:] >= box[:2]).all() and ((box > 0) & (box < 1)).all()


def test_masks_come_at_the_size_of_the_picture(model):
    sample = model.read(PICTURE)
    asked = tiny.asked("the star", 0)
    force = [model.engine.vocabulary.seg, *model.engine.vocabulary.slots]
    answer = model.ask(sample, asked, force=force, max_new_tokens=24)
    assert answer.masks.shape[1:] == (1, 24, 32) and len(answer.masks) >= 1
    assert draw_answer(sample, answer, [np.array(TRACE)]).size == (512, 384)


def test_a_video_has_masks_at_the_frames_that_were_seen(model):
    frames = tiny.sample(4, frames=4, height=16, width=24).frames
    sample = model.read(frames, 2.0)
    force = [model.engine.vocabulary.seg, *model.engine.vocabulary.slots]
    answer = model.ask(sample, tiny.asked("the star", 0), force=force, max_new_tokens=24)
    assert answer.masks.shape[1:] == (2, 16, 24) and answer.frame_times == (0.0, 1.0)
    assert frame_indices(sample, answer) == [0, 2]
    assert draw_answer(sample, answer).width > 512


def test_a_dialogue_goes_on_from_an_earlier_answer(model):
    first = model.answer(PICTURE, "What is {A}?", [TRACE], max_new_tokens=12)
    turns = ["What is {A}?", first, "And now?"]
    second = model.answer(PICTURE, turns, [TRACE], max_new_tokens=12)
    assert second.tokens != first.tokens
    assert model.answer(PICTURE, turns, {"A": TRACE}, max_new_tokens=12).tokens == second.tokens


def test_earlier_answers_may_be_longer_than_what_a_row_of_training_learns(model):
    config = model.engine.config
    few = replace(config, processor=replace(config.processor, learned_share=0.01))
    other = TraceVisionInference(TraceVision(few), tiny.params(), tiny.vocabulary(), buckets=[ROOMY])
    turns = ["What is {A}?", model.answer(PICTURE, "What is {A}?", [TRACE], max_new_tokens=12), "And now?"]
    expected = model.answer(PICTURE, turns, [TRACE], max_new_tokens=12)
    assert other.answer(PICTURE, turns, [TRACE], max_new_tokens=12).tokens == expected.tokens


def test_drawn_answers_follow_their_seed(model):
    def draw(seed: int):
        return model.describe(PICTURE, TRACE, max_new_tokens=12, sampling=Sampling(1.5, seed=seed)).tokens

    assert draw(1) == draw(1) != draw(2)


def test_attention_is_drawn(model):
    blocks = model.attention(Image.fromarray(PICTURE), TRACE)
    assert len(blocks) == 2 and blocks[0].over_image.shape == (1, 3, 4) and len(blocks[0].points) == 3
    assert draw_attention(model.read(PICTURE), blocks).width > 1000


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda m: m.describe("nowhere.jpg", TRACE), r"nowhere\.jpg cannot be read"),
        (lambda m: m.describe(PICTURE, []), "the trace is empty"),
        (lambda m: m.describe(PICTURE, [[100, 200]]), "look like pixels"),
        (lambda m: m.describe(np.zeros((1, 4000, 3), np.uint8), TRACE), "too elongated"),
        (lambda m: m.answer(PICTURE, "What is {C}?", [TRACE]), r"trace \{C\}"),
        (lambda m: m.answer(PICTURE, "What is {A}?", [[[float("nan"), 0.5]]]), "trace A has 1 of 1 points"),
        (lambda m: m.describe(PICTURE, TRACE, max_new_tokens=100_000), "at most 2048 new tokens"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(ask, words, model):
    with pytest.raises(UserError, match=words):
        ask(model)
