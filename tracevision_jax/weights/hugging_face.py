"""Checkpoints of PyTorch of any family: opened and checked, loaded to devices, written back for `transformers`.

A `Family` says what its configuration and table are; everything else is the same for all. Names on disk and
names in memory (transformers 5 calls `visual.` `model.visual.`) are both understood, and so are, where a family says
them, the names of its authors' own files (`Original`), which come without a configuration.
"""

import fnmatch
import functools
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from tracevision_jax.errors import UserError
from tracevision_jax.weights.arrays import ArrayBuilder, ArrayLeaf, ShardingOf, first_device
from tracevision_jax.weights.copying import contiguous
from tracevision_jax.weights.directory import new_directory
from tracevision_jax.weights.engine import Table, flatten, unflatten
from tracevision_jax.weights.family import Config, Family, Leaves, Original
from tracevision_jax.weights.safetensors_io import (
    Progress,
    SafetensorsSource,
    TensorPlan,
    WrittenFile,
    check_index,
    find_safetensors,
    write_sharded,
)
from tracevision_jax.weights.sources import (
    DictSource,
    RenamedSource,
    TensorSource,
    open_torch_files,
    torch_files,
)

SIDE_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "LICENSE*")
"""Files beside the weights (tokenizer, preprocessor, chat template) that are copied through."""
NOT_COPIED = ("*.index.json", "tracevision.json", "original.json", "trainer_state.json", "*results.json")
ORIGINAL_CONFIG = "original.json"
"""What we write beside a file in the authors' layout, so that models of other than released sizes can be read again."""
WEIGHTS_STEM = "model"
MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class OpenCheckpoint:
    """A checkpoint whose names and shapes fit; nothing is read yet."""

    config: Config
    table: Table
    source: TensorSource
    dtypes: Mapping[str, np.dtype]
    """Of every parameter, by path."""

    @property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(self.source.tensors[name].bytes for name in self.table.torch_shapes)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, `{}` when there is no such file.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object")
    return content


def open_checkpoint(place: Path, family: Family, dtype: np.dtype | None = None) -> OpenCheckpoint:
    """Open a directory or a PyTorch file and hold every name and shape against its configuration.

    Raises:
        UserError: damaged files; or everything that is missing, unexpected or mis-shaped
        (`CheckpointMismatch`).
    """
    source = find_tensors(place)
    if family.original and family.original.recognise(source.tensors):
        config, whole = _original_config(place, family, family.original, source)
        return open_source(source, family, config, whole, dtype, family.original.table(config))
    config = family.read_config(read_json(place / "config.json"), read_json(place / "generation_config.json"))
    return open_source(source, family, config, str(place), dtype)


def _original_config(place: Path, family: Family, original: Original, source: TensorSource) -> tuple[Config, str]:
    """The configuration of tensors in the authors' layout, and what the checkpoint is called in messages."""
    directory = place if place.is_dir() else place.parent
    beside = read_json(directory / ORIGINAL_CONFIG)
    if beside.get("file") in {info.place for info in source.tensors.values()}:
        return family.config_from_json(beside.get("config", {})), str(place)
    if place.is_dir() and (content := read_json(place / "config.json")):
        return family.read_config(content, {}), str(place)
    name, config = original.nearest(source.tensors)
    return config, f"{place} (of the released models it is most like {name})"


def find_tensors(place: Path) -> TensorSource:
    """The tensors of a PyTorch file, or of a directory: safetensors if there are any, else PyTorch files.

    Raises:
        UserError: none, or damaged ones.
    """
    if place.is_file():
        return open_torch_files([place])
    directory = place
    if paths := find_safetensors(directory):
        source = SafetensorsSource(paths)
        check_index(directory, source)
        return source
    if paths := torch_files(directory):
        return open_torch_files(paths)
    raise UserError(f"{directory} holds no weights (*.safetensors, pytorch_model*.bin or *.pt)")


def open_source(
    source: TensorSource,
    family: Family,
    config: Config,
    whole: str,
    dtype: np.dtype | None = None,
    table: Table | None = None,
) -> OpenCheckpoint:
    """As `open_checkpoint`, for tensors that are found already; `whole` names them in messages."""
    if table is None:
        source, table = RenamedSource(source, family.canonical_name), family.table(config)
    # Of a tensor with two names either may be there alone.
    alone = {name: other for name, other in table.same.items() if other not in source.tensors}
    source = RenamedSource(source, lambda name: alone.get(name, name))
    table.check_tensors(source.tensors, whole)
    _check_repeated(source, table, whole)
    return OpenCheckpoint(config, table, source, _dtypes(source, table, whole, dtype))


def _check_repeated(source: TensorSource, table: Table, whole: str) -> None:
    """A tensor that is stored again under a second name must be the same there."""
    for name, other in table.same.items():
        if name in source.tensors and _digest(source.read(name)) != _digest(source.read(other)):
            raise UserError(
                f"{whole}: {name} should be {other} again, but their values differ; if these are a head and an "
                'embedding that are not tied, set "tie_word_embeddings": false in config.json'
            )


def _digest(array: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).digest()


def _dtypes(source: TensorSource, table: Table, whole: str, dtype: np.dtype | None) -> dict[str, np.dtype]:
    if dtype is not None:
        return dict.fromkeys(table.by_path, np.dtype(dtype))
    found = {path: {source.tensors[m.name].dtype for m in moves} for path, moves in table.by_path.items()}
    mixed = [f"{path} ({', '.join(sorted(map(str, kinds)))})" for path, kinds in found.items() if len(kinds) > 1]
    if mixed:
        raise UserError(f"{whole} mixes dtypes within {', '.join(mixed)}; say which one you want (--dtype float32)")
    return {path: kinds.pop() for path, kinds in found.items()}


def load(
    checkpoint: OpenCheckpoint,
    sharding_of: ShardingOf = first_device,
    paths: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read parameters (all by default), one tensor of the files at a time, straight to where they belong.

    Raises:
        UserError: an unknown path.
    """
    table = checkpoint.table
    wanted = set(table.flax_shapes) if paths is None else set(paths)
    if unknown := sorted(wanted - set(table.flax_shapes)):
        raise UserError(f"the checkpoint has no parameter {', '.join(unknown)}")
    builders = {
        path: ArrayBuilder(shape, checkpoint.dtypes[path], sharding_of(path, shape))
        for path, shape in table.flax_shapes.items()
        if path in wanted
    }
    for name in checkpoint.source.tensors:
        moves = [move for move in table.by_name.get(name, ()) if move.path in wanted]
        if not moves:
            continue
        tensor = checkpoint.source.read(name)
        for move in moves:
            builders[move.path].write(move.start, move.to_flax(tensor))
        if progress:
            progress(name, tensor.nbytes)
    return unflatten({path: builder.finish() for path, builder in builders.items()})


def load_directory(
    directory: str | Path,
    family: Family,
    sharding_of: ShardingOf = first_device,
    dtype: str | None = None,
    paths: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> tuple[Config, dict[str, Any]]:
    """Open and load a directory; the configuration says the dtype that most parameters have.

    Raises:
        UserError: see `open_checkpoint`.
    """
    checkpoint = open_checkpoint(Path(directory), family, None if dtype is None else jnp.dtype(dtype))
    kinds = [str(kind) for kind in checkpoint.dtypes.values()]
    config = family.with_dtype(checkpoint.config, max(set(kinds), key=kinds.count))
    return config, load(checkpoint, sharding_of, paths, progress)


def from_torch(state: Mapping[str, Any], family: Family, config: Config) -> dict[str, Any]:
    """Parameters from a state dictionary in memory (of torch tensors or arrays), on the first device."""
    return load(open_source(DictSource(state), family, config, "the state dictionary"))


def flax_blocks(checkpoint: OpenCheckpoint, path: str) -> Iterator[np.ndarray]:
    """A parameter in memory order, one block of its leading axes after the other, in host memory."""
    table = checkpoint.table
    kind = checkpoint.dtypes[path]
    for _, moves in table.blocks(path):
        leading = len(moves[0].start) - len(moves[0].layout.block_start)
        shape = table.flax_shapes[path][leading:]
        if len(moves) == 1 and moves[0].shape[leading:] == shape:
            block = moves[0].to_flax(checkpoint.source.read(moves[0].name))
        else:
            block = np.zeros((1,) * leading + shape, kind)
            for move in moves:
                corner = (0,) * leading + move.layout.block_start
                place = zip(corner, move.shape, strict=True)
                block[tuple(slice(start, start + size) for start, size in place)] = move.to_flax(
                    checkpoint.source.read(move.name)
                )
        yield contiguous(block, kind)


def torch_tensor(table: Table, name: str, dtype: np.dtype, leaves: Leaves) -> np.ndarray:
    """A tensor as PyTorch has it, put together from the parameters."""
    name = table.written[name]
    tensor = np.empty(table.torch_shapes[name], dtype)
    for move in table.by_name[name]:
        move.layout.fill_torch(tensor, leaves[move.path].block(move.start, move.shape))
    return tensor


def torch_dtypes(table: Table, leaves: Leaves, dtype: np.dtype | None = None) -> dict[str, np.dtype]:
    """The dtype of every tensor: the one asked for, or one that holds all parameters that it is made of."""
    if dtype is not None:
        return dict.fromkeys(table.written, np.dtype(dtype))
    return {
        name: np.dtype(functools.reduce(jnp.promote_types, (leaves[m.path].dtype for m in table.by_name[other])))
        for name, other in table.written.items()
    }


def exported(params: Mapping[str, Any], family: Family, config: Config) -> tuple[Leaves, Config, Table]:
    """A parameter tree, checked, as it goes to PyTorch.

    Raises:
        UserError: the parameters are not those of the configuration.
    """
    leaves: Leaves = {path: ArrayLeaf(leaf) for path, leaf in flatten(params).items()}
    leaves, config = family.for_export(leaves, config)
    table = family.table(config)
    table.check_parameters({path: leaf.shape for path, leaf in leaves.items()}, "the parameter tree")
    return leaves, config, table


def to_torch_names(params: Mapping[str, Any], family: Family, config: Config) -> Iterator[tuple[str, np.ndarray]]:
    """(name on disk, array) of every tensor, one at a time; added tokens are merged into the vocabulary.

    Raises:
        UserError: the parameters are not those of the configuration.
    """
    leaves, _, table = exported(params, family, config)
    for name, dtype in torch_dtypes(table, leaves).items():
        yield name, torch_tensor(table, name, dtype, leaves)


def save(
    directory: str | Path,
    params: Mapping[str, Any],
    family: Family,
    config: Config,
    *,
    side_files: str | Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write parameters as a directory that `transformers` loads; it appears whole or not at all.

    Args:
        directory: where to.
        params: nested dictionaries of arrays, sharded or not, of one process.
        family: what they are.
        config: their configuration.
        side_files: a directory whose tokenizer, preprocessor and template files are copied.
        dtype: convert to it.
        overwrite: replace a checkpoint that is there.
        max_shard_bytes: of one file, unless a tensor is larger.
        progress: told of each tensor that is written.

    Raises:
        UserError: a directory that must not be replaced, or parameters that are not the configuration's.
    """
    leaves, config, table = exported(params, family, config)
    kinds = torch_dtypes(table, leaves, None if dtype is None else jnp.dtype(dtype))
    plans = tensor_plans(table, leaves, kinds)
    with new_directory(Path(directory), overwrite) as folder:
        copy_side_files(None if side_files is None else Path(side_files), folder)
        files = write_sharded(folder, WEIGHTS_STEM, plans, max_shard_bytes, progress)
        write_configurations(folder, family, config, plans, files)


def tensor_plans(table: Table, leaves: Leaves, dtypes: Mapping[str, np.dtype]) -> list[TensorPlan]:
    """What to write, tensor by tensor."""
    return [
        TensorPlan(
            name, table.torch_shapes[other], dtypes[name], partial(_one_piece, table, name, dtypes[name], leaves)
        )
        for name, other in table.written.items()
    ]


def write_configurations(
    folder: Path, family: Family, config: Config, plans: list[TensorPlan], files: list[WrittenFile]
) -> None:
    """Write the index, `config.json` over the one that was copied through, and other files that were not."""
    if len(files) > 1:
        _write_index(folder, files, sum(plan.bytes for plan in plans))
    kinds = [plan.dtype for plan in plans]
    main_dtype = max(set(kinds), key=kinds.count)
    config_json = family.write_config(config, main_dtype, read_json(folder / "config.json"))
    _write_json(folder / "config.json", config_json)
    for name, content in family.other_files(config).items():
        if not (folder / name).is_file():
            _write_json(folder / name, content)


def write_original_config(folder: Path, family: Family, config: Config, file: str) -> None:
    """Write what names and shapes do not tell, heads and windows, beside a file in the authors' layout."""
    _write_json(folder / ORIGINAL_CONFIG, {"file": file, "config": family.config_to_json(config)})


def _one_piece(table: Table, name: str, dtype: np.dtype, leaves: Leaves) -> Iterator[np.ndarray]:
    yield torch_tensor(table, name, dtype, leaves)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _write_index(folder: Path, files: list[WrittenFile], total_bytes: int) -> None:
    weight_map = {name: file.name for file in files for name in file.tensors}
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def copy_side_files(source: Path | None, folder: Path) -> None:
    """Copy what lies beside the weights: tokenizer, preprocessor, chat template, configurations."""
    for path in sorted(source.iterdir()) if source else []:
        wanted = any(fnmatch.fnmatch(path.name, pattern) for pattern in SIDE_FILES)
        if wanted and path.is_file() and not any(fnmatch.fnmatch(path.name, pattern) for pattern in NOT_COPIED):
            shutil.copyfile(path, folder / path.name)
