"""Train a recipe of configs/, or continue it; any field of the recipe is a flag.

The folder of the run (--out, by default runs/NAME) gets checkpoints/, model/, metrics.jsonl,
bad_records.jsonl and tensorboard/, and profile/ with --profile FIRST:LAST. A run that was stopped, in whatever
way, continues with the same command.

Started several times by a launcher (SLURM, GKE, `tracevision supervise`, ...: docs/launching.md) the processes find
each other, compare what they are about to do, and train together; the first one speaks.
"""

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tracevision_jax.errors import UserError

USAGE = """usage: tracevision train RECIPE [--FIELD VALUE ...]
       tracevision train RECIPE --help     every field, with its value in this recipe

examples:
  tracevision train {example}
  tracevision train {example} --init-from checkpoints/qwen7b --out runs/first --mesh.fsdp 64
  tracevision train {example} --steps 100 --optimizer.learning-rate 3e-4

recipes:
{recipes}"""

PREEMPTED = 75
"""Exit code after SIGTERM: saved, start me again (EX_TEMPFAIL of sysexits.h)."""
INTERRUPTED = 130
"""Exit code after Ctrl-C: saved as well."""


@dataclass(frozen=True)
class Args:
    """A recipe with its overrides applied."""

    recipe: Any
    """`tracevision_jax.training.recipe.TrainRecipe`."""


def parse(argv: list[str]) -> Args:
    """Look the recipe up, then read overrides of its fields; a mistyped recipe or flag names the nearest."""
    from configs import registry
    from launch.cli import parse_with_tyro
    from tracevision_jax.training.recipe import TrainRecipe

    known = registry.names()
    if not argv or argv[0] in ("-h", "--help"):
        listing = "\n".join(f"  {name}" for name in known) or "  (none is registered)"
        print(USAGE.format(recipes=listing, example=known[0] if known else "RECIPE"))
        raise SystemExit(0)
    if argv[0].startswith("-"):
        raise UserError(f"the recipe comes first: tracevision train RECIPE {' '.join(argv)}")
    recipe = registry.get(argv[0])
    return Args(parse_with_tyro(TrainRecipe, argv[1:], f"tracevision train {argv[0]}", default=recipe))


def run(args: Args) -> int:
    """Train; 0 when the run is complete, 75 after SIGTERM and 130 after Ctrl-C, when it can be continued."""
    from tracevision_jax.parallel.processes import connect, leave

    before = signal.signal(signal.SIGTERM, _nothing_to_save)
    try:
        connect()
        summary = train(args.recipe)
    except BaseException as error:
        leave(error)
    finally:
        signal.signal(signal.SIGTERM, before)
    if summary.finished:
        return 0
    return PREEMPTED if summary.interrupted == signal.SIGTERM.name else INTERRUPTED


def train(recipe: Any, console: Any = None) -> Any:
    """Train a recipe from Python; returns the loop's `Summary`, raises UserError on what can be mended.

    With several processes (`tracevision_jax.parallel.processes.connect`) all call it with the same recipe.
    """
    began = time.perf_counter()
    from tracevision_jax.parallel.agreement import agree, check_shared
    from tracevision_jax.training.loop import fit

    prepared, facts, fault = None, {}, None
    try:
        prepared = _prepare(recipe)
        facts = _facts(recipe, prepared.pipeline)
    except UserError as error:
        fault = error
    agree(facts, fault)
    assert prepared is not None
    directory = Path(recipe.out or Path("runs") / recipe.name)
    check_shared(directory)
    return fit(
        prepared.system,
        recipe,
        prepared.pipeline,
        directory,
        evaluators=prepared.evaluators,
        folders=prepared.folders,
        console=console,
        began=began,
    )


@dataclass(frozen=True)
class _Prepared:
    """What a recipe's names have become."""

    system: Any
    pipeline: Any
    evaluators: Any
    folders: Any


def _prepare(recipe: Any) -> _Prepared:
    """Open the data and build everything, before any process waits for another."""
    from configs import registry
    from data_loaders.pipeline import Pipeline
    from data_loaders.plan import Lengths, Plan
    from tracevision_jax.parallel.mesh import make_mesh
    from tracevision_jax.parallel.processes import share_of_rows
    from tracevision_jax.training.recipe import check

    check(recipe)
    entry = registry.system(recipe.system)
    opened = registry.open_sources(recipe.data)
    system = entry.build(recipe)
    data = entry.data(recipe, system, opened)
    lengths = [
        Lengths(f"{source.source}_{number}", resources, source.repetitions)
        for number, (source, resources) in enumerate(zip(recipe.data.sources, data.resources, strict=True))
    ]
    rows = recipe.rows if len(recipe.rows) > 1 else recipe.rows * len(recipe.buckets)
    plan = Plan(recipe.data.seed, lengths, list(recipe.buckets), list(rows))
    share, shares = share_of_rows(make_mesh(recipe.mesh))
    pipeline = Pipeline(
        plan,
        data.records,
        data.make_row,
        data.collate,
        steps=recipe.steps or plan.steps_in(recipe.epochs),
        workers=recipe.data.workers,
        prefetch=recipe.data.prefetch,
        retries=recipe.data.retries,
        timeout=recipe.data.timeout,
        bad_limit=recipe.data.bad_limit,
        process=share,
        processes=shares,
    )
    return _Prepared(system, pipeline, entry.evaluators(recipe, system), entry.folders(recipe))


def _facts(recipe: Any, pipeline: Any) -> dict[str, str]:
    """What must be the same on all processes (`tracevision_jax.parallel.agreement`)."""
    from tracevision_jax.parallel.agreement import code_fingerprint, environment_facts, flat
    from tracevision_jax.systems.config_json import to_json

    root = Path(__file__).resolve().parents[1]
    packages = [root / name for name in ("tracevision_jax", "data_loaders", "evaluation", "configs", "launch")]
    return {
        "code (hash of its files)": code_fingerprint(packages),
        "data (hash of its records' sizes and order)": pipeline.fingerprint,
        "steps": str(pipeline.steps),
        **dict(flat(to_json(recipe), "recipe")),
        **environment_facts(),
    }


def _nothing_to_save(number: int, frame: FrameType | None) -> None:
    """SIGTERM before the first step or after the last."""
    raise SystemExit(PREEMPTED)
