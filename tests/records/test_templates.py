"""Every task from scenes and from sparse samples: what is asked, what is answered, what cannot be."""

import dataclasses

import numpy as np
import pytest

from data_loaders.synthetic.config import SceneConfig
from data_loaders.synthetic.scenes import SyntheticScenes
from tests.data_loaders.same import assert_same_part
from tracevision_jax.errors import UserError
from tracevision_jax.records import templates
from tracevision_jax.records.sample import (
    BoxPart,
    Conversation,
    MaskPart,
    PhrasePart,
    Question,
    Sample,
    TracePart,
    Turn,
    UnitNamesPart,
)

USERS = {
    "caption_from_trace": {TracePart},
    "trace_from_caption": set(),
    "joint_caption_trace": set(),
    "trace_segment": {TracePart},
    "refer_box": set(),
    "refer_segment": set(),
    "plain_caption": set(),
    "plain_boxes": {BoxPart},
    "plain_objects": set(),
    "plain_names": {BoxPart, UnitNamesPart},
}
ANSWERS = {
    "caption_from_trace": {str},
    "trace_from_caption": {TracePart},
    "joint_caption_trace": {str, TracePart},
    "trace_segment": {PhrasePart, MaskPart},
    "refer_box": {PhrasePart, BoxPart},
    "refer_segment": {PhrasePart, MaskPart},
    "plain_caption": {str},
    "plain_boxes": {str},
    "plain_objects": {PhrasePart, BoxPart},
    "plain_names": {str},
}
"""Kinds of parts of a question (text aside) and of its answer, made from the narrative and its regions."""


def kinds(turn: Turn) -> set[type]:
    return {type(part) for part in turn.parts}


@pytest.fixture(scope="module")
def narrated(scenes) -> Sample:
    """A scene without questions of its own: all comes from caption, trace and regions."""
    return dataclasses.replace(scenes[0], questions=())


def assert_same(left: Conversation, right: Conversation) -> None:
    assert left.task == right.task and len(left.turns) == len(right.turns)
    for one, other in zip(left.turns, right.turns, strict=True):
        assert one.role == other.role and len(one.parts) == len(other.parts)
        for part, twin in zip(one.parts, other.parts, strict=True):
            if isinstance(part, UnitNamesPart):
                assert isinstance(twin, UnitNamesPart)
                assert [word for word, _ in part.names] == [word for word, _ in twin.names]
            else:
                assert_same_part(part, twin)


@pytest.mark.parametrize("task", sorted(ANSWERS))
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_a_task_asks_with_its_parts_and_answers_with_its_parts(narrated, task, seed):
    made = templates.build(narrated, task, None if seed is None else np.random.default_rng(seed))
    assert made.task == task
    question, answer = made.turns
    assert (question.role, answer.role) == ("user", "assistant")
    assert kinds(question) - {str} == USERS[task] and str in kinds(question)
    # Several targets are joined by " and ".
    assert kinds(answer) - {str} == ANSWERS[task] - {str}
    assert ANSWERS[task] - kinds(answer) == set()


@pytest.mark.parametrize("task", sorted(templates.TASKS))
def test_every_task_is_built_from_scenes_with_questions(scenes, task):
    sample = scenes[1]
    assert task in sample.tasks or task.startswith("plain_")
    for rng in (None, np.random.default_rng(0)):
        made = templates.build(sample, task, rng)
        assert made.task == task
        assert [turn.role for turn in made.turns] == ["user", "assistant"] * (len(made.turns) // 2)
        assert len(made.turns) == 2 or (task == "dialogue" and 6 <= len(made.turns) <= 8)
        assert all(turn.parts for turn in made.turns)


@pytest.mark.parametrize("task", sorted(templates.TASKS))
def test_without_a_generator_the_wording_is_always_the_first(scenes, task):
    assert_same(templates.build(scenes[2], task), templates.build(scenes[2], task))
    one, other = (templates.build(scenes[2], task, np.random.default_rng(5)) for _ in range(2))
    assert_same(one, other)


def test_a_generator_varies_the_wording(narrated):
    for task in set(ANSWERS) - {"plain_boxes"}:
        asked = set()
        for seed in range(12):
            turn = templates.build(narrated, task, np.random.default_rng(seed)).turns[0]
            asked.add("|".join(part for part in turn.parts if isinstance(part, str)))
        assert len(asked) > 1, task
    first = templates.build(narrated, "plain_caption").turns[0].parts[0]
    assert first == templates.CAPTION[0]


def test_inference_asks_as_the_first_wording_does(narrated):
    """What the API asks without an answer is what training asked with one."""
    trace = templates.full_trace(narrated)
    for built, asked in (
        ("caption_from_trace", templates.describe_trace(trace, "")),
        ("trace_from_caption", templates.predict_trace(narrated.caption, None)),
        ("trace_segment", templates.segment_trace(trace, [])),
    ):
        assert_same(Conversation("", templates.build(narrated, built).turns[:1]), Conversation("", asked.turns[:1]))
    region = narrated.regions[0]
    whole = templates.build(narrated, "refer_box").turns
    assert whole[0] == templates.locate(region.phrase, None).turns[0]
    assert templates.segment_phrases([], prompt=region.phrase).turns[0] == templates.segment_phrases([region]).turns[0]


def test_a_full_trace_has_all_strokes_in_order_of_time(narrated):
    strokes = (np.array([[0.1, 0.1, 2.0], [0.2, 0.1, 3.0]]), np.zeros((0, 3)), np.array([[0.5, 0.5, 1.0]]))
    part = templates.full_trace(dataclasses.replace(narrated, strokes=strokes))
    assert part.points[:, 2].tolist() == [1.0, 2.0, 3.0]
    assert part.words == narrated.words


def test_several_targets_are_listed_and_answered_in_order(narrated):
    regions = [region for region in narrated.regions if region.mask is not None][:2] * 2
    made = templates.segment_phrases(regions[:3])
    phrases = [region.phrase for region in regions[:3]]
    assert made.turns[0].parts == (f"Segment {phrases[0]}, {phrases[1]} and {phrases[2]}.",)
    answer = made.turns[1].parts
    assert [part.text for part in answer if isinstance(part, PhrasePart)] == phrases
    order = [type(part) for part in answer]
    assert order == [PhrasePart, MaskPart, str, PhrasePart, MaskPart, str, PhrasePart, MaskPart]


def test_boxes_are_those_of_the_named_region(narrated):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        made = templates.build(narrated, "plain_boxes", rng)
        (box,) = (part for part in made.turns[0].parts if isinstance(part, BoxPart))
        named = [region for region in narrated.regions if (region.box[0] == box.box).all()]
        assert made.turns[1].parts[0] in {region.phrase for region in named}


def test_absent_regions_are_not_asked_for(narrated):
    gone = dataclasses.replace(narrated.regions[0], box=np.full((1, 4), np.nan))
    sample = dataclasses.replace(narrated, regions=(gone, narrated.regions[1]))
    for seed in range(6):
        made = templates.build(sample, "refer_box", np.random.default_rng(seed))
        phrase, box = made.turns[1].parts
        assert isinstance(phrase, PhrasePart) and phrase.text == narrated.regions[1].phrase
        assert isinstance(box, BoxPart) and (box.box == narrated.regions[1].box[0]).all()


def test_objects_are_listed_in_any_order_each_with_its_own_box(narrated):
    orders = set()
    for seed in range(12):
        parts = templates.build(narrated, "plain_objects", np.random.default_rng(seed)).turns[1].parts
        said = {tuple(box.box): phrase.text for phrase, box in zip(parts[::2], parts[1::2], strict=True)}
        assert said == {tuple(region.box[0]): region.phrase for region in narrated.regions}
        orders.add(tuple(said.values()))
    assert len(orders) > 1


def test_unit_names_are_the_nouns_of_the_phrases(narrated):
    made = templates.build(narrated, "plain_names")
    (part,) = (part for part in made.turns[0].parts if isinstance(part, UnitNamesPart))
    assert [word for word, _ in part.names] == [region.phrase.split()[-1] for region in narrated.regions]


def test_an_unknown_task_suggests_the_nearest(narrated):
    with pytest.raises(UserError, match=r"No task 'trace_qq'\. Did you mean 'trace_qa'\? Tasks: caption_from_trace"):
        templates.build(narrated, "trace_qq")
    with pytest.raises(UserError, match="No task 'dialog'"):
        templates.build_all(narrated, ["plain_caption", "dialog"])


@pytest.mark.parametrize(
    ("task", "missing"),
    [
        ("caption_from_trace", "has no trace"),
        ("trace_from_caption", "has no caption"),
        ("joint_caption_trace", "has no caption"),
        ("plain_caption", "has no caption"),
        ("trace_qa", "has no question"),
        ("dialogue", "has no question"),
        ("refer_box", "no region with a box"),
        ("refer_segment", "no region with a mask"),
        ("trace_segment", "has no trace"),
        ("plain_boxes", "no region with a box"),
        ("plain_objects", "no region with a box"),
        ("plain_names", "no region with a box"),
    ],
)
def test_a_task_that_a_sample_cannot_serve_says_what_is_missing(task, missing):
    bare = Sample("7", "test", np.zeros((1, 8, 8, 3), np.uint8), strokes=(np.zeros((0, 3)),))
    with pytest.raises(UserError, match=f"Task '{task}' does not fit: sample 7 of test .*{missing}"):
        templates.build(bare, task)


def test_every_kind_of_question_serves_its_task(scenes):
    expected = {"box": "refer_box", "trace_box": "refer_box", "segment": "refer_segment"}
    expected |= {"trace_segment": "trace_segment", "dialogue": "dialogue", "what": "trace_qa", "counting": "trace_qa"}
    for kind, task in expected.items():
        assert templates.task_of_question(kind) == task
        question = Question((Turn("user", (kind,)), Turn("assistant", ("yes",))), kind)
        sample = dataclasses.replace(scenes[0], questions=(question,))
        assert templates.build(sample, task).turns == question.turns


def test_no_question_is_asked_twice_while_others_are_left():
    config = SceneConfig(height=(32, 32), width=(32, 32), questions=("what", "colour", "shape"), questions_per_scene=6)
    sample = SyntheticScenes(0, 1, config)[0]
    for rng in (None, np.random.default_rng(0)):
        made = templates.build_all(sample, ["trace_qa"] * 6, rng)
        found = [[q for q in sample.questions if q.turns is c.turns] for c in made]
        assert sorted(id(q[0]) for q in found) == sorted(map(id, sample.questions))
        assert len(templates.build_all(sample, ["trace_qa"] * 8, rng)) == 8


def test_joined_conversations_are_one_dialogue(scenes):
    parts = templates.build_all(scenes[0], ["trace_qa", "refer_box", "plain_caption"])
    joined = templates.join(parts)
    assert joined.task == "dialogue"
    assert joined.turns == tuple(turn for part in parts for turn in part.turns)
    assert templates.join(parts[:1]) == parts[0]
