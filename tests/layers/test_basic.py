"""Shared modules: norm, gated MLP, remat policies."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tracevision_jax.layers.basic import (
    REMAT_POLICIES,
    GatedMLP,
    RMSNorm,
    projection,
    rematerialised,
    scanned,
)


def test_rms_norm_takes_its_statistics_in_float32():
    norm = RMSNorm(1e-6, jnp.bfloat16, jnp.float32)
    x = jnp.full((1, 4096), 200.0, jnp.bfloat16)  # the squares' sum is beyond what bfloat16 can add up
    params = norm.init(jax.random.key(0), x)
    np.testing.assert_array_equal(np.asarray(norm.apply(params, x), np.float32), 1.0)


def test_a_row_of_zeros_has_finite_gradients_through_the_norm():
    norm = RMSNorm(1e-6, jnp.float32, jnp.float32)
    params = norm.init(jax.random.key(0), jnp.zeros((1, 8)))
    gradient = jax.grad(lambda x: norm.apply(params, x).sum())(jnp.zeros((1, 8)))
    assert np.isfinite(gradient).all()


def test_kernels_start_with_a_spread_of_one_over_the_root_of_their_inputs():
    mlp = GatedMLP(512, False, ("batch",), jnp.float32, jnp.float32)
    params = mlp.init(jax.random.key(0), jnp.zeros((1, 128)))["params"]
    assert float(params["gate"]["kernel"].std()) == pytest.approx(128**-0.5, rel=0.05)
    assert float(params["down"]["kernel"].std()) == pytest.approx(512**-0.5, rel=0.05)
    assert "bias" not in params["up"]


def test_parameters_and_computation_have_types_of_their_own(key):
    mlp = GatedMLP(16, True, ("batch",), jnp.bfloat16, jnp.float32)
    x = jnp.ones((2, 8))
    params = mlp.init(key, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert mlp.apply(params, x).dtype == jnp.bfloat16


class Body(nn.Module):
    """A scan body with a flag that must stay a Python value."""

    @nn.compact
    def __call__(self, x, double: bool):
        mlp = GatedMLP(8, False, ("batch",), jnp.float32, jnp.float32, name="mlp")
        return x + (2 if double else 1) * mlp(x), None


@pytest.mark.parametrize("policy", REMAT_POLICIES)
def test_every_remat_policy_gives_the_same_gradients(key, policy):
    x = jnp.ones((2, 4))

    def gradients(policy):
        stack = scanned(rematerialised(Body, policy, static_arguments=(2,)), 3, (nn.broadcast,))()
        params = stack.init(key, x, True)
        assert params["params"]["mlp"]["gate"]["kernel"].shape == (3, 4, 8)
        return jax.grad(lambda p: stack.apply(p, x, True)[0].sum())(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        gradients(policy),
        gradients("none"),
    )


def test_an_unknown_remat_policy_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no remat policy 'all'; known are none, full, dots"):
        rematerialised(Body, "all")


def test_a_projection_is_the_same_with_its_rows_merged_or_not(rng, monkeypatch):
    x = jnp.asarray(rng.standard_normal((2, 3, 4, 5)), jnp.float32)
    module = projection("o", (6, 2), dtype=jnp.float32, param_dtype=jnp.float32, axis=(-2, -1))
    params = module.init(jax.random.key(0), x)
    assert params["params"]["kernel"].shape == (4, 5, 6, 2)

    def result_and_gradients():
        run = jax.value_and_grad(lambda p, x: jnp.square(module.apply(p, x)).sum(), argnums=(0, 1))
        return module.apply(params, x), run(params, x)

    merged = result_and_gradients()
    monkeypatch.setattr("tracevision_jax.layers.basic.leading_axes_merge", lambda: False)
    assert merged[0].shape == (2, 3, 6, 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), merged, result_and_gradients())
