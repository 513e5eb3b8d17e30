"""Segment Anything, SAM 2 and SAM 2.1: their tables of weights, in the names of `transformers` and of the authors.

    params = from_torch(model.state_dict(), config)           # of SamModel, Sam2Model, Sam2VideoModel
    save("exported", params, config)                          # a directory that `transformers` loads

`families.load_host` reads such a directory, or a file of the authors', whose size is recognised. Three `model_type`s
are one family in all but name: "sam", "sam2_video", and "sam2", which is SAM 2 without memory.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tracevision_jax.hosts.sam_presets import SAM_PRESETS, SegmentAnythingConfig
from tracevision_jax.weights import hugging_face
from tracevision_jax.weights.engine import Table
from tracevision_jax.weights.family import Family, Original
from tracevision_jax.weights.hugging_face import MAX_SHARD_BYTES
from tracevision_jax.weights.safetensors_io import Progress
from tracevision_jax.weights.sam_config import SAM, SAM2, SAM2_VIDEO, config_from_json, config_to_json, read_config
from tracevision_jax.weights.sam_config_export import model_type, write_config, write_processors
from tracevision_jax.weights.sam_heads_rules import FOURIER, FOURIER_AGAIN, heads_rules
from tracevision_jax.weights.sam_names import original_names
from tracevision_jax.weights.sam_vision_rules import encoder_rules
from tracevision_jax.weights.sources import TensorInfo

SAM2_NAMES = ("image_encoder.trunk.", "sam_mask_decoder.", "sam_prompt_encoder.")
"""Beginnings of names that only the authors' files of SAM 2 have."""
SAM_NAMES = ("image_encoder.",)
"""The same of SAM, where none of the others are."""


def table(config: SegmentAnythingConfig) -> Table:
    """All tensors of a model of these sizes, with the names of `transformers`."""
    rules, sizes = encoder_rules(config.vision)
    more, further = heads_rules(config.heads)
    return Table([*rules, *more], sizes | further, copies={FOURIER_AGAIN: FOURIER})


def original_table(config: SegmentAnythingConfig) -> Table:
    """All tensors of a model of these sizes, with the names of the authors' files."""
    rules, sizes = encoder_rules(config.vision)
    more, further = heads_rules(config.heads, points_apart=True)
    rename = original_names(config.heads)
    return Table([replace(rule, torch=rename(rule.torch)) for rule in (*rules, *more)], sizes | further)


def is_original(kind: str) -> Callable[[Iterable[str]], bool]:
    """What tells whether tensors of these names are of this `model_type` and in the authors' layout."""

    def recognise(names: Iterable[str]) -> bool:
        names = list(names)
        second = any(name.startswith(SAM2_NAMES) for name in names)
        return second if kind == SAM2_VIDEO else not second and any(name.startswith(SAM_NAMES) for name in names)

    return recognise


def nearest_release(kind: str) -> Callable[[Mapping[str, TensorInfo]], tuple[str, SegmentAnythingConfig]]:
    """What finds the released model of this `model_type` whose tensors differ least from those given."""

    def nearest(tensors: Mapping[str, TensorInfo]) -> tuple[str, SegmentAnythingConfig]:
        found = {(name, tuple(info.shape)) for name, info in tensors.items()}
        releases = {name: config for name, config in SAM_PRESETS.items() if model_type(config) == kind}
        name = min(releases, key=lambda name: len(found ^ set(original_table(releases[name]).torch_shapes.items())))
        return name, releases[name]

    return nearest


def release_name(config: SegmentAnythingConfig) -> str:
    """The name of a released model, or of the family for one of other sizes."""
    plain = config.with_precision("float32", "float32", "none")
    return next((name for name, preset in SAM_PRESETS.items() if preset == plain), model_type(config))


def _family(kind: str, original: Original | None) -> Family:
    return Family(
        name=kind,
        table=table,
        canonical_name=lambda name: name,
        for_export=lambda leaves, config: (leaves, config),
        read_config=read_config,
        write_config=write_config,
        other_files=write_processors,
        config_to_json=config_to_json,
        config_from_json=config_from_json,
        with_dtype=lambda config, dtype: config.with_precision(dtype, dtype),
        original=original,
    )


def _original(kind: str, key: str | None) -> Original:
    return Original(is_original(kind), nearest_release(kind), original_table, release_name, key)


FAMILIES = (
    _family(SAM, _original(SAM, None)),
    _family(SAM2_VIDEO, _original(SAM2_VIDEO, "model")),
    _family(SAM2, None),
)
"""By `model_type`; SAM 2 without memory is no model of the authors'."""


def family_of(config: SegmentAnythingConfig) -> Family:
    """The family of a model."""
    return next(family for family in FAMILIES if family.name == model_type(config))


def from_torch(state: Mapping[str, Any], config: SegmentAnythingConfig) -> dict[str, Any]:
    """Parameters from a state dictionary (torch tensors or arrays, names of `transformers`)."""
    return hugging_face.from_torch(state, family_of(config), config)


def to_torch_names(params: Mapping[str, Any], config: SegmentAnythingConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(name in `transformers`, array) of every tensor, one at a time."""
    return hugging_face.to_torch_names(params, family_of(config), config)


def save(
    directory: str | Path,
    params: Mapping[str, Any],
    config: SegmentAnythingConfig,
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a directory that `transformers` loads, see `hugging_face.save`."""
    hugging_face.save(
        directory,
        params,
        family_of(config),
        config,
        dtype=dtype,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
