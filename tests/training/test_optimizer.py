"""Schedules, weight decay and learning rates by path."""

import jax.numpy as jnp
import numpy as np
import pytest

from tracevision_jax.errors import UserError
from tracevision_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer

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


def test_multipliers_scale_by_path_and_the_first_match_counts():
    config = OptimizerConfig(
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


def test_weight_decay_leaves_biases_alone():
    config = OptimizerConfig(learning_rate=1.0, warmup=0.0, schedule="constant", weight_decay=0.5, clip_norm=0.0)
    update = first_update(config, gradient=0.0)
    np.testing.assert_allclose(update["host"]["mlp"]["kernel"], -0.5)
    np.testing.assert_allclose(update["host"]["mlp"]["bias"], 0.0)
