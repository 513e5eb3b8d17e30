"""Describe, point, segment or answer about one picture or video, from the command line."""

import json as json_format
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from tracevision_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from tracevision_jax.inference.answers import Answer
    from tracevision_jax.inference.tracevision import TraceVisionInference


@dataclass(frozen=True)
class Args:
    """Describe, point, segment or answer about one picture or video.

    Without a task flag, the trace is described. The answer goes to standard output; --out also writes it as
    answer.txt, answer.json (coordinates in [0, 1], masks as COCO run lengths) and picture.png.

    Examples:
      tracevision predict checkpoints/tracevision-7b --image a.jpg --trace a.json
      tracevision predict checkpoints/tracevision-7b --image a.jpg --caption "a man throws a ball" --out ball/
      tracevision predict checkpoints/tracevision-7b --image a.jpg --segment "the dog" --out dog/
      tracevision predict checkpoints/tracevision-7b --image a.jpg --trace a.json --segment --out traced/
      tracevision predict checkpoints/tracevision-7b --image a.jpg --locate "the red kite"
      tracevision predict checkpoints/tracevision-7b --video clip.mp4 --trace a.json b.json --ask "Compare {A} and {B}."
    """

    checkpoint: tyro.conf.Positional[str]
    """Model directory, folder of a run, or a Qwen2.5-VL."""
    image: tuple[Path, ...] = ()
    """Picture; several of one size are asked about together."""
    video: Path | None = None
    """Video file."""
    trace: tuple[Path, ...] = ()
    """JSON file of a trace, [[x, y, t], ...] in [0, 1] and seconds, or a Localized Narratives record; several
    are A, B, ..."""
    caption: str | None = None
    """Predict the trace of someone who says this."""
    segment: tuple[str, ...] | None = None
    """Give masks of what this names; of what the trace rests on if nothing follows."""
    locate: str | None = None
    """Give the box of what this names."""
    ask: tuple[str, ...] = ()
    """A question, or question, answer, ..., question; {A} stands for the first trace."""
    out: Path | None = None
    """Folder to write to."""
    attention: bool = False
    """Also draw what the TVP attends to, as attention.png in --out."""
    max_new_tokens: int = 256
    """Most tokens of the answer."""
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Draw among the most likely tokens that together reach this probability."""
    top_k: int = 0
    """Draw among this many of the most likely tokens; 0: all."""
    seed: int = 0
    """Of the draws."""
    dtype: str | None = None
    """float32, bfloat16 or float16; as stored by default."""
    tensor: int = 1
    """Devices that share every layer."""


def run(args: Args) -> int:
    """Answer, print, write.

    Raises:
        UserError: flags that do not fit together, or files that cannot be used.
    """
    check(args)
    model = _load(args)
    answer, sample, traces = _answer(model, args)
    lines = report(answer)
    if lines:
        print("\n".join(lines))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        _write(args, args.out, model, answer, sample, traces)
    return 0


def check(args: Args) -> None:
    """Check the flags before anything is loaded.

    Raises:
        UserError: flags that do not fit together.
    """
    tasks = {"--caption": args.caption, "--segment": args.segment, "--locate": args.locate, "--ask": args.ask or None}
    given = [flag for flag, value in tasks.items() if value is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are different tasks; give one of them")
    if bool(args.image) == (args.video is not None):
        raise UserError("give --image or --video, one of the two")
    if not given and len(args.trace) != 1:
        raise UserError("to describe a trace give one with --trace FILE, or say what to do: " + ", ".join(tasks))
    if args.segment == () and len(args.trace) != 1:
        raise UserError("--segment needs the name of what to segment, or one --trace FILE over it")
    if args.trace and (args.caption is not None or args.locate is not None or args.segment):
        raise UserError(f"{given[0]} takes no trace here; ask about it with --ask, as {{A}}")
    if args.attention and (args.out is None or not args.trace):
        raise UserError("--attention draws a trace's attention into --out DIR; give both --trace and --out")
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file; give a folder")
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens is {args.max_new_tokens}, must be at least 1")


def _load(args: Args) -> "TraceVisionInference":
    from tracevision_jax.inference.loading import load
    from tracevision_jax.parallel.mesh import MeshConfig

    mesh = None if args.tensor == 1 else MeshConfig(tensor=args.tensor)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = load(args.checkpoint, mesh=mesh, dtype=args.dtype)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return model


def _answer(model: "TraceVisionInference", args: Args) -> tuple["Answer", Any, list["np.ndarray"]]:
    """The answer, what it is about, and the traces that were shown."""
    from tracevision_jax.inference.dialogue import conversation_of
    from tracevision_jax.inference.engine import Sampling
    from tracevision_jax.inference.media import read_trace, read_video
    from tracevision_jax.records import templates
    from tracevision_jax.records.sample import TracePart

    if args.video is not None:
        sample = model.read(*read_video(args.video, model.system.config.processor.vision.frames_per_second))
    else:
        sample = model.read(args.image[0] if len(args.image) == 1 else list(args.image))
    traces = [read_trace(path) for path in args.trace]
    processor, force = model.processor, []
    if args.caption is not None:
        asked, force = templates.predict_trace(args.caption, None), processor.trajectory_outline(args.caption)
    elif args.locate is not None:
        asked, force = templates.locate(args.locate, None), processor.box_beginning(args.locate)
    elif args.segment:
        asked = templates.segment_phrases([], prompt=" ".join(args.segment))
    elif args.segment is not None:
        asked, force = templates.segment_trace(TracePart(traces[0]), []), processor.phrase_beginning()
    elif args.ask:
        letters = {chr(ord("A") + number): points for number, points in enumerate(traces)}
        asked = conversation_of(args.ask, letters, len(sample.frames))
    else:
        asked = templates.describe_trace(TracePart(traces[0]), "")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        print(text, end="", flush=True)

    answer = model.ask(sample, asked, force=force, max_new_tokens=args.max_new_tokens, sampling=sampling, on_text=say)
    if said:
        print()
    return answer, sample, traces


def report(answer: "Answer") -> list[str]:
    """What an answer holds beside its text, a line each."""
    lines = [
        f"trajectory of {len(points)} points: " + " ".join(f"({x:.3f}, {y:.3f})" for x, y in points.tolist())
        for points in answer.trajectories
    ]
    for number, line in enumerate(answer.grounded, 1):
        name = line.phrase or f"object {number}"
        if line.box is not None:
            lines.append(f"box of {name}: " + ", ".join(f"{value:.3f}" for value in line.box.tolist()))
        if line.mask is not None:
            lines.append(f"mask of {name}: {100 * float(line.mask.mean()):.1f} % of the picture")
    if answer.finished == "budget":
        lines.append("(the answer was cut off at --max-new-tokens)")
    return lines


def _write(
    args: Args, folder: Path, model: "TraceVisionInference", answer: "Answer", sample: Any, traces: list["np.ndarray"]
) -> None:
    from tracevision_jax.inference.rendering import draw_answer, draw_attention

    (folder / "answer.txt").write_text("\n".join([answer.text, *report(answer)]) + "\n", encoding="utf-8")
    text = json_format.dumps(answer.as_json(), indent=2, allow_nan=False, ensure_ascii=False)
    (folder / "answer.json").write_text(text + "\n", encoding="utf-8")
    draw_answer(sample, answer, traces).save(folder / "picture.png")
    written = ["answer.txt", "answer.json", "picture.png"]
    if args.attention:
        rate = sample.frames_per_second or None
        blocks = model.attention(sample.frames if rate else sample.frames[0], traces[0], frames_per_second=rate)
        draw_attention(sample, blocks).save(folder / "attention.png")
        written.append("attention.png")
    print(f"wrote {', '.join(written)} to {folder}", file=sys.stderr)
