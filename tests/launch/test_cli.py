"""The command `tracevision`: its help, its messages for mistakes, its exit codes, its speed."""

import dataclasses
import importlib
import inspect
import re
import resource
import shlex
import subprocess
import sys
import types
from dataclasses import dataclass, field
from typing import Annotated

import pytest
import tyro

from launch import cli
from tests.conftest import ROOT
from tracevision_jax.errors import UserError

PYTHON = [sys.executable, "-X", "utf8"]


@dataclass(frozen=True)
class Mesh:
    fsdp: int = 1
    """Devices that share each parameter."""


@dataclass(frozen=True)
class Args:
    """Do something to a picture.

    Examples:
        tracevision predict --picture a.jpg
    """

    picture: str
    """The file."""
    mesh: Mesh = field(default_factory=Mesh)
    from_: str = ""
    to: Annotated[str, tyro.conf.arg(name="output")] = ""
    resume: bool = True


@dataclass(frozen=True)
class Masks:
    """Score masks.

    Examples:
        tracevision score masks --predictions p.json
    """

    predictions: str


@dataclass(frozen=True)
class AllBoxes:
    """Score boxes."""

    predictions: str


@pytest.fixture
def plant(monkeypatch):
    """Put a module in the place of a sub-command's."""

    def plant_module(name: str, **contents) -> list:
        calls = []
        module = types.ModuleType(f"launch.{name}", doc="Help of the whole module.")
        contents.setdefault("Args", Args)
        contents.setdefault("run", lambda args: calls.append(args))
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, f"launch.{name}", module)
        return calls

    return plant_module


def raises(error: BaseException):
    def run(args) -> int:
        raise error

    return run


def run_command(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([*PYTHON, "-m", "launch", *words], cwd=ROOT, capture_output=True, text=True)


def test_help_groups_the_three_jobs_with_an_example_of_each_command(capsys):
    for words in ([], ["--help"], ["-h"], ["help"]):
        assert cli.main(words) == 0
        text = capsys.readouterr().out
        assert [line for line in text.splitlines() if re.match(r"\d\. ", line)] == list(cli.GROUPS)[1:]
        for name in ("train", "evaluate", "predict", "convert", "score", "data", "demo"):
            assert f"$ tracevision {name}" in text
        assert max(map(len, text.splitlines())) <= 110


def test_help_and_version_load_nothing_heavy():
    code = (
        "import sys; from launch.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'jax', 'flax', 'numpy', 'tyro', 'rich', 'transformers'} & set(sys.modules);"
        "sys.exit(f'loaded: {heavy}' if heavy else code)"
    )
    for words in (["--help"], ["--version"], []):
        done = subprocess.run([*PYTHON, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_help_appears_at_once():
    """In seconds of processor time, which other work on the machine does not lengthen as it does waiting."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run_command("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(4)) < 0.3


def test_version_names_the_package_and_jax():
    done = run_command("--version")
    assert done.returncode == 0
    assert re.match(r"tracevision-jax (\d|not installed).*\(jax \d+\.\d+.*, Python 3\.\d+", done.stdout)


@pytest.mark.parametrize(("word", "nearest"), [("trian", "'train'"), ("evalute", "'evaluate'"), ("--hlep", "'--help'")])
def test_an_unknown_command_suggests_the_nearest(word, nearest, capsys):
    assert cli.main([word]) == 2
    out, err = capsys.readouterr()
    assert out == "" and f"Did you mean {nearest}?" in err and len(err.splitlines()) == 1


def test_a_word_like_no_command_lists_the_commands(capsys):
    assert cli.main(["xyzzy"]) == 2
    err = capsys.readouterr().err
    assert "Did you mean" not in err and all(name in err for name in cli.COMMANDS)


def test_flags_become_the_arguments_of_run(plant):
    calls = plant("predict")
    words = ["--picture", "a.jpg", "--mesh.fsdp", "8", "--no-resume", "--from_", "x", "--output", "y"]
    assert cli.main(["predict", *words]) == 0
    assert calls == [Args(picture="a.jpg", mesh=Mesh(8), resume=False, from_="x", to="y")]


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["--picture", "a", "--mesh.fspd", "8"], "--mesh.fsdp"),
        (["--picture", "a", "--no-resum"], "--no-resume"),
        (["--pictrue", "a"], "--picture"),  # required: the one case in which tyro itself suggests nothing
        (["--pictrue=a"], "--picture"),
        (["--picture", "a", "--outptu", "b"], "--output"),
    ],
)
def test_an_unknown_flag_suggests_the_nearest_and_exits_with_2(words, nearest, plant, capsys):
    calls = plant("predict")
    with pytest.raises(SystemExit) as stop:
        cli.main(["predict", *words])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and calls == [] and out == ""
    wrong = next(word.partition("=")[0] for word in words if word.partition("=")[0] not in ("--picture", "a"))
    assert f"There is no flag '{wrong}'. Did you mean '{nearest}'?" in err


def test_a_wrong_value_is_not_taken_for_a_wrong_flag(plant, capsys):
    plant("predict")
    with pytest.raises(SystemExit) as stop:
        cli.main(["predict", "--picture", "a", "--mesh.fsdp", "many"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "--mesh.fsdp" in err and "There is no flag" not in err


def test_flags_are_spelt_as_tyro_spells_them(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(Args, args=["--help"])
    shown = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out)) - {"--help"}
    assert set(cli.flags_of(Args)) == shown


def test_the_help_of_a_command_keeps_its_examples(plant, capsys):
    plant("predict")
    with pytest.raises(SystemExit) as stop:
        cli.main(["predict", "--help"])
    assert stop.value.code == 0
    assert "    tracevision predict --picture a.jpg" in capsys.readouterr().out


@pytest.fixture
def score(plant):
    """A command with commands of its own, one named and one called after its class."""
    return plant("score", Args=Annotated[Masks, tyro.conf.subcommand("masks")] | AllBoxes)


def test_nested_commands_parse_and_run(score):
    assert cli.main(["score", "masks", "--predictions", "p.json"]) == 0
    assert cli.main(["score", "all-boxes", "--predictions", "q.json"]) == 0
    assert score == [Masks("p.json"), AllBoxes("q.json")]


def test_an_unknown_nested_command_suggests_the_nearest(score, capsys):
    assert cli.main(["score", "mask", "--predictions", "p.json"]) == 2
    assert "Did you mean 'masks'? Choose from: masks, all-boxes." in capsys.readouterr().err


def test_the_help_of_nested_commands_lists_them_and_keeps_examples(score, capsys):
    with pytest.raises(SystemExit):
        cli.main(["score", "--help"])
    text = capsys.readouterr().out
    assert "Help of the whole module." in text and "masks" in text and "all-boxes" in text
    with pytest.raises(SystemExit):
        cli.main(["score", "masks", "--help"])
    assert "    tracevision score masks --predictions p.json" in capsys.readouterr().out


def test_a_nested_command_is_required(score):
    with pytest.raises(SystemExit) as stop:
        cli.main(["score"])
    assert stop.value.code == 2 and score == []


def test_a_module_may_parse_its_own_flags(plant):
    calls = plant("train", parse=lambda argv: ("parsed", argv))
    assert cli.main(["train", "recipe", "--x", "1"]) == 0
    assert calls == [("parsed", ["recipe", "--x", "1"])]


def test_defaults_can_come_from_a_recipe():
    recipe = Args(picture="of the recipe.jpg", mesh=Mesh(4))
    args = cli.parse_with_tyro(Args, ["--no-resume"], "tracevision train", default=recipe)
    assert args == dataclasses.replace(recipe, resume=False)


def test_the_exit_code_is_that_of_run(plant):
    plant("predict", run=lambda args: 3)
    assert cli.main(["predict", "--picture", "a"]) == 3


def test_a_users_mistake_is_one_message_without_traceback(plant, capsys, monkeypatch):
    monkeypatch.delenv("TRACEVISION_DEBUG", raising=False)
    plant("predict", run=raises(UserError("a.jpg: no such picture; check --picture")))
    assert cli.main(["predict", "--picture", "a.jpg"]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", "tracevision predict: a.jpg: no such picture; check --picture\n")


@pytest.mark.parametrize("error", [UserError("no such picture"), KeyboardInterrupt()])
def test_debugging_shows_the_traceback(error, plant, capsys, monkeypatch):
    monkeypatch.setenv("TRACEVISION_DEBUG", "1")
    plant("predict", run=raises(error))
    cli.main(["predict", "--picture", "a.jpg"])
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_interruption_is_one_line_and_130(plant, capsys, monkeypatch):
    monkeypatch.delenv("TRACEVISION_DEBUG", raising=False)
    plant("predict", run=raises(KeyboardInterrupt()))
    assert cli.main(["predict", "--picture", "a.jpg"]) == 130
    assert capsys.readouterr().err == "tracevision: interrupted\n"


def test_a_defect_keeps_its_traceback(plant):
    plant("predict", run=raises(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["predict", "--picture", "a.jpg"])


def test_a_reader_that_goes_away_is_no_defect():
    """`tracevision --help | head -1` ends quietly."""
    code = (
        "import os, sys; from launch.cli import main\n"
        "reader, writer = os.pipe(); os.close(reader)\n"
        "sys.stdout = os.fdopen(writer, 'w', buffering=1); sys.exit(main(['--help']))"
    )
    done = subprocess.run([*PYTHON, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_there_and_its_example_parses(name):
    module = importlib.import_module(f"launch.{name}")
    assert list(inspect.signature(module.run).parameters) == ["args"]
    program, command, *words = shlex.split(cli.COMMANDS[name].example)
    assert (program, command) == ("tracevision", name)
    cli.parse(module, words, f"tracevision {name}")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_of_every_command_comes_without_jax(name):
    """Except that of `train`, whose flags are the fields of recipes, models among them."""
    code = (
        "import sys; from launch.cli import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "sys.exit('jax was loaded' if 'jax' in sys.modules and sys.argv[1] != 'train' else 0)"
    )
    done = subprocess.run([*PYTHON, "-c", code, name, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"tracevision {name}" in done.stdout
