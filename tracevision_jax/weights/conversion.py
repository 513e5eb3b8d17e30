"""From a Hugging Face directory to ours and back, as a stream: one tensor in memory at a time, no devices.

    to_native(source, target, family).run()         # safetensors or PyTorch files -> ours
    to_hugging_face(source, target, family).run()   # and back; `transformers` loads the result
    model_to_hugging_face(source, target).run()     # the host of a trained TraceVision

Everything is checked before anything is written, and the target appears whole or not at all.
"""

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tracevision_jax.errors import UserError
from tracevision_jax.systems.config_json import from_json
from tracevision_jax.systems.tracevision import TraceVisionConfig
from tracevision_jax.vision.preprocess import config_to_json
from tracevision_jax.weights import hashes, hugging_face, model_directory, native, qwen25vl
from tracevision_jax.weights.arrays import ArrayLeaf
from tracevision_jax.weights.directory import check_target, new_directory
from tracevision_jax.weights.engine import Table, flatten
from tracevision_jax.weights.families import checked_native_config, load_host, recognise
from tracevision_jax.weights.hugging_face import MAX_SHARD_BYTES, Config, Family, Leaves
from tracevision_jax.weights.safetensors_io import (
    Progress,
    SafetensorsSource,
    TensorPlan,
    WrittenFile,
    write_sharded,
)

PREPROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json")
HOST = "host/"
"""Where a system keeps its host's parameters."""


@dataclass(frozen=True)
class Conversion:
    """A conversion that has been checked and can be run."""

    side_files: Path
    """The directory whose tokenizer and preprocessor files are copied."""
    target: Path
    plans: list[TensorPlan]
    """What will be written."""
    finish: Callable[[Path, list[WrittenFile]], None]
    """Writes what belongs beside the weights into the new folder."""
    stem: str

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
        check_space(self.target, self.bytes)
        with new_directory(self.target, overwrite) as folder:
            hugging_face.copy_side_files(self.side_files, folder)
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

    def __init__(self, read: Callable[[str], np.ndarray], path: str, stored: jax.ShapeDtypeStruct):
        self.read, self.path = read, path
        self.shape, self.dtype = tuple(stored.shape), np.dtype(stored.dtype)

    def block(self, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        """See `arrays.Leaf`."""
        return ArrayLeaf(self.read(self.path)).block(start, shape)


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
    """Check a Hugging Face directory and prepare to write it as ours.

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

    return Conversion(source, target, plans, finish, native.WEIGHTS_STEM)


def to_hugging_face(source: Path, target: Path, family: Family, dtype: str | None = None) -> Conversion:
    """Check one of our directories and prepare to write it as one that `transformers` loads.

    Raises:
        UserError: damaged or changed files, or parameters that are not the configuration's.
    """
    config = checked_native_config(source, family)
    weights = native.open_weights(source, native.read_manifest(source))
    leaves, config = family.for_export({path: FileLeaf(weights, path) for path in weights.tensors}, config)
    table = family.table(config)
    kinds = hugging_face.torch_dtypes(table, leaves, None if dtype is None else jnp.dtype(dtype))
    return _export(source, target, family, config, table, leaves, kinds)


def model_to_hugging_face(source: Path, target: Path, dtype: str | None = None) -> Conversion:
    """Check a trained TraceVision (`model_directory`) and prepare to write its host, added tokens merged.

    What the host of `transformers` has no place for, the TVP and the pixel decoder, stays behind.

    Raises:
        UserError: a damaged model, or one of another system.
    """
    system = _system(source)
    config = system.host
    if damage := hashes.faults(source):
        raise UserError("the model is damaged; copy or export it again:\n  " + "\n  ".join(damage))

    # Tensors come parameter by parameter; embedding and head are made of two each.
    @functools.lru_cache(maxsize=2)
    def read(path: str) -> np.ndarray:
        _, params = model_directory.load_model(source, paths=[HOST + path], verify=False)
        return np.asarray(flatten(params)[HOST + path])

    shapes = model_directory.read_shapes(source)
    leaves = {
        path.removeprefix(HOST): ModelLeaf(read, path.removeprefix(HOST), stored)
        for path, stored in shapes.items()
        if path.startswith(HOST)
    }
    leaves, config = qwen25vl.FAMILY.for_export(leaves, config)
    table = qwen25vl.table(config)
    table.check_parameters({path: leaf.shape for path, leaf in leaves.items()}, str(source))
    kinds = hugging_face.torch_dtypes(table, leaves, None if dtype is None else jnp.dtype(dtype))
    conversion = _export(source / "tokenizer", target, qwen25vl.FAMILY, config, table, leaves, kinds)

    def finish(folder: Path, files: list[WrittenFile]) -> None:
        conversion.finish(folder, files)
        for name, settings in zip(PREPROCESSOR_FILES, config_to_json(system.processor.vision), strict=True):
            (folder / name).write_text(json.dumps(settings, indent=2) + "\n")

    return replace(conversion, finish=finish)


def read_host_config(directory: Path) -> Config:
    """The configuration of the host in one of our directories, converted or trained.

    Raises:
        UserError: damaged, or of another system.
    """
    if not model_directory.is_model(directory):
        return checked_native_config(directory, recognise(directory).family)
    return _system(directory).host


def read_host_params(directory: Path, dtype: str) -> dict[str, Any]:
    """The parameters of the host in one of our directories, converted or trained, on the first device.

    Raises:
        UserError: see `families.load_host` and `model_directory.load_model`.
    """
    if not model_directory.is_model(directory):
        return load_host(directory, dtype=dtype)[1]
    paths = [path for path in model_directory.read_shapes(directory) if path.startswith(HOST)]
    _, params = model_directory.load_model(directory, paths=paths)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params[HOST.removesuffix("/")])


def _system(directory: Path) -> TraceVisionConfig:
    content = model_directory.read_config(directory)
    if content.get("system") != "tracevision":
        raise UserError(f"{directory} holds the system '{content.get('system')}'; only 'tracevision' can be exported")
    return from_json(TraceVisionConfig, content.get("model"), f"'model' in {directory / 'config.json'}")


def _export(
    side_files: Path,
    target: Path,
    family: Family,
    config: Config,
    table: Table,
    leaves: Leaves,
    dtypes: dict[str, np.dtype],
) -> Conversion:
    plans = hugging_face.tensor_plans(table, leaves, dtypes)

    def finish(folder: Path, files: list[WrittenFile]) -> None:
        hugging_face.write_configurations(folder, family, config, plans, files)

    return Conversion(side_files, target, plans, finish, hugging_face.WEIGHTS_STEM)
