"""Where parameters come from at the start of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.tiny import TinyConfig, TinySystem
from tracevision_jax.errors import UserError
from tracevision_jax.parallel.mesh import MeshConfig, make_mesh
from tracevision_jax.parallel.rules import PARAMETERS, parameter_shardings
from tracevision_jax.training.initialise import initialise
from tracevision_jax.training.parameters import flatten, unflatten
from tracevision_jax.weights.model_directory import save_model


class Hosted(TinySystem):
    """The tiny system with its language model inside a host, as TraceVision's."""

    def init(self, rng):
        params = super().init(rng)
        return {"host": {"language": params["language"]}, "tvp": params["tvp"]}


class Settled(Hosted):
    """Its head starts at twice the embedding's mean."""

    def settle(self, params):
        mean = params["host"]["language"]["embed"]["embedding"].mean()
        return params | {"tvp": jax.tree.map(lambda leaf: jnp.full_like(leaf, 2 * mean), params["tvp"])}


def start(system, directory="", seed=0):
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return initialise(system, seed, parameter_shardings(shapes, mesh, PARAMETERS), directory)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A host alone: {language}, every parameter 3."""
    directory = tmp_path_factory.mktemp("host")
    params = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 3.0), TinySystem().init(jax.random.key(0)))
    save_model(directory / "model", {"system": "host"}, {"language": params["language"]})
    return directory / "model"


def test_without_a_start_everything_is_drawn_from_the_seed():
    first, again, other = (flatten(start(TinySystem(), seed=seed).params) for seed in (0, 0, 1))
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, again[path])
    assert not np.array_equal(first["language/head/kernel"], other["language/head/kernel"])


@pytest.mark.parametrize("folder", ["model", "run"])
def test_a_host_fills_the_host_and_the_rest_is_drawn_and_the_report_says_so(host, folder):
    directory = host if folder == "model" else host.parent
    found = start(Hosted(), directory)
    for path, leaf in flatten(found.params).items():
        assert (np.asarray(leaf) == 3.0).all() == path.startswith("host/"), path
    assert found.report == (f"host/language: 5 arrays from {directory}", "tvp: 2 arrays drawn")


def test_what_is_drawn_does_not_depend_on_what_is_read(host):
    drawn, mixed = flatten(start(Hosted()).params), flatten(start(Hosted(), host).params)
    np.testing.assert_array_equal(mixed["tvp/points/kernel"], drawn["tvp/points/kernel"])


def test_drawn_parameters_that_depend_on_others_follow_the_ones_that_were_read(host):
    params = flatten(start(Settled(), host).params)
    np.testing.assert_array_equal(params["tvp/points/kernel"], 6.0)
    np.testing.assert_array_equal(params["host/language/head/kernel"], 3.0)


def test_stored_half_precision_becomes_the_systems_precision(tmp_path):
    params = TinySystem().init(jax.random.key(1))
    save_model(tmp_path / "model", {}, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    assert {leaf.dtype for leaf in flatten(start(TinySystem(), tmp_path / "model").params).values()} == {
        jnp.dtype("float32")
    }


def test_a_model_of_another_size_is_refused_with_every_parameter_that_differs(host):
    with pytest.raises(UserError, match=r"(?s)another size.*embedding: \(32, 16\) .*\(32, 24\).*head/kernel"):
        start(Hosted(TinyConfig(width=24)), host)


def test_a_model_of_another_system_is_refused(tmp_path):
    save_model(tmp_path / "model", {}, unflatten({"encoder/kernel": jnp.ones((2, 2))}))
    with pytest.raises(UserError, match=r"none of this system's parameters: it has encoder/kernel"):
        start(TinySystem(), tmp_path / "model")


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        start(TinySystem(), tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match="has not exported its model yet"):
        start(TinySystem(), tmp_path)
