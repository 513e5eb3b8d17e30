"""From a directory to a model that answers: `tv.load(path)`.

- A model directory of ours (what training exports: `config.json`, `params/`, `tokenizer/`), or the folder of a run
  that holds one as `model/`.
- A released Qwen2.5-VL, as Hugging Face's files or converted. It answers about pictures; trace-aware perception and
  masks are drawn at random then, and a warning says so.

`save` writes the first kind.
"""

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh

from tracevision_jax.errors import UserError
from tracevision_jax.inference.tracevision import TraceVisionInference
from tracevision_jax.parallel.mesh import MeshConfig, make_mesh
from tracevision_jax.parallel.rules import PARAMETERS, parameter_shardings
from tracevision_jax.records.batch import Bucket
from tracevision_jax.records.vocabulary import Vocabulary, load_vocabulary
from tracevision_jax.systems.config_json import from_json, to_json
from tracevision_jax.systems.tracevision import TraceVision, TraceVisionConfig, tracevision_config
from tracevision_jax.vision.preprocess import config_from_json
from tracevision_jax.weights import hashes, model_directory, native
from tracevision_jax.weights.arrays import first_device
from tracevision_jax.weights.families import load_host, recognise
from tracevision_jax.weights.hugging_face import read_json

SYSTEM = "tracevision"
TOKENIZER = "tokenizer"
PRECISIONS = ("float32", "bfloat16", "float16")

Place = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


@dataclass(frozen=True)
class Checkpoint:
    """What a directory holds."""

    system: TraceVision
    params: Any
    vocabulary: Vocabulary
    mesh: Mesh | None
    drawn: tuple[str, ...] = ()
    """Parts that the directory has no parameters of, drawn at random."""
    recipe: dict[str, Any] | None = None
    """The recipe that it was trained by, as JSON values, where the directory says it."""


def load(
    path: str | Path,
    *,
    mesh: Mesh | MeshConfig | None = None,
    dtype: str | None = None,
    buckets: Sequence[Bucket] = (),
) -> TraceVisionInference:
    """Load a model once, to ask it many times.

    Args:
        path: a model directory, the folder of a run, or a Qwen2.5-VL (Hugging Face's files, or converted).
        mesh: devices to spread the model and batches over; the first device by default.
        dtype: "float32", "bfloat16" or "float16" for parameters and arithmetic; as the directory says by default.
        buckets: sizes that prompts are padded to where they fit, smallest first: one program each, see `Engine`.

    Raises:
        UserError: no such directory, or one that is incomplete, damaged or of another system.
    """
    checkpoint = read_checkpoint(path, mesh=mesh, dtype=dtype)
    if checkpoint.drawn:
        warnings.warn(
            f"{path} holds a host alone: {', '.join(checkpoint.drawn)} are drawn at random, so answers about traces, "
            "predicted trajectories and masks mean nothing before training (tracevision train ... --init-from).",
            stacklevel=2,
        )
    return TraceVisionInference(
        checkpoint.system, checkpoint.params, checkpoint.vocabulary, mesh=checkpoint.mesh, buckets=buckets
    )


def save(
    directory: str | Path,
    system: TraceVision,
    params: Any,
    vocabulary: Vocabulary,
    recipe: dict[str, Any] | None = None,
) -> None:
    """Write a model directory that `load` reads; `recipe` is kept for the record."""
    config = {"system": SYSTEM, "model": to_json(system.config)} | ({"recipe": recipe} if recipe else {})
    model_directory.save_model(directory, config, params, {TOKENIZER: vocabulary.save})


def read_checkpoint(path: str | Path, *, mesh: Mesh | MeshConfig | None = None, dtype: str | None = None) -> Checkpoint:
    """Read a directory; arguments and errors as `load`."""
    directory = find_model(path)
    if dtype is not None and dtype not in PRECISIONS:
        raise UserError(f"dtype is '{dtype}', must be one of {', '.join(PRECISIONS)}")
    devices = make_mesh(mesh) if isinstance(mesh, MeshConfig) else mesh
    if model_directory.is_model(directory):
        return _read_model(directory, devices, dtype)
    return _read_host(directory, devices, dtype)


def find_model(path: str | Path) -> Path:
    """The directory of a model, given it or the folder of a run.

    Raises:
        UserError: neither.
    """
    directory = Path(path)
    if not directory.is_dir():
        kind = "a file, not a directory" if directory.exists() else "not there"
        raise UserError(f"the checkpoint {path} is {kind}; give a model directory or a Qwen2.5-VL")
    if not (directory / "config.json").is_file() and model_directory.is_model(directory / "model"):
        return directory / "model"
    if (directory / "checkpoints").is_dir() and not (directory / "config.json").is_file():
        raise UserError(
            f"{path} is the folder of a run that has not exported its model yet (no {directory / 'model'}): let the "
            "run end"
        )
    return directory


def fingerprint(path: str | Path) -> str:
    """What changes whenever a checkpoint does: its files' hashes where it has them, else their sizes and times."""
    directory = find_model(path)
    for name in (hashes.FILE, native.MANIFEST):
        if (directory / name).is_file():
            return hashlib.sha256((directory / name).read_bytes()).hexdigest()[:32]
    states = [(file.name, file.stat()) for file in sorted(directory.iterdir()) if file.is_file()]
    text = "\n".join(f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read_model(directory: Path, mesh: Mesh | None, dtype: str | None) -> Checkpoint:
    content = model_directory.read_config(directory)
    if content.get("system") != SYSTEM:
        raise UserError(
            f"{directory} holds a model of the system '{content.get('system')}', and this is for '{SYSTEM}'"
        )
    config = from_json(TraceVisionConfig, content.get("model"), f"'model' in {directory / 'config.json'}")
    vocabulary = load_vocabulary(directory / TOKENIZER, config.processor.coordinates)
    system = TraceVision(_with_precision(config, dtype))
    _check_shapes(directory, system)
    _, params = model_directory.load_model(directory, None if mesh is None else _placement(mesh))
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)
    return Checkpoint(system, params, vocabulary, mesh, recipe=content.get("recipe"))


def _check_shapes(directory: Path, system: TraceVision) -> None:
    """
    Raises:
        UserError: lists every parameter that is missing, unexpected or of another shape.
    """
    stored = {path: tuple(leaf.shape) for path, leaf in model_directory.read_shapes(directory).items()}
    wanted = {path: tuple(leaf.shape) for path, leaf in _flat_shapes(system).items()}
    faults = [f"{path}: is missing" for path in wanted if path not in stored]
    faults += [f"{path}: is no parameter of this configuration" for path in stored if path not in wanted]
    faults += [
        f"{path}: is {shape}, should be {wanted[path]}"
        for path, shape in stored.items()
        if wanted.get(path, shape) != shape
    ]
    if faults:
        raise UserError(
            f"{directory} does not hold the model that its config.json describes:\n  " + "\n  ".join(faults)
        )


def _read_host(directory: Path, mesh: Mesh | None, dtype: str | None) -> Checkpoint:
    config_file = directory / "config.json"
    if config_file.is_file() and "system" in read_json(config_file):
        raise UserError(f"{directory} is incomplete: there is no {directory / 'params'}; copy or export it again")
    if recognise(directory).family.name != "qwen2_5_vl":
        raise UserError(f"{directory} is no Qwen2.5-VL, the host of TraceVision")
    vocabulary = load_vocabulary(directory)
    host, host_params = load_host(directory, first_device if mesh is None else _placement(mesh), dtype)
    processors = [directory / name for name in ("preprocessor_config.json", "video_preprocessor_config.json")]
    image, video = (read_json(file) if file.is_file() else {} for file in processors)
    try:
        config = tracevision_config(host, vocabulary.first_added, processor={"vision": config_from_json(image, video)})
    except ValueError as error:
        raise UserError(f"the tokenizer in {directory} does not fit the model: {error}") from error
    system = TraceVision(config)
    params = _complete(system, host_params, mesh)
    drawn = ("the TVP", "the trajectory and [SEG] tokens", "the pixel decoder")
    return Checkpoint(system, params, vocabulary, mesh, drawn)


def _complete(system: TraceVision, host_params: Any, mesh: Mesh | None) -> Any:
    """All parameters of a system whose host's are given, the others drawn."""
    given = {f"host/{path}": leaf for path, leaf in traverse_util.flatten_dict(host_params, sep="/").items()}
    missing = [path for path in _flat_shapes(system) if path not in given]

    def draw(key: jax.Array, given: dict[str, Any]) -> dict[str, Any]:
        leaves = traverse_util.flatten_dict(system.init(key), sep="/") | given
        settled = system.settle(traverse_util.unflatten_dict(leaves, sep="/"))
        return {path: leaf for path, leaf in traverse_util.flatten_dict(settled, sep="/").items() if path in missing}

    places = None
    if mesh is not None:
        place, shapes = _placement(mesh), _flat_shapes(system)
        places = {path: place(path, shapes[path].shape) for path in missing}
    drawn = jax.jit(draw, out_shardings=places)(jax.random.key(0), given)
    return traverse_util.unflatten_dict(given | drawn, sep="/")


def _placement(mesh: Mesh) -> Place:
    """Where each parameter goes on a mesh; raises UserError for one that cannot be cut so."""

    def place(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        tree = traverse_util.unflatten_dict({path: jax.ShapeDtypeStruct(shape, jnp.float32)}, sep="/")
        return jax.tree.leaves(parameter_shardings(tree, mesh, PARAMETERS))[0]

    return place


def _flat_shapes(system: TraceVision) -> dict[str, Any]:
    return dict(traverse_util.flatten_dict(jax.eval_shape(system.init, jax.random.key(0)), sep="/"))


def _with_precision(config: TraceVisionConfig, dtype: str | None) -> TraceVisionConfig:
    return config if dtype is None else dataclasses.replace(config, host=config.host.with_precision(dtype, dtype))
