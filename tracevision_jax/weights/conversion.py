"""From PyTorch checkpoints to ours and back, as a stream: one tensor in memory at a time, no devices.

    to_native(source, target, family).run()         # a Hugging Face directory, or the authors' own file -> ours
    to_hugging_face(source, target, family).run()   # and back; `transformers` loads the result
    to_original(source, target, family).run()       # and back; the authors' code loads the result
    model_to_pytorch(source, target).run()          # the host of a trained TraceVision, a trained SAM 2

Everything is checked before anything is written, and the target appears whole or not at all.
"""

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from tracevision_jax.errors import UserError
from tracevision_jax.hosts.sam_presets import SegmentAnythingConfig
from tracevision_jax.systems.config_json import from_json
from tracevision_jax.systems.tracevision import TraceVisionConfig
from tracevision_jax.vision.preprocess import config_to_json
from tracevision_jax.weights import hashes, hugging_face, model_directory, native, qwen25vl, sam
from tracevision_jax.weights.arrays import ArrayLeaf
from tracevision_jax.weights.directory import check_target, new_directory
from tracevision_jax.weights.engine import Table, flatten
from tracevision_jax.weights.families import FAMILIES, checked_native_config, load_host, recognise
from tracevision_jax.weights.family import Config, Family, Leaves, Original
from tracevision_jax.weights.hugging_face import MAX_SHARD_BYTES
from tracevision_jax.weights.safetensors_io import (
    Progress,
    SafetensorsSource,
    TensorPlan,
    WrittenFile,
    write_sharded,
)
from tracevision_jax.weights.torch_io import write_torch_file

PREPROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")
HOST = "host/"
"""Where TraceVision keeps its host's parameters."""
MAX_TOGETHER_BYTES = 64 * 2**20
"""Most of the small parameters of a model directory that are in memory at once."""


@dataclass(frozen=True)
class Conversion:
    """A conversion that has been checked and can be run."""

    side_files: Path | None
    """The directory whose tokenizer and preprocessor files are copied."""
    target: Path
    plans: list[TensorPlan]
    """What will be written."""
    finish: Callable[[Path, list[WrittenFile]], None]
    """Writes what belongs beside the weights into the new folder."""
    stem: str
    original: Original | None = None
    """Given for one PyTorch file in the authors' layout instead of safetensors."""

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(plan.bytes for plan in self.plans)

    def run(
        self,
        overwrite: bool = False,
        max_shard_bytes: int = MAX_SHARD_BYTES,
        progress: Progress | None = None,
    ) -> None:
        """Write the target.

        Raises:
            UserError: the target must not be replaced, or the disk is full.
        """
        # Tensors of a PyTorch file stand beside it, one by one, until it is written.
        check_space(self.target, self.bytes * (2 if self.original else 1))
        with new_directory(self.target, overwrite) as folder:
            hugging_face.copy_side_files(self.side_files, folder)
            if self.original:
                write_torch_file(folder / f"{self.stem}.pt", self.plans, self.original.key, progress)
                self.finish(folder, [])
            else:
                self.finish(folder, write_sharded(folder, self.stem, self.plans, max_shard_bytes, progress))


class FileLeaf:
    """A parameter in one of our weight files, see `arrays.Leaf`."""

    def __init__(self, source: SafetensorsSource, path: str):
        self.source, self.path = source, path
        self.shape, self.dtype = source.tensors[path].shape, source.tensors[path].dtype

    def block(self, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        """See `arrays.Leaf`."""
        return self.source.read_block(self.path, start, shape)


def check_places(source: Path, target: Path, overwrite: bool) -> None:
    """
    Raises:
        UserError: the target must not be written, or lies within the source or the other way round.
    """
    for place in (source, target):
        if place.parts and place.parts[0].endswith(":"):
            raise UserError(f"{place} is no local directory; mount the storage, or copy from and to a local one")
    check_target(target, overwrite)
    there, here = target.resolve(), source.resolve()
    if there == here or here in there.parents or there in here.parents:
        raise UserError(f"{target} and {source} lie within each other; write somewhere else")


class ModelLeaf:
    """A parameter of a model directory, read when it is needed, see `arrays.Leaf`."""

    def __init__(self, read: Callable[[], Mapping[str, Any]], path: str, stored: jax.ShapeDtypeStruct):
        self.read, self.path = read, path
        self.shape, self.dtype = tuple(stored.shape), np.dtype(stored.dtype)

    def block(self, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        """See `arrays.Leaf`."""
        return ArrayLeaf(np.asarray(self.read()[self.path])).block(start, shape)


def check_space(target: Path, needed: int) -> None:
    """
    Raises:
        UserError: less room on the target's disk than that many bytes.
    """
    place = next(parent for parent in target.resolve().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"the weights take {needed / 1e9:.1f} GB, on the disk of {target} are {free / 1e9:.1f} GB free")


def to_native(source: Path, target: Path, family: Family, dtype: str | None = None) -> Conversion:
    """Check a Hugging Face directory, or a file of the authors', and prepare to write it as ours.

    Raises:
        UserError: damaged files; or every missing, unexpected and mis-shaped tensor (`CheckpointMismatch`).
    """
    checkpoint = hugging_face.open_checkpoint(source, family, None if dtype is None else jnp.dtype(dtype))
    plans = [
        TensorPlan(
            path,
            shape,
            checkpoint.dtypes[path],
            functools.partial(hugging_face.flax_blocks, checkpoint, path),
        )
        for path, shape in checkpoint.table.flax_shapes.items()
    ]

    def finish(folder: Path, files: list[WrittenFile]) -> None:
        native.write_manifest(folder, family.name, family.config_to_json(checkpoint.config), files)

    return Conversion(source if source.is_dir() else None, target, plans, finish, native.WEIGHTS_STEM)


def to_hugging_face(source: Path, target: Path, family: Family, dtype: str | None = None) -> Conversion:
    """Check one of our directories and prepare to write it as one that `transformers` loads.

    Raises:
        UserError: damaged or changed files, or parameters that are not the configuration's.
    """
    leaves, config = _native_leaves(source, family)
    return _export(leaves, config, family, target, str(source), dtype, side_files=source)


def to_original(source: Path, target: Path, family: Family, dtype: str | None = None) -> Conversion:
    """Check one of our directories and prepare to write it as a PyTorch file that the authors' code loads.

    Raises:
        UserError: as `to_hugging_face`; or a family whose authors' layout is not known.
    """
    leaves, config = _native_leaves(source, family)
    return _export_original(leaves, config, family, target, str(source), dtype)


def model_to_pytorch(
    source: Path, target: Path, dtype: str | None = None, layout: Literal["hugging_face", "original"] = "hugging_face"
) -> Conversion:
    """Check a trained model (`model_directory`) and prepare to write its host, added tokens merged.

    What the host of `transformers` has no place for, TraceVision's TVP and pixel decoder, stays behind.

    Raises:
        UserError: a damaged model, one of another system, or one that the layout cannot hold.
    """
    trained = _trained(source)
    if damage := hashes.faults(source):
        raise UserError("the model is damaged; copy or export it again:\n  " + "\n  ".join(damage))

    # Tensors come parameter by parameter; embedding and head are made of two each.
    @functools.lru_cache(maxsize=2)
    def read(paths: tuple[str, ...]) -> dict[str, Any]:
        return flatten(model_directory.load_model(source, paths=paths, verify=False)[1])

    shapes = model_directory.read_shapes(source)
    leaves = {
        path.removeprefix(trained.prefix): ModelLeaf(functools.partial(read, paths), path, shapes[path])
        for paths in _read_together({path: at for path, at in shapes.items() if path.startswith(trained.prefix)})
        for path in paths
    }
    given = leaves, trained.config, trained.family, target, str(source), dtype
    if layout == "original":
        return _export_original(*given)
    conversion = _export(*given, side_files=trained.side_files)

    def finish(folder: Path, files: list[WrittenFile]) -> None:
        conversion.finish(folder, files)
        for name, settings in trained.other_files.items():
            (folder / name).write_text(json.dumps(settings, indent=2) + "\n")

    return replace(conversion, finish=finish)


def read_host_config(directory: Path) -> Config:
    """The configuration of the host in one of our directories, converted or trained.

    Raises:
        UserError: damaged, or of another system.
    """
    if not model_directory.is_model(directory):
        return checked_native_config(directory, recognise(directory).family)
    return _trained(directory).config


def read_host_params(directory: Path, dtype: str) -> dict[str, Any]:
    """The parameters of the host in one of our directories, converted or trained, on the first device.

    Raises:
        UserError: see `families.load_host` and `model_directory.load_model`.
    """
    if not model_directory.is_model(directory):
        return load_host(directory, dtype=dtype)[1]
    prefix = _trained(directory).prefix
    paths = [path for path in model_directory.read_shapes(directory) if path.startswith(prefix)]
    _, params = model_directory.load_model(directory, paths=paths)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params[prefix.removesuffix("/")] if prefix else params)


@dataclass(frozen=True)
class Trained:
    """What a model directory holds of a host."""

    family: Family
    config: Config
    """Of the host."""
    prefix: str
    """Of the paths of its parameters."""
    side_files: Path | None
    other_files: Mapping[str, Any]
    """{name: content} of JSON files that its configuration gives."""


def _trained(directory: Path) -> Trained:
    content, place = model_directory.read_config(directory), f"'model' in {directory / 'config.json'}"
    if content.get("system") == "tracevision":
        config = from_json(TraceVisionConfig, content.get("model"), place)
        preprocessors = zip(PREPROCESSOR_FILES, config_to_json(config.processor.vision), strict=True)
        return Trained(qwen25vl.FAMILY, config.host, HOST, directory / "tokenizer", dict(preprocessors))
    if content.get("system") == "sam2":
        config = from_json(SegmentAnythingConfig, content.get("model"), place)
        return Trained(sam.family_of(config), config, "", None, {})
    raise UserError(
        f"{directory} holds the system '{content.get('system')}'; only 'tracevision' and 'sam2' can be exported"
    )


def _read_together(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, ...]]:
    """Parameters that are read at once: neighbours up to `MAX_TOGETHER_BYTES`, as each read takes time of its own."""
    group, size = [], 0
    for path, stored in shapes.items():
        count = math.prod(stored.shape) * np.dtype(stored.dtype).itemsize
        if group and size + count > MAX_TOGETHER_BYTES:
            yield tuple(group)
            group, size = [], 0
        group, size = [*group, path], size + count
    if group:
        yield tuple(group)


def _native_leaves(source: Path, family: Family) -> tuple[Leaves, Config]:
    """Parameters and configuration of one of our directories."""
    config = checked_native_config(source, family)
    weights = native.open_weights(source, native.read_manifest(source))
    return {path: FileLeaf(weights, path) for path in weights.tensors}, config


def _export(
    leaves: Leaves,
    config: Config,
    family: Family,
    target: Path,
    whole: str,
    dtype: str | None,
    side_files: Path | None = None,
) -> Conversion:
    """To a Hugging Face directory; `whole` names the parameters in messages."""
    leaves, config = family.for_export(leaves, config)
    plans = _plans(family.table(config), leaves, whole, dtype)

    def finish(folder: Path, files: list[WrittenFile]) -> None:
        hugging_face.write_configurations(folder, family, config, plans, files)

    return Conversion(side_files, target, plans, finish, hugging_face.WEIGHTS_STEM)


def _export_original(
    leaves: Leaves, config: Config, family: Family, target: Path, whole: str, dtype: str | None
) -> Conversion:
    """To a file in the authors' layout."""
    if family.original is None:
        known = ", ".join(name for name, other in FAMILIES.items() if other.original)
        raise UserError(f"no other layout than Hugging Face's is known of the family '{family.name}', only of {known}")
    leaves, config = family.for_export(leaves, config)
    plans = _plans(family.original.table(config), leaves, whole, dtype)
    stem = family.original.stem(config)

    def finish(folder: Path, files: list[WrittenFile]) -> None:
        hugging_face.write_original_config(folder, family, config, f"{stem}.pt")

    return Conversion(None, target, plans, finish, stem, family.original)


def _plans(table: Table, leaves: Leaves, whole: str, dtype: str | None) -> list[TensorPlan]:
    table.check_parameters({path: leaf.shape for path, leaf in leaves.items()}, whole)
    kinds = hugging_face.torch_dtypes(table, leaves, None if dtype is None else jnp.dtype(dtype))
    return hugging_face.tensor_plans(table, leaves, kinds)
