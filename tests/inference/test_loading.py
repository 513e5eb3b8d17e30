"""Directories to models: ours, folders of runs, hosts alone; and what is wrong with the others."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import tracevision_jax as tv
from tests.conftest import ROOT
from tests.inference import tiny
from tracevision_jax.errors import UserError
from tracevision_jax.inference.loading import find_model, fingerprint, read_checkpoint, save
from tracevision_jax.parallel.mesh import MeshConfig
from tracevision_jax.weights import qwen25vl
from tracevision_jax.weights.model_directory import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A run's folder with an exported model."""
    folder = tmp_path_factory.mktemp("run")
    save(folder / "model", tiny.system(), tiny.params(), tiny.vocabulary(), {"name": "tiny"})
    return folder / "model"


@pytest.fixture
def copied(model, tmp_path):
    """A copy to damage."""
    return shutil.copytree(model, tmp_path / "model")


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A released Qwen2.5-VL's files, tiny."""
    folder = tmp_path_factory.mktemp("host") / "qwen"
    config = tiny.plain_host()
    qwen25vl.save(folder, tiny.host_params(), config)
    tiny.vocabulary().save(folder)
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "min_pixels": 256, "max_pixels": 1024}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes))
    return folder


def assert_equal_trees(left, right) -> None:
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_importing_the_package_loads_nothing():
    code = "import sys, tracevision_jax as tv; assert 'load' in dir(tv); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert tv.UserError is UserError
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = tv.laod


def test_what_was_saved_is_loaded(model):
    read = read_checkpoint(model)
    assert read.system.config == tiny.system().config and read.drawn == () and read.recipe == {"name": "tiny"}
    assert_equal_trees(read.params, tiny.params())
    assert read.vocabulary.encode("the blue square") == tiny.vocabulary().encode("the blue square")
    assert read.vocabulary.size == tiny.vocabulary().size
    assert find_model(model.parent) == model == find_model(model)


def test_precision_and_devices_can_be_chosen(model):
    read = read_checkpoint(model, dtype="bfloat16", mesh=MeshConfig(data=1))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(read.params)} == {"bfloat16"}
    assert read.system.config.host.language.dtype == "bfloat16" == read.system.config.host.vision.param_dtype
    assert read.mesh is not None
    assert all(leaf.sharding.mesh == read.mesh for leaf in jax.tree.leaves(read.params))
    with pytest.raises(UserError, match="dtype is 'half', must be one of float32, bfloat16, float16"):
        read_checkpoint(model, dtype="half")


def test_a_host_alone_is_completed_with_a_warning(host):
    with pytest.warns(UserWarning, match="the TVP, the trajectory and .* are drawn at random"):
        loaded = tv.load(host)
    params = loaded.engine.params
    given = params["host"]
    assert_equal_trees(given["vision"], tiny.host_params()["vision"])
    assert_equal_trees(given["language"]["layers"], tiny.host_params()["language"]["layers"])
    language = loaded.system.config.host.language
    assert (language.added_tokens, language.first_added) == (1009, len(tiny.vocabulary().tokenizer))
    # Bins start at the norm of the host's own rows, see `TraceVision.settle`.
    rows = np.linalg.norm(np.asarray(given["language"]["embed"]["embedding"]), axis=1)
    bins = np.linalg.norm(np.asarray(given["language"]["added"]["embedding"])[9:], axis=1)
    np.testing.assert_allclose(bins, np.sqrt(np.mean(rows**2)), rtol=1e-4)
    assert loaded.system.config.processor.vision.max_pixels == 1024


def test_the_fingerprint_follows_the_parameters(model, tmp_path, host):
    changed = jax.tree.map(lambda x: x + 1, tiny.params())
    save(tmp_path / "other", tiny.system(), changed, tiny.vocabulary())
    save(tmp_path / "same", tiny.system(), tiny.params(), tiny.vocabulary(), {"name": "tiny"})
    prints = [fingerprint(path) for path in (model, model.parent, tmp_path / "other", host)]
    assert prints[0] == prints[1] and len(set(prints)) == 3


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: shutil.rmtree(folder), "is not there"),
        (lambda folder: shutil.rmtree(folder / "params"), "incomplete: there is no .*params"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), "[Nn]o tokenizer"),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{}"), "tokenizer"),
        (lambda folder: (folder / "sha256.json").unlink(), "sha256.json is missing"),
        (lambda folder: edit(folder, lambda c: c.update(system="sjtu")), "system 'sjtu'"),
        (lambda folder: edit(folder, lambda c: c["model"]["tvp"].pop("heads")), r"tvp\.heads: is missing"),
        (lambda folder: edit(folder, lambda c: c["model"]["tvp"].update(blocks=1)), "tvp/block_1/.*: is no parameter"),
        (lambda folder: edit(folder, lambda c: c["model"]["tvp"].update(blocks=3)), "tvp/block_2/.*: is missing"),
        (lambda folder: edit(folder, lambda c: c["model"]["tvp"].update(mlp_width=8)), "ffn_in/.*: is .*, should be"),
        (lambda folder: edit(folder, lambda c: c.pop("model")), "must be an object"),
    ],
)
def test_a_damaged_directory_is_refused_with_the_reason(damage, words, copied):
    damage(copied)
    with pytest.raises(UserError, match=words):
        read_checkpoint(copied)


def edit(folder, change) -> None:
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def test_a_flipped_byte_is_found(copied):
    largest = max((copied / "params").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with pytest.raises(UserError, match="has changed since it was written"):
        read_checkpoint(copied)


def test_folders_that_are_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(UserError, match="is no checkpoint"):
        read_checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has not exported its model yet"):
        read_checkpoint(tmp_path)
    with pytest.raises(UserError, match="a file, not a directory"):
        read_checkpoint(__file__)


def test_a_model_of_no_system_is_refused(tmp_path):
    save_model(tmp_path / "model", {"model": {}}, {"a": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match="of the system 'None'"):
        read_checkpoint(tmp_path / "model")
