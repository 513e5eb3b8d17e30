"""The loop on a tiny system: files, continuation, refusals, evaluation."""

import dataclasses
import io
import json
import os
import resource
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from rich.console import Console

from tests.training.tiny import BUCKET, TinySystem, random_batch
from tracevision_jax.errors import UserError
from tracevision_jax.parallel.mesh import MeshConfig
from tracevision_jax.training.loop import EMPTY_LIMIT, fit
from tracevision_jax.training.optimizer import OptimizerConfig
from tracevision_jax.training.parameters import flatten
from tracevision_jax.training.recipe import CheckpointConfig, EvaluationConfig, TrainRecipe
from tracevision_jax.training.source import BadRecordReport, StepBatch
from tracevision_jax.weights.model_directory import load_model

RECIPE = TrainRecipe(
    name="tiny",
    system="tiny",
    stage="head",
    buckets=(BUCKET,),
    rows=(4,),
    optimizer=OptimizerConfig(learning_rate=1e-2),
    checkpoint=CheckpointConfig(every=4),
)


class Source:
    """Random batches by step number; may raise a signal, or hold bad records, at given steps."""

    rows, buckets, fingerprint = (4,), (BUCKET,), "random"

    def __init__(self, steps=10, interrupt_at=None, bad_at=None, empty=False):
        self.steps, self.interrupt_at, self.bad_at, self.empty = steps, interrupt_at, bad_at, empty

    def describe(self):
        return "random batches"

    def batches(self, start):
        for step in range(start, self.steps):
            if step == self.interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)
            bad = (BadRecordReport(step, "source", 7, "torn file", "a.jpg"),) if step == self.bad_at else ()
            batch = random_batch(4, step)
            if self.empty:
                batch = jax.tree.map(np.zeros_like, batch)
                bad = (BadRecordReport(step, "source", step, "no file", "b.jpg"),)
            yield StepBatch(step, 0, BUCKET, batch, bad)


def run(directory, recipe=RECIPE, source=None, **arguments):
    """fit, with what it prints."""
    text = io.StringIO()
    console = Console(file=text, width=200)
    summary = fit(TinySystem(), recipe, source or Source(), directory, console=console, **arguments)
    return summary, text.getvalue()


def lines_of(directory, kind, file="metrics.jsonl"):
    lines = [json.loads(line) for line in (directory / file).read_text().splitlines()]
    return [line for line in lines if line.get("kind", kind) == kind]


def params_of(directory):
    return flatten(load_model(directory / "model")[1])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: (folder, summary, printed text)."""
    directory = tmp_path_factory.mktemp("run")
    return directory, *run(directory)


def test_a_run_leaves_a_model_checkpoints_metrics_and_a_board(finished):
    directory, summary, text = finished
    assert summary.finished and summary.step == 10 and summary.model == directory / "model"
    assert [line["step"] for line in lines_of(directory, "train")] == list(range(1, 11))
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == [
        "step_00000004",
        "step_00000008",
        "step_00000010",
    ]
    assert list((directory / "tensorboard").glob("events*"))
    config, _ = load_model(directory / "model")
    assert config["system"] == "tiny" and config["model"]["width"] == 16
    assert "stage 'head' trains 563 of 3,155 parameters" in text


def test_a_line_shows_loss_parts_speed_and_what_is_left(finished):
    _, _, text = finished
    line = next(line for line in text.splitlines() if line.startswith("step  5/10"))
    for word in ("loss", "text", "points", "grad", "lr", "tok/s", "s/step", "ETA"):
        assert word in line


def test_frozen_parameters_leave_as_they_came(finished):
    directory, _, _ = finished
    drawn = flatten(jax.jit(TinySystem().init)(jax.random.key(0)))
    moved = {path for path, leaf in params_of(directory).items() if not np.array_equal(leaf, drawn[path])}
    assert moved == {"language/head/kernel", "tvp/points/kernel", "tvp/points/bias"}


def test_an_interrupted_run_saves_says_so_and_ends_in_the_same_bits(finished, tmp_path):
    whole, _, _ = finished
    summary, text = run(tmp_path, source=Source(interrupt_at=5))
    assert not summary.finished and summary.interrupted == "SIGINT" and summary.model is None
    assert "the same command again continues from there" in text
    stopped_at = summary.step
    summary, text = run(tmp_path)
    assert f"Continuing from the checkpoint of step {stopped_at}" in text
    assert [line["step"] for line in lines_of(tmp_path, "train")] == list(range(1, 11))
    for path, leaf in params_of(whole).items():
        np.testing.assert_array_equal(params_of(tmp_path)[path], leaf, err_msg=path)


@pytest.mark.parametrize("kind", [{"moments": "bfloat16"}, {"method": "adafactor"}])
def test_a_run_of_small_optimizer_state_is_continued_to_the_same_bits(kind, tmp_path):
    recipe = dataclasses.replace(RECIPE, stage="all", optimizer=OptimizerConfig(learning_rate=1e-2, **kind))
    run(tmp_path / "whole", recipe)
    assert not run(tmp_path / "parted", recipe, Source(interrupt_at=5))[0].finished
    assert run(tmp_path / "parted", recipe)[0].finished
    for path, leaf in params_of(tmp_path / "whole").items():
        np.testing.assert_array_equal(params_of(tmp_path / "parted")[path], leaf, err_msg=path)


def test_the_same_command_after_the_end_leaves_the_model_as_it_is(finished):
    directory, _, _ = finished

    def files():
        return {path: path.stat().st_mtime_ns for path in sorted((directory / "model").rglob("*")) if path.is_file()}

    before, evaluated = files(), []
    summary, _ = run(directory, evaluators={"held out": lambda params, step: evaluated.append(step) or {}})
    assert summary.finished and summary.model == directory / "model"
    assert before and files() == before and not evaluated


def test_a_finished_run_whose_model_is_gone_exports_it_again(finished, tmp_path):
    directory, _, _ = finished
    shutil.copytree(directory / "checkpoints", tmp_path / "checkpoints")
    assert run(tmp_path)[0].finished
    for path, leaf in params_of(directory).items():
        np.testing.assert_array_equal(params_of(tmp_path)[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    ("recipe", "source", "message"),
    [
        (dataclasses.replace(RECIPE, seed=3), None, r"another run.*seed: 3, was 0"),
        (RECIPE, Source(steps=12), r"steps of the plan: 12, was 10"),
    ],
)
def test_a_folder_of_another_run_is_not_continued(finished, recipe, source, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        run(finished[0], recipe, source)


def test_what_changes_no_batch_and_no_formula_may_change_between_sessions(finished):
    recipe = dataclasses.replace(RECIPE, log_every=5, checkpoint=CheckpointConfig(every=7, keep=9))
    assert run(finished[0], recipe)[0].finished


def test_evaluators_run_every_n_steps_and_at_the_end(tmp_path):
    seen = []

    def evaluate(params, step):
        seen.append((step, "language" in params, "tvp" in params))
        return {"score": step / 10, "picture": np.zeros((4, 6, 3), np.uint8)}

    recipe = dataclasses.replace(RECIPE, evaluation=EvaluationConfig(every=4))
    summary, text = run(tmp_path, recipe, evaluators={"held_out": evaluate})
    assert seen == [(4, True, True), (8, True, True), (10, True, True)]
    values = [(line["step"], line["values"]) for line in lines_of(tmp_path, "evaluation")]
    assert values == [(4, {"score": 0.4}), (8, {"score": 0.8}), (10, {"score": 1.0})]
    assert summary.evaluations == {"held_out": {"score": 1.0}}
    assert "evaluation 'held_out' at step 8" in text


def test_bad_records_are_written_down_and_the_run_goes_on(tmp_path):
    summary, text = run(tmp_path, source=Source(steps=4, bad_at=2))
    assert summary.finished
    report = {"step": 2, "source": "source", "record": 7, "reason": "torn file", "file": "a.jpg"}
    assert lines_of(tmp_path, "bad", "bad_records.jsonl") == [report]
    assert "torn file (a.jpg)" in text


def test_data_without_one_usable_record_ends_the_run_with_the_reason(tmp_path):
    with pytest.raises(UserError, match=f"{EMPTY_LIMIT} batches in a row .* no file"):
        run(tmp_path, source=Source(steps=50, empty=True))


def test_lines_average_over_the_steps_between_them(finished, tmp_path):
    recipe = dataclasses.replace(RECIPE, log_every=5)
    run(tmp_path, recipe)
    every, sparse = lines_of(finished[0], "train"), lines_of(tmp_path, "train")
    assert [line["step"] for line in sparse] == [5, 10]
    assert sparse[0]["loss"] == pytest.approx(np.mean([line["loss"] for line in every[:5]]))


def test_the_next_stage_starts_from_the_model_with_a_new_optimizer(finished, tmp_path):
    recipe = dataclasses.replace(RECIPE, stage="all", init_from=str(finished[0] / "model"))
    recipe = dataclasses.replace(recipe, optimizer=OptimizerConfig(learning_rate=0.0))
    summary, text = run(tmp_path, recipe, Source(steps=1))
    assert summary.finished
    assert "language: 5 arrays from" in text and "drawn" not in text
    for path, leaf in params_of(finished[0]).items():
        np.testing.assert_array_equal(params_of(tmp_path)[path], leaf)


class FullDisk(Source):
    """Random batches; after the first checkpoint the disk is full: no file may grow past 16 KiB, as checkpoints do."""

    def __init__(self, at, first):
        super().__init__()
        self.at, self.first = at, first

    def batches(self, start):
        for item in super().batches(start):
            if item.step == self.at:
                while not (self.first / "sha256.json").exists():
                    time.sleep(0.01)
                resource.setrlimit(resource.RLIMIT_FSIZE, (2**14, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            yield item


def test_a_full_disk_ends_the_run_with_advice_and_with_room_it_ends_in_the_same_bits(tmp_path):
    recipe = dataclasses.replace(RECIPE, stage="all")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError, match=r"step 8 could not be written.*newest is of step 4"):
            run(tmp_path / "full", recipe, FullDisk(6, tmp_path / "full" / "checkpoints" / "step_00000004"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    summary, text = run(tmp_path / "full", recipe)
    assert summary.finished and "Continuing from the checkpoint of step 4" in text
    run(tmp_path / "whole", recipe)
    for path, leaf in params_of(tmp_path / "whole").items():
        np.testing.assert_array_equal(params_of(tmp_path / "full")[path], leaf, err_msg=path)


def test_the_best_evaluation_is_saved_and_kept(tmp_path):
    best = CheckpointConfig(every=4, keep=1, keep_best=1, metric="held_out/score", best="max")
    recipe = dataclasses.replace(RECIPE, checkpoint=best, evaluation=EvaluationConfig(every=3))
    scores = {3: 0.5, 6: 0.9, 9: 0.7, 10: 0.8}
    run(tmp_path, recipe, evaluators={"held_out": lambda params, step: {"score": scores[step]}})
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*")) == ["step_00000006", "step_00000010"]


def test_a_metric_that_no_evaluation_gives_is_named(tmp_path):
    recipe = dataclasses.replace(RECIPE, checkpoint=CheckpointConfig(keep_best=1, metric="held_out/iou"))
    recipe = dataclasses.replace(recipe, evaluation=EvaluationConfig(every=2))
    with pytest.raises(UserError, match="the evaluation gave held_out/score"):
        run(tmp_path, recipe, evaluators={"held_out": lambda params, step: {"score": 1.0}})


def test_the_chosen_steps_are_traced_and_all_time_is_accounted_for(tmp_path):
    recipe = dataclasses.replace(RECIPE, profile="2:3", evaluation=EvaluationConfig(every=4))
    began = time.perf_counter()
    evaluators = {"slow": lambda params, step: time.sleep(0.3) or {"score": 0.0}}
    summary, text = run(tmp_path, recipe, Source(steps=4), evaluators=evaluators, began=began)
    wall = time.perf_counter() - began
    assert list((tmp_path / "profile").rglob("*.xplane.pb")) and "profile of the steps" in text
    seconds = summary.seconds
    assert 0.95 * wall < sum(seconds.values()) <= wall
    assert all(seconds[part] > 0 for part in ("useful", "start", "compile", "input", "save", "export"))
    assert seconds["evaluation"] >= 0.3 and seconds["rejected"] == seconds["lost"] == 0
    assert "in useful steps" in text
    assert lines_of(tmp_path, "goodput")[0]["goodput"]["compile"] == pytest.approx(seconds["compile"], abs=1e-3)


def test_a_profile_that_cannot_be_is_refused_at_start(tmp_path):
    with pytest.raises(UserError, match="FIRST:LAST"):
        run(tmp_path, dataclasses.replace(RECIPE, profile="7"))


@pytest.mark.parametrize("refused", [{"init_from": "/nowhere/model"}, {"mesh": MeshConfig(fsdp=7)}], ids=str)
def test_a_refused_start_leaves_nothing_behind(tmp_path, refused):
    with pytest.raises(UserError):
        run(tmp_path / "run", dataclasses.replace(RECIPE, **refused))
    assert not (tmp_path / "run").exists()
