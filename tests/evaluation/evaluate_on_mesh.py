"""What evaluators say of parameters that are cut over a mesh; as a program, over the devices of several processes.

    JAX_COORDINATOR_ADDRESS=... JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 python -m tests.evaluation.evaluate_on_mesh

prints a JSON line of all figures, as every process has them.
"""

import functools
import json
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from evaluation.held_out import HeldOutLoss, HeldOutPictures
from evaluation.video_tracking import HeldOutTracking
from tests.evaluation.test_held_out import BUCKET, rows
from tests.inference import tiny
from tests.systems.tiny_sam2 import clip_batch
from tracevision_jax.parallel.mesh import MeshConfig, make_mesh
from tracevision_jax.parallel.processes import connect
from tracevision_jax.parallel.rules import PARAMETERS, parameter_shardings
from tracevision_jax.records.collate import collate


def evaluated(mesh: Mesh) -> dict[str, Any]:
    """Figures of the loss, of pictures, and of tracking by something that sees only the parameters and the batch."""
    together = functools.partial(collate, config=tiny.system().config.processor)
    loss = HeldOutLoss(tiny.system(), rows, together, BUCKET, 4)
    prompts = [(tiny.sample(each), tiny.asked("a red circle ?", each, points=2), tiny.piece(each)) for each in (0, 1)]
    pictures = HeldOutPictures(tiny.system().config, tiny.vocabulary(), lambda: prompts, max_new_tokens=8)
    params = jax.device_put(tiny.params(), parameter_shardings(tiny.params(), mesh, PARAMETERS))
    largest = max(jax.tree.leaves(params), key=np.size)

    def follow(values, batch, forget=False):
        places = values.ravel()[: batch.masks.shape[-1]] > (0.5 if forget else -0.5)
        return batch.masks & places

    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        return {
            "loss": loss(params, 1),
            "pictures": {name: int(np.sum(picture, dtype=int)) for name, picture in pictures(params, 1).items()},
            "tracking": HeldOutTracking(follow, [clip_batch()])(largest, 1),
        }


if __name__ == "__main__":
    connect()
    print(json.dumps(evaluated(make_mesh(MeshConfig(data=2, fsdp=2))) | {"processes": jax.process_count()}))
