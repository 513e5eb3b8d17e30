"""Examples and figures of the report: pictures show what was answered, verdicts are right both ways, and the real
model answers what the report asks of it.
"""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from evaluation.report_examples import (
    Places,
    asked_section,
    decode_mask,
    evaluated_section,
    example_picture,
    text_of_parts,
)
from evaluation.report_figures import (
    PORTRAIT,
    Photograph,
    attention_section,
    moment_map,
    photograph_section,
)
from evaluation.report_pictures import Images
from tests.evaluation import fabricated_run as fabricated
from tests.inference import tiny
from tracevision_jax.inference.pictures import TIME_COLOURS
from tracevision_jax.inference.tracevision import TraceVisionInference
from tracevision_jax.records.batch import Bucket
from tracevision_jax.records.sample import BoxPart, MaskPart, PhrasePart, TracePart
from tracevision_jax.trajectory.checks import check_trace
from tracevision_jax.vision.pictures import read_image
from tracevision_jax.vision.run_lengths import encode_mask

SCENES = fabricated.scenes(3, 32)
TASKS = {task.name: task for task in fabricated.TASKS}


@pytest.fixture
def images(tmp_path) -> Images:
    return Images(tmp_path / "images")


def states(section, label: str) -> list[str]:
    return [line.state for card in section.cards for line in card.lines if line.label == label]


@pytest.mark.parametrize(("noise", "state"), [(0.0, "right"), (2.0, "wrong")])
def test_boxes_are_judged_by_their_overlap(images, noise, state):
    section = evaluated_section(fabricated.evaluated(TASKS["refer_box"], SCENES, noise), SCENES, images, 2)
    assert len(section.cards) == 2 and states(section, "IoU") == [state] * 2


def test_an_object_is_right_only_in_colour_and_shape(images):
    made = fabricated.evaluated(TASKS["traced_object"], SCENES)
    records = [{**record, "shape_right": False} for record in made.outcome.records]
    wrong = dataclasses.replace(made, outcome=dataclasses.replace(made.outcome, records=records))
    assert states(evaluated_section(made, SCENES, images, 3), "model") == ["right"] * 3
    assert states(evaluated_section(wrong, SCENES, images, 3), "model") == ["wrong"] * 3


def test_no_more_examples_are_shown_than_there_are_records(images):
    made = fabricated.evaluated(TASKS["trace_segment"], SCENES)
    few = dataclasses.replace(made, outcome=dataclasses.replace(made.outcome, records=made.outcome.records[-1:]))
    assert len(evaluated_section(few, SCENES, images, 12).cards) == 1
    none = dataclasses.replace(made, outcome=dataclasses.replace(made.outcome, records=[]))
    section = evaluated_section(none, SCENES, images, 12)
    assert section.cards == () and "No held-out scene served" in section.missing


def test_every_question_of_a_dialogue_comes_after_the_models_own_answers(images):
    model = fabricated.RoteModel("My own words.")
    section = asked_section(model, "dialogue", SCENES, images, 1)
    assert len(section.cards) == 1 and len(model.asked) == len(states(section, "model")) > 2
    for round_, conversation in enumerate(model.asked):
        said = [turn for turn in conversation.turns if turn.role == "assistant"]
        assert len(said) == round_ and all(turn.parts == ("My own words.",) for turn in said)


def test_answers_in_words_are_judged_and_places_are_not(images):
    section = asked_section(fabricated.RoteModel(), "joint_caption_trace", SCENES, images, 1)
    assert states(section, "model") == [""]
    section = asked_section(fabricated.RoteModel("trajectory a."), "trace_qa", SCENES, images, 3)
    truths = [line.text for card in section.cards for line in card.lines if line.label == "true"]
    assert states(section, "model") == ["right" if truth == "Trajectory A." else "wrong" for truth in truths]


def test_truth_and_answer_stand_beside_each_other():
    image, mask = np.full((64, 64, 3), 90, np.uint8), np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    drawn = example_picture(image, Places(), Places(masks=(mask,)), Places())
    assert drawn.panels == 2
    pixels = np.asarray(drawn.picture).astype(int)
    coloured = pixels.max(axis=2) - pixels.min(axis=2) > 40
    left, right = np.array_split(coloured, 2, axis=1)
    assert left.mean() > 0.1 and not right.any()


def test_several_traces_of_a_question_have_a_panel_each():
    line = np.array([[0.2, 0.2, 0.0], [0.8, 0.8, 1.0]])
    assert example_picture(np.zeros((8, 8, 3), np.uint8), Places((line, line)), Places(), Places()).panels == 2
    assert example_picture(np.zeros((8, 8, 3), np.uint8), Places((line,)), Places(), Places()).panels == 1


def test_places_added_together_keep_names_only_where_all_masks_have_one():
    mask = np.ones((2, 2), bool)
    named, unnamed = Places(masks=(mask,), names=("a",)), Places(masks=(mask,))
    assert (named + named).names == ("a", "a") and (named + unnamed).names == ()
    assert not Places() and named


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 2)])
def test_masks_come_back_from_run_lengths(shape):
    for seed in range(5):
        mask = np.random.default_rng(seed).random(shape) < 0.25 * seed
        assert (decode_mask(encode_mask(mask)) == mask).all()


def test_a_turn_reads_as_text():
    mask = np.zeros((1, 2, 2), bool)
    parts = (
        "Here is ",
        PhrasePart("the dog"),
        MaskPart(mask),
        " at ",
        BoxPart(np.zeros(4)),
        ".",
        TracePart(np.zeros((1, 3))),
    )
    assert text_of_parts(parts) == "Here is the dog (mask) at (box). (trace)"


# Figures


def test_the_map_of_moments_has_the_colour_of_the_moment_and_no_colour_where_all_count_alike():
    weights = np.full((3, 1, 3), 1 / 3)
    weights[:, 0, 0], weights[:, 0, 2] = (1, 0, 0), (0, 0, 1)
    picture = moment_map(np.full((30, 90, 3), 128, np.uint8), weights, np.array([0.0, 1.0, 2.0]))
    first, middle, last = (
        np.array(picture.getpixel((int(x * picture.width), picture.height // 2))).astype(int) for x in (0.02, 0.5, 0.98)
    )
    assert np.argmax(first) == np.argmax(TIME_COLOURS[0]) and np.argmax(last) == np.argmax(TIME_COLOURS[-1])
    assert first.max() - first.min() > 60 and last.max() - last.min() > 60
    assert middle.max() - middle.min() < 25


def test_one_keypoint_has_a_map():
    assert moment_map(np.zeros((8, 8, 3), np.uint8), np.ones((1, 2, 2)), np.array([0.5])).width > 0


def test_the_trace_over_the_embedded_photograph_is_one_that_a_model_takes():
    trace = PORTRAIT.trace
    assert read_image(PORTRAIT.path).shape == (600, 512, 3)
    assert (check_trace(trace) == trace).all() and 300 < len(trace) < 500
    assert trace[:, :2].min() > 0.05 and trace[:, :2].max() < 0.95
    assert np.allclose(np.diff(trace[:, 2]), 1 / 60)


def test_a_real_model_answers_what_the_report_asks(images, tmp_path):
    room = Bucket(tokens=640, frames=1, windows=4, conversations=1, points=16, masks=0)  # one program for all prompts
    model = TraceVisionInference(tiny.system(), tiny.params(), tiny.vocabulary(), buckets=[room])
    assert len(asked_section(model, "trace_qa", SCENES, images, 1).cards) == 1
    maps = attention_section(model, [SCENES[0]], images)
    assert len(maps.cards) == 1 and maps.cards[0].panels == 3
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "photo.png")
    section = photograph_section(model, Photograph(tmp_path / "photo.png", PORTRAIT.strokes, "a test"), 32, images)
    assert section.cards[0].lines[0].text and "32 x 21 pixels" in section.note
