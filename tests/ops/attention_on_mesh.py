"""Run in a process of four virtual devices: attention whose queries are cut, against the reference on one device.

Prints one JSON line: for splash (interpreted), cuDNN's call (through jax's own fallback) and XLA the largest
differences of results and of the gradients of q, k and v; what is chosen for a TPU, and what its kernel takes.
"""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh

from tests.ops.test_attention import draw
from tracevision_jax.ops.attention import attention, attention_mesh, choose
from tracevision_jax.ops.attention_call import AttentionCall, attend_xla
from tracevision_jax.ops.attention_kernels import attend_cudnn, attend_reference, attend_splash
from tracevision_jax.ops.placement import Placement

LENGTH = 256
AXES: dict[str, Any] = {"batch_axes": ("data",), "head_axes": ("tensor",), "token_axes": ("context",)}


def segments() -> jax.Array:
    """Packed rows, the second conversation lying on both shards, and padding."""
    return jnp.asarray(np.repeat([[1, 2, 0]], [50, 160, 46], axis=1))


def result_and_gradients(run, q, k, v, target, causal):
    """[result, dq, dk, dv]."""

    def loss(q, k, v):
        ids = segments()
        mixed = run(AttentionCall(q, k, v, 0.25, q_segments=ids, kv_segments=ids, causal=causal))
        return (mixed * target).sum(), mixed

    gradients, mixed = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x, np.float32) for x in (mixed, *gradients)]


def differences(run, arrays, causal):
    """Largest absolute differences from the reference."""
    return [
        float(np.abs(ours - theirs).max())
        for ours, theirs in zip(
            result_and_gradients(run, *arrays, causal=causal),
            result_and_gradients(attend_xla, *arrays, causal=causal),
            strict=True,
        )
    ]


def cudnn_by_fallback(call, placement):
    """cuDNN needs a GPU; jax's own code behind the same function takes the same arguments."""
    through = jax.nn.dot_product_attention
    jax.nn.dot_product_attention = lambda *given, implementation, **options: through(
        *given, implementation="xla", **options
    )
    try:
        return attend_cudnn(call, placement)
    finally:
        jax.nn.dot_product_attention = through


def main() -> None:
    """Print all of it."""
    rng = np.random.default_rng(0)
    arrays = draw(rng, batch=1, queries=LENGTH, keys=LENGTH, heads=4, kv_heads=2, head_dim=16)
    arrays.append(jnp.asarray(rng.standard_normal(arrays[0].shape), jnp.float32))
    mesh = jax.make_mesh((1, 2, 2), ("data", "tensor", "context"), axis_types=(AxisType.Auto,) * 3)
    pair = Mesh(np.array(jax.devices()[:2]).reshape(1, 1, 2), ("data", "tensor", "context"))
    found: dict[str, Any] = {}
    on_pair, on_mesh = Placement(pair, platform="tpu", **AXES), Placement(mesh, platform="cpu", **AXES)
    for causal in (False, True):
        with pltpu.force_tpu_interpret_mode():
            found[f"splash {causal}"] = differences(lambda call: attend_splash(call, on_pair), arrays, causal)
        found[f"cudnn {causal}"] = differences(lambda call: cudnn_by_fallback(call, on_mesh), arrays, causal)
        found[f"xla {causal}"] = differences(lambda call: attend_reference(call, on_mesh), arrays, causal)
    q, k, v = (x.astype(jnp.bfloat16) for x in arrays[:3])
    with attention_mesh(mesh, platform="tpu", **AXES):
        traced = jax.jit(lambda q, k, v: attention(q, k, v, causal=True, cut="tokens")).trace(q, k, v)
    lowered = traced.lower(lowering_platforms=("tpu",)).as_text()
    kernel = next(line for line in lowered.splitlines() if "tpu_custom_call" in line)
    found["kernel takes"] = re.findall(r"tensor<(\w+)xbf16>", kernel.split(" : (")[-1])[:3]
    found["chosen"] = choose(AttentionCall(q, k, v, 1.0), Placement(mesh, platform="tpu", **AXES)).name
    print(json.dumps(found))


if __name__ == "__main__":
    main()
