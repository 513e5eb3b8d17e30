"""What the data pipeline asks of a dataset: samples by number, their sizes without decoding, and a
fingerprint.

A `Source` is one dataset with one way of reading it (`localized_narratives.py`, `synthetic.py`, `tfds.py`).
The epoch plan reads `sizes` of every record once (the length index) and gets by with that; the workers read
records by number. A source is picklable, since worker processes receive it, and opens its files lazily.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tracevision_jax.records.sample import Question, Sample


@dataclass(frozen=True)
class RecordSize:
    """How large a record is, as far as its bucket depends on it; known without decoding a pixel."""

    height: int
    width: int
    frames: int = 1
    caption_characters: int = 0
    words: int = 0
    """Utterances with a time."""
    trace_points: int = 0
    """Recorded points of all strokes, before simplification."""
    regions: int = 0
    questions: int = 0
    question_characters: int = 0
    """Characters of the longest question with its answers."""
    tasks: frozenset[str] = frozenset()
    """The task kinds that the record can serve, as in `Sample.tasks`."""


def question_characters(question: Question) -> int:
    """Characters of the text of a question and its answers."""
    return sum(len(part) for turn in question.turns for part in turn.parts if isinstance(part, str))


@runtime_checkable
class Source(Protocol):
    """One dataset, read by record number."""

    @property
    def name(self) -> str:
        """Short name for logs and for `Sample.source`."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """Read and decode one record.

        Raises:
            BadRecord: the record cannot be used; the pipeline skips, counts and reports it.
        """
        ...

    def sizes(self, index: int) -> RecordSize:
        """Return the record's size from its metadata alone (of an image, the header at most).

        Raises:
            BadRecord: as `__getitem__`, as far as the metadata shows it.
        """
        ...

    def fingerprint(self) -> str:
        """Return a short text that changes whenever a record or its number does; caches are keyed by it."""
        ...
