"""Shared modules: norm, gated MLP, remat policies."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tracevision_jax.layers.basic import REMAT_POLICIES, GatedMLP, RMSNorm, rematerialised, scanned


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
    mlp = GatedMLP(512, False, jnp.float32, jnp.float32)
    params = mlp.init(jax.random.key(0), jnp.zeros((1, 128)))["params"]
    assert float(params["gate"]["kernel"].std()) == pytest.approx(128**-0.5, rel=0.05)
    assert float(params["down"]["kernel"].std()) == pytest.approx(512**-0.5, rel=0.05)
    assert "bias" not in params["up"]


def test_parameters_and_computation_have_types_of_their_own(key):
    mlp = GatedMLP(16, True, jnp.bfloat16, jnp.float32)
    x = jnp.ones((2, 8))
    params = mlp.init(key, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    assert mlp.apply(params, x).dtype == jnp.bfloat16


class Body(nn.Module):
    """A scan body with a flag that must stay a Python value."""

    @nn.compact
    def __call__(self, x, double: bool):
        mlp = GatedMLP(8, False, jnp.float32, jnp.float32, name="mlp")
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
