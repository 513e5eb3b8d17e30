"""The layout of a stage: frozen parameters that are whole along fsdp, by name, in a step, and over a checkpoint."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest

from configs import registry
from tests.on_devices import printed_on
from tests.parallel.sharding_goldens import MESH, shapes_of
from tests.training.tiny import BUCKET, TinySystem
from tracevision_jax.errors import UserError
from tracevision_jax.training.layout import stage_layout, stage_rules
from tracevision_jax.training.optimizer import make_optimizer
from tracevision_jax.training.parameters import flatten
from tracevision_jax.training.recipe import TrainRecipe, check

QUICK = "--xla_backend_optimization_level=0"


@functools.cache
def laid_out(*frozen_whole: str) -> tuple[dict, dict, list]:
    """Mesh axes by path of what the 7B model's stage 1 trains on 256 chips, of what it freezes, and of the moments."""
    recipe = dataclasses.replace(registry.get("tracevision_7b_stage1"), frozen_whole=frozen_whole)
    system = registry.system(recipe.system).build(recipe)
    layout = stage_layout(system, recipe, make_optimizer(recipe.optimizer, 1), shapes_of(system), MESH)
    trained, frozen = (
        {path: tuple(leaf.sharding.spec) for path, leaf in flatten(tree).items()}
        for tree in (layout.state.trained, layout.frozen)
    )
    return trained, frozen, [tuple(leaf.sharding.spec) for leaf in jax.tree.leaves(layout.state.optimizer)]


def test_a_frozen_tower_is_whole_along_fsdp_and_cut_along_tensor_and_nothing_else_moves():
    (trained, cut, moments), (other_trained, whole, other_moments) = laid_out(), laid_out("vision/")
    assert other_trained == trained and other_moments == moments
    moved = {path for path, spec in whole.items() if spec != cut[path]}
    assert moved == {path for path, spec in cut.items() if "vision/" in path and "fsdp" in spec}
    qkv = "host/vision/groups/window/attn/qkv/kernel"
    assert cut[qkv] == (None, None, "fsdp", None, "tensor", None)
    assert whole[qkv] == (None, None, None, None, "tensor", None)
    assert whole["host/vision/groups/window/mlp/down/kernel"] == (None, None, "tensor", None)
    assert whole["host/vision/patch_embed/kernel"] == (None, None)
    assert whole["host/language/layers/mlp/up/kernel"] == (None, "fsdp", "tensor")


def test_what_a_stage_trains_is_cut_whatever_the_patterns_find():
    (trained, *_), (other_trained, whole, _) = laid_out(), laid_out("vision/|tvp/|language/")
    assert other_trained == trained and any("fsdp" in spec for spec in trained.values())
    assert not any("fsdp" in spec for spec in whole.values())


@pytest.mark.parametrize(
    ("stage", "pattern", "message"),
    [
        ("head", "langauge/layers", r"frozen_whole 'langauge/layers' finds no .* Did you mean 'language/layers'\?"),
        ("head", "layers/mlp/upp", r"The nearest frozen paths: language/layers/mlp/up/kernel, "),
        ("head", "tvp/", r"stage 'head' keeps frozen: it trains all that the pattern finds"),
        ("all", "embed", r"It freezes nothing"),
    ],
)
def test_a_pattern_that_finds_nothing_frozen_is_refused_with_the_nearest_paths(stage, pattern, message):
    system = TinySystem()
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    with pytest.raises(UserError, match=message):
        stage_rules(system, TrainRecipe("x", stage=stage, frozen_whole=("embed/", pattern)[stage == "all" :]), shapes)


def test_a_pattern_that_cannot_be_read_is_a_fault_of_the_recipe():
    with pytest.raises(UserError, match=r"frozen_whole 'vision\(' is no regular expression"):
        check(TrainRecipe("x", buckets=(BUCKET,), frozen_whole=("vision(",)))


def of_tower(origin: str) -> bool:
    """Whether a collective is of the vision tower, by the name of a product or of the argument that it gathers."""
    return re.search(r"\bvision\b", origin) is not None


@pytest.mark.slow
def test_a_whole_tower_gives_the_same_loss_and_gradient_and_is_gathered_no_more():
    found = printed_on(4, "tests.training.frozen_whole", "step", flags=QUICK)
    ours, theirs = found["losses"]
    assert abs(ours - theirs) <= 1e-5 * abs(ours) and found["gradient"] <= 1e-5, found
    assert found["shares"][0] < found["shares"][1] < 1  # one holds more, and still cut over tensor
    cut, whole = ([origin for origin in origins if of_tower(origin)] for origins in found["gathered"])
    assert len(cut) >= 12 and whole == []
    rest = [sorted(origin for origin in origins if not of_tower(origin)) for origins in found["gathered"]]
    assert rest[0] == rest[1] and rest[0]


def test_a_run_goes_on_with_the_other_layout(tmp_path):
    found = printed_on(4, "tests.training.frozen_whole", str(tmp_path), flags=QUICK)
    assert len(set(map(tuple, found["stops"].values()))) == 1, found["stops"]
    cut, whole = "- fsdp tensor", "- - tensor"
    assert found["places"] == {"still": [cut, cut], "to_whole": [cut, whole], "to_cut": [whole, cut]}
    still = np.array(found["parameters"]["still"])
    for name in ("to_whole", "to_cut"):
        error = np.linalg.norm(np.array(found["parameters"][name]) - still) / np.linalg.norm(still)
        assert error <= 1e-5, (name, error)
