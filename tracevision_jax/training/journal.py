"""What a run tells: console lines, `metrics.jsonl`, `bad_records.jsonl`, TensorBoard, a summary at the end.

`metrics.jsonl` holds one JSON object a line, told apart by "kind":
- "train": step, epoch, loss, parts, gradient_norm, learning_rate, tokens and seconds (since the run began),
  tokens_per_second, step_seconds, input_share (of the time, spent waiting for data); losses are means over
  the steps since the line before;
- "rejected": a step that changed nothing, with its loss and gradient_norm (`stability.py`);
- "went_back": step, the checkpoint that the run went back to; what the steps between them learned is undone;
- "data": step, what went wrong in making its batch and was mended;
- "evaluation": step, name, values;
- "goodput": at the end of each start of the run, seconds of each part of its wall time (`goodput.py`), which the
  lines of kind "train" have as well.
A resumed run first drops the lines after the step that it starts from, so that every step stands there once; the time
that they stood for is lost, and is counted so.
"""

import json
import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from tracevision_jax.training.board import Board
from tracevision_jax.training.goodput import Goodput, describe, input_bound, shares
from tracevision_jax.training.source import StepBatch
from tracevision_jax.weights.hashes import write_whole


@dataclass
class Interval:
    """Metrics of the steps since the last line, added up."""

    steps: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    tokens: int = 0
    rejected: int = 0
    """Steps that changed nothing, see `stability.py`; they count in no mean."""
    loss: float = 0.0
    sums: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    weights: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, metrics: Mapping[str, Any], seconds: float, waiting: float) -> None:
        """Add one step's metrics (host values) and times."""
        self.steps += 1
        self.seconds += seconds
        self.waiting += waiting
        self.tokens += int(metrics["tokens"])
        if metrics["rejected"]:
            self.rejected += 1
            return
        self.loss += float(metrics["loss"])
        for name, value in metrics["parts"].items():
            weight = float(metrics["weights"][name])
            self.sums[name] += float(value) * weight
            self.weights[name] += weight

    def parts(self) -> dict[str, float]:
        """Mean of each loss part over its weight."""
        return {name: self.sums[name] / self.weights[name] for name in self.sums if self.weights[name] > 0}


def say(console: Console, text: str) -> None:
    """Print as it is: no colours, no markup, no line breaks of rich's own."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """ "1:02:03" or "2:03"."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def keep_until(path: Path, step: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Drop the JSON lines of later steps, and a last line that a crash cut short; returns (lines kept, dropped)."""
    kept, dropped = [], []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            content = json.loads(line)
        except ValueError:
            continue
        (kept if content["step"] <= step else dropped).append(content)
    write_whole(path, "".join(f"{json.dumps(content)}\n" for content in kept))
    return kept, dropped


def seconds_spent(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the last of some lines of `metrics.jsonl` that says so tells of the wall time of each part."""
    return next((dict(line["goodput"]) for line in reversed(lines) if "goodput" in line), {})


def bad_records_name(process: int) -> str:
    """File of the bad records that a process met."""
    return f"bad_records_{process}.jsonl" if process else "bad_records.jsonl"


def mean_of_lines(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean loss and parts of some lines of `metrics.jsonl`, so that one batch does not decide what is shown."""
    values: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        for name, value in ({"loss": line["loss"]} | line["parts"]).items():
            values[name].append(value)
    return {name: sum(column) / len(column) for name, column in values.items()}


class Journal:
    """Writes everything that a run tells; one per process, silent on all but the first.

    Every process makes rows of its own, so each writes its own list of bad records: `bad_records.jsonl` the first,
    `bad_records_1.jsonl` the next.
    """

    def __init__(self, directory: Path, console: Console, steps: int, start: int, log_every: int, goodput: Goodput):
        """Continue the files of `directory` after `start` of `steps` steps; `goodput` hears what was spent before."""
        primary = jax.process_index() == 0
        self.console, self.steps, self.start, self.log_every, self.goodput = console, steps, start, log_every, goodput
        self.began = time.perf_counter()
        self.interval, self.total = Interval(), Interval()
        self.evaluations: dict[str, dict[str, float]] = {}
        self.bad_reasons: Counter[str] = Counter()
        self.troubles = 0
        self.rate: float | None = None
        directory.mkdir(parents=True, exist_ok=True)
        metrics, bad = directory / "metrics.jsonl", directory / bad_records_name(jax.process_index())
        self.lines: list[dict[str, Any]] = []
        if primary:
            kept, dropped = keep_until(metrics, start)
            self.lines = [line for line in kept if line["kind"] == "train"]
            before, after = (math.fsum(seconds_spent(lines).values()) for lines in (kept, kept + dropped))
            goodput.continue_from(seconds_spent(kept), lost=max(after - before, 0.0))
            now = {bad_records_name(number) for number in range(jax.process_count())}
            for left in directory.glob("bad_records*.jsonl"):
                if left.name not in now:  # of a start with more processes
                    keep_until(left, start - 1)
        keep_until(bad, start - 1)  # its steps count from 0
        self.before = self.lines[-1] if self.lines else {"tokens": 0, "seconds": 0.0}
        files = (metrics if primary else Path(os.devnull), bad)
        self.metrics_file, self.bad_file = (path.open("a", buffering=1) for path in files)
        self.board = Board(directory / "tensorboard", start, primary, self.say)

    def say(self, text: str) -> None:
        """A line of prose."""
        say(self.console, text)

    def step(
        self,
        step: int,
        epoch: int,
        metrics: Mapping[str, Any],
        seconds: float,
        waiting: float,
        compiled: bool = False,
    ) -> None:
        """Take the metrics of a finished step; every `log_every` steps they become a line.

        Args:
            step: counted from 1.
            epoch: counted from 0.
            metrics: host values of what the step returned.
            seconds: since the step before was finished.
            waiting: of these, waiting for data.
            compiled: whether they hold a compilation, and say nothing about the time left.
        """
        for interval in (self.interval, self.total):
            interval.add(metrics, seconds, waiting)
        if not compiled:  # smoothed over about twenty steps
            self.rate = seconds if self.rate is None else 0.95 * self.rate + 0.05 * seconds
        if metrics["rejected"]:
            values = {name: str(float(metrics[name])) for name in ("loss", "gradient_norm")}  # JSON has no NaN
            self._write({"kind": "rejected", "step": step} | values)
        if step % self.log_every and step != self.steps:
            return
        interval, self.interval = self.interval, Interval()
        if interval.rejected == interval.steps:
            self.say(f"step {step}: rejected, as all since the line before")
            return
        line = {
            "kind": "train",
            "step": step,
            "epoch": epoch,
            "loss": interval.loss / (interval.steps - interval.rejected),
            "parts": interval.parts(),
            "rejected": interval.rejected,
            "gradient_norm": float(metrics["gradient_norm"]),
            "learning_rate": float(metrics["learning_rate"]),
            "tokens": self.before["tokens"] + self.total.tokens,
            "seconds": self.before["seconds"] + self.total.seconds,
            "tokens_per_second": interval.tokens / max(interval.seconds, 1e-9),
            "step_seconds": interval.seconds / interval.steps,
            "input_share": interval.waiting / max(interval.seconds, 1e-9),
            "goodput": self._seconds(),
        }
        self.lines.append(line)
        self._write(line)
        shown = ("loss", "gradient_norm", "learning_rate", "tokens_per_second", "input_share")
        self.board.scalars("train", {name: line[name] for name in shown}, step)
        self.board.scalars("parts", line["parts"], step)
        spent = shares(line["goodput"])
        self.board.scalars("goodput", {part: share for part, share in spent.items() if share}, step)
        self.say(self._console_line(line))

    def _console_line(self, line: dict[str, Any]) -> str:
        parts = " ".join(f"{name} {value:.4f}" for name, value in line["parts"].items())
        text = (
            f"step {line['step']:>{len(str(self.steps))}}/{self.steps}  loss {line['loss']:.4f}  {parts}  "
            f"grad {line['gradient_norm']:.2g}  lr {line['learning_rate']:.2e}  "
            f"{line['tokens_per_second']:,.0f} tok/s  {line['step_seconds']:.3f} s/step  "
            f"ETA {duration((self.steps - line['step']) * (self.rate or 0.0))}"
        )
        text += f"  rejected {line['rejected']}" if line["rejected"] else ""
        return text + (f"  input-bound: waits {line['input_share']:.0%}" if input_bound(line["input_share"]) else "")

    def _seconds(self) -> dict[str, float]:
        """Wall time of each part, over all starts of the run."""
        return {part: round(seconds, 3) for part, seconds in self.goodput.total().items()}

    def _write(self, line: Mapping[str, Any]) -> None:
        self.metrics_file.write(json.dumps(line) + "\n")

    def evaluation(self, step: int, name: str, values: Mapping[str, Any], seconds: float) -> None:
        """Write what an evaluator returned: numbers everywhere, (height, width, 3) uint8 to TensorBoard."""
        numbers = {key: float(value) for key, value in values.items() if np.ndim(value) == 0}
        self.board.scalars(name, numbers, step)
        for key, value in values.items():
            if np.ndim(value):
                self.board.picture(f"{name}/{key}", np.asarray(value), step)
        self.evaluations[name] = numbers
        line = {"kind": "evaluation", "step": step, "name": name, "values": numbers}
        self._write(line)
        shown = "  ".join(f"{key} {value:.4f}" for key, value in numbers.items())
        self.say(f"evaluation '{name}' at step {step} ({duration(seconds)}): {shown}")

    def went_back(self, now: int, step: int, rejected: int) -> None:
        """Write down that the run goes on from an earlier checkpoint, with the data after the steps it lost."""
        line = {"kind": "went_back", "step": now, "checkpoint": step, "rejected": rejected}
        self._write(line)
        self.say(
            f"{rejected} steps in a row were rejected: back to the parameters of step {step}, on with the data of step "
            f"{now + 1}; what steps {step + 1} to {now} learned is lost, their data are not repeated."
        )

    def data(self, item: StepBatch) -> None:
        """Write down records that became empty slots, of which the first of each reason is shown, and mended faults."""
        for report in item.bad:
            self.bad_file.write(json.dumps(asdict(report)) + "\n")
            self.bad_reasons[report.reason] += 1
            if self.bad_reasons[report.reason] == 1:
                where = f" ({report.file})" if report.file else ""
                self.say(f"skipped record {report.record} of {report.source}: {report.reason}{where}")
        for trouble in item.troubles:
            self.troubles += 1
            self._write({"kind": "data", "step": item.step + 1, "trouble": trouble})

    def summary(self, step: int, checkpoint: str, model: str | None) -> None:
        """The table at the end."""
        wall = time.perf_counter() - self.began
        table = Table(title=f"{step} of {self.steps} steps", show_header=False, title_justify="left")
        table.add_column()
        table.add_column(overflow="fold")
        total = self.total
        if total.steps:
            table.add_row("this session", f"{total.steps} steps, {total.tokens:,} tokens in {duration(wall)}")
            table.add_row(
                "speed",
                f"{total.tokens / max(total.seconds, 1e-9):,.0f} tok/s, "
                f"{total.seconds / total.steps:.3f} s/step, "
                f"{total.waiting / max(total.seconds, 1e-9):.0%} of it waiting for data",
            )
        self._write({"kind": "goodput", "step": step, "goodput": self._seconds()})
        table.add_row("goodput", describe(self.goodput.spent))
        if any(self.goodput.before.values()):
            table.add_row("goodput, all starts", describe(self.goodput.total()))
        if total.steps and input_bound(self.goodput.input_share()):
            table.add_row(
                "input-bound",
                f"{self.goodput.input_share():.0%} of the steps' time is waiting for data: more data.workers or "
                "data.prefetch, a faster store, or built datasets (tracevision data build)",
            )
        some = min(10, (len(self.lines) + 1) // 2)
        first, last = (mean_of_lines(lines) for lines in (self.lines[:some], self.lines[-some:]))
        for name, value in last.items():
            table.add_row(name, f"{value:.4f}" + (f" (at first {first[name]:.4f})" if name in first else ""))
        for name, numbers in self.evaluations.items():
            table.add_row(f"evaluation {name}", ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
        if total.rejected:
            table.add_row("rejected steps", f"{total.rejected} (not finite, or a spike)")
        for reason, count in self.bad_reasons.most_common(5):
            table.add_row("skipped records", f"{count}: {reason}")
        if self.troubles:
            table.add_row("data", f"{self.troubles} faults that were mended, see metrics.jsonl")
        table.add_row("checkpoints", checkpoint)
        if model:
            table.add_row("model", model)
        self.console.print(table)

    def close(self) -> None:
        """Flush and close the files."""
        self.metrics_file.close()
        self.bad_file.close()
        self.board.close()
