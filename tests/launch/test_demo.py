"""`tracevision demo`: its held-out scenes, bad flags, and the whole way with a step or two a stage."""

import json
from pathlib import Path

import numpy as np
import pytest

from launch import demo
from tracevision_jax.errors import UserError


@pytest.mark.parametrize("flags", [{"length": 0.0}, {"length": -1.0}, {"samples": 0}])
def test_flags_out_of_range_are_refused_before_anything_is_written(tmp_path, flags):
    with pytest.raises(UserError, match="--length must be positive and --samples at least 1"):
        demo.run(demo.Args(out=tmp_path / "run", **flags))
    assert not (tmp_path / "run").exists()


def test_held_out_scenes_go_through_the_released_format_and_its_reader(tmp_path):
    from configs.benchmarks import QUESTIONS

    scenes = demo.held_out_scenes(tmp_path, 3)
    assert len(scenes) == 3
    for index in range(3):
        sample = scenes[index]
        assert sample.frames.shape == (1, 96, 96, 3)
        assert sample.caption and len(np.concatenate(sample.strokes)) > 10
        assert {question.kind for question in sample.questions} == set(QUESTIONS)
        assert len(sample.regions) >= 2 and all(region.mask is not None for region in sample.regions)


@pytest.mark.parametrize(("family", "watching"), [("demo", ["stage1_5"]), ("long", ["stage0", "stage1_5"])])
def test_no_recipe_trains_on_held_out_seeds(family, watching):
    from configs import registry

    evaluated = []
    for stage in demo.STAGES:
        recipe = registry.get(f"tracevision_{family}_{stage}")
        trained = {source.options["seed"] for source in recipe.data.sources}
        watched = {source.options["seed"] for source in recipe.evaluation.sources}
        assert max(trained) < 1_000_000 <= min(watched, default=1_000_000)
        assert demo.HELD_OUT_SEED not in watched and demo.HELD_OUT_SEED + 1 not in watched
        evaluated += [stage] * bool(watched)
    assert evaluated == watching, "the stages of many steps"


def test_the_demo_trains_evaluates_reports_and_continues(tmp_path, capsys):
    args = demo.Args(out=tmp_path / "run", length=0.004, samples=3)
    assert demo.run(args) == 0
    report = tmp_path / "run" / "report"
    page = (report / "index.html").read_text()
    metrics = json.loads((report / "metrics.json").read_text())
    assert set(metrics["seconds"]) >= {*demo.STAGES, "evaluation"}
    assert metrics["samples"] == 3 and set(metrics["targets"])
    for stage in demo.STAGES:
        lines = (tmp_path / "run" / stage / "metrics.jsonl").read_text().splitlines()
        assert lines and (tmp_path / "run" / stage / "model" / "config.json").is_file()
    assert list(report.glob("images/*")) and "<svg" in page
    said = capsys.readouterr().out
    assert said.count("(target") == len(metrics["targets"]) and f"report: {report / 'index.html'}" in said

    written = {path: path.stat().st_mtime_ns for path in Path(tmp_path / "run").glob("stage*/model/config.json")}
    assert demo.run(args) == 0  # everything is there already: nothing is trained again
    assert written == {path: path.stat().st_mtime_ns for path in written}
