"""Rules of the house that hold for every file: size, docstrings, dependencies, nobody's machine paths."""

import ast
import re
import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tracevision_jax", "data_loaders", "evaluation", "configs", "launch")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

LONGEST_FILE = 450
"""Lines; a longer file usually holds two subjects."""

# Folders of one machine only; paths in examples start with /data or gs://, or are relative.
MACHINE_PATH = re.compile(
    r"(?<![\w./-])/(?:" + "|".join(("home", "Users", "work", "opt", "mnt", "root", "tmp", "scratch")) + r")/[\w.]"
)


def tracked_files() -> list[Path]:
    """Text files of the repository, as git knows them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: the list of tracked files is unknown")
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()[:8192]]


def test_no_file_is_longer_than_one_subject():
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name: lines for name, lines in long.items() if lines > LONGEST_FILE} == {}


def test_every_module_says_what_it_is():
    """A module that holds code opens with a docstring; an empty `__init__.py` need not."""
    silent = [
        str(path.relative_to(ROOT))
        for path in MODULES
        if path.read_text().strip() and not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert silent == []


def test_every_public_function_and_class_says_what_it_does():
    silent = []
    for path in MODULES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                overload = any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)
                if not node.name.startswith("_") and not overload and not ast.get_docstring(node):
                    silent.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert silent == []


def test_no_tracked_file_names_a_path_of_somebodys_machine():
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:80]}"
        for path in tracked_files()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("open('" + "/home" + "/ann/data.json')", True),
        ("cd " + "/work" + "/main", True),
        ("--from /data/ln --to gs://bucket/tfds", False),
        ("shared/data beside the repository", False),
        ("docs/work/plan.md", False),
    ],
)
def test_the_machine_path_check_finds_what_it_should(line, found):
    assert bool(MACHINE_PATH.search(line)) is found


def test_every_package_imported_is_a_declared_dependency():
    """What the library imports is in `dependencies`; torch comes from an extra and is imported late."""

    def distribution_name(requirement: str) -> str:
        return re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0].lower().replace("_", "-")

    declared = {distribution_name(item) for item in PROJECT["dependencies"]}
    providers = packages_distributions()
    undeclared = []
    for path in MODULES:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for name in names:
                top = name.partition(".")[0]
                if top in sys.stdlib_module_names or top in PACKAGES:
                    continue
                if top == "torch" and node not in tree.body:
                    continue
                known = {provider.lower().replace("_", "-") for provider in providers.get(top, [])}
                if not known & declared:
                    undeclared.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert undeclared == []


def test_a_warning_that_our_own_code_causes_is_an_error():
    with pytest.raises(UserWarning, match="planted"):
        warnings.warn("planted", stacklevel=1)


def test_every_make_target_has_a_help_line():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z][a-z ]*):(?!=)(.*)$", makefile, flags=re.MULTILINE)
    assert {name for names, _ in targets for name in names.split()} >= {
        "help",
        "demo",
        "test",
        "lint",
        "setup",
    }
    assert [names for names, rest in targets if "## " not in rest] == []
    shown = subprocess.run(["make", "-s", "-C", str(ROOT)], capture_output=True, text=True, check=True).stdout
    assert all(names.split()[0] in shown for names, _ in targets)


def test_the_extras_for_each_accelerator_are_the_same_jax():
    """A TPU or GPU install must not bring another jax than the one that the tests ran on."""
    core = next(item for item in PROJECT["dependencies"] if item.startswith("jax>"))
    for extra in ("tpu", "cuda12", "cuda13"):
        assert PROJECT["optional-dependencies"][extra] == [core.replace("jax", f"jax[{extra}]", 1)]
