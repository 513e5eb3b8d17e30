"""Rotary position embedding (Su et al. 2021) on half-split heads, with several position axes.

The first half of a head's channels is rotated against the second half (the convention of GPT-NeoX and of
every released checkpoint here). `axial_angles` gives each frequency one of several positions: multimodal
rotary of Qwen2-VL (time, height, width in sections) and the towers' 2-D rotary (row, column) are both cases
of it.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num


def inverse_frequencies(channels: int, theta: float) -> Float[np.ndarray, "half"]:
    """Return theta^(-2i / channels) for i < channels / 2, in float32.

    Exponent, power and reciprocal are each rounded to float32, as in the public implementations that models were
    trained with: at position 30,000 one unit in the last place is an angle of 0.002.
    """
    exponent = np.arange(0, channels, 2, dtype=np.float32) / np.float32(channels)
    power = (np.float64(theta) ** exponent.astype(np.float64)).astype(np.float32)
    return np.float32(1) / power


def axial_angles(
    positions: Num[Array, "*rows axes"], frequencies: Sequence[Float[np.ndarray, "_"]]
) -> Float[Array, "*rows half"]:
    """Angles position[axis] * frequency, one axis's section after another: `frequencies[a]` is axis a's."""
    positions = jnp.asarray(positions, jnp.float32)
    sections = [positions[..., axis : axis + 1] * values for axis, values in enumerate(frequencies)]
    return jnp.concatenate(sections, axis=-1)


def multimodal_frequencies(head_dim: int, theta: float, sections: Sequence[int]) -> tuple[Float[np.ndarray, "_"], ...]:
    """Frequencies of multimodal rotary: one series cut into sections for time, height and width, in a row."""
    series = inverse_frequencies(head_dim, theta)
    if sum(sections) != len(series):
        raise ValueError(f"rotary sections {tuple(sections)} must sum to half the head size, {len(series)}")
    return tuple(np.split(series, np.cumsum(sections)[:-1]))


def planar_frequencies(head_dim: int, theta: float) -> tuple[Float[np.ndarray, "quarter"], ...]:
    """Frequencies of 2-D rotary: the same series of head_dim / 4 values for rows and for columns."""
    series = inverse_frequencies(head_dim // 2, theta)
    return series, series


def apply_rotary(
    x: Float[Array, "*rows heads head_dim"], angles: Float[Array, "*#rows half"]
) -> Float[Array, "*rows heads head_dim"]:
    """Rotate channel pairs (i, i + head_dim / 2) by the angles, in float32; the result has x's dtype."""
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
