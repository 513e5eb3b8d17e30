"""The tables of docs/scaling.md are its commands' reports, row by row."""

import dataclasses
import json
import shlex
import subprocess
import sys

import pytest
import tyro

from benchmarks import scaling
from configs import registry
from launch import compile as compile_command
from tracevision_jax.errors import UserError
from tracevision_jax.parallel.topologies import topology

OUTCOME = {
    "program": "train on rows of 4096 tokens",
    "chips": 16,
    "rows": 1024,
    "tokens": 131072,
    "fits": True,
    "reason": "",
    "mesh": {"data": 2, "fsdp": 8, "tensor": 1, "context": 1},
    "hbm": {
        "parameters": 2191365752,
        "optimizer": 0,
        "gradients": 41 * 2**30,
        "activations": 123 * 2**30,
        "total": 28997653184,
        "capacity": 95 * 2**30,
    },
    "model_flops": 7.796e15,
    "recomputed_flops": 1.96e15,
    "executed_flops": 6.35e14,
    "intensity": 1220.92,
    "collectives": [
        {"axes": "data", "sent_bytes": 3e8},
        {"axes": "fsdp", "sent_bytes": 2**30},
        {"axes": "fsdp", "sent_bytes": 2**31},
        {"axes": "tensor", "sent_bytes": 2**20},
    ],
    "roofline": {
        "compute": 1.3834,
        "hbm": 1.0395,
        "collectives": {"fsdp": 0.0042, "data": 0.0001},
        "overlapped": 1.3834,
        "not_overlapped": 1.5144,
        "mfu_overlapped": 0.76738,
        "mfu_not_overlapped": 0.70103,
    },
}
DOCUMENT = """# Scaling

```
tracevision compile other --topology v5e:2x2
```

### Few chips

| Chips | Rows (tokens a chip), remat | Mesh | HBM a GPU, GiB: parameters + optimizer + gradients + \
kept activations; total |
|---|---|---|---|
| 16 | 8, full | ? | ? |

| Chips | Model FLOPs a step (a token) | Computed again | Executed a chip, FLOPs a byte | \
Collectives a chip sends, GiB | Step, overlapped / not | MFU, overlapped / not | Longest terms, ms |
|---|---|---|---|---|---|---|---|
| 16 | ? | ? | ? | ? | ? | 1 / **2 %** | ? |

```
tracevision compile recipe --topology v5p:2x2x4 \\
    --quick
tracevision compile recipe --topology v5p:2x2x4 --search
```

### Prose

Nothing here.
"""


@pytest.fixture
def args(tmp_path):
    (tmp_path / "scaling.md").write_text(DOCUMENT)
    return scaling.Args(document=tmp_path / "scaling.md", reports=tmp_path / "reports")


def write_report(args: scaling.Args, *outcomes: dict) -> None:
    (section,) = scaling.sections(args.document.read_text().splitlines())
    args.reports.mkdir(exist_ok=True)
    scaling.report_path(args.reports, section.commands[0]).write_text(json.dumps({"outcomes": outcomes}))


def test_a_report_fills_its_rows_and_nothing_else(args):
    write_report(args, OUTCOME)
    assert scaling.main(args) == 0
    was, now = DOCUMENT.splitlines(), args.document.read_text().splitlines()
    assert [new for old, new in zip(was, now, strict=True) if new != old] == [
        "| 16 | 1,024 (8,192), full | data 2, fsdp 8 | 2.04 + 0 + 41.0 + 123; 27.0 of 95 |",
        "| 16 | 7.80e15 (5.95e10) | 2.0e15 | 6.35e14, 1,221 | fsdp 3.0, data 0.3 | 1,383 / 1,514 ms | "
        "76.7 / **70.1 %** | compute 1,383, HBM 1,040, fsdp 4.2 |",
    ]


def test_a_check_tells_rows_that_are_no_longer_true_and_changes_nothing(args, capsys):
    check = dataclasses.replace(args, check=True)
    write_report(args, OUTCOME)
    assert scaling.main(check) == 1 and args.document.read_text() == DOCUMENT
    assert "+ | 16 | 1,024 (8,192), full |" in capsys.readouterr().out
    assert scaling.main(args) == 0 and scaling.main(check) == 0
    write_report(args, {**OUTCOME, "executed_flops": 7e14})
    assert scaling.main(check) == 1


def test_rows_without_a_report_stay_and_are_told(args, capsys):
    assert scaling.main(dataclasses.replace(args, check=True)) == 1
    assert "'Few chips' stays as it is: 1 of 1 commands have no report" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        ((OUTCOME, OUTCOME), "a table of 1 rows for 2 programs"),
        (({**OUTCOME, "fits": False, "reason": "20 of 16 GiB"},), "does not fit: 20 of 16 GiB"),
    ],
)
def test_reports_that_fit_no_table_are_refused(args, outcomes, message):
    write_report(args, *outcomes)
    with pytest.raises(UserError, match=message):
        scaling.main(args)
    assert args.document.read_text() == DOCUMENT


def test_a_command_that_fails_leaves_no_report_and_one_that_has_one_is_not_run_again(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(scaling.DOCUMENT.parents[1])
    commands = ["tracevision compile no_such_recipe --topology v5e:2x2", "tracevision compile done --topology v5e:2x2"]
    scaling.report_path(tmp_path, commands[1]).write_text("{}")
    scaling.compile_all(commands, tmp_path)
    out = capsys.readouterr().out
    assert "1/1 tracevision compile no_such_recipe" in out and "There is no recipe 'no_such_recipe'" in out
    assert [path.name for path in tmp_path.iterdir()] == [scaling.report_path(tmp_path, commands[1]).name]


def test_the_document_has_a_row_for_every_program_of_commands_that_can_be_run():
    lines = scaling.DOCUMENT.read_text().splitlines()
    found = scaling.sections(lines)
    assert len(found) > 8
    for section in found:
        programs = 0
        for command in section.commands:
            asked = tyro.cli(compile_command.Args, args=shlex.split(command)[2:])
            registry.get(asked.recipe), topology(asked.topology, asked.slices)
            assert asked.quick and (asked.bucket is not None or "train" not in asked.programs), command
            programs += len(asked.programs)
        assert [len(rows) - 1 for rows in section.tables] == [programs] * len(section.tables), section.title
    commands = [command for section in found for command in section.commands]
    assert len({scaling.report_path(scaling.DOCUMENT, command) for command in commands}) == len(set(commands))


def test_the_program_says_what_it_lacks_and_fails(args):
    words = ["--check", "--document", str(args.document), "--reports", str(args.reports)]
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", *words],
        cwd=scaling.DOCUMENT.parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1 and "have no report" in result.stdout and not result.stderr
