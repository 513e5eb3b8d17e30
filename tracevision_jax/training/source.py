"""What the training loop asks of its data: batches by step number, and what went wrong in making them.

The data pipeline (`data_loaders/pipeline.py`) implements `BatchSource`; so does anything that can make a
batch from a step number. Since the position in the data is the step number and nothing else, a resumed run
needs no replay.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from tracevision_jax.systems.protocol import Batch, Bucket


@dataclass(frozen=True)
class BadRecordReport:
    """A record that became an empty slot, and why."""

    step: int
    source: str
    record: int
    reason: str
    file: str = ""


@dataclass(frozen=True)
class StepBatch:
    """The rows that this process makes of one step's batch, as numpy arrays."""

    step: int
    epoch: int
    bucket: Bucket
    batch: Batch
    bad: tuple[BadRecordReport, ...] = ()
    troubles: tuple[str, ...] = ()
    """What went wrong on the way and was mended, such as a worker that died and was started again."""


@runtime_checkable
class BatchSource(Protocol):
    """Batches addressed by step number."""

    @property
    def steps(self) -> int:
        """Number of steps of the run."""
        ...

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of a global batch, in the order of `buckets`."""
        ...

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The shapes that batches have; one program is compiled for each."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes whenever any step would hold other records."""
        ...

    def describe(self) -> str:
        """Lines for the log: sources, steps, what was left out and why."""
        ...

    def batches(self, start: int) -> Iterator[StepBatch]:
        """Yield the steps from `start` to the end, in order."""
        ...
