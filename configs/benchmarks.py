"""Named benchmarks: tasks of `evaluation/` bound to data.

    benchmark = get("trace_prediction")
    samples = benchmark.open(BenchmarkData(split="val"))
    for name, task in benchmark.tasks(blind=False).items(): ...

Those on synthetic scenes draw scenes of seeds that no recipe trains on, of the kind that a model was trained on where
its directory says so. `ln_*` read Localized Narratives, built (`tracevision data build`) or as released.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_loaders.sources.localized_narratives import LocalizedNarratives
from data_loaders.sources.released_files import narrative_files
from data_loaders.sources.synthetic import SyntheticSource
from data_loaders.sources.tfds import TfdsNarratives
from data_loaders.synthetic.config import COLOURS, SHAPES, SceneConfig
from evaluation.grounding_tasks import ReferBox, ReferSegment, TraceSegment
from evaluation.task import Samples, Task
from evaluation.trace_tasks import TraceCaptioning, TracedObject, TracePrediction
from tracevision_jax.errors import UserError
from tracevision_jax.nearest import suggest
from tracevision_jax.systems.config_json import from_json

HELD_OUT_SEEDS = {"val": 1_000_001, "test": 1_000_002}
"""Of the synthetic splits; recipes train on seeds below a million."""
SCENES = 1_000_000
"""Scenes of a split; the number belongs to what identifies results, so a run with a larger limit goes on."""
SCENES_ASKED = 200
"""How many of them are asked about unless a limit is given."""
QUESTIONS = ("what", "trace_segment")
"""What is asked about each synthetic scene; the rest of a scene does not depend on it."""


@dataclass(frozen=True)
class BenchmarkData:
    """Which data to evaluate on."""

    split: str = "val"
    folder: str | Path | None = None
    """Folder of a dataset that is read from files."""
    images: str | Path | None = None
    """Folder of its images, where it is another one."""
    scenes: SceneConfig = SceneConfig()
    """Kind of synthetic scenes."""


@dataclass(frozen=True)
class Benchmark:
    """Tasks on a dataset."""

    summary: str
    tasks: Callable[[bool], Mapping[str, Task]]
    """(whether traces are simplified without words) -> {name of the result: task}."""
    open: Callable[[BenchmarkData], Samples]
    """Open the data; raises UserError where it is not there."""
    limit: int | None = None
    """Samples that are asked about unless another number is given; None: all."""


def open_scenes(data: BenchmarkData) -> SyntheticSource:
    """Held-out synthetic scenes, each with the questions of `QUESTIONS`."""
    if data.split not in HELD_OUT_SEEDS:
        hint = suggest(data.split, HELD_OUT_SEEDS)
        raise UserError(f"synthetic scenes have no split '{data.split}'.{hint} Splits: {', '.join(HELD_OUT_SEEDS)}.")
    asked = dataclasses.replace(data.scenes, questions=QUESTIONS, questions_per_scene=len(QUESTIONS), narrative=True)
    return SyntheticSource(HELD_OUT_SEEDS[data.split], SCENES, asked)


def open_narratives(dataset: str) -> Callable[[BenchmarkData], Samples]:
    """Opens Localized Narratives of a dataset, from TFDS files if the folder holds them, else as released."""

    def open_source(data: BenchmarkData) -> Samples:
        if data.folder is None:
            raise UserError(f"ln_{dataset} is read from files: say where with --data FOLDER")
        folder = Path(data.folder)
        if (folder / f"ln_{dataset}").is_dir():
            return TfdsNarratives(folder / f"ln_{dataset}", data.split)
        found = narrative_files(folder, dataset)
        if data.split not in found:
            hint = suggest(data.split, found)
            raise UserError(f"no {data.split} split of ln_{dataset} in {folder}.{hint} It has: {', '.join(found)}")
        return LocalizedNarratives([str(file) for file in found[data.split]], data.images or folder, dataset)

    return open_source


def _on_scenes(summary: str, make: Callable[[bool], Task]) -> Benchmark:
    def tasks(blind: bool) -> Mapping[str, Task]:
        task = make(blind)
        return {task.name: task}

    return Benchmark(f"{summary}, synthetic scenes", tasks, open_scenes, SCENES_ASKED)


def _narratives(dataset: str) -> Benchmark:
    def tasks(blind: bool) -> Mapping[str, Task]:
        both = (TraceCaptioning(blind=blind), TracePrediction())
        return {f"ln_{dataset}_{task.name}": task for task in both}

    return Benchmark(
        f"captions of traces and traces of captions on Localized Narratives, {dataset}", tasks, open_narratives(dataset)
    )


BENCHMARKS: dict[str, Benchmark] = {
    "trace_captioning": _on_scenes("captions of traces", lambda blind: TraceCaptioning(blind=blind)),
    "trace_prediction": _on_scenes("traces of captions (LBM)", lambda blind: TracePrediction()),
    "traced_object": _on_scenes(
        "colour and shape of the object under a trace",
        lambda blind: TracedObject(tuple(COLOURS), SHAPES, blind=blind),
    ),
    "refer_box": _on_scenes("boxes of phrases (P@0.5)", lambda blind: ReferBox()),
    "refer_segment": _on_scenes("masks of phrases (cIoU, gIoU)", lambda blind: ReferSegment()),
    "trace_segment": _on_scenes("masks of what a trace rests on (cIoU, gIoU)", lambda blind: TraceSegment(blind=blind)),
    **{f"ln_{dataset}": _narratives(dataset) for dataset in ("coco", "ade20k", "flickr30k", "open_images")},
}
ANNOUNCED: dict[str, str] = {
    name: "its reader comes with the segmentation datasets" for name in ("refcoco", "refcoco_plus", "refcocog")
}
"""Benchmarks that cannot be run yet, and why."""


def get(name: str) -> Benchmark:
    """A benchmark by name.

    Raises:
        UserError: none of this name, or one that cannot be run yet.
    """
    if name in ANNOUNCED:
        raise UserError(f"the benchmark '{name}' cannot be run yet: {ANNOUNCED[name]}")
    if name not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise UserError(
            f"there is no benchmark '{name}'.{suggest(name, [*BENCHMARKS, *ANNOUNCED])} Benchmarks: {known}."
        )
    return BENCHMARKS[name]


def scenes_of_recipe(recipe: Mapping[str, Any] | None) -> SceneConfig | None:
    """The kind of synthetic scenes that a model was trained on, from its recipe as JSON; None if it names none.

    Raises:
        UserError: the recipe's scenes are not those that this version draws.
    """
    sources = ((recipe or {}).get("data") or {}).get("sources") or []
    for source in sources:
        for value in (source.get("options") or {}).values():
            if isinstance(value, Mapping) and value.get("") == SceneConfig.__name__:
                return from_json(SceneConfig, value, "the recipe's kind of scenes")
    return None
