"""Overlap of boxes (x1, y1, x2, y2): IoU, P@0.5, GIoU, CIoU.

P@0.5 is the share of boxes with IoU strictly above 0.5, as PixelLLM's evaluator counts RefCOCO. GIoU follows
Rezatofighi et al. (arXiv 1902.09630), CIoU Zheng et al. (arXiv 1911.08287); SJTU reports both. They are not
the gIoU and cIoU of `masks.py`, which share their letters only.

    precision_at(iou_pairs(predicted, true))

All take numpy arrays or, alone or inside `jax.jit`, jax arrays: they are written against whichever library
made their arguments. Any unit will do, as long as both sides share it. A box without area has IoU 0 with
every box, even itself: there is no area to share.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float


def iou_pairs(predicted: Float[Any, "*n 4"], true: Float[Any, "*n 4"]) -> Float[Any, "*n"]:
    """IoU of each predicted box with the true box of the same index."""
    intersection, union = _intersection_and_union(predicted, true)
    return _ratio(intersection, union)


def iou_matrix(left: Float[Any, "*batch n 4"], right: Float[Any, "*batch m 4"]) -> Float[Any, "*batch n m"]:
    """IoU of every box of one list with every box of the other."""
    intersection, union = _intersection_and_union(left[..., :, None, :], right[..., None, :, :])
    return _ratio(intersection, union)


def giou_pairs(predicted: Float[Any, "*n 4"], true: Float[Any, "*n 4"]) -> Float[Any, "*n"]:
    """IoU less the share of the smallest enclosing box that neither covers; in (-1, 1], at most the IoU."""
    intersection, union = _intersection_and_union(predicted, true)
    width, height = _enclosing_size(predicted, true)
    return _ratio(intersection, union) - _ratio(width * height - union, width * height)


def ciou_pairs(predicted: Float[Any, "*n 4"], true: Float[Any, "*n 4"]) -> Float[Any, "*n"]:
    """IoU - d^2 / c^2 - alpha v; at most the IoU.

    d is the distance of the centres and c the enclosing box's diagonal; v = 4 / pi^2 times the squared
    difference of atan(width / height), and alpha = v / (1 - IoU + v).
    """
    xp = predicted.__array_namespace__()
    iou = iou_pairs(predicted, true)
    width, height = _enclosing_size(predicted, true)
    centres_apart = (predicted[..., :2] + predicted[..., 2:] - true[..., :2] - true[..., 2:]) / 2
    distance = _ratio((centres_apart**2).sum(axis=-1), width**2 + height**2)

    def angle(boxes):
        # atan2: also defined for a box without height.
        return xp.arctan2(boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1])

    shape = 4 / math.pi**2 * (angle(true) - angle(predicted)) ** 2
    return iou - distance - _ratio(shape, 1 - iou + shape) * shape


def precision_at(ious: Float[Any, "n"], threshold: float = 0.5) -> float:
    """Share of IoUs strictly above the threshold.

    Raises:
        ValueError: there is none.
    """
    if ious.shape[0] == 0:
        raise ValueError("precision of no boxes is undefined")
    return float(np.mean(ious > threshold))


def _intersection_and_union(left, right):
    xp = left.__array_namespace__()
    corner = xp.maximum(left[..., :2], right[..., :2])
    opposite = xp.minimum(left[..., 2:], right[..., 2:])
    sides = xp.clip(opposite - corner, 0, None)
    intersection = sides[..., 0] * sides[..., 1]
    return intersection, _area(left) + _area(right) - intersection


def _area(boxes):
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _enclosing_size(left, right):
    xp = left.__array_namespace__()
    sides = xp.maximum(left[..., 2:], right[..., 2:]) - xp.minimum(left[..., :2], right[..., :2])
    return sides[..., 0], sides[..., 1]


def _ratio(part, whole):
    """part / whole, and 0 where the whole is 0, without a division by zero on the way."""
    xp = whole.__array_namespace__()
    positive = whole > 0
    return xp.where(positive, part / xp.where(positive, whole, 1), 0)
