"""Run in a process of eight virtual devices: collectives of a sharded scan, and the outcome of a real training step.

Prints one JSON line.
"""

import json

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.training.tiny import BUCKET, TinySystem
from tracevision_jax.parallel.ahead_of_time import measure, shard_bytes
from tracevision_jax.parallel.collectives import collectives
from tracevision_jax.parallel.hlo import parse
from tracevision_jax.parallel.mesh import MeshConfig, make_mesh
from tracevision_jax.parallel.topologies import topology
from tracevision_jax.training.ahead_of_time import training_program
from tracevision_jax.training.recipe import TrainRecipe


def sharded_scan(mesh) -> list[dict]:
    """Five turns, each a sum over `tensor` of (16, 32) and a gather over `fsdp` of a row's (4, 32) to (8, 32)."""

    def local(x, weights):
        def turn(x, w):
            summed = jax.lax.psum(jnp.sin(x @ w), "tensor")
            whole = jax.lax.all_gather(summed[:4] * x[:4], "fsdp", tiled=True)
            return x + summed + whole.sum(), None

        return jax.lax.scan(turn, x, weights)[0]

    specs = (P("data", None), P(None, None, None))
    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P("data", None), check_vma=False))
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(((32, 32), (5, 32, 32)), specs, strict=True)
    ]
    found = collectives(parse(step.lower(*shapes).compile().as_text()), dict(mesh.shape))
    return [
        {"kind": use.kind, "axes": use.axes, "times": use.times, "whole": use.whole_bytes, "known": use.known}
        for use in found
    ]


def main() -> None:
    """Print both."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    recipe = TrainRecipe("tiny", stage="all", buckets=(BUCKET,))
    program = training_program(TinySystem(), recipe, BUCKET, 16, mesh)
    outcome = measure(program, topology("h100:1x8"), mesh)
    print(
        json.dumps(
            {
                "scan": sharded_scan(mesh),
                "outcome": outcome.to_json(),
                "held": {name: shard_bytes(tree) for name, tree in program.held.items()},
            }
        )
    )


if __name__ == "__main__":
    main()
