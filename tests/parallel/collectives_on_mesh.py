"""Run in a process of as many virtual devices as a given mesh has: collectives and FLOPs of a TraceVision step.

Prints one JSON line: {"parameters": {path: [shape, axes]}, "collectives": [collective, ...], "executed": FLOPs of all
chips' compiled products, "counted": FLOPs that the step has, what is computed again among them}.
"""

import dataclasses
import json
import sys

import jax

from tests.parallel.small_tracevision import small_system
from tracevision_jax.parallel.ahead_of_time import costs
from tracevision_jax.parallel.hlo import parse
from tracevision_jax.parallel.mesh import MeshConfig, make_mesh
from tracevision_jax.parallel.rules import PARAMETERS, spec_of
from tracevision_jax.records.batch import Bucket
from tracevision_jax.training.ahead_of_time import training_program
from tracevision_jax.training.parameters import flatten
from tracevision_jax.training.recipe import TrainRecipe

BUCKET = Bucket(tokens=48, frames=2, windows=3, conversations=2, points=4, masks=3)
ROWS = 8


def main(sizes: dict[str, int]) -> None:
    """Compile everything trained, blocks rematerialised as at production size."""
    system = small_system()
    host = system.config.host.with_precision("float32", "float32", "full")
    system = dataclasses.replace(system, config=dataclasses.replace(system.config, host=host))
    recipe = TrainRecipe("small", stage="stage1_5", buckets=(BUCKET,))
    shapes = flatten(jax.eval_shape(system.init, jax.random.key(0)))
    parameters = {
        path: (leaf.shape, tuple(spec_of(path, leaf.shape, PARAMETERS) or ())) for path, leaf in shapes.items()
    }
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
    program = training_program(system, recipe, BUCKET, ROWS, mesh)
    found = costs(parse(program.lower().compile().as_text()), mesh)
    outcome = {
        "parameters": parameters,
        "collectives": [dataclasses.asdict(use) for use in found.uses],
        "executed": found.flops * mesh.size,
        "counted": program.flops.model_full_square + program.flops.recomputed,
    }
    print(json.dumps(outcome))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
