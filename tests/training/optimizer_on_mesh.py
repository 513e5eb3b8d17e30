"""Run in a process of four virtual devices: three updates of an optimizer on a mesh of 2 x 2 and on one device.

Prints one JSON line: by optimizer the relative distance (Frobenius) of parameters and state, the kinds of collectives
of the compiled update, the elements of the largest, and the share of the state that a device holds.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from tests.training.tiny import TinySystem
from tracevision_jax.parallel.ahead_of_time import costs
from tracevision_jax.parallel.hlo import parse
from tracevision_jax.parallel.mesh import MeshConfig, make_mesh
from tracevision_jax.parallel.rules import PARAMETERS, parameter_shardings
from tracevision_jax.training.optimizer import OptimizerConfig, make_optimizer
from tracevision_jax.training.parameters import flatten, unflatten
from tracevision_jax.training.step import create_state, state_shardings

SHAPES = {
    "host/language/embed/embedding": (64, 32),
    "host/language/layers/attn/q/kernel": (2, 32, 4, 8),
    "host/language/layers/attn/o/kernel": (2, 4, 8, 32),
    "host/language/layers/attn/q/bias": (2, 4, 8),
    "host/language/layers/attn_norm/scale": (2, 32),
    "host/language/layers/mlp/up/kernel": (2, 32, 64),
    "host/vision/groups/window/attn/qkv/kernel": (2, 2, 32, 3, 4, 8),
}
"""One parameter of each kind, stacked and not, square and not."""
CONFIGS = {
    "bfloat16": OptimizerConfig(moments="bfloat16", clip_norm=0.0, warmup=0.0),
    "adafactor": OptimizerConfig(method="adafactor", clip_norm=0.0, warmup=0.0),
}


def drawn(seed):
    """A tree of normal numbers."""
    rng = np.random.default_rng(seed)
    return unflatten({path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()})


def updated(config, mesh):
    """(parameters, optimizer's state) after three updates, and the compiled update."""
    optimizer = make_optimizer(config, 10)
    params = drawn(0)
    state, _ = create_state(TinySystem(), params, optimizer, "all", seed=0)
    places = parameter_shardings(params, mesh, PARAMETERS)
    layout = state_shardings(state, places, mesh).optimizer

    def update(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return jax.tree.map(jnp.add, params, updates), state

    params, kept, gradient = jax.device_put((params, state.optimizer, drawn(1)), (places, layout, places))
    compiled = jax.jit(update, out_shardings=(places, layout)).lower(params, kept, gradient).compile()
    for seed in range(1, 4):
        params, kept = compiled(params, kept, jax.device_put(drawn(seed), places))
    return params, kept, compiled


def distance(ours, theirs):
    """Relative Frobenius distance of two trees."""
    a, b = (
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (ours, theirs)
    )
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def main() -> None:
    """Compare both optimizers."""
    found = {}
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    for name, config in CONFIGS.items():
        params, state, compiled = updated(config, mesh)
        alone, alone_state, _ = updated(config, make_mesh(MeshConfig(), jax.devices()[:1]))
        uses = costs(parse(compiled.as_text()), mesh).uses
        held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
        found[name] = {
            "error": distance(params, alone),
            "state_error": distance(state, alone_state),
            "collectives": sorted({use.kind for use in uses}),
            "largest_collective": max((use.sent_bytes // use.times // 4 for use in uses), default=0),
            "largest_parameter": max(leaf.size for leaf in flatten(params).values()),
            "share": held / sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
