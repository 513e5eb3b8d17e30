"""Model directories: exact, whole or absent, readable in part and straight to a sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tracevision_jax.errors import UserError
from tracevision_jax.weights.model_directory import is_model, load_model, read_shapes, save_model

CONFIG = {"system": "tracevision", "model": {"width": 3}}
PARAMS = {
    "tvp": {"q": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "scale": jnp.ones((3,), jnp.bfloat16)},
    "gamma": jnp.asarray(2.0),
}


@pytest.fixture
def model(tmp_path):
    save_model(tmp_path / "model", CONFIG, PARAMS)
    return tmp_path / "model"


def test_a_model_comes_back_bit_for_bit(model):
    config, params = load_model(model)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, params, PARAMS)
    assert params["tvp"]["scale"].dtype == jnp.bfloat16


def test_shapes_are_known_without_reading(model):
    assert {path: leaf.shape for path, leaf in read_shapes(model).items()} == {
        "tvp/q/kernel": (2, 3),
        "tvp/scale": (3,),
        "gamma": (),
    }


def test_only_the_paths_asked_for_are_read_and_go_where_they_are_wanted(model):
    mesh = jax.make_mesh((1,), ("fsdp",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    asked = []

    def sharding(path, shape):
        asked.append((path, shape))
        return place

    _, params = load_model(model, sharding, ["tvp/q/kernel"])
    assert asked == [("tvp/q/kernel", (2, 3))]
    assert list(params) == ["tvp"] and list(params["tvp"]) == ["q"]
    assert params["tvp"]["q"]["kernel"].sharding == place


def test_saving_again_replaces_the_model_and_leaves_nothing_else(model):
    save_model(model, CONFIG | {"again": True}, PARAMS)
    assert load_model(model)[0]["again"]
    assert [path.name for path in model.parent.iterdir()] == ["model"]


def test_a_failed_save_leaves_the_old_model(model, monkeypatch):
    monkeypatch.setattr("tracevision_jax.weights.hashes.write_hashes", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_model(model, {"system": "new"}, PARAMS)
    assert load_model(model)[0] == CONFIG


def test_damage_is_found(model):
    file = max((model / "params").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"{file.name} has changed"):
        load_model(model)


def test_what_is_no_model_is_refused(model, tmp_path):
    assert is_model(model) and not is_model(tmp_path)
    with pytest.raises(UserError, match="is no checkpoint"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="has no parameter nothing"):
        load_model(model, paths=["nothing"])
