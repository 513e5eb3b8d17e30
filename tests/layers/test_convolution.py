"""Convolutions that are written as something else are convolutions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tracevision_jax.layers.convolution import Depthwise, Doubling, Halving, Patches

KINDS = {"dtype": jnp.float32, "param_dtype": jnp.float32}
LAYOUT = ("NHWC", "HWIO", "NHWC")


def run(module, x):
    """(module's result, its kernel, its bias drawn anew)."""
    params = module.init(jax.random.key(0), x)["params"]
    params = {"kernel": params["kernel"], "bias": jnp.arange(1.0, 1 + len(params["bias"]))}
    return module.apply({"params": params}, x), params["kernel"], params["bias"]


@pytest.mark.parametrize(("rows", "columns"), [(8, 6), (7, 5), (1, 2)])
def test_halving_is_a_convolution_of_stride_2(rows, columns, rng):
    x = jnp.asarray(rng.normal(size=(2, rows, columns, 3)), jnp.float32)
    ours, kernel, bias = run(Halving(5, **KINDS), x)
    theirs = lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=LAYOUT) + bias
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_patches_is_a_convolution_whose_stride_is_its_kernel(rng):
    x = jnp.asarray(rng.normal(size=(2, 8, 4, 3)), jnp.float32)
    ours, kernel, bias = run(Patches(5, 4, **KINDS), x)
    theirs = lax.conv_general_dilated(x, kernel, (4, 4), "VALID", dimension_numbers=LAYOUT) + bias
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_doubling_is_a_transposed_convolution(rng):
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 3)), jnp.float32)
    ours, kernel, bias = run(Doubling(5, **KINDS), x)
    theirs = lax.conv_transpose(x, kernel[::-1, ::-1], (2, 2), "VALID", dimension_numbers=LAYOUT)
    np.testing.assert_allclose(ours, theirs + bias, rtol=1e-5, atol=1e-5)


def test_depthwise_filters_each_channel_for_itself(rng):
    x = jnp.asarray(rng.normal(size=(2, 5, 6, 4)), jnp.float32)
    ours, kernel, bias = run(Depthwise(3, **KINDS), x)
    theirs = lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=LAYOUT, feature_group_count=4
    )
    np.testing.assert_allclose(ours, theirs + bias, rtol=1e-5, atol=1e-5)
