"""`tracevision compile`: mistakes are told before anything is compiled; with libtpu, a whole report and a search."""

import importlib.util
import json

import pytest

from configs import registry
from configs.registry import SystemEntry
from launch.cli import main
from tests.training.tiny import BUCKET, TinyConfig, TinySystem
from tracevision_jax.training.recipe import TrainRecipe

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jax[tpu]'"
)

needs_cuda = pytest.mark.skipif(
    not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)),
    reason="jax's CUDA plugin is not installed: pip install 'jax[cuda12]'",
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """A registry that holds the tiny system and one recipe."""
    for store in ("_recipes", "_systems"):
        monkeypatch.setattr(registry, store, {})
    monkeypatch.setattr(registry, "_loaded", [True])
    registry.register_system("tiny", SystemEntry(build=lambda recipe: TinySystem(recipe.model), data=lambda *_: None))
    recipe = {"system": "tiny", "model": TinyConfig(), "stage": "all", "buckets": (BUCKET,), "rows": (8,)}
    registry.register(TrainRecipe("tiny_numbers", **recipe))


def told(capsys, *arguments: str) -> str:
    """The message of a mistake."""
    assert main(["compile", *arguments]) == 2
    return capsys.readouterr().err


def test_an_unknown_topology_names_the_nearest(capsys):
    assert "Did you mean 'v5p'?" in told(capsys, "tiny_numbers", "--topology", "v5x:8x8x4")


def test_an_unknown_recipe_names_the_nearest(capsys):
    assert "Did you mean 'tiny_numbers'?" in told(capsys, "tiny_number", "--topology", "v5e:2x2")


def test_a_bucket_that_is_not_there_is_refused(capsys):
    message = told(capsys, "tiny_numbers", "--topology", "v5e:2x2", "--bucket", "1")
    assert "--bucket is 1; tiny_numbers has 1, numbered from 0" in message


def test_flags_of_the_optimizer_replace_the_recipes(capsys):
    flags = ("--optimizer.method", "adafactor", "--optimizer.moments", "bfloat16")
    assert "optimizer.moments is of adamw and muon" in told(capsys, "tiny_numbers", "--topology", "v5e:2x2", *flags)


def test_a_mesh_that_does_not_fit_is_refused_with_the_nearest_before_anything_is_compiled(capsys, monkeypatch):
    def never(*_):
        raise AssertionError("devices were asked for")

    monkeypatch.setattr("tracevision_jax.parallel.topologies.open_devices", never)
    message = told(capsys, "tiny_numbers", "--topology", "v5e:2x2", "--mesh.fsdp", "3")
    assert "The nearest mesh that fits 4 chips and 8 rows" in message
    message = told(capsys, "tiny_numbers", "--topology", "v5e:2x2", "--mesh.fsdp", "4", "--rows", "6")
    assert "6 rows a batch cannot be shared" in message and "--mesh.fsdp 2 --mesh.tensor 2" in message


def test_slices_that_do_not_fit_are_refused_with_the_nearest_that_do(capsys):
    asked = ["tiny_numbers", "--topology", "v5e:2x2", "--slices", "2"]
    message = told(capsys, *asked, "--mesh.data", "4", "--mesh.fsdp", "2", "--mesh.dcn.data", "4")
    assert (
        "--mesh.dcn.data 4 does not fit 2 slices" in message and "fits: --mesh.dcn.data 2 --mesh.dcn.fsdp 1" in message
    )
    message = told(capsys, *asked, "--mesh.tensor", "8", "--mesh.data", "1", "--mesh.fsdp", "1")
    assert "2 slices cannot be shared" in message and "The nearest mesh that fits 8 chips and 8 rows" in message


def test_a_pattern_without_a_frozen_parameter_is_refused_before_anything_is_compiled(capsys):
    message = told(capsys, "tiny_numbers", "--topology", "v5e:2x2", "--frozen-whole", "language/")
    assert "stage 'all' keeps frozen" in message and "It freezes nothing" in message


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_it_says_what_to_install(capsys):
    assert "pip install 'jax[tpu]'" in told(capsys, "tiny_numbers", "--topology", "v5e:2x2")


@needs_libtpu
def test_a_step_is_compiled_for_chips_that_are_not_here(capsys, tmp_path):
    file = tmp_path / "report.json"
    assert main(["compile", "tiny_numbers", "--topology", "v5e:2x2", "--mesh.fsdp", "4", "--json", str(file)]) == 0
    said = capsys.readouterr()
    assert "fits" in said.out and "MFU" in said.out and "writes no answers" in said.err
    (outcome,) = json.loads(file.read_text())["outcomes"]
    assert outcome["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1, "context": 1}
    assert outcome["executed_flops"] * 4 >= outcome["model_flops"]
    assert outcome["collectives"] and all(line["axes"] == "fsdp" for line in outcome["collectives"])


@needs_libtpu
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_only_sums_and_gathers_along_the_declared_axis_leave_a_slice(axis, tmp_path):
    file = tmp_path / "report.json"
    asked = ["compile", "tiny_numbers", "--topology", "v5e:2x2", "--slices", "2", "--json", str(file)]
    assert main([*asked, "--mesh.data", "2", "--mesh.fsdp", "4", f"--mesh.dcn.{axis}", "2"]) == 0
    (outcome,) = json.loads(file.read_text())["outcomes"]
    inside = {line["axes"] for line in outcome["collectives"]} - {"slices"}
    assert "slices" in {line["axes"] for line in outcome["collectives"]}
    assert ("data" in inside) == (axis == "fsdp"), inside  # across the slices nothing of data is left inside


@needs_cuda
def test_a_step_is_compiled_for_gpus_that_are_not_here(tmp_path):
    file = tmp_path / "report.json"
    assert main(["compile", "tiny_numbers", "--topology", "a100:2x2", "--mesh.fsdp", "4", "--json", str(file)]) == 0
    (outcome,) = json.loads(file.read_text())["outcomes"]
    assert outcome["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1, "context": 1}
    assert outcome["executed_flops"] * 4 >= outcome["model_flops"] and not outcome["uncounted"]


@needs_libtpu
def test_a_search_prints_the_best_and_goes_on_where_it_was(capsys, tmp_path):
    asked = ["compile", "tiny_numbers", "--topology", "v5e:2x2", "--search", "--out", str(tmp_path / "found.jsonl")]
    asked += ["--rows-per-chip", "1", "--remats", "full", "--tensors", "1"]
    assert main(asked) == 0
    first = capsys.readouterr()
    assert "--rows 4 --remat full" in first.out and "[1/1]" in first.err
    assert main(asked) == 0
    assert "known" in capsys.readouterr().err
    assert main([*asked, "--optimizer.method", "adafactor"]) == 0
    assert "known" not in capsys.readouterr().err
