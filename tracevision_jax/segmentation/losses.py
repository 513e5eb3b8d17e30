"""Mask losses of TraceVision, Eq. 13 to 15 (App. F.4): soft Dice, and BCE weighted where predictions overlap.

Both return sums over masks with the number of masks as weight, so that a step can divide global sums once.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

OVERLAP_WEIGHT = 2.0
"""alpha of Eq. 14."""


def dice_per_mask(logits: Float[Array, "*masks h w"], targets: Float[Array, "*masks h w"]) -> Float[Array, "*masks"]:
    """Eq. 13 in its soft form: sets become sums of probabilities; 1 is added to both sides of the fraction."""
    probabilities = jax.nn.sigmoid(logits.astype(jnp.float32))
    overlap = (probabilities * targets).sum((-1, -2))
    return 1 - (2 * overlap + 1) / (probabilities.sum((-1, -2)) + targets.sum((-1, -2)) + 1)


def overlap_weights(
    logits: Float[Array, "rows k h w"], group: Int[Array, "rows k"], alpha: float = OVERLAP_WEIGHT
) -> Float[Array, "rows k h w"]:
    """A of Eq. 14 per mask: `alpha` where two or more predicted masks of its group are on, else 1.

    Args:
        logits: mask logits; a pixel is predicted on above 0.
        group: number from 1 of the image and answer whose masks compete; 0 is padding.
    """
    on = (logits > 0) & (group > 0)[..., None, None]
    same = (group[:, :, None] == group[:, None, :]).astype(jnp.float32)
    count = jnp.einsum("rkj,rjhw->rkhw", same, on.astype(jnp.float32))
    return jax.lax.stop_gradient(jnp.where(count >= 1.5, alpha, 1.0))


def refinement_per_mask(
    logits: Float[Array, "rows k h w"],
    targets: Float[Array, "rows k h w"],
    group: Int[Array, "rows k"],
    alpha: float = OVERLAP_WEIGHT,
) -> Float[Array, "rows k"]:
    """Eq. 15 before the sum over masks: mean over pixels of A * BCE."""
    logits = logits.astype(jnp.float32)
    bce = jnp.maximum(logits, 0) - logits * targets + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return (overlap_weights(logits, group, alpha) * bce).mean((-1, -2))
