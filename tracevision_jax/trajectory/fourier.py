"""Fourier features of places in the unit square, shared by coordinate tokens, trajectory points and visual tokens.

A bin's embedding starts from these features of its place, and the TVP adds them to the queries and keys of both
sides, so that "near" means a large inner product before anything is learned. Frequencies are geometric from half a
cycle across the image to `max_cycles`, so that inner products fall off smoothly with distance.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def frequencies(count: int, max_cycles: float) -> np.ndarray:
    """`count` frequencies in cycles per image side, geometric from 0.5 to `max_cycles`."""
    return np.geomspace(0.5, max_cycles, count) if count > 1 else np.array([0.5])


def line_features(x: Float[Array, "..."], width: int, max_cycles: float = 16.0) -> Float[Array, "... width"]:
    """Unit-norm features of a coordinate in [0, 1]; `width` must be even."""
    if width % 2:
        raise ValueError(f"Fourier features need an even width, got {width}")
    count = width // 2
    angles = 2 * np.pi * x[..., None] * jnp.asarray(frequencies(count, max_cycles), jnp.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1) / np.sqrt(count)


def plane_features(xy: Float[Array, "... 2"], width: int, max_cycles: float = 16.0) -> Float[Array, "... width"]:
    """Unit-norm features of a place (x, y): half of the width for each coordinate; `width` must divide by 4."""
    halves = [line_features(xy[..., axis], width // 2, max_cycles) for axis in (0, 1)]
    return jnp.concatenate(halves, -1) / np.sqrt(2)


def bin_centres(bins: int) -> Float[Array, "bins"]:
    """Centres of equal bins of [0, 1]."""
    return (jnp.arange(bins) + 0.5) / bins
