"""Results as tables: Markdown for people, JSON for programs.

results = {"trace_prediction": outcome.tables, ...}
markdown(results, "checkpoints/tracevision-7b on ln_coco, split val")
as_json(results)["trace_prediction"]["LBM k=0"]
"""

from collections.abc import Mapping, Sequence
from typing import Any

from evaluation.task import Table

Results = Mapping[str, Sequence[Table]]
"""Tables of each benchmark."""


def as_json(results: Results) -> dict[str, Any]:
    """For each benchmark its tables: {"title", "values" (null where not computed), "reasons", "notes"}."""
    return {
        name: [
            {"title": table.title, "values": table.values, "reasons": table.reasons, "notes": list(table.notes)}
            for table in tables
        ]
        for name, tables in results.items()
    }


def markdown(results: Results, title: str) -> str:
    """A heading, and for each table its numbers, notes and reasons."""
    lines = [f"# {title}", ""]
    for name, tables in results.items():
        lines += [f"## {name}", ""]
        if not tables:
            lines += ["No sample served this benchmark.", ""]
        for table in tables:
            lines += [f"**{table.title}**", "", "| metric | value |", "|---|---:|"]
            lines += [f"| {_cell(metric)} | {number(value)} |" for metric, value in table.values.items()]
            lines.append("")
            reasons: dict[str, list[str]] = {}
            for metric, reason in table.reasons.items():
                reasons.setdefault(reason, []).append(metric)
            notes = [*table.notes, *(f"{', '.join(names)}: not computed; {why}." for why, names in reasons.items())]
            for note in notes:
                lines += [note, ""]
    return "\n".join(lines).rstrip() + "\n"


def number(value: float | None) -> str:
    """Four decimals; a dash for nothing."""
    return "-" if value is None else f"{value:.4f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
