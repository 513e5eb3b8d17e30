"""Run in a process of eight virtual devices: one step of a system on one device and on meshes of eight.

Prints one JSON line: for every mesh the loss, the gradient's relative distance (Frobenius) to one device's,
and the share of the parameters that a device holds; or why the parameters do not fit the mesh.
"""

import json
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from tests.training.tiny import Deterministic, random_batch
from tracevision_jax.errors import UserError
from tracevision_jax.layers.lora import LoRAConfig
from tracevision_jax.parallel.mesh import MeshConfig, batch_sharding, make_mesh
from tracevision_jax.systems.adapted import Adapted
from tracevision_jax.training.layout import stage_layout
from tracevision_jax.training.optimizer import OptimizerConfig, learning_rate_schedule
from tracevision_jax.training.recipe import TrainRecipe
from tracevision_jax.training.step import create_state, make_train_step

SCHEDULE = learning_rate_schedule(OptimizerConfig(), 10)


class Step(NamedTuple):
    """A step that was taken."""

    loss: float
    gradient: Any
    """The momentum after one step."""
    share: float
    """Of the parameters, that a device holds."""
    program: str
    """As it was compiled."""


def one_step(system, params, stage, batch, mesh, accumulation=1, frozen_whole=()):
    """Compile and take one step of a stage on a mesh."""
    recipe = TrainRecipe("step", stage=stage, frozen_whole=frozen_whole)
    optimizer = optax.sgd(SCHEDULE, momentum=0.9)  # less to compile than Adam, which is compiled for every mesh anew
    layout = stage_layout(system, recipe, optimizer, params, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, (layout.state, layout.frozen))
    state, frozen = jax.device_put(create_state(system, params, optimizer, stage, seed=0), places)
    step = make_train_step(
        system,
        optimizer,
        SCHEDULE,
        accumulation=accumulation,
        mesh=mesh,
        state_shardings=places[0],
    )
    with jax.set_mesh(mesh):
        given = (state, frozen, jax.device_put(batch, batch_sharding(mesh)))
        compiled = step.lower(*given).compile()
        state, metrics = compiled(*given)
    moment = optax.tree.get(state.optimizer, "trace")
    leaves = jax.tree.leaves((state.trained, frozen))
    here = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
    share = here / sum(leaf.size for leaf in leaves)
    return Step(float(metrics["loss"]), jax.device_get(moment), share, compiled.as_text() or "")


def distance(ours, theirs):
    """Relative Frobenius distance of two trees."""
    a, b = (np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (ours, theirs))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def subject(name: str):
    """(system, its parameters in the memory of the host, stage, batch)."""
    if name == "sam2":
        from tests.systems.tiny_sam2 import clip_batch, drawn, sam2_of_two_heads

        system = sam2_of_two_heads()
        return system, drawn(system), "all", clip_batch(rows=8)
    if name == "tiny":
        system, stage, batch = Deterministic(), "all", random_batch(16)
    else:
        from tests.parallel.small_tracevision import small_batch, small_system

        system, stage, batch = small_system(), "stage1_5", small_batch(8)
        if name == "adapters":
            system = Adapted(system, LoRAConfig(rank=2, targets=(r"(language/layers|vision/groups|tvp)/.*kernel$",)))
    params = jax.device_get(jax.jit(system.init)(jax.random.key(0)))
    rng = np.random.default_rng(0)

    def heard(path, leaf):
        """B of an adapter starts at 0, and A has no gradient then."""
        return 0.1 * rng.normal(size=leaf.shape).astype(leaf.dtype) if path[-1].key == "lora_b" else leaf

    return system, jax.tree_util.tree_map_with_path(heard, params), stage, batch


def main(name: str, meshes: list[dict[str, int]]) -> None:
    """Compare the meshes with one device."""
    given = subject(name)
    with jax.default_matmul_precision("highest"):
        alone = one_step(*given, make_mesh(MeshConfig(), jax.devices()[:1]))
        found = {}
        for sizes in meshes:
            accumulation = sizes.pop("accumulation", 1)
            mesh = make_mesh(MeshConfig(**sizes))
            try:
                taken = one_step(*given, mesh, accumulation)
            except UserError as error:
                found[json.dumps(sizes)] = {"refused": str(error)}
                continue
            found[json.dumps(sizes)] = {
                "loss": taken.loss,
                "gradient": distance(taken.gradient, alone.gradient),
                "share": taken.share,
            }
    print(json.dumps({"loss": alone.loss, "meshes": found}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
