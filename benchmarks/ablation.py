"""The paper's ablations on synthetic scenes (Table 9b: directions of the TVP; Table 11: simplification), outside tests.

    make ablation                                          # every variant, three seeds: hours
    python -m benchmarks.ablation --seeds 1 --length 0.5 --variants both none

Every variant of a seed starts from the same pretrained host (stage 0), goes through stages 1 and 1.5 of the demo's
recipes, and is evaluated on the same held-out scenes. Results go to OUT/results.json as they come, so an interrupted
run goes on, and docs/ablation.md gets the table, whatever it shows.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from configs.registry import get
from launch.demo import evaluate, held_out_scenes
from launch.train import train
from tracevision_jax.errors import UserError
from tracevision_jax.inference.loading import fingerprint, load
from tracevision_jax.records.simplification import Simplification
from tracevision_jax.systems.tracevision import TraceVisionConfig
from tracevision_jax.training.recipe import TrainRecipe

Change = Callable[[TraceVisionConfig], TraceVisionConfig]


def _direction(direction: Any) -> Change:
    return lambda config: dataclasses.replace(config, tvp=dataclasses.replace(config.tvp, direction=direction))


def _simplification(method: Any) -> Change:
    def change(config: TraceVisionConfig) -> TraceVisionConfig:
        epsilon_px = config.processor.simplification.epsilon_px
        how = Simplification(method, epsilon_px, as_semantic=method in ("plain", "uniform"))
        return dataclasses.replace(config, processor=dataclasses.replace(config.processor, simplification=how))

    return change


VARIANTS: dict[str, tuple[str, Change]] = {
    "both": ("TVP, both directions; semantic Douglas-Peucker", lambda config: config),
    "none": ("no TVP", _direction("none")),
    "trace_to_vision": ("TVP, trace to vision only (Eq. 3)", _direction("trace_to_vision")),
    "vision_to_trace": ("TVP, vision to trace only (Eq. 4)", _direction("vision_to_trace")),
    "all_points": ("all points, thinned evenly to the most that a row takes", _simplification("none")),
    "uniform": ("uniform sampling, as many keypoints as semantic", _simplification("uniform")),
    "plain": ("plain Douglas-Peucker, as many keypoints as semantic", _simplification("plain")),
}


@dataclass(frozen=True)
class Args:
    """Train and evaluate the variants."""

    out: Path = Path("runs/ablation")
    variants: tuple[str, ...] = tuple(VARIANTS)
    seeds: int = 3
    length: float = 1.0
    """Steps of every stage, times this."""
    samples: int = 200
    """Held-out scenes."""
    table: Path = Path("docs/ablation.md")


def run(args: Args) -> None:
    """Run what is not in OUT/results.json yet, then write the table."""
    unknown = [name for name in args.variants if name not in VARIANTS]
    if unknown:
        raise UserError(f"no variant {', '.join(unknown)}; there are {', '.join(VARIANTS)}")
    path = args.out / "results.json"
    results: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    held_out = held_out_scenes(args.out / "held_out", args.samples)
    for seed in range(args.seeds):
        host = args.out / f"seed{seed}" / "stage0"
        _train(_recipe("stage0", seed, args.length, lambda config: config), host, "")
        for name in args.variants:
            key = f"{name}/{seed}"
            if key in results:
                continue
            folder, before = args.out / f"seed{seed}" / name, host
            for stage in ("stage1", "stage1_5"):
                if stage == "stage1" and name == "none":
                    continue  # without a TVP there is nothing of it to pretrain
                _train(_recipe(stage, seed, args.length, VARIANTS[name][1]), folder / stage, str(before / "model"))
                before = folder / stage
            results[key] = numbers(evaluate(load(before), fingerprint(before), held_out, folder / "evaluation"))
            path.write_text(json.dumps(results, indent=2) + "\n")
    args.table.write_text(table(results, args))


def _recipe(stage: str, seed: int, length: float, change: Change) -> TrainRecipe:
    recipe = get(f"tracevision_demo_{stage}")
    steps = max(1, round(recipe.steps * length))
    sources = tuple(
        dataclasses.replace(
            source,
            options=source.options | {"seed": source.options["seed"] + 100 * seed, "count": steps * recipe.rows[0]},
        )
        for source in recipe.data.sources
    )
    model = dataclasses.replace(recipe.model, config=change(recipe.model.config))
    data = dataclasses.replace(recipe.data, sources=sources)
    return dataclasses.replace(recipe, model=model, data=data, steps=steps, seed=seed)


def _train(recipe: TrainRecipe, out: Path, init_from: str) -> None:
    if not train(dataclasses.replace(recipe, out=str(out), init_from=init_from)).finished:
        raise SystemExit(130)


def numbers(evaluated: Any) -> dict[str, float]:
    """The figures of the table."""
    from evaluation.report_targets import targets

    measured = targets({one.task.name: one.outcome.tables for one in evaluated})
    return {target.name: target.value for target in measured if target.value is not None}


def table(results: Mapping[str, Mapping[str, float]], args: Args) -> str:
    """Mean and range over seeds of every figure, as Markdown."""
    names = list(dict.fromkeys(name for row in results.values() for name in row))
    lines = [
        "# Ablations on synthetic scenes",
        "",
        f"`python -m benchmarks.ablation --seeds {args.seeds} --length {args.length} --samples {args.samples}`; mean "
        "over seeds, with the range where there are several. What each figure is: README.",
        "",
        "| variant | seeds | " + " | ".join(names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for variant, (title, _) in VARIANTS.items():
        rows = [row for key, row in results.items() if key.split("/")[0] == variant]
        if rows:
            cells = [_cell([row[name] for row in rows if name in row]) for name in names]
            lines.append(f"| {title} | {len(rows)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    run(tyro.cli(Args))
