"""Benchmark tasks on synthetic scenes: the truth scores best, controls are wrong on purpose, records are JSON."""

import dataclasses
import json

import numpy as np
import pytest

from configs import benchmarks
from data_loaders.sources.synthetic import SyntheticSource
from data_loaders.synthetic.config import COLOURS, SHAPES, SceneConfig
from data_loaders.synthetic.export import export_narratives
from data_loaders.synthetic.scenes import SyntheticScenes
from evaluation.grounding_tasks import ReferBox, ReferSegment, TraceSegment
from evaluation.sweep import record_of
from evaluation.task import split_control
from evaluation.trace_tasks import TraceCaptioning, TracedObject, TracePrediction, true_word_boxes
from tests.inference import tiny
from tracevision_jax.errors import UserError
from tracevision_jax.inference.answers import Answer, Box, Mask, Phrase, Trajectory
from tracevision_jax.records.processor import Processor
from tracevision_jax.records.sample import MaskPart, Question, TracePart, Turn
from tracevision_jax.systems.config_json import to_json
from tracevision_jax.trajectory.tokens import from_bins, to_bins

SCENES = SceneConfig(height=(48, 48), width=(64, 64))
COUNT = 6


@pytest.fixture(scope="module")
def samples() -> SyntheticSource:
    opened = benchmarks.open_scenes(benchmarks.BenchmarkData(scenes=SCENES))
    return dataclasses.replace(opened, count=COUNT)


class Reworded(list):
    """Samples made by hand."""

    def fingerprint(self) -> str:
        return "by hand"


def answered(task, samples, reply, count: int = COUNT) -> list[dict]:
    """Records of what `reply(prompt)` answers: parts, or a text."""
    records = []
    for index in range(count):
        for prompt in task.prompts(samples, index):
            parts = reply(prompt)
            parts = (parts,) if isinstance(parts, str) else parts
            answer = Answer((1,), parts, (-1.0,), "end", "", prompt.sample.size)
            records.append(record_of(task, prompt, answer, tiny.processor()))
    return json.loads(json.dumps(records, allow_nan=False))


def numbers(task, records) -> dict:
    return {name: value for table in task.tables(records) for name, value in table.values.items()}


def test_prompts_are_the_same_in_every_run_and_named_once(samples):
    for make in benchmarks.BENCHMARKS.values():
        for task in make.tasks(False).values():
            ids = [prompt.id for index in range(3) for prompt in task.prompts(samples, index)]
            again = [prompt.id for index in range(3) for prompt in task.prompts(samples, index)]
            assert ids and ids == again and len(set(ids)) == len(ids)


def test_no_prompt_holds_its_answer(samples):
    """What is generated from ends where the answer begins, whatever the conversation holds of the truth."""
    for benchmark in benchmarks.BENCHMARKS.values():
        for task in benchmark.tasks(False).values():
            for prompt in task.prompts(samples, 0):
                piece = tiny.processor().piece(prompt.sample, [prompt.conversation], answer=False)
                text = tiny.vocabulary().decode(piece.conversations[0].tokens.tolist())
                assert text.endswith("<|im_start|>assistant\n")
                assert "[SEG]" not in text and text.count("assistant\n") == 1


def test_captions_without_java_say_so_and_get_a_table_of_their_own(samples, monkeypatch, tmp_path):
    """Nothing of the published tokenizer, with the reason; numbers of the simple one apart from it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    task = TraceCaptioning()
    records = answered(task, samples, lambda prompt: prompt.truth["caption"], 3)
    ptb, simple = task.tables(records)
    assert set(ptb.values.values()) == {None} and set(ptb.reasons) == set(ptb.values) and "ptb tokens" in ptb.title
    assert all("Java" in reason for reason in ptb.reasons.values())
    assert "simple tokens" in simple.title
    assert simple.values["BLEU-4"] == pytest.approx(1) and simple.values["ROUGE-L"] == pytest.approx(1)
    # Narratives of one picture are references of each other.
    for record in records:
        record["picture"] = "one"
    for record, other in zip(records, [*records[1:], records[0]], strict=True):
        record["prediction"] = other["caption"]
    assert task.tables(records)[-1].values["BLEU-4"] == pytest.approx(1)


def keypoints_of(prompt) -> tuple[Trajectory]:
    from tracevision_jax.records.templates import full_trace

    points = tiny.processor().keypoints(full_trace(prompt.sample), prompt.sample.size)
    return (Trajectory(from_bins(to_bins(points))),)


def test_the_true_trajectory_has_its_own_lbm_and_a_far_one_more(samples):
    task = TracePrediction()
    records = answered(task, samples, keypoints_of)
    asked, control = split_control(records)
    assert len(asked) == len(control) == COUNT
    values = numbers(task, records)
    for k in (0, 1):
        assert values[f"LBM k={k}"] == pytest.approx(values[f"LBM k={k}, true trajectory"])
        assert values[f"LBM k={k}, share of the true one's"] == pytest.approx(1)
    assert values["LBM k=1"] <= values["LBM k=0"] and values["trajectories that parse"] == 1
    corner = numbers(task, answered(task, samples, lambda prompt: (Trajectory(np.zeros((3, 2))),)))
    assert corner["LBM k=0"] > 2 * values["LBM k=0"]


def test_captions_of_the_control_are_other_samples(samples):
    for index in range(COUNT):
        own, control = TracePrediction().prompts(samples, index)
        assert own.sample is control.sample or own.sample.id == control.sample.id
        assert control.control and control.truth["caption"] == samples[(index + 1) % COUNT].caption
        assert control.truth["caption"] != own.truth["caption"]
        assert control.truth["caption"] in control.conversation.turns[0].parts[0]
    assert not any(prompt.control for prompt in TracePrediction(control=False).prompts(samples, 0))


def test_an_answer_without_a_trajectory_is_counted(samples):
    values = numbers(TracePrediction(), answered(TracePrediction(), samples, lambda prompt: "no idea"))
    assert values["trajectories that parse"] == 0 and values["LBM k=0"] is None


def test_word_boxes_lie_within_the_picture_and_follow_the_words(samples):
    boxes = true_word_boxes(samples[0])
    assert len(boxes) and ((boxes >= 0) & (boxes <= 1)).all()
    assert len(boxes) <= len(samples[0].caption.split()) + samples[0].caption.count("-")


OBJECT = TracedObject(tuple(COLOURS), SHAPES)


def test_the_traced_object_is_right_only_with_its_colour_and_its_shape(samples):
    truth = answered(OBJECT, samples, lambda prompt: prompt.truth["truth"])
    values = numbers(OBJECT, truth)
    assert values["colour and shape right"] == values["colour right, traces shuffled"] == 1
    half = numbers(OBJECT, answered(OBJECT, samples, lambda prompt: f"A {prompt.truth['colour']} thing."))
    assert (half["colour right"], half["shape right"], half["colour and shape right"]) == (1, 0, 0)
    every = numbers(OBJECT, answered(OBJECT, samples, lambda prompt: " ".join((*COLOURS, *SHAPES))))
    assert every["colour right"] == every["shape right"] == 0


def test_the_control_shows_another_samples_trace_on_this_picture(samples):
    own, control = OBJECT.prompts(samples, 0)
    theirs = OBJECT.prompts(samples, 1)[0]
    trace = {
        p.id: next(x for x in p.conversation.turns[0].parts if isinstance(x, TracePart)) for p in (own, control, theirs)
    }
    np.testing.assert_array_equal(trace[control.id].points, trace[theirs.id].points)
    assert not np.array_equal(trace[control.id].points[:3], trace[own.id].points[:3])
    assert control.truth == own.truth and control.sample.id == own.sample.id
    texts = [[x for x in p.conversation.turns[0].parts if isinstance(x, str)] for p in (own, control)]
    assert texts[0] == texts[1]


def test_true_boxes_are_right_and_shifted_ones_are_not(samples):
    task = ReferBox()
    right = numbers(task, answered(task, samples, lambda prompt: (Box(np.array(prompt.truth["truth"])),)))
    assert right == {"P@0.5": 1.0, "mean IoU": pytest.approx(1)}
    away = numbers(task, answered(task, samples, lambda prompt: (Box(np.array(prompt.truth["truth"]) + 0.5),)))
    assert away["P@0.5"] < 0.2
    assert numbers(task, answered(task, samples, lambda prompt: "nowhere")) == {"P@0.5": 0.0, "mean IoU": 0.0}


def logits_of(mask: np.ndarray) -> Mask:
    """A truth as logits of its own resolution, which interpolation then leaves as it is."""
    return Mask(np.where(mask, 1.0, -1.0))


@pytest.mark.parametrize("task", [ReferSegment(), TraceSegment()], ids=["text", "trace"])
def test_true_masks_score_one_and_none_scores_nothing(task, samples):
    def truth(prompt):
        parts = [part for part in prompt.conversation.turns[-1].parts if isinstance(part, MaskPart)]
        assert parts
        return (Phrase("it"), *(logits_of(part.mask) for part in parts))

    records = answered(task, samples, truth)
    assert numbers(task, records) == {"cIoU": 1.0, "gIoU": 1.0, "answers with a mask": 1.0}
    assert all(record["phrases"] == ["it"] and record["prediction"][0]["size"] == [48, 64] for record in records)
    none = numbers(task, answered(task, samples, lambda prompt: "nothing"))
    assert none == {"cIoU": 0.0, "gIoU": 0.0, "answers with a mask": 0.0}
    full = numbers(task, answered(task, samples, lambda prompt: (Mask(np.ones((1, 4, 4))),)))
    assert 0 < full["cIoU"] < 0.5


def test_what_a_trace_rests_on_is_named_first_where_the_true_answer_does_so(samples):
    processor = tiny.processor()
    (prompt, *_) = TraceSegment().prompts(samples, 0)
    assert prompt.outline is not None
    assert processor.vocabulary.decode(prompt.outline(processor)) == "<|object_ref_start|>"
    spoken = Turn("assistant", ("Here: ", *prompt.conversation.turns[-1].parts))
    question = Question((*prompt.conversation.turns[:-1], spoken), "trace_segment")
    (prompt,) = TraceSegment().prompts(Reworded([dataclasses.replace(samples[0], questions=(question,))]), 0)
    assert prompt.outline is None


def test_masks_of_a_video_are_compared_at_the_frames_that_were_shown():
    config = dataclasses.replace(SCENES, frames=4, questions=("trace_segment",), questions_per_scene=1)
    samples = SyntheticSource(3, 2, config)
    task = ReferSegment()
    (prompt, *_) = task.prompts(samples, 0)
    mask = prompt.conversation.turns[-1].parts[-1].mask
    answer = Answer((1,), (logits_of(mask[[0, 2]]),), (0.0,), "end", "", prompt.sample.size, (0.0, 1.0))
    record = record_of(task, prompt, answer, tiny.processor())
    assert record["intersection"] == record["union"] == int(mask[[0, 2]].sum())


def test_budgets_hold_the_longest_well_formed_answer():
    processor = tiny.processor()
    assert TracePrediction().budget(processor) == 2 * processor.config.max_points + 3
    linked = Processor(processor.vocabulary, dataclasses.replace(processor.config, linked=True))
    assert TracePrediction(phrase_tokens=9).budget(linked) == 2 * processor.config.max_points + 12
    digits = dataclasses.replace(processor.config, coordinates="digits")
    words = dataclasses.replace(tiny.vocabulary(), coordinates="digits")
    assert TracePrediction().budget(Processor(words, digits)) > 2 * processor.config.max_points + 3


def test_an_unknown_benchmark_suggests_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'trace_prediction'"):
        benchmarks.get("trace_predictoin")
    with pytest.raises(UserError, match="'refcoco' cannot be run yet"):
        benchmarks.get("refcoco")
    assert set(benchmarks.BENCHMARKS["ln_coco"].tasks(True)) == {"ln_coco_trace_captioning", "ln_coco_trace_prediction"}


def test_held_out_scenes_are_of_other_seeds_and_of_the_trained_kind():
    val, test = (benchmarks.open_scenes(benchmarks.BenchmarkData(split=split)) for split in ("val", "test"))
    assert val.seed != test.seed and min(val.seed, test.seed) > 10**6
    with pytest.raises(UserError, match="no split 'train'"):
        benchmarks.open_scenes(benchmarks.BenchmarkData(split="train"))
    options = {"seed": 0, "config": to_json(SCENES)}
    assert benchmarks.scenes_of_recipe({"data": {"sources": [{"source": "synthetic", "options": options}]}}) == SCENES
    assert benchmarks.scenes_of_recipe(None) is None and benchmarks.scenes_of_recipe({"data": {"sources": []}}) is None


def test_narratives_say_where_they_are_looked_for(tmp_path):
    ln_coco = benchmarks.get("ln_coco")
    with pytest.raises(UserError, match="--data FOLDER"):
        ln_coco.open(benchmarks.BenchmarkData())
    with pytest.raises(UserError, match="localized_narratives"):
        ln_coco.open(benchmarks.BenchmarkData(folder=tmp_path))


def test_released_narratives_serve_captions_and_traces(tmp_path):
    narratives = export_narratives(SyntheticScenes(5, 3, SCENES), tmp_path, "val")
    ln_coco = benchmarks.get("ln_coco")
    samples = ln_coco.open(benchmarks.BenchmarkData(folder=tmp_path))
    assert len(samples) == 3 and narratives.is_file()
    for task in ln_coco.tasks(False).values():
        prompts = task.prompts(samples, 0)
        assert [prompt.control for prompt in prompts] == [False, True][: len(prompts)]
        assert prompts[0].truth["caption"] == samples[0].caption
    with pytest.raises(UserError, match="no test split of ln_coco"):
        ln_coco.open(benchmarks.BenchmarkData(split="test", folder=tmp_path))
