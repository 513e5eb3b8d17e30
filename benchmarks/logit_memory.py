"""Memory of the loss over a vocabulary of 152k, all logits at once and in chunks: `python -m benchmarks.logit_memory`.

The loss of one row of 8,192 tokens with its gradients (of hidden states, head and added tokens), the head that of
Qwen2.5-VL-7B in bfloat16. It is compiled and not run: temporaries are those that the compiler plans, for one v5p chip
where libtpu is installed (no TPU is needed), else for this machine's CPU.
"""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from tracevision_jax.parallel.topologies import open_devices, prepare_environment, topology

TOKENS = 8192
CHUNKS = (0, 4096, 2560, 1024, 256)
"""Tokens whose logits exist at one time; 0 for all."""
GIB = 2**30


def plan(chunk: int, device: Any) -> tuple[int, int]:
    """Bytes of (temporaries, results) of the loss and its gradients."""
    from configs.tracevision_7b import CONFIG
    from tracevision_jax.language.model import LanguageModel
    from tracevision_jax.ops.cross_entropy import token_cross_entropy

    config = CONFIG.host.language
    model = LanguageModel(config)
    place = SingleDeviceSharding(device)

    def of(kind: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, kind, sharding=place)

    kind = jnp.dtype(config.param_dtype)
    rows = of(kind, config.added_tokens, config.width)
    params = {
        "head": {"kernel": of(kind, config.width, config.vocab_size)},
        "added": {"embedding": rows, "head": rows},
    }

    def loss(params: Any, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        def logits_of(hidden: jax.Array) -> Any:
            return model.apply({"params": params}, hidden, method=LanguageModel.logit_parts)

        return token_cross_entropy(hidden, targets, weights, logits_of, chunk)[0]

    hidden = of(jnp.dtype(config.dtype), 1, TOKENS, config.width)
    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    compiled = step.lower(params, hidden, of(jnp.int32, 1, TOKENS), of(jnp.float32, 1, TOKENS)).compile()
    analysis: Any = compiled.memory_analysis()
    return analysis.temp_size_in_bytes, analysis.output_size_in_bytes


def main() -> None:
    """Print the table."""
    prepare_environment()
    there = importlib.util.find_spec("libtpu") is not None
    device = open_devices(topology("v5p:2x2x1"))[0] if there else jax.devices("cpu")[0]
    table = Table(title=f"{TOKENS} tokens, compiled for {device.device_kind}")
    for name in ("logits at one time", "temporaries, GiB", "results (gradients), GiB"):
        table.add_column(name, justify="right")
    for chunk in CHUNKS:
        temporaries, results = plan(chunk, device)
        table.add_row(f"{chunk or TOKENS} tokens", f"{temporaries / GIB:.2f}", f"{results / GIB:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
