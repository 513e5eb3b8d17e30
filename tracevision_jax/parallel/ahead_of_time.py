"""Compiling a step for chips that are not here, and what the compiled program says: memory, FLOPs, traffic, time.

A `Program` is a real jitted step with the shapes and layouts of its arguments; `training/ahead_of_time.py` makes those
of a recipe and `inference/ahead_of_time.py` those that answer. `measure(program, topology, mesh)` compiles it and
returns an `Outcome`, all numbers a chip's unless they say otherwise.
"""

import contextlib
import dataclasses
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.sharding import Mesh

from tracevision_jax.ops.attention_kernels import SPLASH_BLOCK_LIMIT
from tracevision_jax.parallel.collectives import Collective, by_axes, collectives
from tracevision_jax.parallel.flops import Flops
from tracevision_jax.parallel.hlo import Module, Step, executed, hbm_bytes, parse, product_flops
from tracevision_jax.parallel.roofline import Roofline, roofline
from tracevision_jax.parallel.topologies import Topology, axis_bandwidth, inside_a_slice

KERNELS: tuple[tuple[str, int], ...] = (
    ("splash_mha_fwd", 2),
    ("splash_mha_dkv", 4),
    ("splash_mha_dq", 3),
    ("fmhaSoftmaxBackward", 5),
    ("fmhaScaleBiasSoftmaxBackward", 5),
    ("fmha", 2),
)
"""Attention kernels by what their names hold, and how many products of queries x keys x channels each computes; those
of the backward passes compute the scores again."""
KERNEL_TARGETS = re.compile(r'custom_call_target="(tpu_custom_call|__cudnn\$fmha[^"]*)"')
_SCORES = re.compile(r'"intermediate_tensor_shape":[^\]]*"dimensions":\s*\[([^\]]*)\]')
"""Of cuDNN's attention: rows, heads, queries, keys."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A step to compile."""

    name: str
    lower: Callable[[], Any]
    """Trace and lower it: `jax.stages.Lowered`."""
    held: Mapping[str, Any]
    """{"parameters", "optimizer", ...: tree of `jax.ShapeDtypeStruct` with shardings} that its arguments hold."""
    flops: Flops
    """Of all chips together."""
    tokens: int
    """Places for tokens that the step goes through, padding included."""
    rows: int
    kept: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Estimated bytes a chip of known temporaries: {"gradients", "activations"}."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a compiled program needs and takes; a chip's share unless said otherwise."""

    program: str
    topology: str
    chips: int
    mesh: Mapping[str, int]
    rows: int
    tokens: int
    fits: bool
    reason: str
    """Why it does not fit; empty when it does."""
    hbm: Mapping[str, int]
    """Bytes: what the arguments hold by name, then "gradients", "activations", "temporaries", "total", "capacity"."""
    model_flops: float
    """All chips, causal attention halved."""
    model_flops_full_square: float
    recomputed_flops: float
    """All chips, as traced (full square)."""
    parts: Mapping[str, float]
    executed_flops: float = 0.0
    kernel_flops: float = 0.0
    """Of `executed_flops`: those in attention kernels."""
    hbm_traffic: float = 0.0
    collectives: tuple[Mapping[str, Any], ...] = ()
    kernels: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """{kernel: how often a step runs it}."""
    uncounted: tuple[str, ...] = ()
    """Kernels whose products are not known, so that `executed_flops` lacks them."""
    roofline: Roofline | None = None
    compile_seconds: float = 0.0

    @property
    def intensity(self) -> float:
        """FLOPs for each byte of HBM traffic."""
        return self.executed_flops / self.hbm_traffic if self.hbm_traffic else 0.0

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        content: dict[str, Any] = dataclasses.asdict(self) | {"intensity": self.intensity}
        if self.roofline is not None:
            for name in ("overlapped", "not_overlapped", "mfu_overlapped", "mfu_not_overlapped", "bound"):
                content["roofline"][name] = getattr(self.roofline, name)
        return content


def shard_bytes(tree: Any) -> int:
    """Bytes that one chip holds of a tree of `jax.ShapeDtypeStruct` with shardings."""

    def of_leaf(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * np.dtype(leaf.dtype).itemsize

    return sum(map(of_leaf, jax.tree.leaves(tree)))


def kept_for_backward(loss: Callable[[Any, Any], Any], trained: Any, given: Any) -> int:
    """Bytes over all chips that the forward pass of a loss leaves for its backward pass, inputs not counted."""

    def residuals(trained: Any, given: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda values: loss(values, given), trained)[1])

    jaxpr = jax.make_jaxpr(residuals)(trained, given).jaxpr
    inputs = set(jaxpr.invars)
    left = {v for v in jaxpr.outvars if not isinstance(v, core.Literal) and v not in inputs}
    return sum(
        math.prod(v.aval.shape) * np.dtype(v.aval.dtype).itemsize for v in left if v.aval.dtype != jax.dtypes.float0
    )


def measure(program: Program, topology: Topology, mesh: Mesh) -> Outcome:
    """Compile a program for the topology that the mesh lies on, and read what it needs.

    A program that does not fit is an outcome as well, with the compiler's reason; other failures are raised.
    """
    began = time.perf_counter()
    held = {name: shard_bytes(tree) for name, tree in program.held.items()}
    base: dict[str, Any] = {
        "program": program.name,
        "topology": str(topology),
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "rows": program.rows,
        "tokens": program.tokens,
        "model_flops": program.flops.model,
        "model_flops_full_square": program.flops.model_full_square,
        "recomputed_flops": program.flops.recomputed,
        "parts": dict(program.flops.parts),
    }
    capacity = topology.chip.hbm_bytes
    try:
        with _not_kept():
            compiled = program.lower().compile(compiler_options=dict(topology.chip.compiler_options))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        hbm = held | {"total": _asked_bytes(str(error)), "capacity": capacity}
        seconds = time.perf_counter() - began
        return Outcome(**base, fits=False, reason=_first_line(str(error)), hbm=hbm, compile_seconds=seconds)
    hbm = memory(compiled.memory_analysis(), held, program.kept) | {"capacity": capacity}
    fits = hbm["total"] <= capacity
    module = parse(compiled.as_text())
    found = costs(module, mesh)
    times = roofline(
        program.flops.model / mesh.size,
        found.flops + found.kernel_flops,
        found.traffic,
        {"+".join(axes): sum(use.sent_bytes for use in uses) for axes, uses in by_axes(found.uses).items()},
        peak_flops=topology.chip.flops,
        hbm_bandwidth=topology.chip.hbm_bandwidth,
        link_bandwidths={"+".join(axes): axis_bandwidth(topology, mesh.devices, axes) for axes in by_axes(found.uses)},
    )
    return Outcome(
        **base,
        fits=fits,
        reason="" if fits else f"needs {hbm['total'] / 2**30:.1f} GiB of {capacity / 2**30:.1f} GiB a chip",
        hbm=hbm,
        executed_flops=found.flops + found.kernel_flops,
        kernel_flops=found.kernel_flops,
        hbm_traffic=found.traffic,
        collectives=tuple(summary(found.uses)),
        kernels=found.kernels,
        uncounted=tuple(found.uncounted),
        roofline=times,
        compile_seconds=time.perf_counter() - began,
    )


@contextlib.contextmanager
def _not_kept() -> Iterator[None]:
    """Without writing to jax's cache of compiled programs: it cannot read back those of chips that are not here."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


@dataclasses.dataclass(frozen=True)
class Costs:
    """What one run of a compiled program costs one chip."""

    flops: float
    kernel_flops: float
    traffic: float
    uses: list[Collective]
    kernels: dict[str, int]
    uncounted: list[str]


def costs(module: Module, mesh: Mesh) -> Costs:
    """Add up a program's text."""
    flops = kernel_flops = traffic = 0.0
    kernels: dict[str, int] = {}
    uncounted: list[str] = []
    for step in executed(module):
        flops += step.times * product_flops(step.instruction, step.computation)
        traffic += step.times * hbm_bytes(step, module)
        if target := KERNEL_TARGETS.search(step.instruction.attributes):
            name = kernel_name(step) or step.instruction.origin or target.group(1)
            kernels[name] = kernels.get(name, 0) + step.times
            found = kernel_products(step)
            kernel_flops += step.times * (found or 0.0)
            if found is None and name not in uncounted:
                uncounted.append(name)
    return Costs(flops, kernel_flops, traffic, collectives(module, inside_a_slice(mesh.devices)), kernels, uncounted)


def kernel_name(step: Step) -> str | None:
    """Which of `KERNELS` a custom call is, or None."""
    texts = step.instruction.name, step.instruction.attributes
    return next((name for text in texts for name, _ in KERNELS if name in text), None)


def kernel_products(step: Step) -> float | None:
    """FLOPs of one run of an attention kernel, channels padded as it has them; None for an unknown one.

    Causal attention, that of language models, leaves the blocks above the diagonal out; cuDNN does so only where it is
    told, and not where packed rows go in as a mask. Where queries are cut, it is the chip with the last of them that
    counts: it has the most to see, and the others wait for it.
    """
    name = kernel_name(step)
    if name is None:
        return None
    operands = [step.computation.instructions[operand] for operand in step.instruction.operands]
    if scores := _SCORES.search(step.instruction.attributes):
        pairs = math.prod(map(int, re.findall(r"\d+", scores.group(1)))) * operands[0].shapes[0].dims[-1]
        causal = re.search(r'"mask_type":\s*"CAUSAL"', step.instruction.attributes)
        return dict(KERNELS)[name] * 2.0 * pairs * (0.5 if causal else 1.0)
    shapes = [shape for operand in operands for shape in operand.shapes]
    arrays = [shape.dims for shape in shapes if len(shape.dims) >= 3 and re.match("b?f", shape.kind)]
    if not arrays:
        return None
    queries, keys = arrays[0], arrays[min(1, len(arrays) - 1)]
    length = max(keys[-2], keys[-3])
    blocks = max(length // SPLASH_BLOCK_LIMIT, 1)
    cut = blocks * max(queries[-2], queries[-3]) / length
    share = (2 * blocks - cut + 1) / (2 * blocks) if "language" in step.instruction.origin else 1.0
    return dict(KERNELS)[name] * 2.0 * math.prod(queries) * length * share


def memory(analysis: Any, held: Mapping[str, int], kept: Mapping[str, int]) -> dict[str, int]:
    """HBM of a compiled program by what it holds.

    Arguments are known exactly; among the temporaries gradients and what is kept for the backward pass are estimates,
    cut where they exceed what the compiler needs in all.
    """
    left = int(analysis.temp_size_in_bytes)
    found = dict(held)
    for name, size in kept.items():
        found[name] = min(size, left)
        left -= found[name]
    arguments = int(analysis.argument_size_in_bytes)
    new = int(analysis.output_size_in_bytes) - int(analysis.alias_size_in_bytes)
    found["padding"] = max(arguments - sum(held.values()), 0)
    found["temporaries"] = left
    found["results"] = max(new, 0)
    found["total"] = arguments + max(new, 0) + int(analysis.temp_size_in_bytes)
    return found


def summary(uses: list[Collective]) -> list[dict[str, Any]]:
    """A line for each kind of collective along each set of axes, the costliest first."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for use in uses:
        axes = "+".join(use.axes)
        empty = {"axes": axes, "kind": use.kind, "group": use.group, "written": 0, "times": 0, "sent_bytes": 0.0}
        line = lines.setdefault((axes, use.kind), empty | {"trips_known": True})
        line["written"] += 1
        line["times"] += use.times
        line["sent_bytes"] += use.sent_bytes
        line["trips_known"] &= use.known
    return sorted(lines.values(), key=lambda line: -line["sent_bytes"])


def _asked_bytes(text: str) -> int:
    """The bytes that the compiler says a program needs, its temporaries at least; 0 when it does not say."""
    found = re.search(r"(?:Used|temporaries \()\s*([\d.]+)([KMG]?)", text)
    return int(float(found.group(1)) * 2 ** {"": 0, "K": 10, "M": 20, "G": 30}[found.group(2)]) if found else 0


def _first_line(text: str) -> str:
    found = re.search(r"Ran out of memory[^\n]*", text)
    return found.group() if found else text.splitlines()[0][:200]
