"""What a model answers: token ids read back as text, phrases, boxes, trajectories and masks, in their order.

    answer.text            # readable text, phrases in it
    answer.points          # the first trajectory, (n, 2) in [0, 1]
    answer.grounded        # phrases with the box and the mask that follow them

Ids come from constrained decoding (`hosts/grammar.py`), so what is opened is closed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from tracevision_jax.records.vocabulary import SLOTS, Vocabulary
from tracevision_jax.trajectory.tokens import END, START, from_bins, parse_digits

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

    logits: Float[np.ndarray, "frames side side"]


AnswerPart = str | Phrase | Box | Trajectory | Mask


class MaskPlace(NamedTuple):
    """`[SEG]` in an answer whose mask has not been decoded yet."""

    first_slot: int
    """Index in the answer of the first of its slots."""


class Grounded(NamedTuple):
    """A phrase with what was said about it; boxes and masks before any phrase have an empty one."""

    phrase: str
    box: Float[np.ndarray, "4"] | None
    mask: Float[np.ndarray, "frames side side"] | None


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
        """The first trajectory; no points where there is none."""
        return next(iter(self.trajectories), np.zeros((0, 2)))

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
    def masks(self) -> list[Float[np.ndarray, "frames side side"]]:
        """Logits of all masks."""
        return [part.logits for part in self.parts if isinstance(part, Mask)]

    @property
    def grounded(self) -> list[Grounded]:
        """A line for each phrase, and for each box or mask that stands without one."""
        lines: list[Grounded] = []
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
                lines[-1] = lines[-1]._replace(mask=part.logits)
        return lines


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
