"""From the samples of a source to the rows of a step: which conversations are had about a sample, and their arrays.

    records = ConversationRecords(source, tasks=("trace_qa+refer_box", "caption_from_trace"))
    sample, conversations = records[17]
    make_row = RowMaker(processor)
    row = make_row([records[17], records[40]])      # two samples packed into one row

A task entry names a template, or several joined by "+" into one dialogue about the sample, in random order.
`resource_table` bounds what each record takes of a bucket from its sizes alone, for the epoch plan.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from data_loaders.sources.protocol import RecordSize, Source
from tracevision_jax.errors import UserError
from tracevision_jax.nearest import suggest
from tracevision_jax.records import templates
from tracevision_jax.records.encoded import Piece
from tracevision_jax.records.processor import Processor
from tracevision_jax.records.processor_config import ProcessorConfig
from tracevision_jax.records.sample import Conversation, Sample
from tracevision_jax.vision.preprocess import VisionInputConfig, image_size, sample_frames, video_size

Record = tuple[Sample, list[Conversation]]

CHARACTERS_PER_TOKEN = 2.0
"""Fewest characters of English that a token of any tokenizer in use stands for, on average over a caption."""
TURN_TOKENS = 48
"""Upper bound of the tokens of a template's wording and of the chat's markers around a turn and its answer."""
PHRASE_CHARACTERS = 60
"""Longest phrase of a region, where no caption holds them all."""
MASK_TOKENS = 12
"""[SEG], its slots, the markers of its phrase, and what joins it to the next one."""
REFERRED = 3
"""Most regions that one referring segmentation asks for (`templates`)."""
DIALOGUE_EXCHANGES = 4
"""Most questions in one dialogue of a source."""
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
        dialogues = [[next(built) for _ in group] for group in groups]
        # Any of the questions may come first, as it does when it is asked alone.
        return sample, [templates.join([parts[k] for k in rng.permutation(len(parts))]) for parts in dialogues]

    def place(self, index: int) -> str:
        """The file that a record is read from, where the source can say so."""
        place = getattr(self.source, "place", None)
        return place(index) if place else ""

    def fingerprint(self) -> str:
        """Changes whenever a record does."""
        return hashlib.sha256(f"{self.source.fingerprint()} {self.tasks} {self.seed}".encode()).hexdigest()[:32]


@dataclasses.dataclass(frozen=True)
class RowMaker:
    """Packs records into a row; goes to the data workers whole."""

    processor: Processor

    def __call__(self, records: Sequence[Record]) -> list[Piece]:
        return [self.processor.piece(sample, conversations) for sample, conversations in records]


def resource_table(records: ConversationRecords, config: ProcessorConfig) -> Int[np.ndarray, "records 6"]:
    """What each record of a source takes at most, in the order of the fields of `Bucket`."""
    groups = parse_tasks(records.tasks)
    rows = [_resources(records.source.sizes(index), groups, config) for index in range(len(records))]
    return np.asarray(rows, np.int64).reshape(-1, 6)


def _resources(size: RecordSize, groups: Sequence[tuple[str, ...]], config: ProcessorConfig) -> list[int]:
    """Upper bounds of one record. A record of several frames is a video."""
    groups = groups or tuple((task,) for task in sorted(size.tasks))
    frames, windows, visual = _visual(size.frames, size.height, size.width, config.vision)
    prompt = len(config.system_prompt) / CHARACTERS_PER_TOKEN + 8 if config.system_prompt else 0
    # Every still or video stands between two markers.
    tokens = [prompt + visual + 2 + sum(_task_tokens(task, size, config) for task in group) for group in groups]
    points = [sum(_task_points(task, config) for task in group) for group in groups]
    masks = sum(_task_masks(task, size) * frames for group in groups for task in group)
    total = config.slot_tokens * len(groups) if config.slot_tokens else sum(math.ceil(count) for count in tokens)
    return [total, frames, windows, len(groups), max(points, default=0), masks]


@functools.lru_cache(maxsize=4096)
def _visual(frames: int, height: int, width: int, vision: VisionInputConfig) -> tuple[int, int, int]:
    """Most temporal patches, windows of one, and visual tokens that a still or a video of this size can have.

    A video's rate is not part of its size, so every number of sampled frames is possible; fewer are larger each.
    """
    if frames <= 1:
        return (1, *_cut(*image_size(height, width, vision), vision))
    most = len(sample_frames(frames, vision.frames_per_second, vision))
    least = len(sample_frames(frames, frames * vision.frames_per_second, vision))  # as if it lasted a second
    patches, windows, visual = 0, 0, 0
    for count in range(least, most + 1, vision.temporal_patch):
        patches = math.ceil(count / vision.temporal_patch)
        here, units = _cut(*video_size(height, width, count, vision), vision)
        windows, visual = max(windows, here), max(visual, patches * units)
    return patches, windows, visual


def _cut(height_px: int, width_px: int, vision: VisionInputConfig) -> tuple[int, int]:
    """Windows and units of a resized picture."""
    side_px = vision.window_patches * vision.patch
    windows = math.ceil(height_px / side_px) * math.ceil(width_px / side_px)
    return windows, (height_px // vision.unit_px) * (width_px // vision.unit_px)


def _task_points(task: str, config: ProcessorConfig) -> int:
    """Keypoints that the user shows."""
    if task in ("trace_qa", "dialogue"):
        return QUESTION_TRACES * config.max_points
    return config.max_points if task in ("caption_from_trace", "trace_segment", "refer_box") else 0


def _task_masks(task: str, size: RecordSize) -> int:
    """Masks of one frame."""
    regions = max(size.regions, 1)
    return {"refer_segment": min(regions, REFERRED), "trace_segment": regions, "dialogue": regions}.get(task, 0)


def _task_tokens(task: str, size: RecordSize, config: ProcessorConfig) -> float:
    """Tokens of a question and its answer."""
    # The longest written point is "(123,456), ": eleven characters, each a token at worst.
    coordinate = 1 if config.coordinates == "bins" else 5.5
    trace, box = 2 * coordinate * config.max_points + 2, 4 * coordinate + 2
    masks = MASK_TOKENS * _task_masks(task, size)

    def phrases(most: int) -> float:
        characters = max(size.caption_characters, PHRASE_CHARACTERS * min(max(size.regions, 1), most))
        return characters / CHARACTERS_PER_TOKEN

    caption = size.caption_characters / CHARACTERS_PER_TOKEN
    question = size.question_characters / CHARACTERS_PER_TOKEN
    text = {
        "caption_from_trace": caption + trace,
        "trace_from_caption": caption + trace,
        "joint_caption_trace": caption + trace,
        "plain_caption": caption,
        "plain_boxes": phrases(1) + box,
        "plain_objects": phrases(size.regions) + size.regions * (box + 2),
        "plain_names": phrases(size.regions) + size.regions * (box + 1),
        "trace_qa": question + QUESTION_TRACES * trace,
        "refer_box": max(question, phrases(1)) + trace + box,
        "refer_segment": max(question + phrases(1), 2 * phrases(REFERRED)) + masks,
        "trace_segment": question + phrases(size.regions) + trace + masks,
        "dialogue": question + phrases(1) + QUESTION_TRACES * trace + box + masks,
    }
    return TURN_TOKENS * (DIALOGUE_EXCHANGES if task == "dialogue" else 1) + text[task]


def measured_table(records: ConversationRecords, make_row: RowMaker, count: int) -> Int[np.ndarray, "records 6"]:
    """What the largest of the first `count` records takes, for all of them: for scenes of one kind, which are alike.

    Tighter than the bounds of `resource_table`; a record that takes more after all is skipped and reported.
    """
    taken = [make_row([records[index]])[0].resources for index in range(min(count, len(records)))]
    return np.broadcast_to(np.max(taken, axis=0), (len(records), 6))
