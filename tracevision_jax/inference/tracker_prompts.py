"""What a user says about objects of a video: checked in the frame's own pixels, then as arrays for the model.

prompt = check_prompt(size, points=[(210, 350, 1)], box=None, mask=None, where="object 1, frame 0")
prompt = together(earlier, prompt)                     # clicks add up; a mask takes the place of all else
arrays = frame_prompts({row: Said(prompt, earlier_logits)}, objects, fitting, mask_size)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from tracevision_jax.errors import UserError
from tracevision_jax.hosts.sam2_video import FramePrompts
from tracevision_jax.inference.buckets import power_of_two
from tracevision_jax.segmentation.prompt_encoder import ABSENT, BOTTOM_RIGHT, POSITIVE, TOP_LEFT
from tracevision_jax.vision.sam_preprocess import Fitting

LEAST_SLOTS = 8
"""Places for clicks and corners of a box of an object; more are given in powers of two."""


@dataclass(frozen=True)
class Prompt:
    """About one object on one frame."""

    points_px: Float[np.ndarray, "points 2"]
    labels: Int[np.ndarray, "points"]
    """1 on the object, 0 beside it."""
    box_px: Float[np.ndarray, "4"] | None = None
    mask_binary: Bool[np.ndarray, "height width"] | None = None
    """The result itself; there is nothing else then."""


class Said(NamedTuple):
    """All that is said about an object on a frame, and the logits of an earlier result that it corrects."""

    prompt: Prompt
    earlier: Float[np.ndarray, "size size"] | None


def check_prompt(size: tuple[int, int], points: Any, box: Any, mask: Any, where: str) -> Prompt:
    """Check what a user gave.

    Args:
        size: (height, width) of the frame.
        points: (x, y) on the object, or (x, y, label).
        box: (x1, y1, x2, y2).
        mask: (height, width), of booleans or integers, positive inside.
        where: what messages call it.

    Raises:
        UserError: nothing at all, a mask together with something else, a place outside the frame, or a wrong shape.
    """
    try:
        points = [] if points is None else list(points)
    except TypeError as error:
        raise UserError(f"{where}: points must be a list of (x, y) or (x, y, label), not {points!r}") from error
    if mask is not None:
        if points or box is not None:
            raise UserError(f"{where}: a mask says all there is; give it without points and box")
        return Prompt(np.zeros((0, 2)), np.zeros(0, np.int64), mask_binary=_check_mask(size, mask, where))
    if not points and box is None:
        raise UserError(f"{where}: give points, a box or a mask")
    checked = None if box is None else _check_box(size, box, where)
    return Prompt(*_check_points(size, points, where), checked)


def _numbers(values: Any, lengths: tuple[int, ...], what: str) -> Float[np.ndarray, "numbers"]:
    try:
        row = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        row = np.full(1, np.nan)
    if row.ndim != 1 or len(row) not in lengths or not np.isfinite(row).all():
        told = " or ".join(str(length) for length in lengths)
        raise UserError(f"{what} must be {told} numbers, not {values!r}")
    return row


def _check_points(
    size: tuple[int, int], points: Sequence[Any], where: str
) -> tuple[Float[np.ndarray, "points 2"], Int[np.ndarray, "points"]]:
    height, width = size
    rows = [_numbers(point, (2, 3), f"{where}: a point (x, y) or (x, y, label)") for point in points]
    for row in rows:
        if not (0 <= row[0] < width and 0 <= row[1] < height):
            raise UserError(
                f"{where}: the point ({row[0]:g}, {row[1]:g}) is outside the frame of {width} x {height} px"
            )
        if len(row) == 3 and row[2] not in (0, 1):
            raise UserError(f"{where}: a point's label is 1 (on the object) or 0 (beside it), not {row[2]:g}")
    labels = [int(row[2]) if len(row) == 3 else POSITIVE for row in rows]
    return np.array([row[:2] for row in rows], np.float64).reshape(-1, 2), np.array(labels, np.int64)


def _check_box(size: tuple[int, int], box: Any, where: str) -> Float[np.ndarray, "4"]:
    height, width = size
    corners = _numbers(box, (4,), f"{where}: a box (x1, y1, x2, y2)")
    x1, y1, x2, y2 = corners
    told = f"{where}: the box ({x1:g}, {y1:g}, {x2:g}, {y2:g})"
    if not (x1 < x2 and y1 < y2):
        raise UserError(f"{told} is empty or reversed; boxes are (x1, y1, x2, y2) with x1 < x2 and y1 < y2")
    if x1 < 0 or y1 < 0 or x2 > width or y2 > height:
        raise UserError(f"{told} reaches out of the frame of {width} x {height} px")
    return corners


def _check_mask(size: tuple[int, int], mask: Any, where: str) -> Bool[np.ndarray, "height width"]:
    array = np.asarray(mask)
    if array.shape != size or array.dtype.kind not in "bui":
        raise UserError(
            f"{where}: a mask must be booleans or integers of (height, width) = {size}, the frame's size, not "
            f"{array.dtype} of {array.shape}"
        )
    return array > 0


def together(earlier: Prompt | None, new: Prompt) -> Prompt:
    """What was said about an object on a frame, and what is said now: clicks add up, a later box replaces one."""
    if earlier is None or new.mask_binary is not None or earlier.mask_binary is not None:
        return new
    return Prompt(
        np.concatenate([earlier.points_px, new.points_px]),
        np.concatenate([earlier.labels, new.labels]),
        earlier.box_px if new.box_px is None else new.box_px,
    )


def square_mask(mask_binary: Bool[np.ndarray, "height width"], fitting: Fitting, where: str) -> np.ndarray:
    """A mask as the model takes it.

    Raises:
        UserError: so small a mask that nothing is left of it.
    """
    square = fitting.mask_to_input(mask_binary)
    if mask_binary.any() and not square.any():
        raise UserError(
            f"{where}: the mask of {int(mask_binary.sum())} px vanishes at the model's {fitting.side} x {fitting.side} "
            "px; give a box or a point"
        )
    return square


def frame_prompts(rows: Mapping[int, Said], objects: int, fitting: Fitting, mask_size: int) -> FramePrompts:
    """Prompts of a frame as arrays whose shapes depend on the number of rows, and hardly on the prompts.

    Args:
        rows: by the object's row.
        objects: how many rows there are.
        fitting: how the frame lies in the model's square.
        mask_size: side of the logits.
    """
    most = max((len(said.prompt.labels) + 2 * (said.prompt.box_px is not None) for said in rows.values()), default=0)
    slots = power_of_two(max(LEAST_SLOTS, most))
    points = np.zeros((objects, slots, 2), np.float32)
    labels = np.full((objects, slots), ABSENT, np.int32)
    masks = np.zeros((objects, fitting.side, fitting.side), np.float32)
    earlier = np.zeros((objects, mask_size, mask_size), np.float32)
    has_mask, has_earlier = np.zeros(objects, bool), np.zeros(objects, bool)
    for row, (prompt, logits) in rows.items():
        if prompt.mask_binary is not None:
            masks[row], has_mask[row] = square_mask(prompt.mask_binary, fitting, "the prompt"), True
            continue
        corners = np.zeros((0, 2)) if prompt.box_px is None else prompt.box_px.reshape(2, 2)
        places = fitting.to_input(np.concatenate([corners, prompt.points_px]))
        points[row, : len(places)] = places
        labels[row, : len(places)] = [*(TOP_LEFT, BOTTOM_RIGHT)[: len(corners)], *prompt.labels.tolist()]
        if logits is not None:
            earlier[row], has_earlier[row] = logits, True
    return FramePrompts(*(jnp.asarray(field) for field in (points, labels, masks, has_mask, earlier, has_earlier)))
