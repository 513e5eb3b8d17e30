"""Resizing of maps and masks with the conventions of PyTorch's `interpolate` (align_corners=False).

Target place i reads around (i + 0.5) * source / target - 0.5. "linear" has two taps and "cubic" four, of Keys' kernel
(1981) with a = -0.75; taps past an edge read the edge. With `antialias` the linear kernel widens when an axis shrinks
and drops what lies outside, as Pillow does. (`jax.image.resize` differs: its cubic has a = -0.5, and it always
antialiases.) Axes are resized one after the other, each by a matrix that is made from the sizes alone:

    logits = resize_masks(low_res, (1080, 1920))
    positions = resize_maps(pos_embed, (32, 32), "cubic")
"""

from functools import lru_cache
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int

Kernel = Literal["linear", "cubic"]
CUBIC_A = -0.75


def _keys(distance: Float64[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    """Keys' cubic convolution kernel, at distances of at most 2."""
    x, a = np.abs(distance), CUBIC_A
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, far)


def taps(
    source: int, target: int, kernel: Kernel = "linear", antialias: bool = False
) -> tuple[Int[np.ndarray, "{target} taps"], Float64[np.ndarray, "{target} taps"]]:
    """Return which places of the source each place of the target reads, and with what weights (of sum 1).

    Raises:
        ValueError: an empty axis, or antialiasing with the cubic kernel.
    """
    if source < 1 or target < 1:
        raise ValueError(f"an axis of {source} places cannot be resized to {target}")
    if antialias and kernel != "linear":
        raise ValueError("antialiasing is there for the linear kernel only")
    centres = (np.arange(target)[:, None] + 0.5) * (source / target) - 0.5
    if antialias and target < source:
        widening = source / target
        reach = int(np.ceil(widening))
        places = np.floor(centres).astype(np.int64) + np.arange(-reach, reach + 2)
        weights = np.maximum(1 - np.abs(places - centres) / widening, 0) * ((places >= 0) & (places < source))
        weights /= weights.sum(1, keepdims=True)
    else:
        offsets = np.arange(2) if kernel == "linear" else np.arange(-1, 3)
        places = np.floor(centres).astype(np.int64) + offsets
        distances = places - centres
        weights = 1 - np.abs(distances) if kernel == "linear" else _keys(distances)
    return np.clip(places, 0, source - 1), weights


@lru_cache(maxsize=128)
def resize_matrix(
    source: int, target: int, kernel: Kernel = "linear", antialias: bool = False
) -> Float32[np.ndarray, "{target} {source}"]:
    """Return the matrix that resizes an axis, see `taps`; do not write into it, it is kept."""
    places, weights = taps(source, target, kernel, antialias)
    matrix = np.zeros((target, source))
    np.add.at(matrix, (np.arange(target)[:, None], places), weights)
    return matrix.astype(np.float32)


def _resize_axes(x: Array, sizes: dict[int, int], kernel: Kernel, antialias: bool) -> Array:
    """Resize axes (negative numbers) to sizes; computed in float32, the result has the dtype of `x`."""
    wide = x.astype(jnp.float32)
    for axis, target in sizes.items():
        if x.shape[axis] != target:
            matrix = resize_matrix(x.shape[axis], target, kernel, antialias)
            # Full float32: the default of accelerators would round masks and positions to bfloat16.
            resized = jnp.tensordot(matrix, wide, axes=(1, axis), precision=jax.lax.Precision.HIGHEST)
            wide = jnp.moveaxis(resized, 0, axis)
    return wide.astype(x.dtype)


def resize_rows(x: Float[Array, "rows channels"], size: int) -> Float[Array, "{size} channels"]:
    """Resize a table along its rows, linearly."""
    return _resize_axes(x, {-2: size}, "linear", False)


def resize_maps(
    x: Float[Array, "*lead height width channels"],
    size: tuple[int, int],
    kernel: Kernel = "linear",
    antialias: bool = False,
) -> Float[Array, "*lead new_height new_width channels"]:
    """Resize maps to `size`, (height, width)."""
    return _resize_axes(x, {-3: size[0], -2: size[1]}, kernel, antialias)


def resize_masks(
    x: Float[Array, "*lead height width"], size: tuple[int, int], antialias: bool = False
) -> Float[Array, "*lead new_height new_width"]:
    """Resize masks (logits) bilinearly to `size`, (height, width)."""
    return _resize_axes(x, {-2: size[0], -1: size[1]}, "linear", antialias)


def resize_masks_on_host(
    x: Float[np.ndarray, "*lead height width"], size: tuple[int, int]
) -> Float32[np.ndarray, "*lead new_height new_width"]:
    """`resize_masks` in numpy, for sizes that differ from picture to picture: nothing is compiled for each."""
    x = np.asarray(x, np.float32)
    for axis, target in zip((-2, -1), size, strict=True):
        if x.shape[axis] != target:
            places, weights = taps(x.shape[axis], target)
            weights = weights.astype(np.float32).T.reshape(2, target, *(1,) * (-axis - 1))
            x = np.take(x, places[:, 0], axis) * weights[0] + np.take(x, places[:, 1], axis) * weights[1]
    return x


def double_nearest(
    x: Float[Array, "*lead height width channels"],
) -> Float[Array, "*lead new_height new_width channels"]:
    """Repeat every place of a map 2 x 2 times."""
    return jnp.repeat(jnp.repeat(x, 2, axis=-3), 2, axis=-2)
