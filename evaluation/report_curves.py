"""Loss curves of a run's stages as SVG: read from `metrics.jsonl` (training/journal.py), drawn without a library.

    stage = read_stage("runs/demo/stage1", "stage1")
    for panel in panels(stage):
        svg = line_chart(panel)

Every part of the loss has a chart of its own, since their units differ; all of a stage share the axis of steps.
Colours come from the page's style sheet (classes `line`, `grid`, `dot`, ...), so that they follow light and dark.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from tracevision_jax.errors import UserError

PARTS = {
    "text": "text loss (cross-entropy a token)",
    "guidance": "attention away from what is sought",
    "refinement": "mask refinement loss",
    "dice": "mask Dice loss",
    "accuracy": "tokens predicted right",
}
"""The parts of the loss that have a chart, in this order, and what they are called there."""

WIDTH, HEIGHT, TITLE = 320, 196, 26
"""Of a chart, and of the line above a row of them."""
SHEET_STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#5c6470}.name,.value{fill:#1d2129;font-weight:600}"
    ".title{font-size:14px;font-weight:700;fill:#1d2129}.grid{stroke:#dfe3e8}.base{stroke:#5c6470}"
    ".line{fill:none;stroke:#2563c9;stroke-width:1.8}.dot{fill:#2563c9}.hover{fill:transparent}"
)
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 34, 40
MOST_HOVER_POINTS = 60


class Panel(NamedTuple):
    """One chart: a value over steps."""

    title: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    highest: float | None = None
    """Upper end of the axis; None takes it from the values."""
    marked: bool = False
    """Whether the points are few and shown as dots, as evaluations are."""


@dataclass(frozen=True)
class Stage:
    """What `metrics.jsonl` says of one stage."""

    name: str
    train: tuple[dict[str, Any], ...]
    """Lines of kind "train", by step."""
    evaluations: tuple[dict[str, Any], ...]
    """Lines of kind "evaluation", by step."""

    @property
    def steps(self) -> int:
        """Steps taken."""
        return self.train[-1]["step"] if self.train else 0

    @property
    def tokens(self) -> int:
        """Tokens seen, as far as one session of the run counted them."""
        return max((line["tokens"] for line in self.train), default=0)

    @property
    def step_seconds(self) -> float:
        """Seconds spent in steps, compilation and waiting for data included; not start, evaluation or export."""
        before = [0, *(line["step"] for line in self.train)]
        return sum(
            line["step_seconds"] * (line["step"] - first) for line, first in zip(self.train, before, strict=False)
        )

    @property
    def last_parts(self) -> dict[str, float]:
        """The parts of the loss in the last line."""
        return dict(self.train[-1]["parts"]) if self.train else {}


def read_stage(directory: str | Path, name: str) -> Stage | None:
    """Read the metrics of a stage; None where there are none.

    Raises:
        UserError: a line is not what the training journal writes.
    """
    path = Path(directory) / "metrics.jsonl"
    if not path.is_file():
        return None
    train, evaluations = [], []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            if line["kind"] in ("rejected", "went_back", "data", "goodput"):
                continue
            kind = {"train": train, "evaluation": evaluations}[line["kind"]]
            _ = line["step"], line["parts" if line["kind"] == "train" else "values"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}, line {number} is no line of a training journal: {error!r}") from error
        kind.append(line)
    by_step = [tuple(sorted(lines, key=lambda line: line["step"])) for lines in (train, evaluations)]
    return Stage(name, *by_step)


def panels(stage: Stage) -> list[Panel]:
    """A chart for each part of the loss that the stage has, then one for each number of its evaluations."""
    found = []
    for part, title in PARTS.items():
        points = [(line["step"], line["parts"][part]) for line in stage.train if part in line["parts"]]
        if points:
            steps, values = zip(*points, strict=True)
            found.append(Panel(title, steps, values, 1.0 if part == "accuracy" else None))
    series: dict[str, list[tuple[int, float]]] = {}
    for line in stage.evaluations:
        for key, value in line["values"].items():
            series.setdefault(f"{line['name']}: {key}", []).append((line["step"], value))
    for title, points in series.items():
        steps, values = zip(*points, strict=True)
        found.append(Panel(title, steps, values, marked=True))
    return found


def curve_sheet(rows: Sequence[tuple[str, Sequence[Panel]]]) -> str:
    """Titled rows of charts as one SVG file, which brings its own colours: for a README or a paper."""
    columns = max((len(charts) for _, charts in rows), default=1)
    height = TITLE + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * WIDTH} {len(rows) * height}">',
        f'<style>{SHEET_STYLE}</style><rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for row, (title, charts) in enumerate(rows):
        top = row * height
        parts.append(f'<text class="title" x="2" y="{top + TITLE - 6}">{escape(title)}</text>')
        for column, panel in enumerate(charts):
            place = f'x="{column * WIDTH}" y="{top + TITLE}" width="{WIDTH}" height="{HEIGHT}"'
            parts.append(line_chart(panel).replace("<svg ", f"<svg {place} ", 1))
    return "".join([*parts, "</svg>"])


def nice_ticks(highest: float, most: int = 4) -> list[float]:
    """Round numbers from 0 to the first at or above `highest`, at most `most` steps apart."""
    if not highest > 0:
        return [0.0, 1.0]
    raw = highest / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * (1 - 1e-9))
    return [round(index * step, 12) for index in range(math.ceil(highest / step - 1e-9) + 1)]


def tick_text(value: float) -> str:
    """A tick's number, short: 1200 is "1.2k"."""
    if value >= 1000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


class _Frame(NamedTuple):
    """Where steps and values lie on a chart."""

    last_step: int
    highest: float

    def x(self, step: int | float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / self.last_step

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * min(max(value / self.highest, 0.0), 1.0)


class _Place(NamedTuple):
    """One point of a line."""

    step: int
    value: float
    x: float
    y: float


def line_chart(panel: Panel) -> str:
    """One chart as an SVG element, its points named when the pointer rests on them.

    Values that are not finite leave a gap; negative ones are drawn at 0.
    """
    finite = [value for value in panel.values if math.isfinite(value)]
    vertical = nice_ticks(panel.highest or max(finite, default=1.0))
    frame = _Frame(max(panel.steps[-1], 1), vertical[-1])
    horizontal = [tick for tick in nice_ticks(float(frame.last_step), 5) if tick <= frame.last_step]
    runs = _runs(panel, frame)
    title = escape(panel.title)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}, by step">',
        f'<text class="name" x="2" y="15">{title}</text>',
        *(_horizontal_line(frame.y(tick), tick_text(tick), tick == 0) for tick in vertical),
        *(_step_mark(frame.x(tick), tick_text(tick)) for tick in horizontal),
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.1f}" y="{HEIGHT - 5}" text-anchor="middle">step</text>',
        *(_line(run) for run in runs if len(run) > 1),
        *_marks([place for run in runs for place in run], panel.marked),
        "</svg>",
    ]
    return "".join(parts)


def _runs(panel: Panel, frame: _Frame) -> list[list[_Place]]:
    """Stretches of values that are finite."""
    runs: list[list[_Place]] = [[]]
    for step, value in zip(panel.steps, panel.values, strict=True):
        if math.isfinite(value):
            runs[-1].append(_Place(step, value, frame.x(step), frame.y(value)))
        elif runs[-1]:
            runs.append([])
    return runs


def _horizontal_line(place: float, label: str, base: bool) -> str:
    kind = "base" if base else "grid"
    return (
        f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{place + 3.5:.1f}" text-anchor="end">{label}</text>'
    )


def _step_mark(place: float, label: str) -> str:
    return f'<text class="tick" x="{place:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{label}</text>'


def _line(run: Sequence[_Place]) -> str:
    points = " ".join(f"{place.x:.1f},{place.y:.1f}" for place in run)
    return f'<polyline class="line" points="{points}"/>'


def _marks(places: Sequence[_Place], marked: bool) -> list[str]:
    """The last point with its value (every point where `marked`), and places to rest the pointer on."""
    if not places:
        return []
    last = places[-1]
    every = max(1, math.ceil(len(places) / MOST_HOVER_POINTS))
    above = last.y - 8 if last.y > TOP else last.y + 16
    dots = places if marked else [last]
    return [
        *(f'<circle class="dot" cx="{place.x:.1f}" cy="{place.y:.1f}" r="3.2"/>' for place in dots),
        f'<text class="value" x="{last.x + 4:.1f}" y="{above:.1f}" text-anchor="end">{last.value:.3g}</text>',
        *(
            f'<circle class="hover" cx="{place.x:.1f}" cy="{place.y:.1f}" r="7">'
            f"<title>step {place.step}: {place.value:.4g}</title></circle>"
            for place in places[::-1][::every]
        ),
    ]
