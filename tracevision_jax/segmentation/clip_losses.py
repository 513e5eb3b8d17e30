"""Losses of SAM 2 on frames of clips (Ravi et al. 2024, App. D.2.2): masks, their predicted IoU, the object's score.

They follow facebookresearch/sam2, `training/loss_fns.py`. Every prompt is scored for itself; what is summed over is the
caller's business. Where several masks are offered for an ambiguous prompt, only the one of the lowest loss learns to be
the mask, but all learn to predict their IoU. Frames without the object teach the object's score alone.

    losses = prompt_losses(decoded, several, targets)
    total = sum(COEFFICIENTS[part] * losses[part] for part in COEFFICIENTS)         # of each prompt

Masks are supervised whether or not the object's score hides them: the public training hides them first, so that a
present object that is taken to be absent teaches its score only, which a model that starts from nothing cannot afford.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tracevision_jax.ops.interpolation import resize_masks
from tracevision_jax.segmentation.losses import dice_per_mask
from tracevision_jax.segmentation.mask_decoder import DecodedMasks

COEFFICIENTS = {"mask": 20.0, "dice": 1.0, "iou": 1.0, "object": 1.0}
"""Factors of the released training: 20 focal to 1 Dice to 1 IoU to 1 object score."""
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0


def cross_entropy(logits: Float[Array, "*batch"], targets: Float[Array, "*#batch"]) -> Float[Array, "*batch"]:
    """Binary cross-entropy of each logit, for targets in [0, 1]."""
    return jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))


def focal_per_mask(
    logits: Float[Array, "*masks h w"],
    targets: Float[Array, "*#masks h w"],
    alpha: float = FOCAL_ALPHA,
    gamma: float = FOCAL_GAMMA,
) -> Float[Array, "*masks"]:
    """Focal loss (Lin et al. 2017, Eq. 5), the mean over pixels: -alpha_t (1 - p_t)^gamma log(p_t)."""
    logits = logits.astype(jnp.float32)
    probabilities = jax.nn.sigmoid(logits)
    missing = probabilities * (1 - targets) + (1 - probabilities) * targets  # 1 - p_t
    weights = alpha * targets + (1 - alpha) * (1 - targets)
    return (weights * missing**gamma * cross_entropy(logits, targets)).mean((-2, -1))


def overlap(predicted: Bool[Array, "*masks h w"], true: Bool[Array, "*#masks h w"]) -> Float[Array, "*masks"]:
    """IoU of binary masks; 0 where both are empty, as the public training counts it."""
    intersection = (predicted & true).sum((-2, -1))
    union = (predicted | true).sum((-2, -1))
    return intersection / jnp.maximum(union, 1)


def prompt_losses(
    decoded: DecodedMasks,
    several: Bool[Array, "batch prompts"],
    targets: Float[Array, "batch prompts height width"],
) -> dict[str, Float[Array, "batch prompts"]]:
    """All parts of the loss of each prompt.

    Args:
        decoded: what the mask decoder says, all masks; they are resized to the targets' size.
        several: where the several masks are in use; elsewhere it is the single one.
        targets: the truth, of any size, in [0, 1] where it was made smaller; an empty mask where the object is absent.

    Returns:
        {"mask": focal, "dice": Dice, "iou": distance of predicted IoUs from the true ones, "object": cross-entropy of
        the object's score}, the first three 0 where the object is absent.
    """
    wanted = targets[:, :, None]
    logits = resize_masks(decoded.masks, (targets.shape[-2], targets.shape[-1]))
    present = (targets > 0).any((-2, -1))
    focal, dice = focal_per_mask(logits, wanted), dice_per_mask(logits, jnp.broadcast_to(wanted, logits.shape))
    used = (jnp.arange(decoded.ious.shape[-1]) > 0) == several[:, :, None]
    combined = COEFFICIENTS["mask"] * focal + COEFFICIENTS["dice"] * dice
    best = jnp.where(used, jax.lax.stop_gradient(combined), jnp.inf).argmin(-1)[..., None]

    def of_best(values: Array) -> Array:
        return jnp.take_along_axis(values, best, axis=-1)[..., 0]

    distance = jnp.abs(decoded.ious - jax.lax.stop_gradient(overlap(logits > 0, wanted >= 0.5)))
    return {
        "mask": jnp.where(present, of_best(focal), 0.0),
        "dice": jnp.where(present, of_best(dice), 0.0),
        "iou": jnp.where(present, (distance * used).sum(-1) / used.sum(-1), 0.0),
        "object": cross_entropy(decoded.object_logits, present.astype(jnp.float32)),
    }
