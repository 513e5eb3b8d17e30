"""From the samples of a source to the rows of a step: which conversations are had about a sample, and their arrays.

    records = ConversationRecords(source, tasks=("trace_qa+refer_box", "caption_from_trace"))
    sample, conversations = records[17]
    make_row = RowMaker(processor)
    row = make_row([records[17], records[40]])      # two samples packed into one row

A task entry names a template, or several joined by "+" into one dialogue about the sample. `resource_table` bounds what
each record takes of a bucket from its sizes alone, for the epoch plan.
"""

import dataclasses
import hashlib
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from data_loaders.sources.protocol import RecordSize, Source
from tracevision_jax.errors import UserError
from tracevision_jax.nearest import suggest
from tracevision_jax.records import templates
from tracevision_jax.records.processor import Piece, Processor, ProcessorConfig
from tracevision_jax.records.sample import Conversation, Sample
from tracevision_jax.vision.preprocess import image_size, sample_frames, video_size

Record = tuple[Sample, list[Conversation]]

CHARACTERS_PER_TOKEN = 2.0
"""Fewest characters of English that a token of any tokenizer in use stands for, on average over a caption."""
TURN_TOKENS = 40
"""Upper bound of the tokens of a question's wording and of the chat's markers around a turn and its answer."""
MASK_TASKS = frozenset({"refer_segment", "trace_segment"})
TRACE_TASKS = frozenset({"caption_from_trace", "trace_from_caption", "joint_caption_trace", "trace_qa", "trace_segment"})
QUESTION_TRACES = 2
"""Most traces in one question of a source."""


def parse_tasks(entries: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Task entries as groups of template names.

    Raises:
        UserError: an unknown task.
    """
    groups = tuple(tuple(entry.split("+")) for entry in entries)
    for name in (name for group in groups for name in group):
        if name not in templates.TASKS:
            raise UserError(
                f"No task '{name}'.{suggest(name, templates.TASKS)} Tasks: {', '.join(templates.TASKS)}; "
                "several of them joined by '+' make one dialogue."
            )
    return groups


@dataclasses.dataclass(frozen=True)
class ConversationRecords:
    """A source's samples, each with the conversations that the recipe asks for."""

    source: Source
    tasks: tuple[str, ...] = ()
    """See the module's text; empty: one conversation for each task that a sample serves."""
    seed: int = 0
    """Wording and choice of questions follow from this and the record's number."""

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        """Read a record; raises what the source raises, and UserError where a task does not fit the sample."""
        sample = self.source[index]
        rng = np.random.default_rng((self.seed, index))
        groups = parse_tasks(self.tasks) or tuple((task,) for task in sorted(sample.tasks))
        built = iter(templates.build_all(sample, [name for group in groups for name in group], rng))
        return sample, [templates.join([next(built) for _ in group]) for group in groups]

    def fingerprint(self) -> str:
        """Changes whenever a record does."""
        return hashlib.sha256(f"{self.source.fingerprint()} {self.tasks} {self.seed}".encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class RowMaker:
    """Packs records into a row; goes to the data workers whole."""

    processor: Processor

    def __call__(self, records: Sequence[Record]) -> list[Piece]:
        return [self.processor.piece(sample, conversations) for sample, conversations in records]


def resource_table(
    records: ConversationRecords, config: ProcessorConfig, sample: int = 0
) -> Int[np.ndarray, "records 6"]:
    """What each record takes at most, in the order of the fields of `Bucket`.

    Args:
        records: of one source.
        config: the processor's.
        sample: read so many records' sizes only and give every record the largest; for sources without a cheap index
            whose records are alike (scenes of one size). 0 reads all.
    """
    numbers = range(min(sample, len(records))) if sample else range(len(records))
    rows = [_resources(records.source.sizes(index), parse_tasks(records.tasks), config) for index in numbers]
    table = np.asarray(rows, np.int64).reshape(-1, 6)
    return np.broadcast_to(table.max(0), (len(records), 6)) if sample else table


def _resources(size: RecordSize, groups: Sequence[tuple[str, ...]], config: ProcessorConfig) -> list[int]:
    """Upper bounds of one record."""
    groups = groups or tuple((task,) for task in sorted(size.tasks))
    vision = config.vision
    frames, (height, width) = _frames(size, config)
    windows = math.ceil(height / (vision.window_patches * vision.patch)) * math.ceil(
        width / (vision.window_patches * vision.patch)
    )
    visual = frames * (height // vision.unit_px) * (width // vision.unit_px)
    prompt = len(config.system_prompt) / CHARACTERS_PER_TOKEN + 8 if config.system_prompt else 0
    tokens = [prompt + visual + 8 + sum(_task_tokens(task, size, config) for task in group) for group in groups]
    points = [sum(_task_points(task, config) for task in group) for group in groups]
    masks = sum(max(size.regions, 1) * frames for group in groups for task in group if task in MASK_TASKS)
    total = config.slot_tokens * len(groups) if config.slot_tokens else math.ceil(sum(tokens))
    return [total, frames, windows, len(groups), max(points, default=0), masks]


def _frames(size: RecordSize, config: ProcessorConfig) -> tuple[int, tuple[int, int]]:
    vision = config.vision
    if size.frames <= 1:
        return 1, image_size(size.height, size.width, vision)
    # The rate of a video is not part of its size: the most frames that any rate could give.
    sampled = len(sample_frames(size.frames, vision.frames_per_second, vision))
    return math.ceil(sampled / vision.temporal_patch), video_size(size.height, size.width, sampled, vision)


def _task_points(task: str, config: ProcessorConfig) -> int:
    if task in ("trace_qa", "dialogue"):
        return QUESTION_TRACES * config.max_points
    return config.max_points if task in TRACE_TASKS or task == "refer_box" else 0


def _task_tokens(task: str, size: RecordSize, config: ProcessorConfig) -> float:
    coordinate = 1 if config.coordinates == "bins" else 4
    trace = 2 * coordinate * config.max_points + 2
    caption = size.caption_characters / CHARACTERS_PER_TOKEN
    question = size.question_characters / CHARACTERS_PER_TOKEN
    text = {
        "caption_from_trace": caption + trace,
        "trace_from_caption": caption + trace,
        "joint_caption_trace": caption + trace,
        "plain_caption": caption,
        "trace_qa": question + QUESTION_TRACES * trace,
        "dialogue": 4 * TURN_TOKENS + question + QUESTION_TRACES * trace,
        "refer_box": question + trace + 4 * coordinate,
        "plain_boxes": 4 * coordinate + 16,
    }
    return TURN_TOKENS + text.get(task, max(question, caption) + trace + 9 * max(size.regions, 1))
