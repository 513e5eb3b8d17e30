"""Registries: recipes, systems and data sources by name.

A recipe file of this folder registers what it builds when it is imported; `get` imports all of them on first
use:

    register(TrainRecipe(name="tracevision_7b_stage1", system="tracevision", ...))

The names in a recipe become objects through two more registries, filled by the same files or by a program of
one's own:

    register_system("tracevision", SystemEntry(build=..., data=..., evaluators=...))
    register_source("synthetic", lambda entry, data: SyntheticScenes(**entry.options))
    announce_source("refcoco", "its reader comes with the segmentation datasets")
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import configs
from tracevision_jax.errors import UserError
from tracevision_jax.nearest import suggest
from tracevision_jax.training.recipe import DataConfig, SourceEntry, TrainRecipe

Evaluators = Mapping[str, Callable[[Any, int], Mapping[str, Any]]]
"""{name: (parameters, step) -> numbers and pictures}, as `training.loop.Evaluator`."""


@dataclass(frozen=True)
class TrainingData:
    """What a recipe's data becomes, in the order of `recipe.data.sources`."""

    records: Sequence[Any]
    """`data_loaders.pipeline.Records` of each source."""
    resources: Sequence[Any]
    """Table of each source: (records, sizes) integers, in the order of the buckets' fields."""
    make_row: Callable[[list[Any]], Any]
    """Records packed into a row -> the row."""
    collate: Callable[[list[Any], Any], Any]
    """(rows, bucket) -> Batch."""


@dataclass(frozen=True)
class SystemEntry:
    """How a system's name becomes objects; called in this order."""

    build: Callable[[TrainRecipe], Any]
    """The `System` of `recipe.model`."""
    data: Callable[[TrainRecipe, Any, Sequence[Any]], TrainingData]
    """(recipe, system, opened sources) -> what the pipeline executes."""
    evaluators: Callable[[TrainRecipe, Any], Evaluators] = lambda recipe, system: {}
    """What is called every `recipe.evaluation.every` steps."""
    folders: Callable[[TrainRecipe], Mapping[str, Callable[[Any], None]]] = lambda recipe: {}
    """{name: what writes the files of a folder of that name beside the exported parameters}."""


OpenSource = Callable[[SourceEntry, DataConfig], Any]
"""Open a dataset: its entry in the mixture, and the data configuration with the root folder."""

_recipes: dict[str, TrainRecipe] = {}
_systems: dict[str, SystemEntry] = {}
_sources: dict[str, OpenSource] = {}
_announced: dict[str, str] = {}
_loaded: list[bool] = []


def register(recipe: TrainRecipe) -> TrainRecipe:
    """Add a recipe under its name and return it; raises ValueError when the name is taken by another."""
    if _recipes.setdefault(recipe.name, recipe) != recipe:
        raise ValueError(f"two recipes are named '{recipe.name}'")
    return recipe


def register_system(name: str, entry: SystemEntry) -> None:
    """Add a system."""
    _systems[name] = entry


def register_source(name: str, open_source: OpenSource) -> None:
    """Add a data source."""
    _sources[name] = open_source


def announce_source(name: str, reason: str) -> None:
    """Name a source that recipes may speak of but that cannot be read yet; `reason` says when or why."""
    _announced[name] = reason


def names() -> list[str]:
    """All recipes, sorted."""
    _load()
    return sorted(_recipes)


def get(name: str) -> TrainRecipe:
    """The recipe of a name; UserError with the nearest name when there is none."""
    _load()
    return _find(_recipes, name, "recipe")


def system(name: str) -> SystemEntry:
    """The system of a name; UserError as `get`."""
    _load()
    return _find(_systems, name, "system")


def open_sources(data: DataConfig) -> list[Any]:
    """Open every source of a mixture; UserError lists all that are unknown or not there yet."""
    _load()
    faults = []
    for entry in data.sources:
        if entry.source in _sources:
            continue
        if entry.source in _announced:
            faults.append(f"source '{entry.source}' cannot be read yet: {_announced[entry.source]}")
        else:
            known = [*_sources, *_announced]
            faults.append(f"there is no source '{entry.source}'.{suggest(entry.source, known)}")
    if faults:
        raise UserError("This recipe's data cannot be had:\n  " + "\n  ".join(faults))
    return [_sources[entry.source](entry, data) for entry in data.sources]


def _find(registry: Mapping[str, Any], name: str, kind: str) -> Any:
    if name not in registry:
        known = ", ".join(sorted(registry)) or "none is registered"
        raise UserError(f"There is no {kind} '{name}'.{suggest(name, registry)} Known: {known}.")
    return registry[name]


def _load() -> None:
    """Import every file of this folder, once; they register what they hold."""
    if not _loaded:
        _loaded.append(True)
        for module in pkgutil.iter_modules(configs.__path__):
            importlib.import_module(f"configs.{module.name}")
