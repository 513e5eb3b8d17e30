"""Held-out batches through a model that trains on a mesh, over the devices of one process or of many.

    sums = on_mesh(jax.jit(program), params, batch)        # on the host of every process

Every process has the whole batch and calls with the same one; each device computes its rows.
"""

from collections.abc import Callable
from typing import Any

import jax

from tracevision_jax.layers.sharding import activation_sharding, gathered, mesh_of
from tracevision_jax.parallel.mesh import batch_sharding
from tracevision_jax.parallel.rules import ACTIVATIONS


def on_mesh(program: Callable[..., Any], params: Any, batch: Any, *static: Any) -> Any:
    """What `program(params, batch, *static)` gives, as host arrays, its rows and activations laid out as in training.

    Args:
        program: jitted; traced here for the first time, so that its activations follow the mesh.
        params: arrays as they are trained; where they lie on one device, so does everything.
        batch: host arrays whose leading axis, rows, divides over the mesh's `data` and `fsdp`.
        static: further arguments as they are.
    """
    mesh = mesh_of(params)
    if mesh is None:
        return gathered(program(params, batch, *static))
    with activation_sharding(mesh, ACTIVATIONS):
        return gathered(program(params, jax.device_put(batch, batch_sharding(mesh)), *static))
