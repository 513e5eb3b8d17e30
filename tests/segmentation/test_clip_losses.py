"""The losses of clips against numbers worked by hand and against the published formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tracevision_jax.segmentation.clip_losses import (
    COEFFICIENTS,
    cross_entropy,
    focal_per_mask,
    overlap,
    prompt_losses,
)
from tracevision_jax.segmentation.mask_decoder import DecodedMasks

SIDE = 8


def decoded(masks, ious, object_logits):
    masks = jnp.asarray(masks, jnp.float32)
    tokens = jnp.zeros((*masks.shape[:3], 4))
    return DecodedMasks(masks, jnp.asarray(ious, jnp.float32), tokens, jnp.asarray(object_logits, jnp.float32))


def half(value: float = 40.0) -> np.ndarray:
    """Logits of a mask of the left half."""
    return np.where(np.arange(SIDE) < SIDE // 2, value, -value) * np.ones((SIDE, 1))


def test_focal_loss_of_an_unsure_pixel_by_hand():
    """Eq. 5 of the focal paper at p = 1/2: alpha_t (1/2)^2 log 2."""
    zeros = jnp.zeros((2, 1, 1))
    wanted = jnp.array([1.0, 0.0]).reshape(2, 1, 1)
    np.testing.assert_allclose(focal_per_mask(zeros, wanted), np.log(2) / 4 * np.array([0.25, 0.75]), rtol=1e-6)


def test_focal_loss_is_the_published_one(rng):
    logits = rng.normal(0, 4, (3, SIDE, SIDE)).astype(np.float32)
    wanted = rng.integers(0, 2, (3, SIDE, SIDE)).astype(np.float32)
    x, t = torch.tensor(logits), torch.tensor(wanted)
    p = x.sigmoid()
    p_t = p * t + (1 - p) * (1 - t)
    theirs = F.binary_cross_entropy_with_logits(x, t, reduction="none") * (1 - p_t) ** 2
    theirs = (0.25 * t + 0.75 * (1 - t)) * theirs
    ours = focal_per_mask(jnp.asarray(logits), jnp.asarray(wanted))
    np.testing.assert_allclose(ours, theirs.mean((1, 2)).numpy(), rtol=1e-5)


def test_cross_entropy_is_finite_and_right_far_out():
    np.testing.assert_allclose(cross_entropy(jnp.array([1000.0, -1000.0, 0.0]), jnp.array([0.0, 1.0, 1.0])),
                               [1000.0, 1000.0, np.log(2)], rtol=1e-6)  # fmt: skip


def test_overlap_by_hand():
    """Two columns of four against the middle two: one of three; nothing against nothing counts 0."""
    ours, true = np.zeros((2, 4, 4), bool), np.zeros((2, 4, 4), bool)
    ours[0, :, :2], true[0, :, 1:3] = True, True
    np.testing.assert_allclose(overlap(jnp.asarray(ours), jnp.asarray(true)), [1 / 3, 0.0])


@pytest.fixture
def four_masks():
    """Single: empty. Several: the truth, its opposite, everything."""
    return np.stack([np.full((SIDE, SIDE), -40.0), half(), -half(), np.full((SIDE, SIDE), 40.0)])[None, None]


TRUE = jnp.asarray(half() > 0, jnp.float32)[None, None]


def test_only_the_best_of_several_masks_is_taught_and_all_predict_their_iou(four_masks):
    said = [[[0.3, 0.9, 0.2, 0.6]]]
    losses = prompt_losses(decoded(four_masks, said, [[0.0]]), jnp.array([[True]]), TRUE)
    np.testing.assert_allclose(losses["mask"], 0.0, atol=1e-6)
    np.testing.assert_allclose(losses["dice"], 0.0, atol=1e-6)
    # True IoUs are 1, 0 and 1/2: |.9 - 1|, |.2 - 0| and |.6 - .5| have the mean 0.4 / 3.
    np.testing.assert_allclose(losses["iou"], 0.4 / 3, rtol=1e-5)
    np.testing.assert_allclose(losses["object"], np.log(2), rtol=1e-6)


def test_the_single_mask_is_scored_where_several_are_not_in_use(four_masks):
    losses = prompt_losses(decoded(four_masks, [[[0.3, 0.9, 0.2, 0.6]]], [[0.0]]), jnp.array([[False]]), TRUE)
    # Half the pixels are missed at a logit of 40 with alpha 1/4; Dice has no overlap: 1 - 1 / (32 + 1).
    np.testing.assert_allclose(losses["mask"], 40 * 0.25 / 2, rtol=1e-5)
    np.testing.assert_allclose(losses["dice"], 1 - 1 / 33, rtol=1e-5)
    np.testing.assert_allclose(losses["iou"], 0.3, rtol=1e-6)


def test_gradients_reach_the_best_mask_alone(four_masks):
    def total(masks):
        losses = prompt_losses(decoded(masks, np.zeros((1, 1, 4)), [[0.0]]), jnp.array([[True]]), TRUE)
        return sum(factor * losses[name].sum() for name, factor in COEFFICIENTS.items())

    gradient = jax.grad(total)(jnp.asarray(four_masks / 40, jnp.float32))
    assert [bool(jnp.abs(gradient[0, 0, k]).max() > 0) for k in range(4)] == [False, True, False, False]


def test_a_frame_without_the_object_teaches_its_score_alone(four_masks):
    losses = prompt_losses(decoded(four_masks, np.zeros((1, 1, 4)), [[3.0]]), jnp.array([[True]]), jnp.zeros_like(TRUE))
    assert float((losses["mask"] + losses["dice"] + losses["iou"]).sum()) == 0.0
    np.testing.assert_allclose(losses["object"], 3 + np.log1p(np.exp(-3)), rtol=1e-6)


def test_masks_are_compared_at_the_size_of_the_truth(four_masks):
    large = jnp.repeat(jnp.repeat(TRUE, 4, -1), 4, -2)
    losses = prompt_losses(decoded(four_masks, [[[0.0] * 4]], [[0.0]]), jnp.array([[True]]), large)
    assert float(losses["dice"][0, 0]) < 0.01


def test_half_a_pixel_of_truth_counts_half(four_masks):
    """All pixels are half covered: at p = 1/2 each costs the mean of both kinds; for the IoU the truth is full."""
    soft = jnp.full_like(TRUE, 0.5)
    losses = prompt_losses(decoded(four_masks * 0, [[[1.0] * 4]], [[0.0]]), jnp.array([[True]]), soft)
    np.testing.assert_allclose(losses["mask"], np.log(2) / 4 / 2, rtol=1e-5)
    np.testing.assert_allclose(losses["iou"], 1.0, rtol=1e-5)
