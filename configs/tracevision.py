"""The system "tracevision" and the data sources, as recipes name them; nothing to train here.

`TraceVisionTraining` is the `model` of a TraceVision recipe: the system's configuration, and where its tokenizer comes
from.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.registry import (
    SystemEntry,
    TrainingData,
    announce_source,
    open_sources,
    register_source,
    register_system,
)
from data_loaders.rows import ConversationRecords, RowMaker, measured_table, resource_table
from data_loaders.sources.localized_narratives import LocalizedNarratives
from data_loaders.sources.protocol import Source
from data_loaders.sources.released_files import narrative_files
from data_loaders.sources.synthetic import SyntheticSource
from data_loaders.sources.tfds import TfdsNarratives
from data_loaders.synthetic.tokenizer import scene_tokenizer
from evaluation.held_out import HeldOutLoss, HeldOutPictures
from tracevision_jax.errors import UserError
from tracevision_jax.inference.loading import TOKENIZER, find_model
from tracevision_jax.records.collate import collate
from tracevision_jax.records.encoded import Piece
from tracevision_jax.records.processor import Processor
from tracevision_jax.records.sample import BadRecord, Conversation, Sample
from tracevision_jax.records.vocabulary import Vocabulary, load_vocabulary
from tracevision_jax.systems.tracevision import TraceVision, TraceVisionConfig
from tracevision_jax.training.recipe import DataConfig, SourceEntry, TrainRecipe

SCENES_TOKENIZER = "synthetic scenes"
MEASURED_SCENES = 64
"""Synthetic scenes of one kind whose rows stand for all of them in the epoch plan."""


@dataclasses.dataclass(frozen=True)
class TraceVisionTraining:
    """What a TraceVision recipe trains."""

    config: TraceVisionConfig
    tokenizer: str = ""
    """Folder of the tokenizer; by default that of --init-from. "synthetic scenes" trains one on their words."""


@functools.lru_cache(maxsize=4)
def _vocabulary(model: TraceVisionTraining, init_from: str) -> Vocabulary:
    """The tokenizer of a recipe; UserError when there is none or it is not the one of the configuration."""
    coordinates = model.config.processor.coordinates
    language = model.config.host.language
    if model.tokenizer == SCENES_TOKENIZER and not init_from:
        vocabulary = Vocabulary(scene_tokenizer(language.first_added), coordinates)
    else:
        folder = model.tokenizer if model.tokenizer and model.tokenizer != SCENES_TOKENIZER else init_from
        if not folder:
            raise UserError(
                "The recipe has no tokenizer: start from a host or the stage before (--init-from DIR), or name a "
                "folder with one (--model.tokenizer DIR)."
            )
        found = find_model(folder) if folder == init_from else Path(folder)
        vocabulary = load_vocabulary(found / TOKENIZER if (found / TOKENIZER).is_dir() else found, coordinates)
    if vocabulary.first_added != language.first_added:
        raise UserError(
            f"The tokenizer has {vocabulary.first_added} tokens, the recipe's model expects {language.first_added}."
        )
    return vocabulary


def _processor(recipe: TrainRecipe) -> Processor:
    return Processor(_vocabulary(recipe.model, recipe.init_from), recipe.model.config.processor)


def _records(entries: Sequence[SourceEntry], opened: Sequence[Source], seed: int) -> list[ConversationRecords]:
    return [ConversationRecords(s, entry.tasks, seed) for entry, s in zip(entries, opened, strict=True)]


def _data(recipe: TrainRecipe, system: TraceVision, opened: Sequence[Source]) -> TrainingData:
    """Rows of the mixture."""
    config = system.config.processor
    records = _records(recipe.data.sources, opened, recipe.data.seed)
    make_row = RowMaker(_processor(recipe))
    alike = [isinstance(source, SyntheticSource) for source in opened]
    return TrainingData(
        records=records,
        resources=[
            measured_table(r, make_row, MEASURED_SCENES) if same else resource_table(r, config)
            for r, same in zip(records, alike, strict=True)
        ],
        make_row=make_row,
        collate=functools.partial(collate, config=config),
    )


def _evaluators(recipe: TrainRecipe, system: TraceVision) -> Mapping[str, Callable[[Any, int], Mapping[str, Any]]]:
    """The loss on held-out records, and pictures of answers about them."""
    if not recipe.evaluation.every or not recipe.evaluation.sources:
        return {}
    held_out = dataclasses.replace(recipe.data, sources=recipe.evaluation.sources)
    records = _records(held_out.sources, open_sources(held_out), recipe.data.seed)
    make_row = RowMaker(_processor(recipe))

    def read_rows() -> Iterator[list[Piece]]:
        """The first records of each source that can be used."""
        for source in records:
            for index in range(min(len(source), -(-recipe.evaluation.samples // len(records)))):
                try:
                    yield make_row([source[index]])
                except (BadRecord, UserError):
                    continue

    def read_prompts() -> Iterator[tuple[Sample, Conversation, Piece]]:
        """The first question about the first samples of each source, in turn."""
        for number in range(recipe.evaluation.pictures):
            sample, conversations = records[number % len(records)][number // len(records)]
            first = dataclasses.replace(conversations[0], turns=conversations[0].turns[:2])
            yield sample, first, make_row.processor.piece(sample, [first], answer=False)

    place = functools.partial(collate, config=system.config.processor)
    loss = HeldOutLoss(system, read_rows, place, recipe.buckets[0], recipe.rows[0])
    if not recipe.evaluation.pictures:
        return {"held_out": loss}
    return {"held_out": loss, "pictures": HeldOutPictures(system.config, make_row.processor.vocabulary, read_prompts)}


def _folders(recipe: TrainRecipe) -> Mapping[str, Callable[[Path], None]]:
    """The tokenizer, written beside the exported parameters."""
    return {TOKENIZER: _vocabulary(recipe.model, recipe.init_from).save}


def _open_synthetic(entry: SourceEntry, data: DataConfig) -> SyntheticSource:
    return SyntheticSource(**entry.options)


def _open_narratives(entry: SourceEntry, data: DataConfig) -> Source:
    """Localized Narratives under `data.root`: built for TFDS where there is a folder `ln_<dataset>`, else as released.

    Options: dataset ("coco", ...), split, images (folder of the images, if elsewhere).
    """
    options = dict(entry.options)
    dataset, split = options.get("dataset", "coco"), options.get("split", "train")
    if not data.root:
        raise UserError("Localized Narratives are read from files: say where with --data.root DIR.")
    root = Path(data.root)
    if (root / f"ln_{dataset}").is_dir():
        return TfdsNarratives(root / f"ln_{dataset}", split)
    found = narrative_files(root, dataset)
    if split not in found:
        raise UserError(f"No {split} split of Localized Narratives ({dataset}) in {root}; it has: {', '.join(found)}.")
    return LocalizedNarratives([str(file) for file in found[split]], options.get("images", root), dataset)


register_system(
    "tracevision",
    SystemEntry(
        build=lambda recipe: TraceVision(recipe.model.config),
        data=_data,
        evaluators=_evaluators,
        folders=_folders,
    ),
)
register_source("synthetic", _open_synthetic)
register_source("localized_narratives", _open_narratives)
for _name, _what in {
    "video_localized_narratives": "VidLN (OVIS, UVO, Oops)",
    "panoptic_narrative_grounding": "Panoptic Narrative Grounding",
    "refcoco": "RefCOCO, RefCOCO+, RefCOCOg and gRefCOCO",
    "riln": "RILN has not been released by its authors, so far as is known; its reader",
    "reasoning_segmentation": "ReasonSeg, LISA++ and ReVOS",
    "coco_interactive": "COCO-Interactive",
}.items():
    announce_source(_name, f"{_what} comes with the segmentation and video data sets")
