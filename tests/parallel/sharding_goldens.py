"""How every production recipe's parameters and optimizer lie on a mesh, as text: one file a recipe in `goldens/`.

python -m tests.parallel.sharding_goldens        # writes the files anew; read the diff before committing it
"""

import functools
import re
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from configs import registry
from tracevision_jax.parallel.mesh import AXES
from tracevision_jax.parallel.rules import ACTIVATIONS
from tracevision_jax.training.layout import stage_layout
from tracevision_jax.training.optimizer import make_optimizer
from tracevision_jax.training.parameters import flatten, merge

FOLDER = Path(__file__).with_name("goldens")
COMMAND = "python -m tests.parallel.sharding_goldens"
MESH = AbstractMesh((2, 32, 4, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES))
"""256 chips on which every axis that parameters know is split."""
SMALL = ("demo", "long")
"""Parts of the names of recipes that run on one device."""


def production_recipes() -> list[str]:
    """Names of the recipes that are made for many chips."""
    return [name for name in registry.names() if not any(part in name for part in SMALL)]


def _axes(spec: Any, ndim: int) -> str:
    entries = [*spec, *[None] * (ndim - len(spec))]
    named = ("+".join(entry) if isinstance(entry, tuple) else entry for entry in entries)
    return " ".join(axis or "-" for axis in named) or "-"


@functools.cache
def shapes_of(system: Any) -> Any:
    """Parameters of a system, which the stages of a size share."""
    return jax.eval_shape(system.init, jax.random.key(0))


def golden(name: str) -> str:
    """The text of a recipe: rules of activations, every parameter, and how the optimizer's state follows."""
    recipe = registry.get(name)
    system = registry.system(recipe.system).build(recipe)
    layout = stage_layout(system, recipe, make_optimizer(recipe.optimizer, 1), shapes_of(system), MESH)
    placed = flatten(merge(layout.state.trained, layout.frozen))

    trains = system.trainable(recipe.stage)
    rows = sorted(
        {
            (re.sub(r"\d+", "*", path), " x ".join(map(str, leaf.shape)) or "scalar",
             _axes(leaf.sharding.spec, leaf.ndim), "trained" if trains(path) else "frozen")
            for path, leaf in placed.items()
        }
    )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)) for row in rows]

    whole: dict[str, int] = {}
    cut = 0
    for path, leaf in jax.tree.leaves_with_path(layout.state.optimizer):
        if any(leaf.sharding.spec):
            cut += 1
        elif leaf.size > 1:
            kind = next((key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)), "other")
            whole[kind] = whole.get(kind, 0) + leaf.size
    kept = ", ".join(f"{kind} {size:,}" for kind, size in sorted(whole.items())) or "none"
    rules = ", ".join(f"{axis} -> {_axes((axes,), 1)}" for axis, axes in sorted(ACTIVATIONS.items()))
    return "\n".join(
        (
            f"# {name}: parameters (* is a number), shape, mesh axes of each dimension (- is whole).",
            f"# Written by: {COMMAND}",
            f"activations: {rules}",
            f"optimizer: {cut} arrays lie as their parameters; numbers that every chip keeps whole: {kept}",
            "",
            *lines,
            "",
        )
    )


def main() -> int:
    """Write all files, and remove those of recipes that are gone."""
    FOLDER.mkdir(exist_ok=True)
    names = production_recipes()
    for path in FOLDER.glob("*.txt"):
        if path.stem not in names:
            path.unlink()
    for name in names:
        (FOLDER / f"{name}.txt").write_text(golden(name), encoding="utf-8")
        print(FOLDER / f"{name}.txt")
    return 0


if __name__ == "__main__":
    sys.exit(main())
