"""`tracevision train`: recipes, overrides, mistakes, and a whole run on a tiny system."""

import json

import numpy as np
import pytest

from configs import registry
from configs.registry import SystemEntry, TrainingData
from launch.cli import main
from tests.training.tiny import BUCKET, TinyConfig, TinySystem
from tests.training.train_tiny import Records, collate, make_row
from tracevision_jax.training.recipe import CheckpointConfig, DataConfig, SourceEntry, TrainRecipe


def data_of(recipe, system, opened):
    resources = [np.ones((len(records), 6), int) * [[6, 1, 1, 1, 1, 1]] for records in opened]
    return TrainingData(opened, resources, make_row, collate)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A registry that holds the tiny system, a source of numbers and two recipes."""
    for store in ("_recipes", "_systems", "_sources", "_announced"):
        monkeypatch.setattr(registry, store, {})
    monkeypatch.setattr(registry, "_loaded", [True])
    registry.register_system("tiny", SystemEntry(build=lambda recipe: TinySystem(recipe.model), data=data_of))
    registry.register_source("numbers", lambda entry, data: Records())
    registry.announce_source("refcoco", "its reader comes later")
    recipe = {"system": "tiny", "model": TinyConfig(), "stage": "all", "buckets": (BUCKET,), "rows": (4,)}
    numbers = DataConfig(sources=(SourceEntry("numbers"),))
    registry.register(TrainRecipe("tiny_numbers", data=numbers, checkpoint=CheckpointConfig(every=3), **recipe))
    mixture = DataConfig(sources=(SourceEntry("numbers"), SourceEntry("refcoco"), SourceEntry("nubmers")))
    registry.register(TrainRecipe("tiny_mixture", data=mixture, **recipe))


def test_a_recipe_with_overrides_is_trained_and_continued(tmp_path, capsys):
    arguments = ["train", "tiny_numbers", "--out", str(tmp_path), "--model.width", "8", "--epochs", "1.5"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "source numbers_0: 50 records" in first and "drawn" in first
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model"]["width"] == 8 and config["recipe"]["epochs"] == 1.5
    assert main(arguments) == 0
    assert "Continuing from the checkpoint" in capsys.readouterr().out


def test_the_next_run_starts_from_the_folder_of_the_one_before(tmp_path, capsys):
    assert main(["train", "tiny_numbers", "--out", str(tmp_path / "a"), "--steps", "1"]) == 0
    start = ["--init-from", str(tmp_path / "a"), "--stage", "head"]
    assert main(["train", "tiny_numbers", "--out", str(tmp_path / "b"), "--steps", "1", *start]) == 0
    assert f"language: 5 arrays from {tmp_path / 'a'}" in capsys.readouterr().out


def test_a_mistyped_recipe_names_the_nearest(capsys):
    assert main(["train", "tiny_number"]) == 2
    assert "There is no recipe 'tiny_number'. Did you mean 'tiny_numbers'?" in capsys.readouterr().err


def test_a_mistyped_flag_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "tiny_numbers", "--mesh.fdsp", "2"])
    assert stop.value.code == 2
    assert "--mesh.fsdp" in capsys.readouterr().err


def test_sources_that_cannot_be_read_are_all_named_before_anything_is_built(capsys):
    assert main(["train", "tiny_mixture"]) == 2
    message = capsys.readouterr().err
    assert "source 'refcoco' cannot be read yet: its reader comes later" in message
    assert "there is no source 'nubmers'. Did you mean 'numbers'?" in message


def test_a_mesh_that_does_not_fit_is_refused_at_start(tmp_path, capsys):
    assert main(["train", "tiny_numbers", "--mesh.fsdp", "7", "--out", str(tmp_path)]) == 2
    assert "needs a multiple of 7 devices" in capsys.readouterr().err


def test_help_lists_recipes_and_the_fields_of_one(capsys):
    for arguments, expected in (
        (["train", "--help"], "tiny_mixture"),
        (["train", "tiny_numbers", "-h"], "--mesh.fsdp"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out


def test_two_recipes_of_one_name_are_a_defect():
    with pytest.raises(ValueError, match="two recipes are named"):
        registry.register(TrainRecipe("tiny_numbers", steps=7))
