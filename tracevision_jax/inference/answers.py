"""What a model answers: token ids read back as text, phrases, boxes, trajectories and masks, in their order.

    answer.text            # readable text, phrases in it
    answer.points          # the trajectory, (n, 2) in [0, 1]
    answer.masks           # (masks, frames, height, width) at the picture's own resolution
    answer.grounded        # phrases with the box and the mask that follow them
    answer.as_json()       # all of it, masks as COCO run lengths

Ids come from constrained decoding (`hosts/grammar.py`), so what is opened is closed.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from tracevision_jax.records.vocabulary import SLOTS, Vocabulary
from tracevision_jax.trajectory.tokens import END, START, from_bins, parse_digits
from tracevision_jax.vision.run_lengths import encode_mask

Finished = Literal["end", "budget"]


class Phrase(NamedTuple):
    """A phrase that what follows belongs to."""

    text: str


class Box(NamedTuple):
    """(x1, y1, x2, y2) in [0, 1]."""

    corners: Float[np.ndarray, "4"]


class Trajectory(NamedTuple):
    """Points (x, y) in [0, 1], in their order."""

    points: Float[np.ndarray, "points 2"]


class Mask(NamedTuple):
    """Logits on the decoder's square grid, stretched over each frame; positive inside."""

    logits: Float[np.ndarray, "frames rows columns"]


AnswerPart = str | Phrase | Box | Trajectory | Mask


class MaskPlace(NamedTuple):
    """`[SEG]` in an answer whose mask has not been decoded yet."""

    first_slot: int
    """Index in the answer of the first of its slots."""


class Grounded(NamedTuple):
    """A phrase with what was said about it; boxes and masks before any phrase have an empty one."""

    phrase: str
    box: Float[np.ndarray, "4"] | None
    """As written; else around the mask, in the first frame that has some of it."""
    mask: Bool[np.ndarray, "frames height width"] | None


@dataclass(frozen=True)
class Answer:
    """One answer."""

    tokens: tuple[int, ...]
    """Ids as generated, without the end token."""
    parts: tuple[AnswerPart, ...]
    """Text, phrases, boxes, trajectories and masks in reading order."""
    log_probabilities: tuple[float, ...]
    """Of each token under the model itself (temperature 1, no grammar)."""
    finished: Finished
    """Whether the model ended the answer or its budget of tokens did."""
    written: str
    """The answer as the model wrote it, markers and coordinates included."""
    size: tuple[int, int] | None = None
    """(height, width) in pixels at which masks are given; None: the decoder's own grid."""
    frame_times: tuple[float, ...] = (0.0,)
    """Seconds at which the frames begin that masks are of."""

    @property
    def text(self) -> str:
        """Readable text: what was written, phrases included, less coordinates and masks."""
        return readable(self.parts).strip()

    @property
    def trajectories(self) -> list[Float[np.ndarray, "_ 2"]]:
        """All trajectories, each (n, 2)."""
        return [part.points for part in self.parts if isinstance(part, Trajectory)]

    @property
    def points(self) -> Float[np.ndarray, "points 2"]:
        """All trajectories, one after the other: one may be written in parts, each after its phrase."""
        return np.concatenate([np.zeros((0, 2)), *self.trajectories])

    @property
    def boxes(self) -> Float[np.ndarray, "boxes 4"]:
        """All boxes."""
        boxes = [part.corners for part in self.parts if isinstance(part, Box)]
        return np.array(boxes, np.float64).reshape(-1, 4)

    @property
    def box(self) -> Float[np.ndarray, "4"] | None:
        """The first box."""
        return next((part.corners for part in self.parts if isinstance(part, Box)), None)

    @property
    def phrases(self) -> list[str]:
        """All phrases."""
        return [part.text for part in self.parts if isinstance(part, Phrase)]

    @property
    def mask_logits(self) -> list[Float[np.ndarray, "_ rows columns"]]:
        """Logits of all masks on the decoder's grid."""
        return [part.logits for part in self.parts if isinstance(part, Mask)]

    @functools.cached_property
    def masks(self) -> Bool[np.ndarray, "masks frames height width"]:
        """All masks, at the size of the picture where it is known."""
        frames = len(self.frame_times)
        if not self.mask_logits:
            return np.zeros((0, frames, *(self.size or (0, 0))), bool)
        return np.stack([binary_mask(logits, self.size) for logits in self.mask_logits])

    @property
    def grounded(self) -> list[Grounded]:
        """A line for each phrase, and for each box or mask that stands without one."""
        lines: list[Grounded] = []
        masks = iter(self.masks)
        for part in self.parts:
            if isinstance(part, Phrase):
                lines.append(Grounded(part.text, None, None))
            elif isinstance(part, Box):
                if not lines or lines[-1].box is not None:
                    lines.append(Grounded("", None, None))
                lines[-1] = lines[-1]._replace(box=part.corners)
            elif isinstance(part, Mask):
                if not lines or lines[-1].mask is not None:
                    lines.append(Grounded("", None, None))
                lines[-1] = lines[-1]._replace(mask=next(masks))
        return [
            line._replace(box=box_of_mask(line.mask)) if line.box is None and line.mask is not None else line
            for line in lines
        ]

    def as_json(self) -> dict[str, Any]:
        """Everything as JSON values, coordinates in [0, 1], masks as COCO run lengths of each frame."""
        return {
            "text": self.text,
            "written": self.written,
            "finished": self.finished,
            "trajectories": [points.tolist() for points in self.trajectories],
            "boxes": self.boxes.tolist(),
            "grounded": [
                {
                    "phrase": line.phrase,
                    "box": None if line.box is None else line.box.tolist(),
                    "mask": None if line.mask is None else [encode_mask(frame) for frame in line.mask],
                }
                for line in self.grounded
            ],
            "frame_times": list(self.frame_times),
            "log_probability": float(sum(self.log_probabilities)),
            "tokens": len(self.tokens),
        }


def binary_mask(
    logits: Float[np.ndarray, "frames rows columns"], size: tuple[int, int] | None
) -> Bool[np.ndarray, "frames height width"]:
    """Where logits are positive, after bilinear interpolation to `size` = (height, width) pixels."""
    if size is None:
        return logits > 0
    height, width = size
    planes = [Image.fromarray(np.ascontiguousarray(plane, np.float32)) for plane in logits]
    return np.stack([np.asarray(p.resize((width, height), Image.Resampling.BILINEAR)) > 0 for p in planes])


def box_of_mask(mask: Bool[np.ndarray, "frames height width"]) -> Float[np.ndarray, "4"] | None:
    """The box (x1, y1, x2, y2) in [0, 1] around the first frame's mask that is not empty."""
    for frame in mask:
        rows, columns = np.flatnonzero(frame.any(axis=1)), np.flatnonzero(frame.any(axis=0))
        if len(rows):
            height, width = frame.shape
            return np.array([columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height])
    return None


def readable(parts: Sequence[AnswerPart | MaskPlace]) -> str:
    """Text and phrases of an answer's parts."""
    return "".join(part if isinstance(part, str) else part.text for part in parts if isinstance(part, str | Phrase))


def read_tokens(tokens: Sequence[int], vocabulary: Vocabulary) -> list[str | Phrase | Box | Trajectory | MaskPlace]:
    """The parts of an answer, masks as places; what is opened and never closed is left out."""
    special = vocabulary.special
    closing = {
        vocabulary.traj_open: vocabulary.traj_close,
        special("<|box_start|>"): special("<|box_end|>"),
        special("<|object_ref_start|>"): special("<|object_ref_end|>"),
        vocabulary.seg: vocabulary.slots[-1],
    }
    parts: list[str | Phrase | Box | Trajectory | MaskPlace] = []
    run: list[int] = []

    def flush() -> None:
        if run:
            parts.append(vocabulary.decode(run))
            run.clear()

    ids = list(tokens)
    place = 0
    while place < len(ids):
        token = ids[place]
        if token not in closing:
            run.append(token)
            place += 1
            continue
        flush()
        try:
            end = ids.index(closing[token], place + 1)
        except ValueError:
            break
        inside = ids[place + 1 : end]
        if token == vocabulary.seg:
            parts.append(MaskPlace(end - SLOTS + 1))
        elif token == vocabulary.traj_open:
            parts.append(Trajectory(_coordinates(inside, vocabulary)))
        elif token == special("<|box_start|>"):
            parts.append(Box(_coordinates(inside, vocabulary).reshape(4)))
        else:
            parts.append(Phrase(vocabulary.decode(inside)))
        place = end + 1
    flush()
    return parts


def _coordinates(ids: list[int], vocabulary: Vocabulary) -> Float[np.ndarray, "points 2"]:
    """Points in [0, 1] of the tokens between two tags."""
    if vocabulary.coordinates == "digits":
        return from_bins(parse_digits(START + vocabulary.decode(ids) + END))
    return from_bins(np.asarray(ids, np.int64).reshape(-1, 2) - vocabulary.first_bin)
