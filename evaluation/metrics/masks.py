"""Overlap of masks: IoU of each sample, gIoU (their mean) and cIoU (cumulative), from arrays or from areas.

Definitions as LISA's evaluation (Lai et al., arXiv 2308.00692) and the RefCOCO evaluators use them:
- IoU of a sample whose masks are both empty is 1;
- gIoU is the mean of IoUs over samples. LISA adds 1e-5 to each union before dividing (`LISA_UNION_EPSILON`);
  the default here is the plain quotient, which can differ in the fifth decimal for masks of a few pixels;
- cIoU is the sum of intersections over the sum of unions, so large objects weigh more;
- pixels that ReasonSeg marks to be ignored count in neither.

    intersections, unions = areas(predicted_masks, true_masks)
    giou(intersections, unions), ciou(intersections, unions)

Arrays may be numpy's or, alone or inside `jax.jit`, jax's; `on_device.py` has the jitted form. Masks of
different sizes, as files hold them, come as COCO run lengths: `run_lengths.py` gives their areas.
"""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

LISA_UNION_EPSILON = 1e-5


def areas(
    predicted: Bool[Any, "*n height width"],
    true: Bool[Any, "*n height width"],
    valid: Bool[Any, "*n height width"] | None = None,
) -> tuple[Int[Any, "*n"], Int[Any, "*n"]]:
    """Pixels in the intersection and in the union of each pair of masks, of the `valid` pixels if given."""
    if valid is not None:
        predicted, true = predicted & valid, true & valid
    return (predicted & true).sum(axis=(-2, -1)), (predicted | true).sum(axis=(-2, -1))


def iou(intersections: Int[Any, "*n"], unions: Int[Any, "*n"], union_epsilon: float = 0.0) -> Float[Any, "*n"]:
    """IoU of each sample: 1 where the union is empty, else intersection / (union + union_epsilon)."""
    xp = unions.__array_namespace__()
    empty = unions == 0
    return xp.where(empty, 1.0, intersections / xp.where(empty, 1.0, unions + union_epsilon))


def giou(intersections: Int[Any, "n"], unions: Int[Any, "n"], union_epsilon: float = 0.0) -> float:
    """Mean over samples of their IoU.

    Raises:
        ValueError: there is no sample.
    """
    if unions.shape[0] == 0:
        raise ValueError("gIoU of no samples is undefined")
    return float(iou(intersections, unions, union_epsilon).mean())


def ciou(intersections: Int[Any, "n"], unions: Int[Any, "n"]) -> float:
    """Sum of intersections over sum of unions; 1 when every union is empty, as each sample's IoU then is.

    Raises:
        ValueError: there is no sample.
    """
    if unions.shape[0] == 0:
        raise ValueError("cIoU of no samples is undefined")
    # Summed in 64 bits on the host: a data set holds more pixels than 32 bits count.
    intersection, union = (int(np.asarray(pixels).sum(dtype=np.int64)) for pixels in (intersections, unions))
    return intersection / union if union else 1.0
