"""Run by test_engine.py in a process of its own: answer on four virtual devices, print JSON."""

import json

import jax

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)

from tests.inference import tiny
from tests.inference.tiny import ROOMY, forced_masks
from tracevision_jax.inference.engine import Engine
from tracevision_jax.parallel.mesh import MeshConfig, make_mesh
from tracevision_jax.parallel.rules import PARAMETERS, shard_params


def answers() -> dict:
    """Rows over data and fsdp, parameters cut over fsdp and tensor."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, tensor=2))
    params = shard_params(tiny.params(), mesh, PARAMETERS)
    engine = Engine(tiny.system().config, params, tiny.vocabulary(), mesh=mesh, buckets=[ROOMY])
    pieces = tiny.unlike_pieces()
    (plan,) = engine.plan(pieces, rows=4)[:1]
    batch = engine._placed([pieces[number] for number in plan.numbers], plan)
    made = engine.generate(pieces, max_new_tokens=24, force=forced_masks(), rows=8)
    return {
        "rows_on_a_device": batch.tokens.addressable_shards[0].data.shape[0],
        "tokens": [list(answer.tokens) for answer in made],
        "mask_sums": [[float(mask.sum()) for mask in answer.mask_logits] for answer in made],
    }


if __name__ == "__main__":
    print(json.dumps(answers()))
