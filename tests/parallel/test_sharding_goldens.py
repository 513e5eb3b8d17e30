"""The layout of every production recipe is pinned: a change of a rule shows as a readable diff."""

import dataclasses
import difflib

import jax
import pytest

from configs import registry
from tests.parallel.sharding_goldens import COMMAND, FOLDER, MESH, golden, production_recipes, shapes_of
from tracevision_jax.training.ahead_of_time import usual_mesh
from tracevision_jax.training.layout import stage_layout
from tracevision_jax.training.optimizer import make_optimizer


def test_every_production_recipe_has_a_golden_and_no_other_is_left_over():
    assert sorted(path.stem for path in FOLDER.glob("*.txt")) == production_recipes()


@pytest.mark.parametrize("name", production_recipes())
def test_the_layout_of_a_production_recipe_is_the_one_that_was_agreed_on(name):
    agreed, now = (FOLDER / f"{name}.txt").read_text(encoding="utf-8"), golden(name)
    changed = "\n".join(difflib.unified_diff(agreed.splitlines(), now.splitlines(), "agreed", "now", lineterm="", n=0))
    assert not changed, f"{name} lies otherwise now; if that is meant: {COMMAND}\n{changed}"


def kept_by_the_72b(**optimizer):
    """Leaves of the optimizer's state of stage 1.5, as shapes with layouts."""
    recipe = registry.get("tracevision_72b_stage1_5")
    recipe = dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, **optimizer))
    system = registry.system(recipe.system).build(recipe)
    layout = stage_layout(system, recipe, make_optimizer(recipe.optimizer, 1), shapes_of(system), MESH)
    return jax.tree.leaves(layout.state.optimizer)


def size(leaves):
    """Bytes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def test_less_optimizer_state_for_72b_is_half_or_nearly_nothing_and_nothing_large_is_whole():
    adamw, half, adafactor = (
        kept_by_the_72b(**kind) for kind in ({}, {"moments": "bfloat16"}, {"method": "adafactor"})
    )
    assert size(half) == pytest.approx(size(adamw) / 2, rel=1e-6)
    assert size(adafactor) < 0.0002 * size(adamw)
    whole = [leaf for leaf in adafactor if not any(leaf.sharding.spec)]
    assert max(leaf.size for leaf in whole) <= 80 * 8192  # the norms' scales of all layers, which are whole themselves
    assert size(whole) < 13e6


@pytest.mark.parametrize(("rows", "mesh"), [(256, (8, 32, 1, 1)), (128, (4, 32, 2, 1))])
def test_the_usual_mesh_of_256_chips_leaves_the_7b_model_in_whole_tiles(rows, mesh):
    recipe = registry.get("tracevision_7b_stage1_5")
    shapes = shapes_of(registry.system(recipe.system).build(recipe))
    assert usual_mesh(rows, 256, 1, shapes).sizes == mesh
