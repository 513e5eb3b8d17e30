"""From a Hugging Face directory to ours and back, as a stream: one tensor in memory at a time, no devices.

    to_native(source, target, family).run()         # safetensors or PyTorch files -> ours
    to_hugging_face(source, target, family).run()   # and back; `transformers` loads the result

Everything is checked before anything is written, and the target appears whole or not at all.
"""

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tracevision_jax.errors import UserError
from tracevision_jax.weights import hugging_face, native
from tracevision_jax.weights.directory import check_target, new_directory
from tracevision_jax.weights.families import checked_native_config
from tracevision_jax.weights.hugging_face import MAX_SHARD_BYTES, Family
from tracevision_jax.weights.safetensors_io import (
    Progress,
    SafetensorsSource,
    TensorPlan,
    WrittenFile,
    write_sharded,
)


@dataclass(frozen=True)
class Conversion:
    """A conversion that has been checked and can be run."""

    source: Path
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
            hugging_face.copy_side_files(self.source, folder)
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
    check_target(target, overwrite)
    there, here = target.resolve(), source.resolve()
    if there == here or here in there.parents or there in here.parents:
        raise UserError(f"{target} and {source} lie within each other; write somewhere else")


def check_space(target: Path, needed: int) -> None:
    """
    Raises:
        UserError: less room on the target's disk than that many bytes.
    """
    place = next(parent for parent in target.resolve().parents if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"the weights take {needed / 1e9:.1f} GB, on the disk of {target} are {free / 1e9:.1f} GB free"
        )


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
    plans = hugging_face.tensor_plans(table, leaves, kinds)

    def finish(folder: Path, files: list[WrittenFile]) -> None:
        hugging_face.write_configurations(folder, family, config, plans, files)

    return Conversion(source, target, plans, finish, hugging_face.WEIGHTS_STEM)
