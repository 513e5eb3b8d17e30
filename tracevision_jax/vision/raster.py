"""Features in window order read on a square grid stretched over the whole picture, by bilinear interpolation.

The pixel decoder works on fixed grids whatever the picture's size and shape; where the picture's patches lie in the
tower's arrays follows from `grid` alone (`windows.py`).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tracevision_jax.layers.sharding import constrain
from tracevision_jax.vision.windows import raster_slots, slot_coordinates


def features_on_square(
    features: Float[Array, "batch frames places width"],
    grid: Int[Array, "batch frames 2"],
    side: int,
    window_units: int,
    merge: int,
) -> Float[Array, "batch frames side side width"]:
    """Bilinear samples at the centres of side x side cells; an absent frame gives its (meaningless) first place."""
    batch, frames, _, width = features.shape
    size = jnp.maximum(grid, 1)[..., None]
    centres = (jnp.arange(side) + 0.5) / side * size - 0.5
    centres = jnp.clip(centres, 0, size - 1)
    low = jnp.floor(centres).astype(jnp.int32)
    high = jnp.minimum(low + 1, size - 1)
    share = (centres - low).astype(features.dtype)

    def read(rows, cols):
        places = raster_slots(rows[..., :, None], cols[..., None, :], size[..., 1, :, None], window_units, merge)
        index = places.reshape(batch, frames, side * side, 1)
        return jnp.take_along_axis(features, index, axis=2).reshape(batch, frames, side, side, width)

    down, right = share[:, :, 0, :, None, None], share[:, :, 1, None, :, None]
    rows, cols = (low[:, :, 0], high[:, :, 0]), (low[:, :, 1], high[:, :, 1])
    upper = read(rows[0], cols[0]) * (1 - right) + read(rows[0], cols[1]) * right
    lower = read(rows[1], cols[0]) * (1 - right) + read(rows[1], cols[1]) * right
    square = (upper * (1 - down) + lower * down).reshape(batch * frames, side, side, width)
    return constrain(square, "sets", None, None, None).reshape(batch, frames, side, side, width)


def unit_centres(
    grid: Int[Array, "batch frames 2"], windows: int, window_units: int, merge: int
) -> tuple[Float[Array, "batch frames units 2"], Array]:
    """Centres (x, y) in [0, 1] of the merged units in window order, and which of them lie inside the picture."""
    slots = jnp.arange((window_units * merge) ** 2)[:: merge**2]
    row, col, inside = slot_coordinates(grid, jnp.arange(windows), slots, window_units, merge)
    size = jnp.maximum(grid, 1)[..., None, None, :].astype(jnp.float32)
    half = merge / 2
    xy = jnp.stack([(col + half) / size[..., 1], (row + half) / size[..., 0]], -1)
    flat = (*grid.shape[:2], -1)
    return jnp.where(inside[..., None], xy, 0.0).reshape(*flat, 2), inside.reshape(flat)


def unit_boxes(
    grid: Int[Array, "batch frames 2"], windows: int, window_units: int, merge: int
) -> Float[Array, "batch frames units 4"]:
    """The part (x1, y1, x2, y2) of the picture that each merged unit shows, in window order; 0 outside the picture."""
    centres, inside = unit_centres(grid, windows, window_units, merge)
    half = merge / 2 / jnp.maximum(grid, 1)[:, :, None, ::-1].astype(jnp.float32)
    return jnp.where(inside[..., None], jnp.concatenate([centres - half, centres + half], -1), 0.0)
