"""Multimodal rotary positions of a token sequence, made on the host in numpy.

Follows Qwen2-VL (Sec. 2.1) with the absolute time of Qwen2.5-VL: text counts up with all three positions
equal; an image or video that starts at position p has time p + floor(frame * tokens per second * seconds per
frame), height p + row, width p + column on the grid of merged units; what follows goes on at p + max(rows,
columns).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class VisualSpan:
    """An image or video in a prompt: its temporal patches, and rows and columns of patches (not of units)."""

    frames: int
    rows: int
    cols: int
    seconds_per_frame: float = 0.0
    """Seconds between temporal patches (temporal patch size / sampled frames per second); 0 for a still."""

    def tokens(self, merge: int) -> int:
        """Number of visual tokens that it takes in the prompt."""
        return self.frames * (self.rows // merge) * (self.cols // merge)


def visual_positions(
    span: VisualSpan, start: int, merge: int, tokens_per_second: int | float
) -> Int[np.ndarray, "tokens 3"]:
    """Positions (time, height, width) of a span's tokens in the order frame, row, column."""
    # In float32 and cut, not rounded, as the reference does it.
    interval = np.float32(tokens_per_second * span.seconds_per_frame)
    time = (np.arange(span.frames, dtype=np.float32) * interval).astype(np.int64)
    axes = np.meshgrid(time, np.arange(span.rows // merge), np.arange(span.cols // merge), indexing="ij")
    return np.stack([axis.reshape(-1) for axis in axes], axis=-1) + start


def mrope_positions(
    tokens: Int[np.ndarray, "tokens"],
    spans: Sequence[VisualSpan],
    visual_ids: Collection[int],
    merge: int,
    tokens_per_second: int | float,
) -> tuple[Int[np.ndarray, "tokens 3"], int]:
    """Return positions of one sequence, and the offset that turns a later token's index into its position.

    `spans` are the prompt's images and videos in reading order; `visual_ids` are the image and video pad
    tokens. Raises ValueError when the pad tokens in the sequence are not those that the spans need.
    """
    tokens = np.asarray(tokens)
    visual = np.isin(tokens, list(visual_ids))
    needed = sum(span.tokens(merge) for span in spans)
    if int(visual.sum()) != needed:
        raise ValueError(f"the sequence has {int(visual.sum())} visual tokens, its images and videos need {needed}")
    pieces: list[np.ndarray] = []
    place, following = 0, 0

    def add_text(end: int) -> None:
        nonlocal following
        pieces.append(np.repeat(np.arange(following, following + end - place)[:, None], 3, axis=1))
        following += end - place

    for span in spans:
        start = place + int(np.argmax(visual[place:]))
        count = span.tokens(merge)
        if not visual[start : start + count].all():
            raise ValueError(f"an image or video of {count} tokens is interrupted after token {start}")
        add_text(start)
        pieces.append(visual_positions(span, following, merge, tokens_per_second))
        following += max(span.rows, span.cols) // merge
        place = start + count
    add_text(len(tokens))
    positions = np.concatenate(pieces).astype(np.int32)
    return positions, int(positions.max(initial=-1)) + 1 - len(tokens)
