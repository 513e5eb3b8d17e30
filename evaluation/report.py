"""The report of a demo run: `report/index.html` with its pictures, and `report/metrics.json`.

    report = write_report("runs/demo", evaluated, held_out, tv.load("runs/demo/stage2"), seconds=seconds)
    report.page, report.metrics["targets"]["mask_ciou"]

Loss curves are read from the run's stages (STAGE/metrics.jsonl), numbers and examples come from what the sweep
returned, attention maps and dialogues from the model. What is missing is shown as missing, with its reason.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from evaluation import report_page, tables
from evaluation.report_curves import Stage, curve_sheet, line_chart, panels, read_stage
from evaluation.report_examples import Evaluated, asked_section, evaluated_section
from evaluation.report_figures import (
    PORTRAIT,
    Photograph,
    attention_section,
    photograph_section,
    simplification_section,
)
from evaluation.report_page import Chart, Page, Section, render
from evaluation.report_pictures import Images
from evaluation.report_targets import Target, page_table, targets, verdict
from evaluation.task import Samples
from tracevision_jax.records.sample import BadRecord, Sample
from tracevision_jax.records.simplification import Simplification
from tracevision_jax.training.journal import duration
from tracevision_jax.weights.hashes import write_whole

EXAMPLES = 12
ATTENTION_MAPS = 6
ASKED = ("joint_caption_trace", "trace_qa", "dialogue")
"""Tasks without a benchmark, whose examples the report asks for itself."""
STAGES = {
    "stage0": "Stage 0: the host learns to see and to speak (plain captions and boxes)",
    "stage1": "Stage 1: trace perception and the added tokens alone",
    "stage1_5": "Stage 1.5: everything together, with the mask decoder",
    "stage2": "Stage 2: the language model on instructions",
}
PACKAGES = ("tracevision-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")

LIMITS = (
    "The model is a toy, drawn at random and trained for minutes on synthetic scenes. Its numbers say that the parts "
    "work together and learn; they are not comparable with any number of the paper, which trains 7 billion parameters "
    "on photographs.",
    "Held-out scenes have a seed of their own, but come from the same generator as those of training: with the same "
    "colours, shapes and sentences, and the same simulated hand.",
    "LBM holds predicted points, as boxes without area, against the boxes of the true trace's words. Since a hand "
    "hovers around what it shows, the true trajectory does not have LBM 0 either, which is why it stands beside ours.",
    "Examples and attention maps are of the first held-out scenes that serve, right or wrong; none was picked.",
)


@dataclass(frozen=True)
class Report:
    """What was written."""

    page: Path
    """index.html."""
    metrics: dict[str, Any]
    """The content of metrics.json."""


def write_report(
    run_dir: str | Path,
    evaluated: Sequence[Evaluated],
    held_out: Samples,
    model: Any,
    *,
    samples: int | None = None,
    seconds: Mapping[str, float] | None = None,
    asked: Sequence[str] = ASKED,
    asked_about: Samples | None = None,
    simplified: Sample | None = None,
    photograph: Photograph = PORTRAIT,
    examples: int = EXAMPLES,
) -> Report:
    """Write RUN_DIR/report.

    Args:
        run_dir: the run, with a folder for each stage of `STAGES`; a stage without metrics is reported as missing.
        evaluated: what the sweep ran on `held_out`, one entry a task.
        held_out: the held-out samples, in the order in which they were evaluated.
        model: the trained model, `tv.load(...)`.
        samples: how many of them were evaluated, from the first on; all by default.
        seconds: how long each part took by the wall clock, in the order to be shown; names of stages or others. A
            stage that is not in it is given the time of its steps.
        asked: task kinds whose examples are asked of the model here.
        asked_about: held-out samples with questions of these kinds; `held_out` by default.
        simplified: a scene of a photograph's size, simplified with the paper's 5 px; by default the held-out scene
            with most recorded points, simplified as the model is given it.
        photograph: a real picture with a drawn trace; by default the embedded portrait.
        examples: how many to show of each task.

    Raises:
        UserError: a stage's metrics cannot be read.
    """
    run = Path(run_dir)
    seconds = {name: float(value) for name, value in (seconds or {}).items()}
    held_out = _First(held_out, samples)
    talks = held_out if asked_about is None else _First(asked_about, samples)
    by_task = {one.task.name: one.outcome.tables for one in evaluated}
    stages = {name: read_stage(run / name, name) for name in STAGES}
    reached = targets(by_task)
    images = Images(run / "report" / "images")
    first = held_out.first(ATTENTION_MAPS)
    page = Page(
        title="TraceVision demo",
        lead=_lead(model, len(held_out)),
        verdict=verdict(reached),
        targets=tuple(target.row() for target in reached),
        charts=tuple(_chart(name, stage, seconds) for name, stage in stages.items()),
        tables=tuple(page_table(table) for one in evaluated for table in one.outcome.tables),
        examples=(
            *(evaluated_section(one, held_out, images, examples) for one in evaluated),
            *(asked_section(model, task, talks, images, examples) for task in asked),
        ),
        figures=(
            attention_section(model, [sample for sample in first if sample.strokes], images),
            _simplification(model, held_out, simplified, images),
            photograph_section(model, photograph, _side_px(first), images),
        ),
        times=_times(stages, seconds),
        machine=_machine(),
        limits=LIMITS + _missed(reached),
    )
    metrics = {
        "targets": {target.name: target.as_json() for target in reached},
        "benchmarks": tables.as_json({one.name: one.outcome.tables for one in evaluated}),
        "seconds": _all_seconds(stages, seconds),
        "samples": len(held_out),
        "versions": versions(),
        "machine": machine(),
    }
    rows = [(STAGES[name], panels(stage)) for name, stage in stages.items() if stage is not None and stage.train]
    write_whole(run / "report" / "curves.svg", curve_sheet(rows) + "\n")
    write_whole(run / "report" / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    write_whole(run / "report" / "index.html", _ascii(render(page)))
    return Report(run / "report" / "index.html", metrics)


class _First:
    """The first of some samples, each kept once it was read: every section goes through them."""

    def __init__(self, samples: Samples, count: int | None):
        self._samples = samples
        self._count = len(samples) if count is None else min(count, len(samples))
        self._kept: dict[int, Sample] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int, /) -> Sample:
        if index not in self._kept:
            self._kept[index] = self._samples[index]
        return self._kept[index]

    def fingerprint(self) -> str:
        return self._samples.fingerprint()

    def first(self, count: int) -> list[Sample]:
        """The first so many that can be read."""
        found: list[Sample] = []
        for index in range(len(self)):
            if len(found) == count:
                break
            try:
                found.append(self[index])
            except BadRecord:
                continue
        return found


def _ascii(page: str) -> str:
    """The page with a character reference for all else than ASCII, so that no encoding can spoil it."""
    return page.encode("ascii", "xmlcharrefreplace").decode("ascii")


def _lead(model: Any, samples: int) -> str:
    """What this page is about."""
    counts = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in model.engine.params.items()}
    parts = ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
    return (
        f"A TraceVision of {sum(counts.values()):,} parameters ({parts}), trained from nothing on synthetic scenes and "
        f"evaluated on {samples} held-out ones: it reads traces drawn over a picture, draws traces of its own, names, "
        "boxes and masks what they rest on."
    )


def _chart(name: str, stage: Stage | None, seconds: Mapping[str, float]) -> Chart:
    """The curves of one stage, or why there are none."""
    if stage is None or not stage.train:
        return Chart(STAGES[name], "", (), "This run has no metrics of this stage.")
    took = seconds.get(name, stage.step_seconds)
    facts = f"{stage.steps:,} steps in {duration(took)}"
    return Chart(STAGES[name], facts, tuple(line_chart(panel) for panel in panels(stage)))


def _simplification(model: Any, held_out: "_First", simplified: Sample | None, images: Images) -> Section:
    """Fig. 3 on a given scene, or on the held-out one with the longest trace."""
    if simplified is not None:
        return simplification_section(simplified, Simplification(), images)
    traced = [sample for sample in held_out.first(EXAMPLES) if sample.strokes]
    if not traced:
        return Section("simplification", "Trajectory simplification", missing="The held-out scenes have no traces.")
    longest = max(traced, key=lambda sample: sum(map(len, sample.strokes)))
    return simplification_section(longest, model.processor.config.simplification, images)


def _side_px(samples: Sequence[Sample]) -> int:
    """The longer side of the scenes that the model knows."""
    return max((max(sample.size) for sample in samples), default=128)


def _missed(reached: Sequence[Target]) -> tuple[str, ...]:
    """A sentence for each target that the demo has not reached."""
    return tuple(
        f"{target.label[0].upper()}{target.label[1:]}: {target.value:.3f}, where {target.row().required} is the "
        "target. What these minutes cannot carry, a longer recipe may."
        for target in reached
        if target.value is not None and not target.reached
    )


# Times and machine


def _all_seconds(stages: Mapping[str, Stage | None], seconds: Mapping[str, float]) -> dict[str, float]:
    """Seconds of every part, those of stages that nobody clocked from their steps."""
    from_steps = {name: stage.step_seconds for name, stage in stages.items() if stage is not None}
    return {name: round(value, 1) for name, value in (from_steps | dict(seconds)).items()}


def _times(stages: Mapping[str, Stage | None], seconds: Mapping[str, float]) -> report_page.Table:
    rows = []
    for name, value in _all_seconds(stages, seconds).items():
        label = STAGES.get(name, name).partition(":")[0]
        rows.append((label, duration(value), "wall clock" if name in seconds else "its steps alone"))
    total = sum(_all_seconds(stages, seconds).values(), 0.0)
    return report_page.Table(
        "How long it took", ("part", "h:min:s", "counted"), (*rows, ("together", duration(total), ""))
    )


def _machine() -> report_page.Table:
    rows = [*machine().items(), *versions().items()]
    return report_page.Table("On what", ("what", "value"), tuple((name, str(value)) for name, value in rows))


def machine() -> dict[str, Any]:
    """What this process runs on."""
    device = jax.devices()[0]
    names = [
        line.partition(":")[2].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ())
        if line.startswith("model name")
    ]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores,
        "system": f"{platform.system()} {platform.machine()}",
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
