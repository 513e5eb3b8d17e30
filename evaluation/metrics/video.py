"""Masks over time: region similarity J, boundary accuracy F, their recall and decay, and temporal stability.

Definitions of the DAVIS evaluation (Perazzi et al., CVPR 2016, and the 2017 code, davis2017-evaluation):
- J of a frame is the IoU; 1 where both masks are empty.
- F of a frame is the F-measure of boundary pixels. A pixel is on the boundary where it differs from its right,
  lower or lower-right neighbour within the frame; it is matched if a boundary pixel of the other mask lies within
  ceil(0.008 x diagonal) pixels. Two empty boundaries give 1; one empty gives 0. A mask of the whole frame has no
  boundary.
- Of one object's frames: the mean; the recall, the share of frames above 0.5; the decay, the mean of the first
  quarter less that of the last, neighbouring quarters sharing a frame. DAVIS keeps the ends of quarters in 8 bits,
  which is wrong beyond 256 frames; here they are exact.
- Of a sequence or a data set: the plain mean over its objects, however many frames each has. J&F is (J + F) / 2.
- The semi-supervised protocol leaves out the first frame, which is given, and the last.

    scores = object_scores(predicted, true)            # (frames, height, width), semi-supervised
    mean_scores([scores, ...]).named()                 # {"J": ..., "F": ..., "J&F": ..., "J-recall": ..., ...}

A video of two frames or fewer leaves the protocol nothing to score: undefined (DAVIS's code stops with an error),
which is a ValueError here. Arrays are numpy's; `video_on_device.py` counts the same on an accelerator.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from evaluation.metrics import masks

TOLERANCE_OF_DIAGONAL = 0.008
RECALL_ABOVE = 0.5
QUARTERS = 4

SEMI_SUPERVISED = slice(1, -1)
"""Frames that count when the first mask is given (DAVIS, SA-V)."""
ALL_FRAMES = slice(None)
"""Frames that count when an expression is given (MeViS, Ref-YouTube-VOS, ReVOS)."""


class FrameCounts(NamedTuple):
    """Pixels of frames, all that J and F need. `matched` is what lies near the other mask's boundary."""

    intersection: Int[Any, "*n"]
    union: Int[Any, "*n"]
    predicted_matched: Int[Any, "*n"]
    predicted_boundary: Int[Any, "*n"]
    true_matched: Int[Any, "*n"]
    true_boundary: Int[Any, "*n"]


class Statistics(NamedTuple):
    """J or F over the frames of an object, or the mean of that over objects."""

    mean: float
    recall: float
    decay: float


class Scores(NamedTuple):
    """Both measures of an object, a sequence or a data set."""

    j: Statistics
    f: Statistics

    def named(self) -> dict[str, float]:
        """The figures under the names that papers give them."""
        return {
            "J": self.j.mean,
            "F": self.f.mean,
            "J&F": (self.j.mean + self.f.mean) / 2,
            "J-recall": self.j.recall,
            "J-decay": self.j.decay,
            "F-recall": self.f.recall,
            "F-decay": self.f.decay,
        }


class Stability(NamedTuple):
    """Overlap of neighbouring frames, as fractions; TrajSeg's Table V prints both times 100."""

    mean_iou: float
    variance: float


def tolerance_px(height: int, width: int) -> int:
    """How far apart two boundaries may lie and still match, in whole pixels: 8 for 854 x 480."""
    return math.ceil(TOLERANCE_OF_DIAGONAL * math.sqrt(height * height + width * width))


def boundary(mask: Bool[Any, "*n height width"]) -> Bool[Any, "*n height width"]:
    """Pixels that differ from their right, lower or lower-right neighbour; beyond the frame the edge goes on."""
    xp = mask.__array_namespace__()
    right = xp.concat([mask[..., 1:], mask[..., -1:]], axis=-1)
    below, diagonal = (xp.concat([pixels[..., 1:, :], pixels[..., -1:, :]], axis=-2) for pixels in (mask, right))
    return (mask ^ right) | (mask ^ below) | (mask ^ diagonal)


def dilated(marks: Bool[np.ndarray, "*n height width"], radius_px: int) -> Bool[np.ndarray, "*n height width"]:
    """Pixels whose distance to a mark is at most the radius, as by a disk."""
    height = marks.shape[-2]
    rows, near = marks.copy(), np.zeros_like(marks)
    reach = 0
    # From the disk's top and bottom rows, one pixel wide, to its middle: each is the one before, widened.
    for offset in range(radius_px, -1, -1):
        while reach < math.isqrt(radius_px**2 - offset**2):
            reach += 1
            rows[..., reach:] |= marks[..., :-reach]
            rows[..., :-reach] |= marks[..., reach:]
        kept = max(height - offset, 0)
        near[..., offset:, :] |= rows[..., :kept, :]
        near[..., :kept, :] |= rows[..., offset:, :]
    return near


def count_pixels(
    predicted: Bool[Any, "*n height width"],
    true: Bool[Any, "*n height width"],
    radius_px: int,
    dilate: Callable[[Any, int], Any],
) -> FrameCounts:
    """The counts of each pair of masks; `dilate(marks, radius_px)` is `dilated` or its form on a device."""
    intersection, union = masks.areas(predicted, true)
    edges = boundary(predicted), boundary(true)
    near = [dilate(edge, radius_px) for edge in edges]
    sums = [
        pixels.sum(axis=(-2, -1)) for pixels in (edges[0] & near[1], edges[0], edges[1] & near[0], edges[1])
    ]  # fmt: skip
    return FrameCounts(intersection, union, *sums)


def frame_counts(
    predicted: Bool[np.ndarray, "*n height width"], true: Bool[np.ndarray, "*n height width"]
) -> FrameCounts:
    """Pixel counts of each pair of masks; computed within the rows and columns that any of the masks reaches."""
    either = predicted | true
    rows, columns = _reach(np.any(either, axis=-1)), _reach(np.any(either, axis=-2))
    radius_px = tolerance_px(*true.shape[-2:])
    return count_pixels(predicted[..., rows, columns], true[..., rows, columns], radius_px, dilated)


def j_and_f(counts: FrameCounts) -> tuple[Float[Any, "*n"], Float[Any, "*n"]]:
    """J and F of each frame, in [0, 1]."""
    xp = counts.union.__array_namespace__()
    precision, recall = (
        # Without boundary pixels the share is 1: where only one mask has none, the other's share is 0.
        xp.where(total == 0, 1.0, matched / xp.where(total == 0, 1, total))
        for matched, total in (
            (counts.predicted_matched, counts.predicted_boundary),
            (counts.true_matched, counts.true_boundary),
        )
    )
    both = precision + recall
    f = xp.where(both == 0, 0.0, 2 * precision * recall / xp.where(both == 0, 1.0, both))
    return masks.iou(counts.intersection, counts.union), f


def statistics(values: Float[np.ndarray, "frames"]) -> Statistics:
    """Mean, recall and decay of one object's J or F.

    Raises:
        ValueError: there is no frame.
    """
    if len(values) == 0:
        raise ValueError("J and F of no frames are undefined")
    # Halves are rounded up, as DAVIS does by adding 1e-10.
    ends = np.round(np.linspace(0, len(values) - 1, QUARTERS + 1) + 1e-10).astype(int)
    decay = values[: ends[1] + 1].mean() - values[ends[-2] :].mean()
    return Statistics(float(values.mean()), float((values > RECALL_ABOVE).mean()), float(decay))


def object_scores(
    predicted: Bool[np.ndarray, "frames height width"],
    true: Bool[np.ndarray, "frames height width"],
    scored: slice = SEMI_SUPERVISED,
) -> Scores:
    """J and F of one object (or expression) over the scored frames.

    Raises:
        ValueError: no frame is scored.
    """
    frames = [j_and_f(frame_counts(p, t)) for p, t in zip(predicted[scored], true[scored], strict=True)]
    j, f = np.array(frames, dtype=np.float64).reshape(-1, 2).T
    return Scores(statistics(j), statistics(f))


def mean_scores(scores: Sequence[Scores]) -> Scores:
    """The plain mean over objects: of a sequence, or over all objects of a data set.

    Raises:
        ValueError: there is no object.
    """
    if not scores:
        raise ValueError("the mean score of no objects is undefined")
    j, f = np.mean([(score.j, score.f) for score in scores], axis=0).tolist()
    return Scores(Statistics(*j), Statistics(*f))


def temporal_stability(predicted: Bool[np.ndarray, "frames height width"]) -> Stability:
    """T-IoU of one predicted object: the IoU of each frame's mask with the next one's, its mean and variance.

    TrajSeg (Table V) gives no formula. Here the variance is over the frames of one expression, of IoUs in [0, 1],
    divided by their number; two empty masks count as IoU 1, as for J, so an object that is never drawn is
    perfectly stable. The table's figures are means of both over expressions.

    Raises:
        ValueError: there are fewer than two frames.
    """
    if len(predicted) < 2:
        raise ValueError("temporal stability needs two frames or more")
    ious = masks.iou(*masks.areas(predicted[:-1], predicted[1:]))
    return Stability(float(ious.mean()), float(ious.var()))


def _reach(occupied: Bool[np.ndarray, "*n length"]) -> slice:
    """From one before the first to one past the last: boundaries lie one pixel before a mask at most."""
    places = np.flatnonzero(occupied.reshape(-1, occupied.shape[-1]).any(axis=0))
    if len(places) == 0:
        return slice(0, 1)
    return slice(max(int(places[0]) - 1, 0), int(places[-1]) + 2)
