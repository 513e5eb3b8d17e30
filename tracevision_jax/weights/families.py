"""The kinds of models whose weights we can move, and loading a checkpoint of any of them from any place.

config, params = load_host(directory)      # ours or Hugging Face's; or a file in the authors' own layout
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tracevision_jax.errors import UserError
from tracevision_jax.nearest import suggest
from tracevision_jax.weights import hugging_face, native, qwen25vl, sam
from tracevision_jax.weights.arrays import ShardingOf, first_device
from tracevision_jax.weights.family import Config, Family
from tracevision_jax.weights.safetensors_io import Progress
from tracevision_jax.weights.sources import torch_files

FAMILIES: dict[str, Family] = {family.name: family for family in (qwen25vl.FAMILY, *sam.FAMILIES)}

Layout = Literal["native", "hugging_face", "original"]
"""Ours (`tracevision.json`), Hugging Face's, or that of a family's authors."""


@dataclass(frozen=True)
class Recognised:
    """What a place holds."""

    layout: Layout
    family: Family

    @property
    def native(self) -> bool:
        """Whether it is ours."""
        return self.layout == "native"


def family_named(name: str) -> Family:
    """
    Raises:
        UserError: an unknown family.
    """
    if name not in FAMILIES:
        raise UserError(
            f"checkpoints of the family '{name}' cannot be read; known are {', '.join(FAMILIES)}."
            + suggest(name, FAMILIES)
        )
    return FAMILIES[name]


def recognise(directory: str | Path) -> Recognised:
    """Tell what kind of checkpoint a directory, or a PyTorch file, is.

    Raises:
        UserError: none that we know.
    """
    directory = Path(directory)
    if directory.is_file():
        return _recognise_tensors(directory)
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory and no file")
    if native.is_native(directory):
        return Recognised("native", family_named(native.read_manifest(directory).family))
    if not (directory / "config.json").is_file():
        if torch_files(directory):
            return _recognise_tensors(directory)
        raise UserError(
            f"{directory} is no checkpoint: it has neither tracevision.json (ours) nor config.json (Hugging Face's)"
        )
    config = hugging_face.read_json(directory / "config.json")
    if "model_type" not in config:
        raise UserError(f"{directory / 'config.json'} names no model_type, so it is no Hugging Face checkpoint")
    family = family_named(str(config["model_type"]))
    original = family.original and family.original.recognise(hugging_face.find_tensors(directory).tensors)
    return Recognised("original" if original else "hugging_face", family)


def _recognise_tensors(place: Path) -> Recognised:
    """By the names of the tensors alone."""
    names = hugging_face.find_tensors(place).tensors
    for family in FAMILIES.values():
        if family.original and family.original.recognise(names):
            return Recognised("original", family)
    known = ", ".join(name for name, family in FAMILIES.items() if family.original)
    raise UserError(
        f"{place} comes without config.json, and its tensors ({', '.join(list(names)[:3])}, ...) have the names of no "
        f"family that is known without one ({known})"
    )


def load_host(
    directory: str | Path,
    sharding_of: ShardingOf = first_device,
    dtype: str | None = None,
    paths: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> tuple[Config, dict[str, Any]]:
    """Read a host (configuration, parameters) from our directory, a Hugging Face one, or a file of the authors'.

    Args:
        directory: the checkpoint.
        sharding_of: (path, shape) -> where a parameter goes; the first device by default.
        dtype: of the parameters, such as "bfloat16"; as stored by default. The model computes in it, too.
        paths: which parameters to read; all by default.
        progress: told of each tensor that is read.

    Raises:
        UserError: an unknown, damaged or incomplete checkpoint, or an unknown path.
    """
    found = recognise(directory)
    if not found.native:
        return hugging_face.load_directory(directory, found.family, sharding_of, dtype, paths, progress)
    kind = None if dtype is None else jnp.dtype(dtype)
    config = checked_native_config(Path(directory), found.family)
    _, params = native.load(directory, sharding_of, kind, paths, progress=progress)
    kinds = [str(np.dtype(shape.dtype)) for shape in native.read_shapes(directory).values()]
    return found.family.with_dtype(config, dtype or max(set(kinds), key=kinds.count)), params


def read_host_shapes(directory: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter of a host by path, without reading any; errors as `load_host`."""
    found = recognise(directory)
    if found.native:
        checked_native_config(Path(directory), found.family)
        return native.read_shapes(directory)
    checkpoint = hugging_face.open_checkpoint(Path(directory), found.family)
    return {
        path: jax.ShapeDtypeStruct(shape, checkpoint.dtypes[path])
        for path, shape in checkpoint.table.flax_shapes.items()
    }


def checked_native_config(directory: Path, family: Family) -> Config:
    """The configuration of one of our directories, whose parameters are those that it asks for.

    Raises:
        UserError: everything that is missing, unexpected or mis-shaped (`CheckpointMismatch`).
    """
    config = family.config_from_json(native.read_manifest(directory).config)
    shapes = {path: tuple(shape.shape) for path, shape in native.read_shapes(directory).items()}
    family.table(config).check_parameters(shapes, str(directory))
    return config
