"""The system "sam2" and the source of synthetic videos, as recipes name them; nothing to train here.

`Sam2Training` is the `model` of a SAM 2 recipe: the model's configuration, and how clips are prompted. A recipe has one
bucket, a `ClipBucket`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from configs.registry import SystemEntry, TrainingData, open_sources, register_source, register_system
from data_loaders.clips import ClipRecords, make_row, size_table
from data_loaders.sources.protocol import Source
from data_loaders.synthetic.videos import SyntheticVideos
from evaluation.video_tracking import HeldOutTracking
from tracevision_jax.hosts.sam_presets import SegmentAnythingConfig
from tracevision_jax.records.clips import Clip, collate
from tracevision_jax.records.sample import BadRecord
from tracevision_jax.systems.sam2 import PromptingConfig, Sam2
from tracevision_jax.training.recipe import TrainRecipe


@dataclasses.dataclass(frozen=True)
class Sam2Training:
    """What a SAM 2 recipe trains."""

    config: SegmentAnythingConfig
    prompting: PromptingConfig = PromptingConfig()


def _records(recipe: TrainRecipe, opened: Sequence[Source], reverse: bool = True) -> list[ClipRecords]:
    bucket = recipe.buckets[0]
    return [ClipRecords(s, bucket.frames, bucket.objects, recipe.data.seed, reverse=reverse) for s in opened]


def _data(recipe: TrainRecipe, system: Sam2, opened: Sequence[Source]) -> TrainingData:
    """A clip of each video of the mixture."""
    records = _records(recipe, opened)
    return TrainingData(records, [size_table(each) for each in records], make_row, collate)


def _evaluators(recipe: TrainRecipe, system: Sam2) -> Mapping[str, Callable[[Any, int], Mapping[str, Any]]]:
    """J and F on held-out clips."""
    if not recipe.evaluation.sources:
        return {}
    held_out = dataclasses.replace(recipe.data, sources=recipe.evaluation.sources)
    clips: list[Clip | None] = []
    for records in _records(recipe, open_sources(held_out), reverse=False):
        for index in range(min(len(records), -(-recipe.evaluation.samples // len(held_out.sources)))):
            try:
                clips.append(records[index])
            except BadRecord:
                continue
    rows = recipe.rows[0]
    clips += [None] * (-len(clips) % rows)
    batches = [collate(clips[first : first + rows], recipe.buckets[0]) for first in range(0, len(clips), rows)]
    return {"held_out": HeldOutTracking(system.follow, batches)}


register_system(
    "sam2",
    SystemEntry(
        build=lambda recipe: Sam2(recipe.model.config, recipe.model.prompting),
        data=_data,
        evaluators=_evaluators,
    ),
)
register_source("synthetic_videos", lambda entry, data: SyntheticVideos(**entry.options))
