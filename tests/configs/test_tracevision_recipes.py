"""The recipes of TraceVision: what they say at start, and that each stage fits the one before it."""

import jax
import pytest

from configs import registry
from launch.cli import main
from tracevision_jax.training.parameters import flatten

STAGES = ("stage1", "stage1_5", "stage2")
MISSING = {
    "stage1_5": ("video_localized_narratives", "panoptic_narrative_grounding", "refcoco"),
    "stage2": ("riln", "reasoning_segmentation", "coco_interactive"),
}


@pytest.mark.parametrize("stage", MISSING)
def test_sources_whose_readers_come_later_are_named_at_start(stage, tmp_path, capsys):
    assert main(["train", f"tracevision_7b_{stage}", "--data.root", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    for source in MISSING[stage]:
        assert f"source '{source}' cannot be read yet: " in message
    assert not (tmp_path / "run").exists(), "nothing is written before the data can be had"


def test_stage_1_at_the_papers_size_names_the_folder_that_is_not_there(tmp_path, capsys):
    assert main(["train", "tracevision_7b_stage1", "--data.root", str(tmp_path / "none")]) == 2
    assert f"no folder {tmp_path / 'none'}" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["7b", "demo"])
def test_every_stage_has_the_parameters_of_the_one_before(size):
    stages = (("stage0",) if size == "demo" else ()) + STAGES
    recipes = [registry.get(f"tracevision_{size}_{stage}") for stage in stages]
    shapes = []
    for recipe in recipes:
        system = registry.system(recipe.system).build(recipe)
        made = jax.eval_shape(system.init, jax.random.key(0))
        shapes.append({path: leaf.shape for path, leaf in flatten(made).items()})
    assert all(shape == shapes[0] for shape in shapes[1:])
    assert [recipe.stage for recipe in recipes] == list(stages)
