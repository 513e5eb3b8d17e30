"""Compile a recipe's steps for chips that are not here: fits or not, memory, FLOPs, collectives, step time, MFU."""

import dataclasses
import json as json_format
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import tyro

from tracevision_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class DcnFlags:
    """TPU slices along an axis; 0 leaves it to the recipe: by default as many as go along data, the rest along fsdp."""

    data: int = 0
    fsdp: int = 0


@dataclasses.dataclass(frozen=True)
class MeshFlags:
    """Chips along each axis of the mesh, those of all slices; 0 leaves it to the recipe."""

    data: int = 0
    fsdp: int = 0
    tensor: int = 0
    context: int = 0
    dcn: DcnFlags = DcnFlags()
    """Which part of data and fsdp lies across TPU slices."""


@dataclasses.dataclass(frozen=True)
class LoRAFlags:
    """Low-rank adapters, as `tracevision train` takes them; rank 0 leaves them to the recipe."""

    rank: int = 0
    targets: tuple[str, ...] = ()
    """Regular expressions, searched in the paths of kernels; empty for the usual ones."""


@dataclasses.dataclass(frozen=True)
class OptimizerFlags:
    """What the optimizer keeps; by default as in the recipe."""

    method: Literal["adamw", "muon", "adafactor"] | None = None
    moments: Literal["float32", "bfloat16"] | None = None

    def chosen(self) -> dict[str, str]:
        """The fields that replace the recipe's."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value}


@dataclasses.dataclass(frozen=True)
class Args:
    """Compile a recipe's steps on this machine for a topology of other chips, and say what they need and take.

    Topologies: v4, v5e, v5p, v6e with a shape (v5p:8x8x4); a100 (80 GB) and h100 with hosts x GPUs (h100:2x8). TPU
    needs libtpu (pip install 'jax[tpu]'), GPU the CUDA plugin (pip install 'jax[cuda12]'); no accelerator is needed.

    Times are a roofline of published peaks: the best that the compiled program could do, not a measurement.

    Examples:
      tracevision compile tracevision_7b_stage1_5 --topology v5p:8x8x4
      tracevision compile tracevision_7b_stage1_5 --topology v5e:16x16 --rows 256 --json report.json
      tracevision compile tracevision_72b_stage1_5 --topology v5p:4x4x8 --rows 128 --optimizer.method adafactor
      tracevision compile tracevision_7b_stage2 --topology v5p:2x2x1 --programs decode --new-tokens 512
      tracevision compile tracevision_7b_stage1_5 --topology v5p:8x8x4 --quick --search --limit 8
    """

    recipe: tyro.conf.Positional[str]
    """A recipe of configs/."""
    topology: str
    """KIND:SHAPE of one slice."""
    slices: int = 1
    """TPU slices, joined by the data-centre network."""
    programs: tuple[Literal["train", "encode", "prefill", "decode"], ...] = ("train", "encode", "prefill", "decode")
    """Which steps."""
    bucket: int | None = None
    """Only the bucket of this number, from 0; by default all of them, the first for answers and for --search."""
    rows: int | None = None
    """Rows of a global batch; by default the recipe's."""
    mesh: MeshFlags = MeshFlags()
    """Of training. By default the recipe's; where that names no sizes, rows over fsdp as far as slices are whole tiles,
    then over data; the chips that are left over tensor."""
    accumulation: int | None = None
    """Microbatches of an update; by default the recipe's."""
    optimizer: OptimizerFlags = OptimizerFlags()
    """By default the recipe's."""
    remat: str | None = None
    """none, dots or full; by default the recipe's."""
    frozen_whole: tuple[str, ...] | None = None
    """Patterns of frozen parameters that every chip keeps whole along fsdp (vision/); by default the recipe's."""
    lora: LoRAFlags = LoRAFlags()
    """Of training."""
    answer_rows: int = 8
    """Prompts that each copy of the model answers together."""
    new_tokens: int = 256
    """Room for the tokens of an answer."""
    json: str | None = None
    """Write everything to this file; "-" is standard output."""
    quick: bool = False
    """Let the compiler make its least effort: several times faster. Products, kernels and bytes of collectives are the
    same; temporaries and HBM traffic come out larger."""
    search: bool = False
    """Try batches, remat policies and meshes for training, those first that compute the least again, and print the
    best that fit; what cannot be better than the best so far is left out."""
    rows_per_chip: tuple[float, ...] = (0.5, 1, 2, 4)
    """For --search."""
    remats: tuple[str, ...] = ("full", "dots")
    """For --search."""
    tensors: tuple[int, ...] = (1, 2, 4)
    """For --search: sizes of the axis tensor; fsdp takes the other chips."""
    copies: tuple[int, ...] = (1, 8)
    """For --search: sizes of the axis data, each with all parameters."""
    contexts: tuple[int, ...] = (1,)
    """For --search: sizes of the axis context, which cuts a row's tokens."""
    limit: int = 0
    """For --search: compile at most so many; 0 for all."""
    out: Path | None = None
    """For --search: the file of outcomes, which it continues; by default runs/compile/RECIPE.jsonl."""


def run(args: Args) -> int:
    """Compile and print; 0 when all that was asked for fits, 1 otherwise.

    Raises:
        UserError: an unknown recipe or topology, a layout that does not fit, or a compiler that is not installed.
    """
    from tracevision_jax.parallel.topologies import prepare_environment, topology

    prepare_environment()
    wanted = topology(args.topology, args.slices)
    from configs import registry
    from tracevision_jax.training.recipe import check

    if args.quick:
        import jax

        jax.config.update("jax_exec_time_optimization_effort", -1.0)
    recipe = _changed(registry.get(args.recipe), args)
    check(recipe)
    if args.bucket is not None and not 0 <= args.bucket < len(recipe.buckets):
        raise UserError(f"--bucket is {args.bucket}; {recipe.name} has {len(recipe.buckets)}, numbered from 0.")
    build = registry.system(recipe.system).build
    if args.search:
        return _search(args, recipe, build, wanted)
    if args.remat:
        recipe = _with_remat(recipe, args.remat)
    shown = sys.stderr if args.json == "-" else sys.stdout
    outcomes = []
    for outcome in _outcomes(args, recipe, build(recipe), wanted):
        print(text(outcome), file=shown, flush=True)
        outcomes.append(outcome)
    if args.json:
        peaks = {name: value for name, value in dataclasses.asdict(wanted.chip).items() if name != "target"}
        content = {"recipe": recipe.name, "chip": peaks, "outcomes": [outcome.to_json() for outcome in outcomes]}
        written = json_format.dumps(content, indent=2)
        if args.json == "-":
            print(written)
        else:
            Path(args.json).write_text(written + "\n", encoding="utf-8")
    return 0 if all(outcome.fits for outcome in outcomes) else 1


def _changed(recipe: Any, args: Args) -> Any:
    """The recipe with what flags replace of it, remat and mesh apart."""
    from tracevision_jax.layers.lora import LoRAConfig

    changes: dict[str, Any] = {"optimizer": dataclasses.replace(recipe.optimizer, **args.optimizer.chosen())}
    if args.accumulation is not None:
        changes["accumulation"] = args.accumulation
    if args.frozen_whole is not None:
        changes["frozen_whole"] = args.frozen_whole
    if args.lora.rank:
        changes["lora"] = LoRAConfig(args.lora.rank, targets=args.lora.targets or LoRAConfig().targets)
    return dataclasses.replace(recipe, **changes)


def _with_remat(recipe: Any, policy: str) -> Any:
    from tracevision_jax.training.ahead_of_time import with_remat

    return dataclasses.replace(recipe, model=with_remat(recipe.model, policy))


def _outcomes(args: Args, recipe: Any, system: Any, wanted: Any) -> Iterator[Any]:
    """Check every layout, then compile one program after the other."""
    import jax

    from tracevision_jax.parallel.ahead_of_time import measure
    from tracevision_jax.parallel.mesh import make_mesh
    from tracevision_jax.parallel.topologies import open_devices
    from tracevision_jax.systems.adapted import with_adapters
    from tracevision_jax.training.ahead_of_time import fitting_mesh, training_program
    from tracevision_jax.training.layout import stage_rules

    adapted = with_adapters(system, recipe.lora)
    shapes = jax.eval_shape(adapted.init, jax.random.key(0))
    rules = stage_rules(adapted, recipe, shapes)
    rows_of = recipe.rows if len(recipe.rows) > 1 else recipe.rows * len(recipe.buckets)
    numbers = range(len(recipe.buckets)) if args.bucket is None else [args.bucket]
    layouts = []
    for number in numbers if "train" in args.programs else ():
        rows = args.rows or rows_of[number]
        asked = _mesh(args.mesh, recipe, rows, wanted.devices, shapes)
        config = fitting_mesh(asked, wanted.devices, rows, recipe.accumulation, shapes, rules, wanted.slices)
        layouts.append((number, rows, config))
    devices = open_devices(wanted)
    for number, rows, config in layouts:
        mesh = make_mesh(config, devices)
        print(f"compiling the training step for {rows} rows of {recipe.buckets[number]} ...", file=sys.stderr)
        yield measure(training_program(system, recipe, recipe.buckets[number], rows, mesh), wanted, mesh)
    steps = [name for name in args.programs if name != "train"]
    if steps and recipe.system != "tracevision":
        print(f"no {', '.join(steps)}: the system '{recipe.system}' writes no answers", file=sys.stderr)
    elif steps:
        yield from _answers(args, steps, system, recipe.buckets[args.bucket or 0], wanted, devices)


def _answers(args: Args, steps: list[str], system: Any, bucket: Any, wanted: Any, devices: list[Any]) -> Iterator[Any]:
    from tracevision_jax.inference.ahead_of_time import answer_mesh, answer_programs
    from tracevision_jax.parallel.ahead_of_time import measure
    from tracevision_jax.parallel.mesh import make_mesh

    config = answer_mesh(system, wanted.devices)
    mesh = make_mesh(config, devices)
    for program in answer_programs(system, bucket, args.answer_rows * config.data, args.new_tokens, mesh):
        if program.name.split(",")[0] in steps:
            print(f"compiling {program.name} ...", file=sys.stderr)
            yield measure(program, wanted, mesh)


def _mesh(flags: MeshFlags, recipe: Any, rows: int, devices: int, shapes: Any) -> Any:
    """The mesh that is asked for: flags over the recipe's; with neither, `usual_mesh`."""
    from tracevision_jax.parallel.mesh import AXES, BATCH_AXES, MeshConfig
    from tracevision_jax.training.ahead_of_time import usual_mesh

    across = {axis: getattr(flags.dcn, axis) for axis in BATCH_AXES if getattr(flags.dcn, axis)}
    dcn = dataclasses.replace(recipe.mesh.dcn, **across)
    named = {axis: getattr(flags, axis) for axis in AXES if getattr(flags, axis)}
    if named:
        sizes = dict.fromkeys(AXES, 1) | named
        if "fsdp" not in named and math.prod(sizes.values()) != devices and -1 not in named.values():
            sizes["fsdp"] = -1
        return MeshConfig(**sizes, dcn=dcn)
    chosen = recipe.mesh
    if chosen.sizes == MeshConfig().sizes:
        chosen = usual_mesh(rows, devices, recipe.accumulation, shapes)
    return dataclasses.replace(chosen, dcn=dcn)


def _search(args: Args, recipe: Any, build: Any, wanted: Any) -> int:
    import jax

    from configs import registry
    from tracevision_jax.parallel.agreement import flat
    from tracevision_jax.parallel.ahead_of_time import measure
    from tracevision_jax.parallel.mesh import DcnConfig, MeshConfig, as_flags, make_mesh
    from tracevision_jax.parallel.topologies import open_devices
    from tracevision_jax.systems.adapted import with_adapters
    from tracevision_jax.systems.config_json import to_json
    from tracevision_jax.training.ahead_of_time import step_flops, training_program
    from tracevision_jax.training.layout import stage_rules
    from tracevision_jax.training.layout_search import Candidate, candidates, search, verdict

    bucket = recipe.buckets[args.bucket or 0]
    system = with_adapters(build(recipe), recipe.lora)
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    per_chip = (args.rows / wanted.devices,) if args.rows else args.rows_per_chip
    axes = args.tensors, args.copies, args.contexts
    rules = stage_rules(system, recipe, shapes)
    tried = candidates(wanted.devices, recipe.accumulation, shapes, per_chip, args.remats, *axes, rules, wanted.slices)
    devices = open_devices(wanted)

    def outcome_of(candidate: Candidate) -> dict[str, Any]:
        changed = _with_remat(recipe, candidate.remat)
        mesh = make_mesh(MeshConfig(**candidate.mesh, dcn=DcnConfig()), devices)
        program = training_program(build(changed), changed, bucket, candidate.rows, mesh)
        return measure(program, wanted, mesh).to_json()

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    bounds = {}
    for policy in args.remats:
        # Every product grows with the rows, so that what is computed again has the same share of any batch.
        changed = _with_remat(recipe, policy)
        bounds[policy] = step_flops(build(changed), changed, bucket, tried[0].rows).mfu_bound
        say(f"remat {policy}: at most {100 * bounds[policy]:.1f} % MFU")
    path = args.out or Path("runs/compile") / f"{recipe.name}.jsonl"
    known = dict(flat(to_json(registry.get(recipe.name)), "recipe"))
    changes = [f"{field} {value}" for field, value in flat(to_json(recipe), "recipe") if known.get(field) != value]
    about = " | ".join((recipe.name, str(bucket), str(wanted), *changes, *["quick"] * args.quick))
    found = search(tried, about, path, outcome_of, say, args.limit, bounds)
    print(f"{recipe.name} on {wanted}, rows of {bucket}; all outcomes are in {path}")
    for entry in found:
        asked = entry["candidate"]
        flags = f"--rows {asked['rows']} --remat {asked['remat']} {as_flags(asked['mesh'])}"
        print(f"  {verdict(entry)}\n    {flags}")
    if args.json:
        content = json_format.dumps({"recipe": recipe.name, "outcomes": found}, indent=2)
        print(content) if args.json == "-" else Path(args.json).write_text(content + "\n", encoding="utf-8")
    return 0 if any(entry["fits"] for entry in found) else 1


def text(outcome: Any) -> str:
    """An outcome for people."""
    mesh = ", ".join(f"{axis} {size}" for axis, size in outcome.mesh.items() if size > 1) or "one chip"
    answer = "fits" if outcome.fits else f"DOES NOT FIT: {outcome.reason}"
    lines = [
        "",
        f"{outcome.program}: {answer}",
        f"  {outcome.chips} chips of {outcome.topology} as {mesh}; {outcome.rows} rows, {outcome.tokens:,} tokens "
        f"({outcome.tokens / outcome.chips:,.0f} a chip); compiled in {outcome.compile_seconds:.0f} s",
        "  HBM a chip, GiB: " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in outcome.hbm.items() if size),
        f"  model FLOPs: {outcome.model_flops:.3e} a step, {outcome.model_flops / outcome.tokens:.3e} a token (causal "
        f"attention halved; {outcome.model_flops_full_square:.3e} with the full square); computed again on top, as "
        f"traced: {outcome.recomputed_flops:.3e}",
        "    " + ", ".join(f"{part} {flops:.3e}" for part, flops in outcome.parts.items()),
    ]
    times = outcome.roofline
    if times is None:
        return "\n".join(lines)
    lines += [
        f"  executed a chip: {outcome.executed_flops:.3e} FLOPs ({outcome.kernel_flops:.3e} in attention kernels), "
        f"{outcome.hbm_traffic / GIB:.1f} GiB through HBM: {outcome.intensity:.0f} FLOPs a byte",
        "  collectives, GiB that a chip sends: " + ("; ".join(map(_collective, outcome.collectives)) or "none"),
        "  kernels: " + (", ".join(f"{name} x {count}" for name, count in outcome.kernels.items()) or "none"),
    ]
    if outcome.uncounted:
        lines.append(f"  kernels whose FLOPs are not counted: {', '.join(outcome.uncounted)}")
    sent = ", ".join(f"{axes} {1e3 * seconds:.1f}" for axes, seconds in times.collectives.items())
    lines += [
        f"  roofline, ms: compute {1e3 * times.compute:.1f}, HBM {1e3 * times.hbm:.1f}, collectives {sent or 'none'}; "
        f"bound by {times.bound}",
        f"  step {1e3 * times.overlapped:.1f} ms, MFU {100 * times.mfu_overlapped:.1f} % with collectives overlapped; "
        f"{1e3 * times.not_overlapped:.1f} ms, {100 * times.mfu_not_overlapped:.1f} % not overlapped",
    ]
    return "\n".join(lines)


def _collective(line: dict[str, Any]) -> str:
    counted = f"{line['times']} x" if line["trips_known"] else f"{line['times']} x a turn of the loop"
    return f"{line['axes']} {line['kind']} {counted} {line['sent_bytes'] / GIB:.2f}"
