"""Mask losses against Eq. 13 to 15 written out pixel by pixel."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tracevision_jax.segmentation.losses import OVERLAP_WEIGHT, dice_per_mask, overlap_weights, refinement_per_mask

SIDE = 6


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def naive_dice(logits, target) -> float:
    """Eq. 13 with sets as sums of probabilities, and 1 added above and below."""
    overlap = predicted = true = 0.0
    for x, y in zip(logits.ravel().tolist(), target.ravel().tolist(), strict=True):
        overlap, predicted, true = overlap + sigmoid(x) * y, predicted + sigmoid(x), true + y
    return 1 - (2 * overlap + 1) / (predicted + true + 1)


def naive_refinement(logits, targets, alpha=2.0) -> float:
    """Eq. 14 and 15 of the K masks of one answer."""
    count, height, width = logits.shape
    total = 0.0
    for r in range(height):
        for c in range(width):
            on = sum(sigmoid(logits[k, r, c]) > 0.5 for k in range(count))
            weight = alpha if on >= 2 else 1.0
            for k in range(count):
                p, y = sigmoid(logits[k, r, c]), targets[k, r, c]
                total += weight * -(y * math.log(p) + (1 - y) * math.log(1 - p))
    return total / (count * height * width)


@pytest.fixture
def masks(rng):
    """Two rows: answers of three and one masks; of two, and padding."""
    logits = rng.normal(size=(2, 4, SIDE, SIDE)) * 3
    targets = (rng.random((2, 4, SIDE, SIDE)) > 0.5).astype(np.float32)
    group = np.array([[1, 1, 1, 2], [5, 5, 0, 0]], np.int32)
    return logits.astype(np.float32), targets, group


def test_dice_is_equation_13(masks):
    logits, targets, _ = masks
    ours = np.asarray(dice_per_mask(jnp.asarray(logits), jnp.asarray(targets)))
    expected = [[naive_dice(x, y) for x, y in zip(*row, strict=True)] for row in zip(logits, targets, strict=True)]
    assert np.allclose(ours, expected, atol=1e-6)


def test_dice_runs_from_none_to_all():
    target = jnp.zeros((SIDE, SIDE)).at[:3].set(1)
    assert float(dice_per_mask(100 * (2 * target - 1), target)) < 1e-6
    assert float(dice_per_mask(-100 * (2 * target - 1), target)) > 0.95
    assert float(dice_per_mask(jnp.full((SIDE, SIDE), -100.0), jnp.zeros((SIDE, SIDE)))) == 0


def test_refinement_is_equations_14_and_15_of_each_answer(masks):
    logits, targets, group = masks
    ours = np.asarray(refinement_per_mask(jnp.asarray(logits), jnp.asarray(targets), jnp.asarray(group)))
    for row, chosen in ((0, [0, 1, 2]), (0, [3]), (1, [0, 1])):
        expected = naive_refinement(logits[row, chosen], targets[row, chosen])
        assert np.allclose(ours[row, chosen].mean(), expected, rtol=1e-5)


def test_overlapping_predictions_of_one_answer_weigh_alpha_everywhere_else_one(masks):
    logits, _, group = masks
    weights = np.asarray(overlap_weights(jnp.asarray(logits), jnp.asarray(group)))
    on = (logits[0, :3] > 0).sum(0)
    assert OVERLAP_WEIGHT == 2.0 and {1.0, 2.0} == set(weights[0, :3].ravel().tolist())
    for k in range(3):
        assert (weights[0, k] == np.where(on >= 2, 2.0, 1.0)).all()


def test_a_single_mask_is_plain_cross_entropy(masks):
    logits, targets, group = masks
    alone = jnp.asarray(group) * 0 + jnp.arange(1, 5)
    assert (overlap_weights(jnp.asarray(logits), alone) == 1).all()
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    plain = -(targets * np.log(p) + (1 - targets) * np.log(1 - p)).mean((-1, -2))
    assert np.allclose(refinement_per_mask(jnp.asarray(logits), jnp.asarray(targets), alone), plain, rtol=1e-5)


def test_padding_masks_change_no_weight_of_a_real_one(masks):
    logits, _, group = masks
    padded_on = logits.copy()
    padded_on[1, 2:] = 50
    weights = overlap_weights(jnp.asarray(padded_on), jnp.asarray(group))
    assert (weights[1, :2] == overlap_weights(jnp.asarray(logits), jnp.asarray(group))[1, :2]).all()


def test_losses_and_gradients_are_finite_at_extreme_logits():
    logits = jnp.asarray([-1e4, -80.0, 0.0, 80.0, 1e4]).reshape(1, 1, 1, 5)
    targets = jnp.asarray([1.0, 0.0, 1.0, 0.0, 1.0]).reshape(1, 1, 1, 5)
    group = jnp.ones((1, 1), jnp.int32)

    def total(logits):
        return (refinement_per_mask(logits, targets, group) + dice_per_mask(logits, targets)).sum()

    value, gradient = jax.value_and_grad(total)(logits)
    assert np.isfinite(value) and np.isfinite(gradient).all()
    assert gradient[0, 0, 0, 0] < 0 < gradient[0, 0, 0, 3]


def test_no_gradient_flows_through_the_weights(masks):
    """A is a weight: its gradient would be that of a step, which is nowhere."""
    logits, targets, group = (jnp.asarray(x) for x in masks)

    def weighted(logits, frozen):
        return (refinement_per_mask(logits, targets, group) - frozen).sum()

    gradient = jax.grad(weighted)(logits, 0.0)
    p = jax.nn.sigmoid(logits)
    expected = overlap_weights(logits, group) * (p - targets) / SIDE**2
    assert np.allclose(gradient, expected, atol=1e-6)


def test_low_precision_logits_are_summed_in_float32(masks):
    logits, targets, group = (jnp.asarray(x) for x in masks)
    low = logits.astype(jnp.bfloat16)
    assert dice_per_mask(low, targets).dtype == refinement_per_mask(low, targets, group).dtype == jnp.float32
    assert np.allclose(dice_per_mask(low, targets), dice_per_mask(low.astype(jnp.float32), targets), atol=1e-6)
