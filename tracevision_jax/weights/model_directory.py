"""A model as a directory: `config.json`, `params/` (Orbax, sharded) and `sha256.json`.

What training exports, what inference and the next stage load:

    save_model("runs/stage1/model", {"system": "tracevision", "model": {...}}, params)
    config, params = load_model("runs/stage1/model")
    config, params = load_model(directory, sharding=lambda path, shape: ..., paths=["tvp/out_scale"])

Arrays are read straight to where they belong, only those that are asked for. The directory appears whole or
not at all. `read_shapes` and `load_model` read hosts as well (`families.py`), so that a recipe can start from one.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import traverse_util
from jax.experimental import multihost_utils

from tracevision_jax.errors import UserError
from tracevision_jax.weights import hashes
from tracevision_jax.weights.arrays import ShardingOf, first_device
from tracevision_jax.weights.families import load_host, read_host_shapes

Params = Any


def save_model(
    directory: str | Path,
    config: dict[str, Any],
    params: Params,
    folders: Mapping[str, Callable[[Path], Any]] | None = None,
) -> None:
    """Write a model; one that is there already is replaced once the new one is complete.

    Args:
        directory: where to.
        config: JSON values; by convention "system" (its name) and "model" (its configuration).
        params: nested dictionaries of arrays; with several processes all call with the same ones, the first writes.
        folders: {name: what writes the files of a folder of that name beside them}, such as the tokenizer's.
    """
    directory = Path(directory).absolute()
    partial, old = (directory.with_name(f".{directory.name}.{kind}") for kind in ("partial", "old"))
    first = jax.process_index() == 0
    if first:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
    multihost_utils.sync_global_devices("a folder for the model is there")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial / "params", params)
    if first:
        _finish(directory, partial, old, config, folders or {})
    multihost_utils.sync_global_devices("the model is written")


def _finish(
    directory: Path, partial: Path, old: Path, config: dict[str, Any], folders: Mapping[str, Callable[[Path], Any]]
) -> None:
    """Add what stands beside the parameters, and put the whole in its place."""
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name, write in folders.items():
        (partial / name).mkdir()
        write(partial / name)
    hashes.write_hashes(partial)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def is_model(directory: str | Path) -> bool:
    """Whether a directory looks like one of ours."""
    directory = Path(directory)
    return (directory / "config.json").is_file() and (directory / "params").is_dir()


def read_config(directory: str | Path) -> dict[str, Any]:
    """The configuration alone; UserError when the directory is no model of ours."""
    directory = Path(directory)
    if not is_model(directory):
        raise UserError(f"{directory} is not a model directory: it needs config.json and params/.")
    try:
        return json.loads((directory / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{directory / 'config.json'} is not readable JSON: {error}.") from error


def read_shapes(directory: str | Path) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and dtype} of every parameter of a model or a host, without reading any."""
    if not is_model(directory):
        return read_host_shapes(directory)
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(Path(directory).absolute() / "params").item_metadata
    if tree is None:
        raise UserError(f"{directory} is damaged: the list of its parameters cannot be read.")
    leaves: dict[str, Any] = traverse_util.flatten_dict(dict(tree), sep="/")
    return {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}


def load_model(
    directory: str | Path,
    sharding: ShardingOf | None = None,
    paths: Iterable[str] | None = None,
    verify: bool = True,
) -> tuple[dict[str, Any], Params]:
    """Read (configuration, parameters).

    Args:
        directory: what `save_model` wrote; or a host, converted or Hugging Face's, whose configuration is then {}.
        sharding: where each array goes; the first device by default.
        paths: which parameters to read; all by default.
        verify: check the files' hashes first.

    Raises:
        UserError: no such model, a damaged file (all are named), or an unknown path.
    """
    if not is_model(directory):
        return {}, load_host(directory, sharding or first_device, paths=paths)[1]
    config, directory = read_config(directory), Path(directory).absolute()
    if verify and (damage := hashes.faults(directory)):
        raise UserError("This model is damaged; copy or export it again:\n  " + "\n  ".join(damage))
    shapes = read_shapes(directory)
    wanted = set(shapes) if paths is None else set(paths)
    if unknown := sorted(wanted - set(shapes)):
        raise UserError(f"{directory} has no parameter {', '.join(unknown)}.")
    sharding_of = sharding or first_device

    def target(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
        if path not in wanted:
            return ocp.PLACEHOLDER
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding_of(path, leaf.shape))

    targets = {path: target(path, leaf) for path, leaf in shapes.items()}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = traverse_util.unflatten_dict(targets, sep="/")
        arguments = jax.tree.map(_restore_arguments, tree)
        restored = checkpointer.restore(directory / "params", ocp.args.PyTreeRestore(tree, arguments))
    leaves = traverse_util.flatten_dict(restored, sep="/")
    return config, traverse_util.unflatten_dict({p: leaves[p] for p in shapes if p in wanted}, sep="/")


def _restore_arguments(leaf: Any) -> ocp.RestoreArgs:
    if leaf is ocp.PLACEHOLDER:
        return ocp.RestoreArgs()
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
