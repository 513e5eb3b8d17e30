"""Low-rank adapters: Eq. 3 of their paper by hand, under scans and over several axes, and merged into the kernels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tracevision_jax.errors import UserError
from tracevision_jax.layers.basic import projection, rematerialised, scanned
from tracevision_jax.layers.lora import A, B, LoRAConfig, adapted, check_adapted, faults, is_adapter, merged

CONFIG = LoRAConfig(rank=3, alpha=6.0, targets=("kernel$",))
KINDS = {"dtype": jnp.float32, "param_dtype": jnp.float32}


class Layer(nn.Module):
    """Heads out of a width and back, as attention's projections, and a plain Dense."""

    @nn.compact
    def __call__(self, x, _):
        heads = projection("q", (2, 4), **KINDS)(x)
        mixed = projection("o", x.shape[-1], axis=(-2, -1), **KINDS)(nn.silu(heads))
        return x + nn.Dense(x.shape[-1], name="mlp")(mixed), None


class Layers(nn.Module):
    """Two scanned, rematerialised layers, and one that stands alone."""

    @nn.compact
    def __call__(self, x):
        x, _ = scanned(rematerialised(Layer, "full"), 2, (nn.broadcast,))(name="layers")(x, 0)
        return Layer(name="last")(x, 0)[0]


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (2, 5, 6))


@pytest.fixture(scope="module")
def params(x):
    """Of `Layers` with adapters whose B is no longer 0."""
    with adapted(CONFIG):
        drawn = traverse_util.flatten_dict(Layers().init(jax.random.key(0), x)["params"], sep="/")
    for number, (path, leaf) in enumerate(drawn.items()):
        if path.endswith(B):
            drawn[path] = jax.random.normal(jax.random.key(number), leaf.shape)
    return traverse_util.unflatten_dict(drawn, sep="/")


def test_a_linear_layer_gets_alpha_over_rank_times_x_a_b(x):
    layer = nn.Dense(4)
    with adapted(CONFIG):
        params = layer.init(jax.random.key(0), x)["params"]
        assert params[A].shape == (6, 3) and params[B].shape == (3, 4)
        assert not params[B].any() and float(jnp.abs(params[A]).max()) <= 6**-0.5 and params[A].any()
        params = params | {B: jnp.ones((3, 4))}
        ours = layer.apply({"params": params}, x)
    wide = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
    rows = np.asarray(x, np.float64)
    wanted = rows @ wide["kernel"] + wide["bias"] + 6.0 / 3 * rows @ wide[A] @ wide[B]
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-5)


def test_adapters_of_scanned_layers_are_stacked_and_keep_the_axes_of_what_comes_in_and_goes_out(params):
    shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params, sep="/").items()}
    assert shapes["layers/q/lora_a"] == (2, 6, 3) and shapes["layers/q/lora_b"] == (2, 3, 2, 4)
    assert shapes["layers/o/lora_a"] == (2, 2, 4, 3) and shapes["layers/o/lora_b"] == (2, 3, 6)
    assert shapes["last/mlp/lora_a"] == (6, 3) and shapes["last/mlp/lora_b"] == (3, 6)


def test_adapters_start_without_a_say(x):
    with adapted(CONFIG):
        params = Layers().init(jax.random.key(0), x)["params"]
        ours = Layers().apply({"params": params}, x)
    bare = {path: leaf for path, leaf in traverse_util.flatten_dict(params, sep="/").items() if not is_adapter(path)}
    np.testing.assert_array_equal(ours, Layers().apply({"params": traverse_util.unflatten_dict(bare, sep="/")}, x))


def test_merged_kernels_compute_the_same_without_adapters(params, x):
    with adapted(CONFIG):
        wanted = Layers().apply({"params": params}, x)
    whole = merged(params, CONFIG)
    assert not any(map(is_adapter, traverse_util.flatten_dict(whole, sep="/")))
    np.testing.assert_allclose(Layers().apply({"params": whole}, x), wanted, rtol=2e-5, atol=2e-5)
    assert float(jnp.abs(wanted - Layers().apply({"params": merged(params, LoRAConfig(3, 0.01))}, x)).max()) > 0.1


def test_merging_keeps_the_precision_of_kernels_and_passes_the_rest_through(params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    whole = merged(half, CONFIG)
    assert whole["last"]["q"]["kernel"].dtype == jnp.bfloat16
    assert whole["last"]["q"]["bias"] is half["last"]["q"]["bias"]
    assert merged(whole, LoRAConfig()) == whole


def test_gradients_reach_both_adapters_as_finite_differences_say(params, x):
    def loss(b):
        with adapted(CONFIG):
            changed = params | {"last": params["last"] | {"q": params["last"]["q"] | {B: b}}}
            return jnp.mean(jnp.square(Layers().apply({"params": changed}, x)))

    b = params["last"]["q"][B]
    direction = jax.random.normal(jax.random.key(7), b.shape)
    slope = (loss(b + 1e-2 * direction) - loss(b - 1e-2 * direction)) / 2e-2
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(b), direction), slope, rtol=2e-2)


def test_only_what_a_target_matches_is_adapted(x):
    config = LoRAConfig(rank=2, targets=(r"layers/q/kernel$",))
    with adapted(config):
        params = Layers().init(jax.random.key(0), x)["params"]
    paths = traverse_util.flatten_dict(params, sep="/")
    assert [path for path in paths if is_adapter(path)] == ["layers/q/lora_a", "layers/q/lora_b"]
    check_adapted(params, config)


def test_a_target_that_matches_nothing_is_refused_with_the_nearest(params):
    with pytest.raises(UserError, match=r"'last/mpl/kernel' matches no kernel. Did you mean 'last/mlp/kernel'\?"):
        check_adapted(params, LoRAConfig(rank=2, targets=("last/mpl/kernel",)))


def test_a_kernel_that_no_linear_layer_multiplies_by_is_refused():
    config = LoRAConfig(rank=2, targets=("kernel",))
    with adapted(config):
        params = nn.Conv(3, (2, 2)).init(jax.random.key(0), jnp.ones((1, 4, 4, 2)))["params"]
    with pytest.raises(UserError, match=r"no linear layer multiplies by .*: conv/kernel"):
        check_adapted({"conv": params}, config)


def test_a_layer_that_contracts_other_axes_is_refused():
    layer = nn.DenseGeneral(4, axis=(1,))
    with adapted(CONFIG), pytest.raises(ValueError, match="only the last ones"):
        layer.init(jax.random.key(0), jnp.ones((2, 3, 5)))


def test_faults_of_a_configuration_are_all_named():
    assert faults(LoRAConfig()) == [] == faults(CONFIG)
    found = " ".join(faults(LoRAConfig(rank=-1, alpha=0.0, targets=("(",))))
    assert "lora.rank is -1" in found and "'(' is no regular expression" in found
    assert "targets is empty" in " ".join(faults(LoRAConfig(rank=1, targets=())))
