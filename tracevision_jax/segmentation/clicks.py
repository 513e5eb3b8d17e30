"""Prompts as a user would give them, drawn from true masks: clicks on errors, and boxes by an unsteady hand.

They follow facebookresearch/sam2, `modeling/sam2_utils.py`: a click lies anywhere in the region of error, with
even chances, and is positive where the mask misses the object; a mask without error gets a negative click beside the
object. All are pure functions, batched over any leading axes, usable inside `jax.lax.scan`.

    point_px, label = click_on_error(key, true, logits > 0)
    corners_px = unsteady_box(key, true)                           # two points, labelled TOP_LEFT and BOTTOM_RIGHT
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tracevision_jax.segmentation.prompt_encoder import NEGATIVE, POSITIVE

BOX_NOISE = 0.1
"""Largest error of a box's corner, as a part of its width or height."""
BOX_NOISE_PX = 20.0
"""The same in pixels."""


def click_on_error(
    key: PRNGKeyArray,
    true: Bool[Array, "*masks height width"],
    predicted: Bool[Array, "*masks height width"] | None = None,
) -> tuple[Float[Array, "*masks 2"], Int[Array, "*masks"]]:
    """A click that corrects a predicted mask; without one, a first click on the object.

    Returns:
        ((x, y) in whole pixels, label POSITIVE or NEGATIVE). Where the truth covers the whole picture and nothing is
        wrong, or there is neither a truth nor a prediction, it may be any pixel, labelled as the truth has it.
    """
    *lead, height, width = true.shape
    wrong = true if predicted is None else true ^ predicted
    region = jnp.where(wrong.any((-2, -1), keepdims=True), wrong, ~true)
    chance = jnp.where(region, jax.random.uniform(key, true.shape), -1.0)
    place = chance.reshape(*lead, height * width).argmax(-1)
    inside = jnp.take_along_axis(true.reshape(*lead, height * width), place[..., None], axis=-1)[..., 0]
    point = jnp.stack([place % width, place // width], axis=-1).astype(jnp.float32)
    return point, jnp.where(inside, POSITIVE, NEGATIVE)


def tight_box(true: Bool[Array, "*masks height width"]) -> Float[Array, "*masks 2 2"]:
    """First and last pixel, (x, y) each, of the smallest box around a mask; zeros for an empty one."""

    def ends(occupied: Bool[Array, "*masks length"]) -> tuple[Array, Array]:
        last = occupied.shape[-1] - 1 - occupied[..., ::-1].argmax(-1)
        return occupied.argmax(-1), jnp.where(occupied.any(-1), last, 0)

    (left, right), (top, bottom) = ends(true.any(-2)), ends(true.any(-1))
    corners = jnp.stack([jnp.stack([left, top], -1), jnp.stack([right, bottom], -1)], -2)
    return corners.astype(jnp.float32)


def unsteady_box(key: PRNGKeyArray, true: Bool[Array, "*masks height width"]) -> Float[Array, "*masks 2 2"]:
    """Corners (x, y) of a box around each mask, each moved by up to a tenth of its size, kept within the picture."""
    height, width = true.shape[-2:]
    corners = tight_box(true)
    size = corners[..., 1, :] - corners[..., 0, :]
    reach = jnp.minimum(BOX_NOISE * size, BOX_NOISE_PX)[..., None, :]
    moved = corners + reach * jax.random.uniform(key, corners.shape, minval=-1.0, maxval=1.0)
    return jnp.clip(moved, 0.0, jnp.array([width - 1.0, height - 1.0]))
