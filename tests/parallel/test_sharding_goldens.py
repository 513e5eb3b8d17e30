"""The layout of every production recipe is pinned: a change of a rule shows as a readable diff."""

import difflib

import pytest

from configs import registry
from tests.parallel.sharding_goldens import COMMAND, FOLDER, golden, production_recipes, shapes_of
from tracevision_jax.training.ahead_of_time import usual_mesh


def test_every_production_recipe_has_a_golden_and_no_other_is_left_over():
    assert sorted(path.stem for path in FOLDER.glob("*.txt")) == production_recipes()


@pytest.mark.parametrize("name", production_recipes())
def test_the_layout_of_a_production_recipe_is_the_one_that_was_agreed_on(name):
    agreed, now = (FOLDER / f"{name}.txt").read_text(encoding="utf-8"), golden(name)
    changed = "\n".join(difflib.unified_diff(agreed.splitlines(), now.splitlines(), "agreed", "now", lineterm="", n=0))
    assert not changed, f"{name} lies otherwise now; if that is meant: {COMMAND}\n{changed}"


@pytest.mark.parametrize(("rows", "mesh"), [(256, (8, 32, 1, 1)), (128, (4, 32, 2, 1))])
def test_the_usual_mesh_of_256_chips_leaves_the_7b_model_in_whole_tiles(rows, mesh):
    recipe = registry.get("tracevision_7b_stage1_5")
    shapes = shapes_of(registry.system(recipe.system).build(recipe))
    assert usual_mesh(rows, 256, 1, shapes).sizes == mesh
