"""Recipes: faults named at once, differences named by field."""

import dataclasses

import pytest

from tests.training.tiny import BUCKET
from tracevision_jax.errors import UserError
from tracevision_jax.parallel.mesh import MeshConfig
from tracevision_jax.systems.config_json import to_json
from tracevision_jax.training.optimizer import OptimizerConfig
from tracevision_jax.training.recipe import DataConfig, SourceEntry, TrainRecipe, check, differences

RECIPE = TrainRecipe(name="x", buckets=(BUCKET,), data=DataConfig(sources=(SourceEntry("scenes"),)))


def test_all_faults_of_a_recipe_are_named_at_once():
    faulty = dataclasses.replace(RECIPE, steps=-1, accumulation=0, rows=(4, 4), log_every=0)
    with pytest.raises(UserError, match=r"'x' cannot be run: steps .*; accumulation .*; rows has 2 .*; log_every"):
        check(faulty)
    check(RECIPE)


def test_moments_of_adafactor_are_refused():
    faulty = dataclasses.replace(RECIPE, optimizer=OptimizerConfig(method="adafactor", moments="bfloat16"))
    with pytest.raises(UserError, match=r"optimizer\.moments is of adamw and muon"):
        check(faulty)


def test_differences_are_named_by_field_and_leave_out_what_changes_nothing():
    other = dataclasses.replace(
        RECIPE,
        data=dataclasses.replace(RECIPE.data, seed=5, workers=9),
        mesh=MeshConfig(fsdp=8),
        log_every=50,
        out="elsewhere",
    )
    assert differences(to_json(other), to_json(RECIPE)) == ["data.seed: 5, was 0"]
    assert differences(to_json(RECIPE), to_json(RECIPE)) == []
