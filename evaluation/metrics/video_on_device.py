"""J and F of video masks as a jitted program, batched over any leading axes: objects, frames, videos.

Definitions and arithmetic are those of `video.py`; only the search for a boundary nearby differs. Counts are whole
numbers, so they are exact; `video.j_and_f` turns them into J and F on the host in double precision, or, alone or
inside `jax.jit`, into float32 ones.

    counts = jax.device_get(frame_counts(logits > 0, true_masks))
    j, f = video.j_and_f(counts)                        # (objects, frames)

Free of communication, so a batch sharded over a mesh stays where it is. All masks of a call have one size, from
which the tolerance follows; padded frames would score otherwise. A pair of masks takes about 20 bytes a pixel
while it is counted.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from evaluation.metrics import video


def dilated(marks: Bool[Array, "*n height width"], radius_px: int) -> Bool[Array, "*n height width"]:
    """Pixels whose distance to a mark is at most the radius.

    First the distance to the nearest mark of the same row, then, of each row in reach, whether it is near enough:
    2 (2 r + 1) steps a pixel instead of a disk's r^2, without branches and in two fused loops.
    """
    height, width = marks.shape[-2:]
    offsets = range(-radius_px, radius_px + 1)
    around = [(0, 0)] * (marks.ndim - 1) + [(radius_px, radius_px)]
    padded = jnp.pad(marks, around)
    distances = (
        jnp.where(padded[..., radius_px + offset : radius_px + offset + width], abs(offset), radius_px + 1)
        for offset in offsets
    )
    along_row = functools.reduce(jnp.minimum, distances).astype(jnp.int16)
    padded = jnp.pad(along_row, [*around[:-2], around[-1], (0, 0)], constant_values=radius_px + 1)
    near = (
        padded[..., radius_px + offset : radius_px + offset + height, :] <= math.isqrt(radius_px**2 - offset**2)
        for offset in offsets
    )
    return functools.reduce(jnp.logical_or, near)


@jax.jit
def frame_counts(predicted: Bool[Array, "*n height width"], true: Bool[Array, "*n height width"]) -> video.FrameCounts:
    """Pixel counts of each pair of masks, exactly those of `video.frame_counts`."""
    return video.count_pixels(predicted, true, video.tolerance_px(*true.shape[-2:]), dilated)
