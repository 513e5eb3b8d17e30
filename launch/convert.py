"""`tracevision convert`: PyTorch checkpoints to ours and back, or a trained host to PyTorch."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from tracevision_jax.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from tracevision_jax.weights.conversion import Conversion
    from tracevision_jax.weights.safetensors_io import Progress


@dataclass(frozen=True)
class Args:
    """Convert a checkpoint; which way is told by what --from holds.

      a Hugging Face directory (safetensors, .bin or .pt)   -> ours
      ours, as this command wrote it                        -> a directory that transformers loads
      a trained TraceVision (runs/NAME/model)               -> its host, added tokens merged, for transformers

    Names, shapes and files are checked first, and everything that is wrong is listed at once. The result appears whole
    or not at all. Weights stream through: memory for one tensor is enough.

    Examples:
      tracevision convert --from Qwen2.5-VL-7B-Instruct --to checkpoints/qwen7b --verify
      tracevision convert --from checkpoints/qwen7b --to exported --dtype bfloat16
    """

    source: Annotated[Path, tyro.conf.arg(name="from")]
    """The checkpoint, a directory."""
    to: Path
    """The directory to write."""
    verify: bool = False
    """Afterwards run both implementations on the same prompt, pictures included, and print the largest relative error
    of every stage; exit with 1 if one is beyond 1e-4. Needs torch, and memory for the model in float32."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the written weights; as they are by default."""
    overwrite: bool = False
    """Replace the checkpoint that --to holds."""
    max_shard_gb: float = 5.0
    """Largest weight file in gigabytes; a single larger tensor gets a file of its own."""


def run(args: Args) -> int:
    """Convert, and compare if asked; returns 1 when the comparison fails.

    Raises:
        UserError: nothing was written, and the message says why.
    """
    from rich.console import Console
    from rich.filesize import decimal

    from tracevision_jax.weights.conversion import check_places

    if args.max_shard_gb <= 0:
        raise UserError(f"--max-shard-gb is {args.max_shard_gb}; it must be positive")
    if args.verify:
        from evaluation.verify import require_torch

        require_torch()
    check_places(args.source, args.to, args.overwrite)
    if not args.source.is_dir():
        raise UserError(f"--from {args.source} is no directory")
    console = Console(stderr=True)
    conversion, reference, ours = plan(args)
    with ended_by_termination(), progress_bar(console, conversion) as progress:
        conversion.run(args.overwrite, int(args.max_shard_gb * 1e9), progress)
    console.print(
        f"wrote {args.to}: {len(conversion.plans)} tensors, {decimal(conversion.bytes)}",
        highlight=False,
        soft_wrap=True,
    )
    return compare(console, reference, ours) if args.verify else 0


def plan(args: Args) -> tuple["Conversion", Path, Path]:
    """The conversion, and which directories are Hugging Face's and ours when it is done.

    Raises:
        UserError: the source cannot be converted.
    """
    from tracevision_jax.weights import model_directory
    from tracevision_jax.weights.conversion import model_to_hugging_face, to_hugging_face, to_native
    from tracevision_jax.weights.families import recognise

    if model_directory.is_model(args.source):
        return model_to_hugging_face(args.source, args.to, args.dtype), args.to, args.source
    found = recognise(args.source)
    if found.native:
        return to_hugging_face(args.source, args.to, found.family, args.dtype), args.to, args.source
    return to_native(args.source, args.to, found.family, args.dtype), args.source, args.to


@contextmanager
def progress_bar(console: "Console", conversion: "Conversion") -> Iterator["Progress"]:
    """Show tensors, bytes, bytes per second and the time left; yields the callback that moves the bar."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.fields[done]}/{task.fields[tensors]} tensors"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    remaining = {plan.name: plan.bytes for plan in conversion.plans}
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("", total=conversion.bytes, done=0, tensors=len(remaining))

        def advance(name: str, count: int) -> None:
            remaining[name] -= count
            done = sum(1 for left in remaining.values() if left <= 0)
            bar.update(task, advance=count, done=done, description=name)

        yield advance


@contextmanager
def ended_by_termination() -> Iterator[None]:
    """Let SIGTERM end the program like Ctrl-C, so that what is half written is removed."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: nobody sends this thread signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def compare(console: "Console", reference: Path, ours: Path) -> int:
    """Compare the two directories' models and print the table; 1 when a stage is beyond its limit."""
    from rich.console import Console
    from rich.table import Table

    from evaluation.verify import VERIFIERS
    from tracevision_jax.weights.conversion import read_host_config, read_host_params
    from tracevision_jax.weights.families import recognise

    verifier = VERIFIERS[recognise(reference).family.name]
    with console.status("comparing with transformers") as status:
        config = read_host_config(ours)
        rows = verifier(reference, config, lambda: read_host_params(ours, "float32"), status.update)
    table = Table(
        "stage", "compared", "largest relative error", "limit", "", title="ours against transformers, float32"
    )
    for row in rows:
        verdict = "[green]equal[/green]" if row.passed else "[red]DIFFERS[/red]"
        table.add_row(row.stage, f"{row.rows} rows", f"{row.error:.2e}", f"{row.limit:.0e}", verdict)
    Console().print(table)
    if all(row.passed for row in rows):
        return 0
    console.print("[red]The two implementations differ: do not use the result, and report this checkpoint.[/red]")
    return 1
