"""The tables of docs/scaling.md, filled by the commands that stand below them: `python -m benchmarks.scaling`.

    python -m benchmarks.scaling                    # compile what has no report yet (hours), then fill the tables
    python -m benchmarks.scaling --only a100        # only commands with this in them
    python -m benchmarks.scaling --check            # compile nothing; say which rows differ from their reports

In a section (###) the programs of its commands, in their order, are the rows of its tables. Reports are kept in
runs/scaling, so an interrupted run goes on where it was; remove them to compile again.
"""

import json
import math
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import tyro

from tracevision_jax.errors import UserError
from tracevision_jax.weights.hashes import write_whole

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
GIB = 2**30
HELD = {
    "kept activations": ("activations",),
    "prompts or cache": ("prompts", "cache"),
    "other temporaries": ("temporaries",),
}
"""Keys of a report's memory by the words of a table's header; other words are keys themselves."""


@dataclass(frozen=True)
class Args:
    """What is compiled and written."""

    only: str = ""
    """Compile only commands with this in them."""
    check: bool = False
    """Compile and write nothing: list the rows that differ from their reports."""
    document: Path = DOCUMENT
    """Where the tables and the commands stand."""
    reports: Path = Path("runs/scaling")
    """Folder of the reports."""


@dataclass(frozen=True)
class Section:
    """A part of the document with commands and tables."""

    title: str
    commands: tuple[str, ...]
    tables: tuple[tuple[int, ...], ...]
    """Numbers of the lines of each table: its header, then its rows."""


def sections(lines: Sequence[str]) -> list[Section]:
    """Sections that have both commands and tables of theirs."""
    starts = [number for number, line in enumerate(lines) if line.startswith("### ")]
    found = []
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        commands, tables = tuple(_commands(lines[start:stop])), tuple(_tables(lines, start, stop))
        if commands and tables:
            found.append(Section(lines[start].removeprefix("### "), commands, tables))
    return found


def _commands(lines: Sequence[str]) -> Iterator[str]:
    for command in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if command.startswith("tracevision compile ") and "--search" not in command:
            yield " ".join(command.split())


def _tables(lines: Sequence[str], start: int, stop: int) -> Iterator[tuple[int, ...]]:
    for number in range(start, stop):
        if lines[number].startswith("|") and re.search(r"HBM a \w+, GiB: |Model FLOPs a step", lines[number]):
            rows = takewhile(lambda row: lines[row].startswith("|"), range(number + 2, stop))
            yield number, *rows


def filled(lines: Sequence[str], section: Section, outcomes: Sequence[dict[str, Any]]) -> dict[int, str]:
    """{number of a line: the row with what its report says}.

    Raises:
        UserError: a program does not fit, or a table has another number of rows than the commands have programs.
    """
    for outcome in outcomes:
        if not outcome["fits"]:
            raise UserError(f"'{section.title}': {outcome['program']} does not fit: {outcome['reason']}")
    rows = {}
    for header, *numbers in section.tables:
        if len(numbers) != len(outcomes):
            raise UserError(
                f"'{section.title}' has a table of {len(numbers)} rows for {len(outcomes)} programs of its commands: "
                "give every row its program, in order."
            )
        titles = cells(lines[header])
        for number, outcome in zip(numbers, outcomes, strict=True):
            old = cells(lines[number])
            new = [cell(title, text, outcome) for title, text in zip(titles, old, strict=True)]
            rows[number] = f"| {' | '.join(new)} |"
    return rows


def cells(row: str) -> list[str]:
    """Cells of a table's row."""
    return [text.strip() for text in row.strip().strip("|").split("|")]


def cell(title: str, old: str, outcome: dict[str, Any]) -> str:
    """What a report says in a column; as it was in a column that says what was asked for. What is bold stays so."""
    times = outcome["roofline"]
    match re.split(r"[:(,]", title.replace("a GPU", "a chip"))[0].strip():
        case "Rows":
            share = f" ({outcome['tokens'] / outcome['chips']:,.0f})" if "(" in title else ""
            return re.sub(r"^[\d,]*\d( \([\d,]+\))?", f"{outcome['rows']:,}{share}", old)
        case "Mesh":
            return ", ".join(f"{axis} {size}" for axis, size in outcome["mesh"].items() if size > 1)
        case "HBM a chip":
            return _memory(title, outcome["hbm"])
        case "Model FLOPs a step" | "Model FLOPs":
            return f"{_power(outcome['model_flops'], 2)} ({_power(outcome['model_flops'] / outcome['tokens'], 2)})"
        case "Computed again":
            return _power(outcome["recomputed_flops"], 1)
        case "Executed a chip":
            return f"{_power(outcome['executed_flops'], 2)}, {outcome['intensity']:,.0f}"
        case "Collectives a chip sends":
            return _sent(outcome["collectives"])
        case "Step":
            return f"{_milliseconds(times['overlapped'])} / {_milliseconds(times['not_overlapped'])} ms"
        case "MFU":
            hidden, shown = 100 * times["mfu_overlapped"], 100 * times["mfu_not_overlapped"]
            return f"{hidden:.1f} / **{shown:.1f} %**" if "**" in old else f"{hidden:.1f} / {shown:.1f} %"
        case "Longest terms":
            return _terms({"compute": times["compute"], "HBM": times["hbm"], **times["collectives"]})
        case _:
            return old


def _memory(title: str, held: dict[str, int]) -> str:
    """Of the parts that the title lists, and the total; with the chip's where the title does not say it."""
    names, _, rest = title.partition(": ")[2].partition(";")
    sizes = [sum(held.get(key, 0) for key in HELD.get(name, (name,))) / GIB for name in names.split(" + ")]
    of = "" if " of " in rest else f" of {held['capacity'] / GIB:.0f}"
    return f"{' + '.join(map(_three, sizes))}; {held['total'] / GIB:.1f}{of}"


def _three(size: float) -> str:
    """To three digits; 0 for what rounds to it."""
    if size < 0.005:
        return "0"
    return f"{size:.{max(0, 2 - math.floor(math.log10(max(size, 1.0))))}f}"


def _power(number: float, digits: int) -> str:
    return f"{number:.{digits}e}".replace("e+", "e")


def _sent(collectives: Sequence[dict[str, Any]]) -> str:
    """GiB by axes, the most first; those that round to 0.0 only where all do."""
    by_axes: dict[str, float] = {}
    for line in collectives:
        by_axes[line["axes"]] = by_axes.get(line["axes"], 0.0) + line["sent_bytes"] / GIB
    ordered = sorted(by_axes.items(), key=lambda item: -item[1])
    shown = [(axes, size) for axes, size in ordered if size >= 0.05] or ordered[:1]
    return ", ".join(f"{axes} {size:.0f}" if size >= 100 else f"{axes} {size:.1f}" for axes, size in shown) or "none"


def _terms(seconds: dict[str, float]) -> str:
    """The longest first, without what takes less than a thousandth of it or rounds to nothing."""
    ordered = sorted(seconds.items(), key=lambda term: -term[1])
    least = max(1e-3 * ordered[0][1], 5e-5)
    return ", ".join(f"{name} {_milliseconds(each)}" for name, each in ordered if each >= least)


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 9.95e-3 else f"{1e3 * seconds:.1f}"


def report_path(folder: Path, command: str) -> Path:
    """Where the report of a command is kept."""
    words = [word.lstrip("-") for word in shlex.split(command)[2:]]
    return folder / (re.sub(r"[^\w.]+", "-", "_".join(words)) + ".json")


def compile_all(commands: Sequence[str], folder: Path) -> None:
    """Run the commands that have no report yet, one after another; one that fails stops nothing but has none."""
    folder.mkdir(parents=True, exist_ok=True)
    left = [command for command in dict.fromkeys(commands) if not report_path(folder, command).exists()]
    start = time.perf_counter()
    for number, command in enumerate(left, 1):
        print(f"{number}/{len(left)} {command}", flush=True)
        path = report_path(folder, command)
        unfinished = path.with_suffix(".part")
        words = [sys.executable, "-m", "launch", *shlex.split(command)[1:], "--json", str(unfinished)]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if unfinished.exists():
            unfinished.rename(path)
        said = "" if path.exists() else f": {(done.stdout.strip().splitlines() or ['no report'])[-1]}"
        seconds = time.perf_counter() - start
        remaining = seconds / number * (len(left) - number)
        print(f"    {seconds / 60:.0f} min gone, some {remaining / 60:.0f} min left{said}", flush=True)


def main(args: Args) -> int:
    """Compile, then fill or check the tables; 1 if a row could not be filled, or differs under `--check`."""
    if not args.check:
        found = sections(args.document.read_text(encoding="utf-8").splitlines())
        compile_all([c for section in found for c in section.commands if args.only in c], args.reports)
    lines = args.document.read_text(encoding="utf-8").splitlines()  # again: hours may have passed
    changed: dict[int, str] = {}
    missing = 0
    for section in sections(lines):
        paths = [report_path(args.reports, command) for command in section.commands]
        absent = [path for path in paths if not path.exists()]
        if absent:
            missing += len(absent)
            print(f"'{section.title}' stays as it is: {len(absent)} of {len(paths)} commands have no report")
            continue
        outcomes = [outcome for path in paths for outcome in json.loads(path.read_text(encoding="utf-8"))["outcomes"]]
        changed |= {n: row for n, row in filled(lines, section, outcomes).items() if row != lines[n]}
    for number, row in changed.items():
        print(f"line {number + 1}\n  - {lines[number]}\n  + {row}")
    if args.check:
        return 1 if changed or missing else 0
    write_whole(args.document, "".join(f"{changed.get(n, line)}\n" for n, line in enumerate(lines)))
    return 1 if missing else 0


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args, description=__doc__)))
    except UserError as error:
        sys.exit(str(error))
