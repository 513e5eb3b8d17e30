"""Memory of the loss over a vocabulary of 152k, all logits at once and in chunks: `python -m benchmarks.logit_memory`.

The loss of one row of 8,192 tokens with its gradients (of hidden states, head and added tokens), the vocabulary that of
Qwen2.5-VL-7B, in bfloat16. Two tables:

- Planned: the temporaries that the compiler plans at the 7B model's width, for one v5p chip where libtpu is installed
  (no TPU is needed), else for this machine's CPU.
- Executed: the same loss is run on this machine's CPU, each row in a process of its own, and the peak of the resident
  memory over what the process had before is read beside the plan. Logits do not depend on the width of the hidden
  states, so that a narrow one will do. What this machine has too little free memory for, such as 15 GiB for all logits,
  is not run, and the table says so.
"""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import SingleDeviceSharding
from rich.console import Console
from rich.table import Table

from benchmarks.resident_memory import available, peak_above
from tracevision_jax.language.config import LanguageConfig
from tracevision_jax.parallel.topologies import open_devices, prepare_environment, topology

TOKENS = 8192
NARROW = 128
"""Width of the hidden states of what is run."""
SPARE = 2**30
"""Bytes that a run may take over the plan; measured were up to 0.5 GiB."""
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Args:
    """Plan and run the loss over a large vocabulary."""

    chunks: tuple[int, ...] = (0, 4096, 2560, 1024, 256)
    """Tokens whose logits exist at one time; 0 for all."""
    execute: int | None = None
    """Only run this chunk in this process, and print what it took as JSON."""


def language(width: int | None = None) -> LanguageConfig:
    """The 7B model's, at another width of its hidden states."""
    from configs.tracevision_7b import CONFIG

    config = CONFIG.host.language
    return config if width is None else dataclasses.replace(config, width=width)


def compiled(config: LanguageConfig, tokens: int, chunk: int, device: Any) -> tuple[Any, tuple[Any, ...]]:
    """(the loss and its gradients, compiled for a device; its arguments as shapes)."""
    from tracevision_jax.language.model import LanguageModel
    from tracevision_jax.ops.cross_entropy import token_cross_entropy

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

    hidden = of(jnp.dtype(config.dtype), 1, tokens, config.width)
    given = params, hidden, of(jnp.int32, 1, tokens), of(jnp.float32, 1, tokens)
    return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*given).compile(), given


def plan(step: Any) -> tuple[int, int]:
    """Bytes of (temporaries, results) as the compiler plans them."""
    analysis: Any = step.memory_analysis()
    return analysis.temp_size_in_bytes, analysis.output_size_in_bytes


def executed(config: LanguageConfig, tokens: int, chunk: int) -> dict[str, int]:
    """Run the loss and its gradients once on the CPU.

    Returns:
        bytes: {"planned": temporaries and results, "peak": what the process grew by at most, 0 where too little memory
        was free to run it}.
    """
    step, shapes = compiled(config, tokens, chunk, jax.devices("cpu")[0])
    if sum(plan(step)) + SPARE > available():
        return {"planned": sum(plan(step)), "peak": 0}
    given = jax.block_until_ready(jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes))
    return {"planned": sum(plan(step)), "peak": peak_above(lambda: jax.block_until_ready(step(*given)))}


def main(args: Args) -> None:
    """Print both tables."""
    if args.execute is not None:
        print(json.dumps(executed(language(NARROW), TOKENS, args.execute)))
        return
    prepare_environment()
    there = importlib.util.find_spec("libtpu") is not None
    device = open_devices(topology("v5p:2x2x1"))[0] if there else jax.devices("cpu")[0]
    planned = [plan(compiled(language(), TOKENS, chunk, device)[0]) for chunk in args.chunks]
    _show(
        f"{TOKENS} tokens, planned for {device.device_kind}",
        ("temporaries, GiB", "results (gradients), GiB"),
        args.chunks,
        planned,
    )
    ran = []
    for chunk in args.chunks:
        command = [sys.executable, "-m", "benchmarks.logit_memory", "--execute", str(chunk)]
        outcome = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ran.append((outcome["planned"], outcome["peak"]))
    _show(
        f"{TOKENS} tokens, executed on this CPU, hidden states of {NARROW} channels",
        ("planned, GiB", "peak of the process, GiB"),
        args.chunks,
        ran,
    )


def _show(title: str, names: tuple[str, str], chunks: tuple[int, ...], sizes: list[tuple[int, int]]) -> None:
    table = Table(title=title)
    for name in ("logits at one time", *names):
        table.add_column(name, justify="right")
    for chunk, pair in zip(chunks, sizes, strict=True):
        table.add_row(f"{chunk or TOKENS} tokens", *(f"{size / GIB:.2f}" if size else "not run" for size in pair))
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Args))
