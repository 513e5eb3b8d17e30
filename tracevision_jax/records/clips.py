"""Clips: stretches of videos with the masks of some objects, what systems that track objects are trained on.

A `Clip` is one row of a batch; `collate` fills rows up to the static sizes of a `ClipBucket` and makes a `ClipBatch`,
the arrays of one jitted step. Axes: clips B (sharded over data and fsdp), time T, objects O. Objects and frames that
are padding have no weight in any loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, no_type_check

import jax
import numpy as np
from jaxtyping import Bool, UInt8

Array = Any
"""numpy's on the host, jax's in a step; also specs and shardings, which jax puts in their place."""


@dataclass(frozen=True)
class Clip:
    """Consecutive frames, and what is seen of each object; all objects are seen on the first frame."""

    name: str
    frames: UInt8[np.ndarray, "time height width 3"]
    masks: Bool[np.ndarray, "objects time height width"]


@dataclass(frozen=True, order=True)
class ClipBucket:
    """Static sizes of a row; one program is compiled for each that a run uses. A row holds one clip."""

    frames: int
    objects: int
    side: int
    """Of the square frames, pixels."""

    adds_up: ClassVar[tuple[str, ...]] = ()

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.side} x {self.side} px with {self.objects} objects"


@jax.tree_util.register_dataclass
@no_type_check  # what jax puts in place of arrays has no such shapes
@dataclass(frozen=True)
class ClipBatch:
    """See the module's text for the axes; padding is 0."""

    frames: UInt8[Array, "B T side side 3"]
    """RGB."""
    masks: Bool[Array, "B O T side side"]
    """What is seen of each object."""
    real: Bool[Array, "B O T"]
    """Which objects and frames are there at all; an object that is hidden or outside is."""

    @property
    def filled(self) -> Bool[Array, "B O T"]:
        """What counts as a token in the log: a frame of an object."""
        return self.real


def empty_batch(rows: int, bucket: ClipBucket) -> ClipBatch:
    """A batch of padding."""
    shape = (rows, bucket.objects, bucket.frames)
    return ClipBatch(
        frames=np.zeros((rows, bucket.frames, bucket.side, bucket.side, 3), np.uint8),
        masks=np.zeros((*shape, bucket.side, bucket.side), bool),
        real=np.zeros(shape, bool),
    )


def collate(rows: Sequence[Clip | None], bucket: ClipBucket) -> ClipBatch:
    """Put clips into a batch; None is an empty row.

    Raises:
        ValueError: a clip that is larger than the bucket, or whose frames have another size.
    """
    batch = empty_batch(len(rows), bucket)
    for row, clip in enumerate(rows):
        if clip is None:
            continue
        objects, frames, height, width = clip.masks.shape
        if objects > bucket.objects or frames > bucket.frames or (height, width) != (bucket.side, bucket.side):
            raise ValueError(
                f"clip {clip.name} of {frames} frames of {width} x {height} px with {objects} objects does not fit "
                f"rows of {bucket}"
            )
        batch.frames[row, :frames] = clip.frames
        batch.masks[row, :objects, :frames] = clip.masks
        batch.real[row, :objects, :frames] = True
    return batch
