"""`tracevision convert`: PyTorch checkpoints to ours and back, or a trained host to PyTorch."""

import signal
import tempfile
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
      SAM's or SAM 2's own file (.pth, .pt)                 -> ours
      ours, as this command wrote it                        -> a directory that transformers loads
      a trained TraceVision or SAM 2 (runs/NAME/model)      -> its host, added tokens merged, for transformers

    Family, layout and size are recognised. Names, shapes and files are checked first, and everything that is wrong is
    listed at once. The result appears whole or not at all. Weights stream through: memory for one tensor is enough.
    Of PyTorch files tensors alone are read; one that would run code is refused.

    Examples:
      tracevision convert --from Qwen2.5-VL-7B-Instruct --to checkpoints/qwen7b --verify
      tracevision convert --from checkpoints/qwen7b --to exported --dtype bfloat16
      tracevision convert --from sam2.1_hiera_tiny.pt --to checkpoints/sam2_tiny --verify
      tracevision convert --from checkpoints/sam2_tiny --to exported --layout original
    """

    source: Annotated[Path, tyro.conf.arg(name="from")]
    """The checkpoint, a directory or a PyTorch file."""
    to: Path
    """The directory to write."""
    layout: Literal["hugging_face", "original"] = "hugging_face"
    """Of what is written from ours: a directory for transformers, or a file with the names of the model's authors (SAM,
    SAM 2)."""
    verify: bool = False
    """Afterwards run both implementations on the same prompt, pictures included, and print the largest relative error
    of every stage; exit with 1 if one is beyond 1e-4. Needs torch, and memory for the model in float32. Transformers
    reads no file of SAM's authors: of one it is given the weights as ours exports them."""
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
    if not args.source.exists():
        raise UserError(f"--from {args.source} is no directory and no file")
    console = Console(stderr=True)
    conversion, reference, ours = plan(args)
    with ended_by_termination(), progress_bar(console, conversion) as progress:
        conversion.run(args.overwrite, int(args.max_shard_gb * 1e9), progress)
    console.print(
        f"wrote {args.to}: {len(conversion.plans)} tensors, {decimal(conversion.bytes)}",
        highlight=False,
        soft_wrap=True,
    )
    if not args.verify:
        return 0
    if reference is not None:
        return compare(console, reference, ours)
    with tempfile.TemporaryDirectory(dir=args.to.absolute().parent, prefix=".verify-") as folder:
        reference = Path(folder) / "reference"
        export(ours, reference).run()
        return compare(console, reference, ours)


def plan(args: Args) -> tuple["Conversion", Path | None, Path]:
    """The conversion, and which directories are Hugging Face's, if one is, and ours when it is done.

    Raises:
        UserError: the source cannot be converted.
    """
    from tracevision_jax.weights import model_directory
    from tracevision_jax.weights.conversion import to_native
    from tracevision_jax.weights.families import recognise

    if not model_directory.is_model(args.source):
        found = recognise(args.source)
        if not found.native:
            if args.layout != "hugging_face":
                raise UserError(f"--layout {args.layout} is for what is written from ours: convert {args.source} first")
            conversion = to_native(args.source, args.to, found.family, args.dtype)
            return conversion, args.source if found.layout == "hugging_face" else None, args.to
    reference = args.to if args.layout == "hugging_face" else None
    return export(args.source, args.to, args.dtype, args.layout), reference, args.source


def export(
    source: Path, target: Path, dtype: str | None = None, layout: Literal["hugging_face", "original"] = "hugging_face"
) -> "Conversion":
    """From ours, converted or trained, to PyTorch.

    Raises:
        UserError: the source cannot be converted.
    """
    from tracevision_jax.weights import model_directory
    from tracevision_jax.weights.conversion import model_to_pytorch, to_hugging_face, to_original
    from tracevision_jax.weights.families import recognise

    if model_directory.is_model(source):
        return model_to_pytorch(source, target, dtype, layout)
    convert = to_hugging_face if layout == "hugging_face" else to_original
    return convert(source, target, recognise(source).family, dtype)


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

    from evaluation.verifiers import VERIFIERS
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
