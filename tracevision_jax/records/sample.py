"""`Sample`: what a dataset says about one image or video, in one schema for every dataset.

Sources (`data_loaders/sources/`, `data_loaders/synthetic/`) yield samples; task templates (`templates.py`) turn a
sample into conversations; the processor turns conversations into arrays. Coordinates are (x, y) in [0, 1] by width
and height, times are seconds, masks are boolean (height, width).
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float, UInt8


@dataclass(frozen=True)
class TimedWord:
    """One utterance of a spoken caption with its time, seconds from the start of the recording."""

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Region:
    """One object that the text names: a phrase, and where it is in each frame."""

    phrase: str
    box: Float[np.ndarray, "frames 4"]
    """(x1, y1, x2, y2) per frame; NaN where the object is absent."""
    mask: Bool[np.ndarray, "frames height width"] | None = None
    attributes: dict[str, str] = field(default_factory=dict)
    """What is known of it, such as {"colour": "red", "shape": "circle"}; used by tests and evaluation."""


@dataclass(frozen=True)
class TracePart:
    """A trace inside a conversation: shown to the model when the user says it, asked of it when the assistant does."""

    points: Float[np.ndarray, "points 3"]
    """(x, y, t), already simplified to keypoints or not; the processor simplifies raw traces."""
    words: tuple[TimedWord, ...] = ()


@dataclass(frozen=True)
class BoxPart:
    """A box inside a conversation."""

    box: Float[np.ndarray, "4"]


@dataclass(frozen=True)
class MaskPart:
    """`[SEG]`: a mask that the assistant gives at this place of the text."""

    mask: Bool[np.ndarray, "frames height width"]


@dataclass(frozen=True)
class PhrasePart:
    """A phrase that the parts after it belong to, written between the host's object-reference tokens."""

    text: str


@dataclass(frozen=True)
class UnitNamesPart:
    """A word for each visual token of the pictures shown before: a dense caption, learned at the tokens themselves.

    It adds no text. The language model is taught to have the word of what lies under a visual token in mind there,
    which gives a host that starts from nothing many targets a picture.
    """

    names: tuple[tuple[str, Bool[np.ndarray, "frames height width"]], ...]
    """(word, mask) of each object; a token under no mask has none."""


Part = str | TracePart | BoxPart | MaskPart | PhrasePart | UnitNamesPart


@dataclass(frozen=True)
class Turn:
    """One turn of a dialogue: `role` is "system", "user" or "assistant"; text and other parts in reading order."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Conversation:
    """Turns about one sample; its frames are shown at the start of the first user turn."""

    task: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Question:
    """A question about the sample, with the traces that it speaks of and its answer, as templates want them."""

    turns: tuple[Turn, ...]
    kind: str = "qa"


@dataclass(frozen=True)
class Sample:
    """One image (one frame) or video with everything that is known about it. Unknown parts are empty."""

    id: str
    source: str
    frames: UInt8[np.ndarray, "frames height width 3"]
    frames_per_second: float = 0.0
    """0 for a still image."""
    caption: str = ""
    words: tuple[TimedWord, ...] = ()
    strokes: tuple[Float[np.ndarray, "_ 3"], ...] = ()
    """The recorded trace, one array of (x, y, t) per entry and exit of the pointer."""
    regions: tuple[Region, ...] = ()
    """In the order in which the caption names them."""
    questions: tuple[Question, ...] = ()
    tasks: frozenset[str] = frozenset()
    """The task kinds that this sample can serve, names of `templates.TASKS`."""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.frames.shape[1], self.frames.shape[2]


class BadRecord(Exception):
    """A record that cannot be used: carries the reason and the file; the pipeline skips, counts and reports it."""

    def __init__(self, reason: str, file: str = "", record: str = ""):
        super().__init__(f"{reason} (record {record or '?'} of {file or '?'})")
        self.reason, self.file, self.record = reason, file, record
