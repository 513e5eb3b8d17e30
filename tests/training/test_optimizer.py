"""Schedules, weight decay, learning rates by path, and which axes Muon takes for a matrix."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tracevision_jax.errors import UserError
from tracevision_jax.training.matrices import matrix_axes
from tracevision_jax.training.optimizer import (
    OptimizerConfig,
    learning_rate_schedule,
    make_optimizer,
)
from tracevision_jax.training.parameters import flatten, unflatten

PARAMS = {
    "host": {"mlp": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2,))}},
    "tvp": {"kernel": jnp.ones((2,))},
}


def first_update(config, gradient=0.5):
    optimizer = make_optimizer(config, steps=10)
    gradients = {
        "host": {"mlp": {"kernel": jnp.full((2, 2), gradient), "bias": jnp.full((2,), gradient)}},
        "tvp": {"kernel": jnp.full((2,), gradient)},
    }
    return optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)[0]


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1.0, 1.0)]
)
def test_schedules_rise_over_the_warm_up_and_fall_to_their_final_share(schedule, middle, end):
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup=0.1, final_share=0.1)
    rate = learning_rate_schedule(config, 100)
    np.testing.assert_allclose([rate(s) for s in (0, 4, 9)], [0.2, 1.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose([rate(55), rate(100)], [2.0 * middle, 2.0 * end], rtol=1e-5)
    assert float(rate(0)) > 0


def test_no_warm_up_starts_at_the_peak():
    assert float(learning_rate_schedule(OptimizerConfig(learning_rate=2.0, warmup=0.0), 10)(0)) == 2.0


ALL = [
    {"method": "adamw"},
    {"method": "adamw", "moments": "bfloat16"},
    {"method": "adafactor"},
]
"""Whose first update of equal gradients is the learning rate in size."""


@pytest.mark.parametrize("kind", ALL)
def test_multipliers_scale_by_path_and_the_first_match_counts(kind):
    config = OptimizerConfig(
        **kind,
        learning_rate=1.0,
        warmup=0.0,
        clip_norm=0.0,
        schedule="constant",
        multipliers=(("^tvp", 10.0), ("kernel", 0.1)),
    )
    update = first_update(config)
    np.testing.assert_allclose(update["tvp"]["kernel"], -10.0, rtol=1e-5)
    np.testing.assert_allclose(update["host"]["mlp"]["kernel"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(update["host"]["mlp"]["bias"], -1.0, rtol=1e-5)


def test_a_multiplier_that_matches_nothing_is_refused():
    with pytest.raises(UserError, match="match no trained parameter: decodr"):
        first_update(OptimizerConfig(multipliers=(("decodr", 2.0),)))


@pytest.mark.parametrize("kind", ALL)
def test_weight_decay_leaves_biases_alone(kind):
    config = OptimizerConfig(
        **kind, learning_rate=1.0, warmup=0.0, schedule="constant", weight_decay=0.5, clip_norm=0.0
    )
    update = first_update(config, gradient=0.0)
    np.testing.assert_allclose(update["host"]["mlp"]["kernel"], -0.5)
    np.testing.assert_allclose(update["host"]["mlp"]["bias"], 0.0)


def test_adafactor_sees_gradients_after_they_are_clipped():
    """All eight gradients of 0.5 have norm 1.41; clipped to 0.1, each is 0.5 / 14.1."""
    optimizer = make_optimizer(OptimizerConfig(method="adafactor", clip_norm=0.1), 10)
    gradients = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.5), PARAMS)
    state = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)[1]
    squares = optax.tree.get(state, "whole")["host"]["mlp"]["bias"]
    np.testing.assert_allclose(squares, 0.1**2 / 8, rtol=1e-5)


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_moments_in_bfloat16_take_half_the_memory(method):
    def moments(kind):
        state = make_optimizer(OptimizerConfig(method=method, moments=kind), 10).init(PARAMS)
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.size > 1 and leaf.dtype != jnp.int32)

    coefficients = 3 * 4 * (method == "muon")  # of Newton-Schulz, which stay as they are
    assert moments("bfloat16") - coefficients == (moments("float32") - coefficients) / 2 > 0


MUON = OptimizerConfig(method="muon", learning_rate=1.0, warmup=0.0, schedule="constant", clip_norm=0.0)


def muon_update(gradients, config=MUON):
    optimizer = make_optimizer(config, steps=10)
    params = unflatten(jax.tree.map(jnp.zeros_like, gradients))
    updates = optimizer.update(unflatten(gradients), optimizer.init(params), params)[0]
    return {path: np.asarray(update) for path, update in flatten(updates).items()}


@pytest.mark.parametrize(
    ("path", "ndim", "axes"),
    [
        ("host/language/layers/mlp/up/kernel", 3, ((1,), (2,))),
        ("host/language/layers/attn/q/kernel", 4, ((1,), (2, 3))),
        ("host/language/layers/attn/o/kernel", 4, ((1, 2), (3,))),
        ("host/vision/groups/full/attn/qkv/kernel", 5, ((1,), (3, 4))),
        ("host/vision/groups/window/attn/qkv/kernel", 6, ((2,), (4, 5))),
        ("host/vision/groups/window/attn/proj/kernel", 5, ((2, 3), (4,))),
        ("tvp/block_0/refine/place/kernel", 3, ((0,), (1, 2))),
        ("decoder/two_way_0/last/o/kernel", 3, ((0, 1), (2,))),
    ],
)
def test_muon_takes_each_matrix_of_a_stack_for_itself(path, ndim, axes):
    assert tuple(matrix_axes(path, ndim)) == axes


@pytest.mark.parametrize(
    ("path", "ndim"),
    [
        ("host/language/embed/embedding", 2),
        ("host/language/head/kernel", 2),
        ("host/language/added/head", 2),
        ("host/language/layers/attn/q/bias", 3),
        ("decoder/neck_out_0/kernel", 4),
        ("decoder/upsample_1_0/kernel", 4),
        ("tvp/out_norm/scale", 1),
    ],
)
def test_muon_leaves_what_is_no_matrix_to_adam(path, ndim):
    assert matrix_axes(path, ndim) is None


def test_muons_update_is_nearly_orthogonal_at_adams_size():
    """Five Newton-Schulz steps bring singular values to about 0.7 to 1.2; they are scaled by the wider side."""
    gradient = np.random.default_rng(0).normal(size=(3, 24, 2, 4)).astype(np.float32)
    update = muon_update({"layers/attn/q/kernel": jnp.asarray(gradient), "layers/norm/scale": jnp.ones((3, 24))})
    values = np.linalg.svd(update["layers/attn/q/kernel"].reshape(3, 24, 8), compute_uv=False)
    assert (values > 0.6 * 0.2 * 24**0.5).all() and (values < 1.3 * 0.2 * 24**0.5).all()
    # Adam with Nesterov's momentum: a first step of the learning rate times 1 + beta1 / (1 + beta1).
    np.testing.assert_allclose(update["layers/norm/scale"], -(1 + 0.9 / 1.9), rtol=1e-5)
    alone = muon_update({"layers/attn/q/kernel": jnp.asarray(gradient[1:2])})
    np.testing.assert_allclose(alone["layers/attn/q/kernel"][0], update["layers/attn/q/kernel"][1], atol=1e-5)
