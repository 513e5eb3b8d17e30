"""Masks as COCO run lengths (RLE): checked and measured in numpy.

A mask is `{"size": [height, width], "counts": runs}`; the runs alternate between 0 and 1, beginning with 0,
down the columns. `counts` is a list of run lengths, or the string that COCO's API packs them into: five bits
a character (from "0" on), least first, the sixth bit marking that more follow, and from the fourth run on the
difference to the run two before. Every malformed mask is refused with the reason, where COCO's C code would
read past its end.

    overlap = overlap_areas(parse(prediction), parse(truth))
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

LARGEST_SIDE_PX = 65_536


class RunLengths(NamedTuple):
    """A checked mask: its size in pixels, and where each run ends down the columns."""

    height: int
    width: int
    ends: Int[np.ndarray, "runs"]


def parse(mask: Any) -> RunLengths:
    """Check a COCO run-length mask as `json.load` returns it.

    Raises:
        ValueError: it is no such mask; the message says why.
    """
    if not isinstance(mask, dict) or not {"size", "counts"} <= mask.keys():
        raise ValueError('must be a COCO RLE object {"size": [height, width], "counts": ...}')
    size, counts = mask["size"], mask["counts"]
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(side) is int for side in size):
        raise ValueError('"size" must be [height, width] in whole pixels')
    height, width = size
    if not (0 < height <= LARGEST_SIDE_PX and 0 < width <= LARGEST_SIDE_PX):
        raise ValueError(f'"size" must lie between 1 and {LARGEST_SIDE_PX} pixels a side, but is {size}')
    if isinstance(counts, str):
        lengths = _unpack(counts)
    elif isinstance(counts, list) and all(type(count) is int for count in counts):
        if any(not 0 <= count <= height * width for count in counts):
            raise ValueError('a run of "counts" is negative or longer than the mask')
        lengths = np.array(counts, dtype=np.int64)
    else:
        raise ValueError('"counts" must be a string or a list of whole numbers')
    if (lengths < 0).any():
        raise ValueError('"counts" does not decode: it holds a negative run')
    total = int(lengths.sum())
    if total != height * width:
        raise ValueError(f'"counts" covers {total} pixels, but "size" {height} x {width} has {height * width}')
    return RunLengths(height, width, np.cumsum(lengths))


def _unpack(packed: str) -> Int[np.ndarray, "runs"]:
    """The run lengths in COCO's packed string."""
    codes = np.array([ord(character) for character in packed], dtype=np.int64) - 48
    if codes.size == 0 or codes.min() < 0 or codes.max() > 63:
        raise ValueError('"counts" does not decode: characters must lie between "0" and "o"')
    more = (codes & 32) > 0
    if more[-1]:
        raise ValueError('"counts" does not decode: it ends inside a number')
    ends = np.flatnonzero(~more) + 1
    starts = np.concatenate([[0], ends[:-1]])
    digits = ends - starts
    if digits.max() > 8:
        raise ValueError('"counts" does not decode: a run has more than 40 bits')
    place = np.arange(codes.size) - np.repeat(starts, digits)
    numbers = np.add.reduceat((codes & 31) << (5 * place), starts)
    negative = (codes[ends - 1] & 16) > 0
    numbers = np.where(negative, numbers - (1 << (5 * digits)), numbers)
    # From the fourth run on, numbers are differences to the run two before: odd runs add up from the
    # second, even ones from the third.
    numbers[1::2] = np.cumsum(numbers[1::2])
    numbers[2::2] = np.cumsum(numbers[2::2])
    return numbers


def overlap_areas(predicted: RunLengths, true: RunLengths) -> tuple[int, int]:
    """Pixels in the intersection and in the union of two masks, from their runs alone.

    Raises:
        ValueError: the masks differ in size.
    """
    if predicted[:2] != true[:2]:
        raise ValueError(
            f"sizes differ: prediction {predicted.height} x {predicted.width}, "
            f"reference {true.height} x {true.width} (height x width)"
        )
    ends = np.union1d(predicted.ends, true.ends)
    lengths = np.diff(ends, prepend=0)
    # Between two neighbouring ends nothing changes; an odd number of runs ended before means ones.
    both = [np.searchsorted(mask.ends, ends, side="left") % 2 == 1 for mask in (predicted, true)]
    return int(lengths[both[0] & both[1]].sum()), int(lengths[both[0] | both[1]].sum())
