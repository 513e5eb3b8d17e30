"""A program for `test_layout.py`, on four virtual devices: a frozen tower cut over fsdp, and whole along it.

python -m tests.training.frozen_whole step          # the step of a small TraceVision, both ways
python -m tests.training.frozen_whole FOLDER        # a run that is continued with the other layout, both ways

Prints one JSON line.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from tests.parallel.mesh_step import distance, one_step
from tests.parallel.small_tracevision import small_batch, small_system
from tests.training.remesh import Interrupted
from tests.training.train_tiny import Counting, Records, collate, make_plan, make_recipe, make_row, saved_state
from tracevision_jax.parallel.ahead_of_time import costs
from tracevision_jax.parallel.hlo import parse
from tracevision_jax.parallel.mesh import MeshConfig, make_mesh
from tracevision_jax.training.loop import fit
from tracevision_jax.training.parameters import flatten
from tracevision_jax.training.recipe import EvaluationConfig

MESH = MeshConfig(data=1, fsdp=2, tensor=2)
ROWS, STEPS, STOP = 8, 8, 3
TOWER, LAYERS = ("vision/",), ("language/layers/",)
"""What stays whole: of TraceVision, and of the tiny system."""


def step() -> dict:
    """Loss, distance of the gradients, share of a device, and what is gathered over fsdp."""
    system, mesh = small_system(), make_mesh(MESH)
    params = jax.device_get(jax.jit(system.init)(jax.random.key(0)))
    given = (system, params, "stage1", small_batch(ROWS), mesh)
    with jax.default_matmul_precision("highest"):
        cut, whole = (one_step(*given, frozen_whole=patterns) for patterns in ((), TOWER))
    return {
        "losses": (cut.loss, whole.loss),
        "gradient": distance(whole.gradient, cut.gradient),
        "shares": (cut.share, whole.share),
        "gathered": [gathered(taken.program, mesh) for taken in (cut, whole)],
    }


def gathered(program: str, mesh) -> list[str]:
    """Where a compiled step gathers over fsdp."""
    uses = costs(parse(program), mesh).uses
    return [use.origin for use in uses if use.kind == "all-gather" and "fsdp" in use.axes]


def moved(folder: Path) -> dict:
    """Runs of the tiny system that go on with the other layout, and one that keeps its own."""
    found = {"stops": {}, "places": {}, "parameters": {}}
    for name, first, second in (("still", (), ()), ("to_whole", (), LAYERS), ("to_cut", LAYERS, ())):
        stops, found["places"][name] = zip(
            *(train(folder / name, *part) for part in ((first, STOP), (second, None))), strict=True
        )
        found["stops"][name] = stops
        trained = flatten(saved_state(folder / name)["state"]["trained"])
        found["parameters"][name] = np.concatenate([leaf.ravel() for leaf in trained.values()]).tolist()
    return found


def train(folder: Path, whole: tuple[str, ...], at: int | None) -> tuple[int, str]:
    """Train, or continue, to Ctrl-C at a step or to the end: (last step, mesh axes of a frozen kernel till then)."""
    pipeline = Interrupted(make_plan(ROWS), [Records()], make_row, collate, STEPS)
    pipeline.at = at
    recipe = make_recipe(ROWS, stage="head", mesh=MESH, frozen_whole=whole, evaluation=EvaluationConfig(every=1))
    places: set[str] = set()

    def look(params, step):
        spec = params["language"]["layers"]["mlp"]["up"]["kernel"].sharding.spec
        places.add(" ".join(axis or "-" for axis in spec))
        return {}

    summary = fit(Counting(), recipe, pipeline, folder, evaluators={"places": look})
    return summary.step, " then ".join(places)


if __name__ == "__main__":
    print(json.dumps(step() if sys.argv[1] == "step" else moved(Path(sys.argv[1]))))
