"""What the sweep asks of a benchmark task: prompts of a sample, a record of each answer, tables of all records.

    prompts = task.prompts(samples, index)                    # what is asked about sample number `index`
    record = task.record(prompt, answer, processor)           # JSON values: prediction, truth, scores
    tables = task.tables(records)                             # numbers, and reasons where there is none

A task is a frozen dataclass, so that its settings are part of what identifies a result. A control is a prompt whose
input is made wrong on purpose (another sample's trace); it shows what a number would be without that input.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from tracevision_jax.inference.answers import Answer
from tracevision_jax.records.processor import Processor
from tracevision_jax.records.sample import BadRecord, Conversation, Sample, TracePart, Turn

Record = dict[str, Any]
"""JSON values."""
Outline = Callable[[Processor], list[int]]

SEARCHED = 16
"""Samples that are looked at to find another one for a control."""


@runtime_checkable
class Samples(Protocol):
    """Random access to samples; a `data_loaders` source is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class Prompt:
    """One question, and what its answer is held against."""

    id: str
    """Unique within the task and the same in every run."""
    sample: Sample
    conversation: Conversation
    truth: Record = field(default_factory=dict)
    """What the record keeps of the truth; JSON values."""
    outline: Outline | None = None
    """Tokens that the answer is held to: its beginning, or more (`generation.Generator.generate`)."""
    control: bool = False


@dataclass(frozen=True)
class Table:
    """Numbers that belong together; None is what could not be computed, with its reason."""

    title: str
    values: dict[str, float | None]
    reasons: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@runtime_checkable
class Task(Protocol):
    """See the module's text."""

    @property
    def name(self) -> str:
        """Of the task's records and tables."""
        ...

    def budget(self, processor: Processor) -> int:
        """Most tokens of an answer beyond those that it is held to, the end token included."""
        ...

    def prompts(self, samples: Samples, index: int) -> list[Prompt]:
        """What is asked about a sample; nothing where it does not serve.

        Raises:
            BadRecord: the sample cannot be used.
        """
        ...

    def record(self, prompt: Prompt, answer: Answer, processor: Processor) -> Record:
        """Prediction, truth and scores of one answer."""
        ...

    def tables(self, records: Sequence[Record]) -> list[Table]:
        """The numbers of all records."""
        ...


def without_words(conversation: Conversation) -> Conversation:
    """The same with traces that know no words, so that they are simplified without any phrase of a caption."""
    return Conversation(
        conversation.task,
        tuple(
            Turn(turn.role, tuple(replace(p, words=()) if isinstance(p, TracePart) else p for p in turn.parts))
            for turn in conversation.turns
        ),
    )


def another(samples: Samples, index: int, serves: Any) -> Sample | None:
    """The next sample after number `index` (from the start again at the end) that `serves` a control, if any."""
    for offset in range(1, min(SEARCHED, len(samples) - 1) + 1):
        try:
            sample = samples[(index + offset) % len(samples)]
        except BadRecord:
            continue
        if serves(sample):
            return sample
    return None


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return sum(values) / len(values) if values else None


def split_control(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Records of the task itself, and those of its control."""
    return (
        [record for record in records if not record["control"]],
        [record for record in records if record["control"]],
    )
