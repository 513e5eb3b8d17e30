"""Adafactor: optax's numbers on a matrix, each matrix of a stack for itself, and statistics that keep their axes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tracevision_jax.training.adafactor import scale_by_factored_rms
from tracevision_jax.training.parameters import flatten, unflatten

STEPS = 4


def gradients(shape, seed=0):
    """Gradients of several steps, whose rows and columns differ in size."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.normal(size=(*shape[:-1], 1)) + rng.normal(size=shape[-1:]))
    return [jnp.asarray(sizes * rng.normal(size=shape), jnp.float32) for _ in range(STEPS)]


def updates(path, given, beta2=0.999):
    """Our updates of one parameter."""
    optimizer = scale_by_factored_rms(beta2)
    state, found = optimizer.init(unflatten({path: given[0]})), []
    for gradient in given:
        update, state = optimizer.update(unflatten({path: gradient}), state)
        found.append(flatten(update)[path])
    return np.stack(found)


def optax_updates(given):
    """optax's, of one array."""
    optimizer = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1), optax.clip_by_block_rms(1.0))
    state, found = optimizer.init(given[0]), []
    for gradient in given:
        update, state = optimizer.update(gradient, state, given[0])
        found.append(update)
    return np.stack(found)


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("tvp/ffn_in/kernel", (16, 24)),
        ("host/language/embed/embedding", (40, 8)),
        ("host/language/head/kernel", (8, 40)),
        ("tvp/x_bins", (40, 8)),
        ("tvp/out_norm/scale", (16,)),
    ],
)
def test_updates_are_optaxs_on_a_matrix_a_table_and_a_vector(path, shape):
    given = gradients(shape)
    np.testing.assert_allclose(updates(path, given), optax_updates(given), rtol=2e-5)


@pytest.mark.parametrize(
    ("path", "shape", "as_matrices"),
    [
        ("host/language/layers/attn/q/kernel", (3, 8, 2, 4), lambda x: x.reshape(3, 8, 8)),
        ("host/language/layers/attn/o/kernel", (3, 2, 4, 8), lambda x: x.reshape(3, 8, 8)),
    ],
)
def test_each_layer_and_all_heads_of_a_kernel_are_one_matrix(path, shape, as_matrices):
    given = gradients(shape)
    ours = updates(path, given)
    for layer in range(shape[0]):
        alone = optax_updates([as_matrices(gradient)[layer] for gradient in given])
        np.testing.assert_allclose(ours[:, layer].reshape(alone.shape), alone, rtol=2e-5)


def test_a_spike_in_one_layer_is_clipped_and_leaves_the_others_alone():
    path, given = "layers/mlp/up/kernel", gradients((3, 8, 8))
    spiked = [*given[:-1], given[-1].at[1].multiply(1e4)]
    calm, wild = updates(path, given), updates(path, spiked)
    np.testing.assert_array_equal(wild[:, [0, 2]], calm[:, [0, 2]])
    assert np.sqrt((wild[-1, 1] ** 2).mean()) == pytest.approx(1.0, rel=1e-5)


def test_beta2_bounds_the_decay():
    """With beta2 = 0 the second moment is the last gradient's alone, whatever came before."""
    path, given = "norm/scale", gradients((16,))
    np.testing.assert_allclose(updates(path, given, beta2=0.0), np.sign(given), rtol=1e-6)
    assert np.abs(updates(path, given)[-1] - np.sign(given[-1])).max() > 0.1


def test_statistics_are_float32_and_keep_a_parameters_axes_at_size_one():
    shapes = {
        "layers/attn/q/kernel": (3, 8, 2, 4),
        "vision/groups/window/attn/qkv/kernel": (2, 3, 8, 3, 2, 4),
        "added/head": (5, 8),
        "neck_out_0/kernel": (3, 3, 4, 4),
        "layers/attn/q/bias": (3, 2, 4),
    }
    params = unflatten({path: jnp.ones(shape, jnp.bfloat16) for path, shape in shapes.items()})
    state = jax.eval_shape(scale_by_factored_rms(0.999).init, params)
    kept = [{path: leaf.shape for path, leaf in flatten(tree).items()} for tree in state[1:]]
    assert kept == [
        {
            "layers/attn/q/kernel": (3, 8, 1, 1),
            "vision/groups/window/attn/qkv/kernel": (2, 3, 8, 3, 1, 1),
            "added/head": (5, 1),
        },
        {
            "layers/attn/q/kernel": (3, 1, 2, 4),
            "vision/groups/window/attn/qkv/kernel": (2, 3, 1, 3, 2, 4),
            "added/head": (1, 8),
        },
        {"neck_out_0/kernel": (3, 3, 4, 4), "layers/attn/q/bias": (3, 2, 4)},
    ]
    assert {leaf.dtype for leaf in jax.tree.leaves(state[1:])} == {jnp.dtype("float32")}


def test_a_gradient_of_zero_moves_nothing():
    np.testing.assert_array_equal(updates("a/kernel", [jnp.zeros((4, 6))] * 2), np.zeros((2, 4, 6)))
