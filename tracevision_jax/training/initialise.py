"""Parameters at the start of a run: drawn, or read from a converted host or from the stage before.

A start is a model directory, the folder of a run that holds one as `model/`, or a host (converted, or Hugging Face's).
A stored parameter is used where its path equals one of the system's; a host's tree ({vision, language}) stands for the
system's `host/...`. Everything else is drawn, and the report says which came from where. Only
what is drawn is computed, and each array is made or read where the mesh wants it. A system whose drawn
parameters depend on others (an embedding at the norm of the host's) has a method `settle(params) -> params`,
whose result replaces what was drawn.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from tracevision_jax.errors import UserError
from tracevision_jax.systems.protocol import Params, System
from tracevision_jax.training.parameters import flatten, unflatten
from tracevision_jax.weights.model_directory import is_model, load_model, read_shapes

HOST = "host/"


@dataclass(frozen=True)
class Initialisation:
    """Parameters, and lines that say where they came from."""

    params: Params
    report: tuple[str, ...]


def initialise(system: System, seed: int, shardings: Params, directory: str | Path = "") -> Initialisation:
    """Make all parameters of a system.

    Args:
        system: what to make parameters of.
        seed: for what is drawn.
        shardings: tree of the parameters' shardings.
        directory: what to start from; empty draws everything.

    Raises:
        UserError: the directory fits no parameter, or fits some with other shapes (all are listed).
    """
    shapes = flatten(jax.eval_shape(system.init, jax.random.key(seed)))
    places = flatten(shardings)
    start = find_start(directory) if directory else None
    given = match(shapes, read_shapes(start), str(directory)) if start else {}
    drawn = [path for path in shapes if path not in given]

    def draw(key: jax.Array) -> dict[str, jax.Array]:
        leaves = flatten(system.init(key))
        return {path: leaves[path] for path in drawn}

    leaves = {}
    if drawn:
        place = {path: places[path] for path in drawn}
        leaves = dict(jax.jit(draw, out_shardings=place)(jax.random.key(seed)))
    if start:
        ours = {theirs: path for path, theirs in given.items()}
        _, read = load_model(start, lambda path, _: places[ours[path]], given.values())
        for theirs, leaf in flatten(read).items():
            path = ours[theirs]
            leaves[path] = leaf.astype(shapes[path].dtype)
    params = unflatten({path: leaves[path] for path in shapes})
    settle = getattr(system, "settle", None)
    if settle is not None and given and drawn:
        place = {path: places[path] for path in drawn}
        settled = jax.jit(
            lambda params: {path: leaf for path, leaf in flatten(settle(params)).items() if path in place},
            out_shardings=place,
        )(params)
        params = unflatten({path: leaves[path] for path in shapes} | settled)
    return Initialisation(params, describe(list(shapes), set(given), str(directory)))


def find_start(directory: str | Path) -> Path:
    """The folder that holds the parameters; UserError when a run has not exported its model yet."""
    directory = Path(directory)
    if is_model(directory / "model"):
        return directory / "model"
    if (directory / "checkpoints").is_dir():
        raise UserError(f"{directory} is a run that has not exported its model yet: let it end first.")
    return directory


def match(shapes: dict[str, Any], stored: dict[str, Any], directory: str) -> dict[str, str]:
    """{our path: stored path} of the parameters that a checkpoint gives.

    Raises:
        UserError: see `initialise`.
    """
    given = {}
    for path in shapes:
        for name in (path, path.removeprefix(HOST)):
            if name in stored:
                given[path] = name
                break
    if not given:
        raise UserError(
            f"{directory} holds none of this system's parameters: it has {_examples(stored)}, wanted are "
            f"{_examples(shapes)}."
        )
    wrong = [
        f"{path}: {tuple(stored[name].shape)} in the checkpoint, {tuple(shapes[path].shape)} in the system"
        for path, name in given.items()
        if stored[name].shape != shapes[path].shape
    ]
    if wrong:
        raise UserError(f"{directory} is of another size than the recipe's model:\n  " + "\n  ".join(wrong))
    return given


def describe(paths: list[str], given: set[str], directory: str) -> tuple[str, ...]:
    """One line for each group of parameters: how many arrays were read, how many drawn."""
    read: Counter[str] = Counter()
    drawn: Counter[str] = Counter()
    for path in paths:
        parts = path.split("/")
        group = "/".join(parts[: 2 if f"{parts[0]}/" == HOST else 1])
        (read if path in given else drawn)[group] += 1
    lines = []
    for group in dict.fromkeys([*read, *drawn]):
        origin = [f"{read[group]} arrays from {directory}"] if read[group] else []
        origin += [f"{drawn[group]} arrays drawn"] if drawn[group] else []
        lines.append(f"{group}: {', '.join(origin)}")
    return tuple(lines)


def _examples(paths: dict[str, Any]) -> str:
    return ", ".join(sorted(paths)[:3]) + (", ..." if len(paths) > 3 else "")
