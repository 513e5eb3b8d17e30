"""The command `tracevision`: finds the sub-command, parses its flags, turns errors into messages.

A sub-command NAME is the module `launch/NAME.py`, imported only when it is called, with
- `Args`: a frozen dataclass (its docstring is the help text), or a union of them for commands with commands
  of their own, each member `Annotated[Dataclass, tyro.conf.subcommand("name")]`;
- `run(args) -> int | None`: does the work and returns the exit code (None is 0);
- optionally `parse(argv) -> args`, which replaces the parsing of `Args` (`train` looks a recipe up first and
  then reads overrides of its fields); `parse_with_tyro` serves it as well.

A module imports jax inside `run`, so that help and mistakes in flags take no time. Exit codes: 0; 1 for a
defect (with a traceback); 2 for a mistake of the user (one message); 130 when interrupted; 75 when training was told to
stop by SIGTERM and has saved.
`TRACEVISION_DEBUG=1` shows every traceback; `TRACEVISION_COMPILATION_CACHE` moves the cache of compiled programs or
turns it off (`launch/compilation_cache.py`).
"""

import dataclasses
import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import ModuleType, UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from launch import compilation_cache
from tracevision_jax.errors import Stuck, UserError
from tracevision_jax.nearest import suggest

PROGRAM = "tracevision"


class Command(NamedTuple):
    """A sub-command as the top-level help shows it."""

    summary: str
    example: str


GROUPS: dict[str, dict[str, Command]] = {
    "See it work": {
        "demo": Command(
            "train a small model on drawn scenes, evaluate it, write a report with pictures (15 minutes)",
            "tracevision demo",
        ),
    },
    "1. Train": {
        "data": Command(
            "build and inspect datasets",
            "tracevision data build ln_coco --from /data/localized_narratives --to /data/tfds",
        ),
        "train": Command(
            "train a recipe of configs/, or continue it; any field is a flag",
            "tracevision train tracevision_7b_stage1 --init-from checkpoints/qwen7b --mesh.fsdp 64",
        ),
        "supervise": Command(
            "start the processes of a run on this host; end all when one dies, with one message",
            "tracevision supervise --processes 8 -- tracevision train tracevision_7b_stage1 --mesh.fsdp 8",
        ),
        "launch": Command(
            "write what starts a recipe on a cluster: SLURM, GKE, XPK or TPU VM",
            "tracevision launch slurm tracevision_7b_stage1 --nodes 2 -- --out /data/runs/s1 --mesh.fsdp 16",
        ),
        "compile": Command(
            "what a recipe needs and takes on chips that are not here: memory, FLOPs, collectives, step time",
            "tracevision compile tracevision_7b_stage1_5 --topology v5p:8x8x4",
        ),
    },
    "2. Convert": {
        "convert": Command(
            "PyTorch checkpoints to ours and back, compared on the same prompts",
            "tracevision convert --from Qwen2.5-VL-7B-Instruct --to checkpoints/qwen7b --verify",
        ),
    },
    "3. Evaluate and use": {
        "evaluate": Command(
            "run benchmarks on a checkpoint, resumable, with tables in Markdown and JSON",
            "tracevision evaluate checkpoints/tracevision-7b --benchmark ln_coco",
        ),
        "score": Command(
            "score anybody's predictions from files",
            "tracevision score lbm --predictions p.json --references r.json --k 0",
        ),
        "predict": Command(
            "describe, point, segment or answer about one image or video",
            "tracevision predict checkpoints/tracevision-7b --image a.jpg --trace a.json",
        ),
        "track": Command(
            "follow objects through a video from a box, clicks or a mask; masks, JSON, an overlay",
            "tracevision track clip.mp4 --checkpoint checkpoints/sam2.1_tiny --box 10 20 200 180 --out out",
        ),
    },
}
COMMANDS: dict[str, Command] = {name: command for group in GROUPS.values() for name, command in group.items()}


def help_text() -> str:
    """The top-level help: the three jobs, each with its commands and an example of each."""
    lines = [
        "tracevision: models that read and draw human traces over images and videos.",
        "",
        f"usage: {PROGRAM} COMMAND [flags]",
        f"       {PROGRAM} COMMAND --help      what COMMAND takes, with examples",
        f"       {PROGRAM} --version",
    ]
    for title, commands in GROUPS.items():
        lines += ["", title]
        for name, command in commands.items():
            lines += [f"  {name:<10}{command.summary}", f"            $ {command.example}"]
    lines += [
        "",
        "A mistyped command, recipe or flag is answered with the nearest name.",
    ]
    return "\n".join(lines)


def version_text() -> str:
    """Version of this package and of what results depend on, read without importing any of it."""
    from importlib.metadata import PackageNotFoundError, version

    def version_of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    libraries = ", ".join(f"{name} {version_of(name)}" for name in ("jax", "jaxlib", "flax"))
    python = ".".join(str(part) for part in sys.version_info[:3])
    return f"tracevision-jax {version_of('tracevision-jax')} ({libraries}, Python {python})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; `argv` is what follows the word `tracevision`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    compilation_cache.enable(os.environ)
    try:
        return _dispatch(argv)
    except UserError as error:
        _print_traceback_when_debugging()
        prefix = f"{PROGRAM} {argv[0]}" if argv and argv[0] in COMMANDS else PROGRAM
        print(f"{prefix}: {error}", file=sys.stderr)
        if isinstance(error, Stuck):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)  # the interpreter would wait for the thread that hangs
        return 2
    except KeyboardInterrupt:
        _print_traceback_when_debugging()
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output went away (`| head`): not a defect. Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if argv[0] in ("-V", "--version"):
        print(version_text())
        return 0
    name, rest = argv[0], argv[1:]
    if name not in COMMANDS:
        kind = "flag" if name.startswith("-") else "command"
        known = [*COMMANDS, "--help", "--version"]
        raise UserError(
            f"there is no {kind} '{name}'.{suggest(name, known)} Commands: {', '.join(COMMANDS)}. See {PROGRAM} --help."
        )
    module = importlib.import_module(f"launch.{name}")
    return int(module.run(parse(module, rest, f"{PROGRAM} {name}")) or 0)


def parse(module: ModuleType, argv: Sequence[str], program: str) -> Any:
    """Parse the flags of a sub-command: by its module's own `parse` if there is one, else from its `Args`."""
    if hasattr(module, "parse"):
        return module.parse(list(argv))
    return parse_with_tyro(module.Args, argv, program, description=module.__doc__)


def parse_with_tyro(
    arguments: Any, argv: Sequence[str], program: str, description: str | None = None, default: Any = None
) -> Any:
    """Parse flags into a dataclass (or a union of them), starting from `default` when one is given.

    Exits with status 2 on a mistake, after naming the nearest flag, and with 0 after `--help`. The help text
    is the dataclass's docstring, examples included; for a union, `description`.

    Raises:
        UserError: the first word is none of the union's commands.
    """
    import tyro

    if get_origin(arguments) in (Union, UnionType):
        members = {_nested_name(member): member for member in get_args(arguments)}
        if argv and not argv[0].startswith("-"):
            name = argv[0]
            if name not in members:
                raise UserError(
                    f"there is no command '{program} {name}'.{suggest(name, members)} "
                    f"Choose from: {', '.join(members)}."
                )
            return parse_with_tyro(members[name], argv[1:], f"{program} {name}", default=default)
    else:
        # Handed over explicitly, since tyro reads a docstring by sections and would drop "Examples:".
        description = _dataclass_of(arguments).__doc__
    text = inspect.cleandoc(description) if description else None
    keywords = {} if default is None else {"default": default}
    try:
        return tyro.cli(arguments, prog=program, description=text, args=list(argv), **keywords)
    except SystemExit as stop:
        if stop.code == 2:
            _print_nearest_flags(_dataclass_of(arguments), argv)
        raise


def _print_nearest_flags(arguments: Any, argv: Sequence[str]) -> None:
    """Name the flag that was meant: tyro does so too, but not when a required flag is the mistyped one."""
    known = list(flags_of(arguments))
    for word in argv:
        flag = _hyphened(word.partition("=")[0])
        if flag.startswith("--") and flag not in (*known, "--help") and suggest(flag, known):
            print(f"There is no flag '{flag}'.{suggest(flag, known)}", file=sys.stderr)


def flags_of(arguments: Any, prefix: str = "--") -> Iterator[str]:
    """The flags of a dataclass and of those in it, as tyro spells them: `--mesh.fsdp`, `--no-resume`."""
    if not dataclasses.is_dataclass(arguments):
        return
    hints = get_type_hints(arguments, include_extras=True)
    for field in dataclasses.fields(arguments):
        hint, renamed = _dataclass_of(hints[field.name]), _given_name(hints[field.name])
        name = renamed or _hyphened(field.name)
        if dataclasses.is_dataclass(hint):
            yield from flags_of(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
            if hint is bool:
                yield f"{prefix}no-{name}"


def _hyphened(name: str) -> str:
    """Spell a name as tyro does: inner underscores become hyphens, trailing ones stay."""
    stem = name.rstrip("_")
    return stem.replace("_", "-") + name[len(stem) :]


def _nested_name(member: Any) -> str:
    """Name of a union's member: given with `tyro.conf.subcommand`, else the class name with hyphens."""
    return _given_name(member) or re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", _dataclass_of(member).__name__).lower()


def _given_name(member: Any) -> str | None:
    """The name in `Annotated[..., tyro.conf.subcommand(name)]` or `tyro.conf.arg(name=...)`."""
    notes = get_args(member)[1:] if get_origin(member) is Annotated else ()
    return next((note.name for note in notes if getattr(note, "name", None)), None)


def _dataclass_of(member: Any) -> Any:
    """The dataclass inside `Annotated[...]`, or what is given."""
    return get_args(member)[0] if get_origin(member) is Annotated else member


def _print_traceback_when_debugging() -> None:
    if os.environ.get("TRACEVISION_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
