"""What tracking a frame gives: of each object a mask at the frame's own size, its box, run lengths and scores.

    result.frame, result.image                       # number, and the picture itself
    result.masks[1]                                  # (height, width), bool
    result.boxes[1]                                  # (x1, y1, x2, y2) in pixels, or None where nothing is seen
    result.run_lengths[1]                            # COCO's {"size": ..., "counts": ...}
    result.scores[1], result.ious[1]                 # chance that the object is in sight; predicted quality
    result.ids                                       # one picture of object numbers, as in DAVIS

Everything is made from the model's small logits when it is asked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from tracevision_jax.errors import UserError
from tracevision_jax.vision.run_lengths import encode_mask
from tracevision_jax.vision.sam_preprocess import Fitting

HIGHEST_ID = 254
"""Of a picture of object numbers, where 255 means something else in DAVIS."""


class Found(NamedTuple):
    """An object on a frame, as the model gives it."""

    logits: Float32[np.ndarray, "size size"]
    """Over the square picture."""
    iou: float
    """Predicted by the model."""
    object_logit: float


@dataclass(frozen=True)
class TrackedFrame:
    """Results of one frame."""

    frame: int
    """Its number in the video."""
    image: UInt8[np.ndarray, "height width 3"]
    found: Mapping[int, Found]
    """By the object's number; an object that nothing is known of yet is not there."""
    fitting: Fitting

    @cached_property
    def logits(self) -> dict[int, Float32[np.ndarray, "height width"]]:
        """At the frame's size."""
        return {number: self.fitting.masks_to_picture(found.logits) for number, found in self.found.items()}

    @cached_property
    def masks(self) -> dict[int, Bool[np.ndarray, "height width"]]:
        """By object; they may overlap."""
        return {number: logits > 0 for number, logits in self.logits.items()}

    @property
    def boxes(self) -> dict[int, tuple[int, int, int, int] | None]:
        """Around the masks, (x1, y1, x2, y2) in pixels, the last two one past the mask; None for an empty mask."""
        return {number: box_px(mask) for number, mask in self.masks.items()}

    @property
    def run_lengths(self) -> dict[int, dict[str, Any]]:
        """Masks in COCO's compressed run lengths."""
        return {number: encode_mask(mask) for number, mask in self.masks.items()}

    @property
    def scores(self) -> dict[int, float]:
        """Chance that the object is in sight."""
        return {number: _chance(found.object_logit) for number, found in self.found.items()}

    @property
    def ious(self) -> dict[int, float]:
        """How well the mask fits, as the model believes."""
        return {number: found.iou for number, found in self.found.items()}

    @cached_property
    def ids(self) -> UInt8[np.ndarray, "height width"]:
        """Object numbers, 0 for none; where masks overlap, that of the highest logit.

        Raises:
            UserError: an object whose number does not fit.
        """
        ids = np.zeros((self.fitting.height, self.fitting.width), np.uint8)
        best = np.zeros(ids.shape, np.float32)
        for number, logits in self.logits.items():
            if number > HIGHEST_ID:
                raise UserError(f"object {number}: a picture of object numbers holds 1 to {HIGHEST_ID}")
            wins = logits > best
            ids[wins], best[wins] = number, logits[wins]
        return ids


def box_px(mask: Bool[np.ndarray, "height width"]) -> tuple[int, int, int, int] | None:
    """The box around a mask, None around an empty one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _chance(logit: Float[np.ndarray, ""] | float) -> float:
    return float(1 / (1 + np.exp(-np.clip(logit, -60, 60))))
