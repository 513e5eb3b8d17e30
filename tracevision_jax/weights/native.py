"""Our own checkpoint of a host, as `tracevision convert` writes it: parameters under their Flax paths.

A directory with `tracevision.json` (format version, family, configuration, hash of every weight file),
safetensors whose tensors are named by path ("language/layers/mlp/gate/kernel", all layers in one), and the
tokenizer and preprocessor files of the checkpoint that it came from.

    manifest, params = load(directory, sharding_of=lambda path, shape: ...)

Parameters are read a stretch of layers at a time straight to where they belong.
"""

import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tracevision_jax.errors import UserError
from tracevision_jax.weights.arrays import ArrayBuilder, ShardingOf, first_device
from tracevision_jax.weights.engine import unflatten
from tracevision_jax.weights.hashes import sha256
from tracevision_jax.weights.safetensors_io import Progress, SafetensorsSource, WrittenFile

MANIFEST = "tracevision.json"
WEIGHTS_STEM = "tracevision"
FORMAT_VERSION = 1
MAX_BLOCK_BYTES = 256 * 2**20
"""Most of a parameter that is in host memory at once (but at least one layer)."""


@dataclass(frozen=True)
class Manifest:
    """What `tracevision.json` says."""

    family: str
    config: Mapping[str, Any]
    sha256: Mapping[str, str]
    """Weight file -> hash."""


def is_native(directory: str | Path) -> bool:
    """Whether a directory is one of ours."""
    return (Path(directory) / MANIFEST).is_file()


def write_manifest(directory: Path, family: str, config: Mapping[str, Any], files: Iterable[WrittenFile]) -> None:
    """Write `tracevision.json` beside the weight files."""
    content = {
        "format_version": FORMAT_VERSION,
        "family": family,
        "config": config,
        "sha256": {file.name: file.sha256 for file in files},
    }
    (directory / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def read_manifest(directory: str | Path) -> Manifest:
    """
    Raises:
        UserError: no such file, damaged, or written by a newer version.
    """
    path = Path(directory) / MANIFEST
    try:
        content = json.loads(path.read_text())
        version = int(content["format_version"])
        manifest = Manifest(content["family"], dict(content["config"]), dict(content["sha256"]))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error!r}") from error
    if version > FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, this program knows up to {FORMAT_VERSION}: update it")
    return manifest


def open_weights(directory: str | Path, manifest: Manifest, check_hashes: bool = True) -> SafetensorsSource:
    """The weight files of a directory; by default they are hashed first, to find damage.

    Raises:
        UserError: with every file that is missing, damaged or changed.
    """
    paths = [Path(directory) / name for name in manifest.sha256]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise UserError("files of the checkpoint are missing: " + ", ".join(missing))
    source = SafetensorsSource(paths)
    if check_hashes:
        with ThreadPoolExecutor() as pool:
            digests = list(pool.map(sha256, paths))
        changed = [
            str(path) for path, digest in zip(paths, digests, strict=True) if digest != manifest.sha256[path.name]
        ]
        if changed:
            raise UserError("files changed since they were written; copy or convert them again: " + ", ".join(changed))
    return source


def read_shapes(directory: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of every parameter by path, without reading any."""
    source = open_weights(directory, read_manifest(directory), check_hashes=False)
    return {path: jax.ShapeDtypeStruct(info.shape, info.dtype) for path, info in source.tensors.items()}


def load(
    directory: str | Path,
    sharding_of: ShardingOf = first_device,
    dtype: np.dtype | None = None,
    paths: Iterable[str] | None = None,
    check_hashes: bool = True,
    progress: Progress | None = None,
) -> tuple[Manifest, dict[str, Any]]:
    """Read (manifest, parameters as nested dictionaries).

    Args:
        directory: what `tracevision convert` wrote.
        sharding_of: where each parameter goes; the first device by default.
        dtype: convert to it; as stored by default.
        paths: which parameters to read; all by default.
        check_hashes: find damaged files first.
        progress: told of each block that is read.

    Raises:
        UserError: a damaged checkpoint, or an unknown path.
    """
    manifest = read_manifest(directory)
    source = open_weights(directory, manifest, check_hashes)
    wanted = set(source.tensors) if paths is None else set(paths)
    if unknown := sorted(wanted - set(source.tensors)):
        raise UserError(f"{directory} has no parameter {', '.join(unknown)}")
    leaves = {}
    for path, info in source.tensors.items():
        if path not in wanted:
            continue
        builder = ArrayBuilder(info.shape, dtype or info.dtype, sharding_of(path, info.shape))
        for start, shape in _stretches(info.shape, info.dtype.itemsize):
            block = source.read_block(path, start, shape)
            builder.write(start, block)
            if progress:
                progress(path, block.nbytes)
        leaves[path] = builder.finish()
    return manifest, unflatten(leaves)


def _stretches(shape: tuple[int, ...], itemsize: int) -> Iterable[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut an array along its first axis into blocks (first corner, shape) of at most `MAX_BLOCK_BYTES`."""
    if not shape or math.prod(shape) * itemsize <= MAX_BLOCK_BYTES:
        return [((0,) * len(shape), shape)]
    rows = max(1, MAX_BLOCK_BYTES // (math.prod(shape[1:]) * itemsize))
    rest = (0,) * (len(shape) - 1)
    return [((first, *rest), (min(rows, shape[0] - first), *shape[1:])) for first in range(0, shape[0], rows)]
