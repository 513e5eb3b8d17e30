"""Train a recipe of configs/, or continue it; any field of the recipe is a flag.

The folder of the run (--out, by default runs/NAME) gets checkpoints/, model/, metrics.jsonl,
bad_records.jsonl and tensorboard/, and profile/ with --profile FIRST:LAST. A run that was stopped, in whatever
way, continues with the same command.
"""

import time
from dataclasses import dataclass
from pathlib import Path
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
    """Train; 0 when the run is complete, 130 when it was interrupted and can be continued."""
    summary = train(args.recipe)
    return 0 if summary.finished else 130


def train(recipe: Any, console: Any = None) -> Any:
    """Train a recipe from Python; returns the loop's `Summary`, raises UserError on what can be mended."""
    began = time.perf_counter()
    from configs import registry
    from data_loaders.pipeline import Pipeline
    from data_loaders.plan import Lengths, Plan
    from tracevision_jax.training.loop import fit
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
    )
    directory = Path(recipe.out or Path("runs") / recipe.name)
    evaluators = entry.evaluators(recipe, system)
    folders = entry.folders(recipe)
    return fit(
        system, recipe, pipeline, directory, evaluators=evaluators, folders=folders, console=console, began=began
    )
