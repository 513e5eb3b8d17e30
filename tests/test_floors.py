"""The import rule of docs/architecture.md: downwards only, and not between folders of one floor."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tracevision_jax", "data_loaders", "evaluation", "configs", "launch")

FLOORS: tuple[tuple[str, ...], ...] = (
    ("tracevision_jax.errors", "tracevision_jax.nearest"),
    ("tracevision_jax.ops",),
    ("tracevision_jax.layers",),
    (
        "tracevision_jax.language",
        "tracevision_jax.vision",
        "tracevision_jax.trajectory",
        "tracevision_jax.segmentation",
    ),
    ("tracevision_jax.records",),
    ("tracevision_jax.hosts",),
    ("tracevision_jax.systems",),
    ("tracevision_jax.weights", "tracevision_jax.parallel"),
    ("tracevision_jax.training", "tracevision_jax.inference"),
    ("data_loaders", "evaluation"),
    ("configs",),
    ("launch",),
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}

LINEN_ROOMS = {
    f"tracevision_jax.{folder}"
    for folder in ("layers", "language", "vision", "trajectory", "segmentation", "hosts", "systems")
}


def room_of(module: str) -> str | None:
    """The folder (or bottom module) that a module of ours belongs to; None for other packages' modules."""
    name = module
    while name:
        if name in FLOOR_OF:
            return name
        name = name.rpartition(".")[0]
    return None


def module_name(path: Path, root: Path) -> str:
    """Dotted name of a file: `tracevision_jax/ops/rotary.py` is `tracevision_jax.ops.rotary`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, module: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a file imports, also inside functions; `from a import b` is a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif isinstance(node, ast.ImportFrom):
            package = module if path.name == "__init__.py" else module.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            base = ".".join(part for part in (package if node.level else "", node.module or "") if part)
            for name in node.names:
                yield node.lineno, base if name.name == "*" else f"{base}.{name.name}"


def violations(root: Path) -> list[str]:
    """Every import under `root` that goes up, sideways or out of the house, and Linen outside its rooms."""
    found = []
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            module = module_name(path, root)
            here = room_of(module)
            for line, name in imports_of(path, module):
                place = f"{path.relative_to(root)}:{line} imports {name}"
                if (name.startswith("flax.linen") or name.startswith("flax.nnx")) and here not in LINEN_ROOMS:
                    found.append(f"{place}: modules belong to layers, models, hosts and systems")
                if name.partition(".")[0] in ("tests", "benchmarks"):
                    found.append(f"{place}: not part of the package")
                there = room_of(name)
                if name.partition(".")[0] not in PACKAGES or module == "tracevision_jax":
                    continue  # a library; or the package's front door, which offers names from every floor
                if here is None:
                    found.append(f"{path.relative_to(root)}: the folder is on no floor")
                elif there is None:
                    # The front door offers names of `inference`, so it stands open to the floors above.
                    if FLOOR_OF[here] <= FLOOR_OF["tracevision_jax.inference"]:
                        found.append(f"{place}: name the module that defines it")
                elif there != here and FLOOR_OF[there] >= FLOOR_OF[here]:
                    way = "sideways" if FLOOR_OF[there] == FLOOR_OF[here] else "upwards"
                    found.append(f"{place}: {way}")
    return found


def test_imports_go_downwards_only():
    assert violations(ROOT) == []


def test_the_check_reads_every_floor():
    modules = [module_name(path, ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    assert set(FLOOR_OF) <= {room_of(module) for module in modules}


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("tracevision_jax/ops/a.py", "from tracevision_jax.layers import norms", "upwards"),
        ("tracevision_jax/vision/a.py", "import tracevision_jax.language.model", "sideways"),
        ("tracevision_jax/vision/a.py", "def f():\n    from tracevision_jax import language", "sideways"),
        ("tracevision_jax/vision/a.py", "from ..language import model", "sideways"),
        ("tracevision_jax/training/a.py", "import data_loaders.mixtures", "upwards"),
        ("tracevision_jax/training/a.py", "import tracevision_jax", "name the module"),
        ("data_loaders/a.py", "from evaluation.metrics import boxes", "sideways"),
        ("tracevision_jax/errors.py", "from tracevision_jax.ops import rotary", "upwards"),
        ("tracevision_jax/training/a.py", "import flax.linen as nn", "modules belong"),
        ("tracevision_jax/training/a.py", "from flax import linen", "modules belong"),
        ("tracevision_jax/attic/a.py", "from tracevision_jax.ops import rotary", "on no floor"),
        ("launch/a.py", "from tests.conftest import ROOT", "not part of the package"),
    ],
)
def test_a_planted_violation_is_found(tmp_path, path, line, complaint):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    assert len(violations(tmp_path)) == 1 and complaint in violations(tmp_path)[0]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (
            "tracevision_jax/layers/a.py",
            "from flax import linen as nn\nfrom tracevision_jax.ops import rotary",
        ),
        (
            "tracevision_jax/vision/a.py",
            "from . import windows\nfrom tracevision_jax.errors import UserError",
        ),
        (
            "evaluation/metrics/a.py",
            "from evaluation.report import table\nimport tracevision_jax.inference.api",
        ),
        ("tracevision_jax/__init__.py", "from tracevision_jax.inference.api import load"),
        ("launch/demo.py", "import tracevision_jax as tv\nimport configs.demo"),
    ],
)
def test_what_the_rule_allows_is_not_complained_about(tmp_path, path, line):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    assert violations(tmp_path) == []
