"""Square windows of a map as a batch axis, for window attention.

The map is filled up with zeros at the bottom and the right until windows tile it; attention sees the filling as tokens
like others, as in ViTDet (Li et al. 2022) and SAM. `from_windows` drops it again, and takes windows that were pooled in
between as well:

    windows = to_windows(x, 14)                  # (batch * rows * columns, 14, 14, channels)
    x = from_windows(attend(windows), *x.shape[:3])
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def to_windows(
    x: Float[Array, "batch height width channels"], side: int
) -> Float[Array, "windows {side} {side} channels"]:
    """Cut a map into windows of `side` x `side`, row by row, after zeros are added at the bottom and the right."""
    batch, height, width, channels = x.shape
    x = jnp.pad(x, ((0, 0), (0, -height % side), (0, -width % side), (0, 0)))
    x = x.reshape(batch, x.shape[1] // side, side, x.shape[2] // side, side, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, side, side, channels)


def from_windows(
    windows: Float[Array, "windows side side channels"], batch: int, height: int, width: int
) -> Float[Array, "{batch} {height} {width} channels"]:
    """Put windows back into maps of `height` x `width`, dropping what lies outside."""
    side, channels = windows.shape[1], windows.shape[3]
    down, across = -(-height // side), -(-width // side)
    x = windows.reshape(batch, down, across, side, side, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, down * side, across * side, channels)[:, :height, :width]
