"""Sine positions of a map (Carion et al. 2020, Sec. A.4), as SAM 2 gives them to its memory.

Rows and columns count from 1 and are divided by the number of them, so that a map of any size spans one turn.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32

TEMPERATURE = 1e4


def sine_position(height: int, width: int, channels: int) -> Float32[Array, "{height} {width} {channels}"]:
    """Code each place of a map: the first half of the channels its row, the second its column, sines and cosines in
    turn.

    Raises:
        ValueError: `channels` is no multiple of 4.
    """
    if channels % 4:
        raise ValueError(f"sine positions of {channels} channels; they need a multiple of 4")
    wavelengths = TEMPERATURE ** (jnp.arange(0, channels // 2, 2, dtype=jnp.float32) / (channels // 2))

    def line(count: int) -> Float32[Array, "{count} half"]:
        turn = jnp.arange(1, count + 1, dtype=jnp.float32) / (count + 1e-6) * (2 * jnp.pi)
        angles = turn[:, None] / wavelengths
        return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(count, channels // 2)

    rows = jnp.broadcast_to(line(height)[:, None], (height, width, channels // 2))
    columns = jnp.broadcast_to(line(width)[None], (height, width, channels // 2))
    return jnp.concatenate([rows, columns], axis=-1)
