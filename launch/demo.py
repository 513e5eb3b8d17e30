"""Train TraceVision from nothing on synthetic scenes, evaluate it on held-out ones, write a report with pictures."""

import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tracevision_jax.errors import UserError

if TYPE_CHECKING:
    from data_loaders.sources.localized_narratives import LocalizedNarratives
    from evaluation.report_examples import Evaluated
    from tracevision_jax.inference.tracevision import TraceVisionInference

STAGES = ("stage0", "stage1", "stage1_5", "stage2")
HELD_OUT_SEED = 1_000_001
"""No recipe trains on seeds from a million up."""
EXAMPLES_ASKED = 40
"""Scenes with dialogues, from which the report takes its examples of them."""
PROMPT_SIZES = ((128, 16), (224, 32))
"""Tokens and points that prompts are padded to: of the evaluation, and of dialogues with their history."""


@dataclass(frozen=True)
class Args:
    """Train TraceVision from nothing on synthetic scenes, evaluate it, and write a report with pictures.

    OUT gets a folder for each stage (stage0, stage1, stage1_5, stage2), held_out (the scenes of the evaluation, in the
    format of Localized Narratives), evaluation (a record of every answer) and report (index.html, metrics.json). The
    same command after an interruption goes on where it stopped.

    Examples:
      tracevision demo
      tracevision demo --long --out runs/long
    """

    out: Path = Path("runs/demo")
    """Folder of the run."""
    length: float = 1.0
    """Steps of every stage, times this."""
    long: bool = False
    """The longer recipe, whose model also finds what a phrase names: about 35 minutes on two idle cores, not 15."""
    samples: int = 200
    """Held-out scenes to evaluate on."""


def run(args: Args) -> int:
    """Train what is not trained yet, evaluate, report.

    Raises:
        UserError: a flag is out of range, or the folder holds another run.
    """
    if args.length <= 0 or args.samples < 1:
        raise UserError("--length must be positive and --samples at least 1")
    from tracevision_jax.inference.loading import fingerprint, load
    from tracevision_jax.records.batch import Bucket

    clock = _Clock(args.out / "seconds.json")
    model = Path()
    for before, stage in zip(("", *STAGES), STAGES, strict=False):
        with clock.measure(stage):
            model = args.out / stage
            if not _train(stage, args, args.out / before if before else None):
                return 130
    with clock.measure("evaluation"):
        held_out = held_out_scenes(args.out / "held_out", args.samples)
        trained = load(model, buckets=[Bucket(tokens, 1, 4, 1, points, 0) for tokens, points in PROMPT_SIZES])
        evaluated = evaluate(trained, fingerprint(model), held_out, args.out / "evaluation")
    with clock.measure("report"):
        page, metrics = _report(args, trained, evaluated, held_out, clock.seconds)
    for name, target in metrics["targets"].items():
        mark = "reached" if target["reached"] else "missed"
        print(f"{name:32s} {target['value']!s:>22.22} (target {target['target']})  {mark}")
    print(f"report: {page}")
    return 0


def _train(stage: str, args: Args, init_from: Path | None) -> bool:
    """Train a stage, or go on with it, in its folder; False when it was interrupted."""
    from configs import registry
    from launch.train import train

    recipe = registry.get(f"tracevision_{'long' if args.long else 'demo'}_{stage}")
    steps = max(1, round(recipe.steps * args.length))
    count = {"count": steps * recipe.rows[0]}
    sources = tuple(replace(source, options=source.options | count) for source in recipe.data.sources)
    recipe = replace(
        recipe,
        steps=steps,
        data=replace(recipe.data, sources=sources),
        init_from=str(init_from / "model") if init_from else "",
        out=str(args.out / stage),
    )
    print(f"\n== {stage}: {steps} steps ==", flush=True)
    return train(recipe).finished


def held_out_scenes(folder: Path, count: int) -> "LocalizedNarratives":
    """Held-out scenes, written as Localized Narratives and read back by their reader."""
    from configs.benchmarks import QUESTIONS
    from configs.tracevision_demo import SCENES
    from data_loaders.sources.localized_narratives import LocalizedNarratives
    from data_loaders.synthetic.export import export_narratives
    from data_loaders.synthetic.scenes import SyntheticScenes

    config = replace(SCENES, questions=QUESTIONS, questions_per_scene=len(QUESTIONS))
    written = folder / f"written_{count}.txt"
    if not written.is_file():  # writing them again would change their fingerprint
        narratives = export_narratives(SyntheticScenes(HELD_OUT_SEED, count, config), folder, "val")
        written.write_text(str(Path(narratives).relative_to(folder)))
    narratives = folder / written.read_text()
    return LocalizedNarratives([str(narratives)], folder, "coco", cache=folder / "cache")


def evaluate(
    model: "TraceVisionInference", fingerprint: str, held_out: "LocalizedNarratives", out: Path
) -> "list[Evaluated]":
    """Every task with its controls; `fingerprint` is the model's, by which an interrupted evaluation knows its own."""
    from data_loaders.synthetic.config import COLOURS, SHAPES
    from evaluation.grounding_tasks import ReferBox, ReferSegment, TraceSegment
    from evaluation.report_examples import Evaluated
    from evaluation.sweep import Sweep
    from evaluation.trace_tasks import TraceCaptioning, TracedObject, TracePrediction

    sweep = Sweep(model.engine, model.processor, out, fingerprint)
    tasks = (
        TracedObject(tuple(COLOURS), SHAPES),
        TracePrediction(),
        ReferBox(),
        ReferSegment(),
        TraceSegment(),
        TraceCaptioning(),
    )
    return [Evaluated(task.name, task, sweep.run(task.name, task, held_out)) for task in tasks]


def _report(
    args: Args, model: "TraceVisionInference", evaluated: "list[Evaluated]", held_out: Any, seconds: dict[str, float]
) -> tuple[Path, dict[str, Any]]:
    """Write the report; (its page, its numbers)."""
    from configs.tracevision_demo import asked
    from data_loaders.sources.synthetic import SyntheticSource
    from data_loaders.synthetic.config import SceneConfig
    from data_loaders.synthetic.scenes import SyntheticScenes
    from evaluation.report import write_report

    print("writing the report", file=sys.stderr)
    large = SceneConfig(height=(480, 480), width=(640, 640), named=(2, 3))
    report = write_report(
        args.out,
        evaluated,
        held_out,
        model,
        seconds=seconds,
        asked_about=SyntheticSource(HELD_OUT_SEED + 1, EXAMPLES_ASKED, asked("dialogue", "which_trace", "what")),
        simplified=SyntheticScenes(HELD_OUT_SEED, 1, large)[0],
    )
    return report.page, report.metrics


class _Clock:
    """Seconds of each part, kept in a file, so that a continued run adds to them."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}

    def measure(self, name: str) -> "_Clock":
        """Add the time of a `with` block to a part."""
        self.name = name
        return self

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        spent = time.perf_counter() - self.began
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + spent
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.seconds, indent=2) + "\n")
