"""The demo's targets, and the numbers of all tasks as tables of the page.

    targets(outcomes)                     # outcomes: task name -> tables (evaluation/task.py)
    page_table(table)                     # names like "LBM k=0, captions shuffled" become rows and columns

A target that was not measured says why; it counts as not reached and is not left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation import report_page
from evaluation.report_page import TargetRow
from evaluation.task import Table

Tables = Mapping[str, Sequence[Table]]
"""Tables of each task, by the task's name."""


@dataclass(frozen=True)
class Target:
    """A number that the demo has to reach."""

    name: str
    """As in metrics.json."""
    label: str
    limit: float
    at_least: bool
    """Whether the number must be at least the limit; at most otherwise."""
    value: float | None
    control: str = ""
    """What the number is to be held against."""
    note: str = ""

    @property
    def reached(self) -> bool:
        """Whether it was measured and is on the right side of the limit."""
        if self.value is None:
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def as_json(self) -> dict[str, Any]:
        """For metrics.json."""
        return {"value": self.value, "target": self.limit, "reached": self.reached}

    def row(self) -> TargetRow:
        """For the page."""
        state = "not measured" if self.value is None else "reached" if self.reached else "not reached"
        required = f"{'at least' if self.at_least else 'at most'} {self.limit:g}"
        return TargetRow(self.label, number(self.value), required, state, self.control, self.note)


def targets(tables: Tables) -> list[Target]:
    """The seven targets of the demo."""
    right = "colour and shape right"
    shuffled = find(tables, "traced_object", f"{right}, traces shuffled")
    lbm = {
        kind: find(tables, "trace_prediction", f"LBM k=0{suffix}")
        for kind, suffix in (
            ("ours", ""),
            ("own", ", true trajectory"),
            ("other", ", captions shuffled"),
            ("to_own", ", share of the true one's"),
            ("to_other", ", share of shuffled"),
        )
    }
    overlaps = {name: find(tables, name, "cIoU") for name in ("refer_segment", "trace_segment")}
    measured = [value for value in overlaps.values() if value is not None]
    return [
        Target(
            "traced_object",
            "colour and shape of the traced object",
            0.90,
            True,
            find(tables, "traced_object", right),
            f"{number(shuffled)} with the traces of other scenes",
        ),
        Target(
            "traced_object_shuffled",
            "the same with traces shuffled between scenes",
            0.35,
            False,
            shuffled,
            note="Low on purpose: it shows that the trace is what is read.",
        ),
        Target(
            "lbm_to_true",
            "LBM (k=0) of predicted trajectories, as a multiple of the true ones' own",
            1.5,
            False,
            lbm["to_own"],
            f"{number(lbm['ours'])} predicted, {number(lbm['own'])} the true trajectories' own",
        ),
        Target(
            "lbm_to_shuffled",
            "LBM (k=0) of predicted trajectories, as a share of that with captions shuffled",
            0.6,
            False,
            lbm["to_other"],
            f"{number(lbm['ours'])} predicted, {number(lbm['other'])} with the captions of other scenes",
        ),
        Target(
            "mask_ciou",
            "cIoU of masks",
            0.75,
            True,
            # Both kinds of masks have to reach it; one that was not measured has not.
            min(measured) if len(measured) == len(overlaps) else None,
            f"{number(overlaps['refer_segment'])} of phrases, {number(overlaps['trace_segment'])} of traces",
            "The lower of masks of phrases and masks of what a trace rests on.",
        ),
        Target("box_p_at_0.5", "P@0.5 of boxes", 0.8, True, find(tables, "refer_box", "P@0.5")),
        Target(
            "trajectories_parse",
            "share of predicted trajectories that parse",
            1.0,
            True,
            find(tables, "trace_prediction", "trajectories that parse"),
            note="Constrained decoding allows nothing else.",
        ),
    ]


def find(tables: Tables, task: str, name: str) -> float | None:
    """A number of a task by its name; None where it was not measured."""
    found = (table.values.get(name) for table in tables.get(task, ()))
    return next((float(value) for value in found if value is not None), None)


def verdict(targets: Sequence[Target]) -> tuple[str, ...]:
    """One sentence about all targets, then which were not reached or not measured."""
    reached = sum(target.reached for target in targets)
    missed = [target.label for target in targets if target.value is not None and not target.reached]
    unmeasured = [target.label for target in targets if target.value is None]
    parts = [f"{reached} of {len(targets)} targets reached."]
    parts += [f"Not reached: {'; '.join(missed)}."] if missed else []
    parts += [f"Not measured: {'; '.join(unmeasured)}."] if unmeasured else []
    return tuple(parts)


def page_table(table: Table) -> report_page.Table:
    """A task's table with a row a name and a column for each ", suffix" that names have; null has its reason below."""
    split = {name: tuple(name.partition(", ")[::2]) for name in table.values}
    rows = list(dict.fromkeys(base for base, _ in split.values()))
    suffixes = list(dict.fromkeys(suffix for _, suffix in split.values()))
    cells = {split[name]: number(value) for name, value in table.values.items()}
    reasons: dict[str, list[str]] = {}
    for name, reason in table.reasons.items():
        reasons.setdefault(reason, []).append(name)
    return report_page.Table(
        table.title,
        ("metric", *(suffix or "value" for suffix in suffixes)),
        tuple((row, *(cells.get((row, suffix), "") for suffix in suffixes)) for row in rows),
        (*table.notes, *(f"{', '.join(names)}: null, because {reason}." for reason, names in reasons.items())),
    )


def number(value: float | None) -> str:
    """Three decimals; "null" for what was not measured."""
    return "null" if value is None else f"{value:.3f}"
