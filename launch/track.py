"""Track objects through a video from a box, clicks or a mask, from the command line."""

import json as json_format
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from tracevision_jax.errors import UserError

if TYPE_CHECKING:
    from rich.progress import Progress

    from tracevision_jax.inference.frames import FrameSource
    from tracevision_jax.inference.tracker import Session
    from tracevision_jax.inference.tracker_files import TrackFolder

SAVE_EVERY_S = 15.0
"""Time between two savings of the state: so much work is lost at most when the command is killed."""

Place = tuple[float, float]
Box = tuple[float, float, float, float]
FORWARDS, BACKWARDS, DONE = 0, 1, 2
"""Stages of a command."""


@dataclass(frozen=True)
class Args:
    """Track objects through a video from a box, clicks or a mask.

    Each --box is an object, all clicks together are one, a mask gives an object for each of its ids. Places are pixels
    of the frame. --out gets masks/NAME/FRAME.png (DAVIS's layout: object numbers as palette indices), tracks.json
    (SA-V's layout), frames.jsonl (boxes and scores of each frame) and the overlay. Interrupted, the same command again
    goes on where it was.

    Examples:
      tracevision track clip.mp4 --checkpoint checkpoints/sam2.1_tiny --box 10 20 200 180 --out tracked
      tracevision track clip.mp4 --checkpoint sam2.1_tiny --point 210 350 --not-point 90 40 --out tracked
      tracevision track frames/ --checkpoint sam2.1_hiera_tiny.pt --mask first.png --reverse --overlay gif --out tracked
      tracevision track clip.mp4 --checkpoint runs/sam2_demo --prompts prompts.json --out tracked
    """

    video: tyro.conf.Positional[Path]
    """Video file, or folder of pictures."""
    checkpoint: Path
    """SAM 2: a converted directory, the folder of a run, a Hugging Face directory, or a .pt file."""
    out: Path
    """Folder to write to."""
    box: Annotated[tuple[Box, ...], tyro.conf.arg(metavar="X1 Y1 X2 Y2")] = ()
    """Box of an object, x1 y1 x2 y2; four more numbers are the next object."""
    point: Annotated[tuple[Place, ...], tyro.conf.arg(metavar="X Y")] = ()
    """Click on the object, x y; more numbers are more clicks. With one --box they are about its object."""
    not_point: Annotated[tuple[Place, ...], tyro.conf.arg(metavar="X Y")] = ()
    """Click beside the object of --point."""
    mask: Path | None = None
    """PNG of the frame's size whose palette indices (or grey values) are object numbers."""
    frame: int = 0
    """Frame, counted from 0, that --box, --point and --mask are about."""
    prompts: Path | None = None
    """JSON file: a list of {"object": 1, "frame": 0, "box": [x1, y1, x2, y2], "points": [[x, y, label], ...]} or
    {"object": 1, "mask": "mask.png"}."""
    reverse: bool = False
    """Also track from the first prompt back to the beginning."""
    overlay: Literal["mp4", "gif", "none"] = "mp4"
    """Video or animation of the masks over the frames."""
    name: str | None = None
    """Of the video in the output; by default the file's."""
    batch: int = 8
    """Frames that are computed together."""
    image_size: int | None = None
    """Side of the model's pictures in pixels; smaller is faster. That of the checkpoint by default."""
    dtype: str | None = None
    """float32 or bfloat16; as stored by default."""


def run(args: Args) -> int:
    """Track, write, and say what was done.

    Raises:
        UserError: flags that do not fit together, or files that cannot be used.
    """
    said = check(args)
    from rich.console import Console

    from tracevision_jax.inference.frames import open_frames
    from tracevision_jax.inference.tracker_files import TrackFolder, fingerprint

    source = open_frames(args.video)
    content = [said, args.reverse, args.batch, args.image_size, args.dtype, args.name, str(args.video.resolve())]
    masks = [Path(prompt["mask"]) for prompt in said if "mask" in prompt]
    told = fingerprint(content, args.video, args.checkpoint, *masks)
    folder = TrackFolder(args.out, args.name or args.video.resolve().stem, told)
    console = Console(stderr=True)
    stopped = _track(args, said, source, folder, console)
    if stopped:
        console.print(f"interrupted by {stopped}; the same command goes on from there", markup=False, highlight=False)
        return 130
    written = [f"masks/{folder.masks.name}/", "frames.jsonl", *_finish(args, source, folder, console)]
    print(f"wrote {', '.join(written)} to {args.out}", file=sys.stderr)
    return 0


def check(args: Args) -> list[dict[str, Any]]:
    """Check the flags before anything is loaded; gives the prompts, as --prompts has them.

    Raises:
        UserError: flags that do not fit together, or a prompt file that cannot be used.
    """
    clicks = [[*point, 1] for point in args.point] + [[*point, 0] for point in args.not_point]
    said = _read_prompts(args.prompts) if args.prompts is not None else []
    if args.mask is not None:
        if args.box or clicks:
            raise UserError("--mask says where its objects are; give further ones with --prompts FILE")
        said.append({"mask": str(args.mask), "frame": args.frame})
    if args.prompts is not None and (args.box or clicks or args.mask is not None):
        raise UserError("--prompts says everything; put boxes, clicks and masks into its file")
    said += [{"object": number, "frame": args.frame, "box": list(box)} for number, box in enumerate(args.box, 1)]
    if clicks and len(args.box) == 1:
        said[0]["points"] = clicks
    elif clicks:
        said.append({"object": len(args.box) + 1, "frame": args.frame, "points": clicks})
    if not said:
        raise UserError("say what to track: --box X1 Y1 X2 Y2, --point X Y, --mask FILE, or --prompts FILE")
    if args.batch < 1:
        raise UserError(f"--batch is {args.batch}; it must be at least 1")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out {args.out} is a file; give a folder")
    if args.name is not None and (not args.name or Path(args.name).name != args.name):
        raise UserError(f"--name '{args.name}' is no name of a folder")
    return said


def _read_prompts(path: Path) -> list[dict[str, Any]]:
    try:
        said = json_format.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the prompts {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"the prompts {path} are not valid JSON: {error}") from error
    known = {"object", "frame", "box", "points", "mask"}
    for number, prompt in enumerate(said if isinstance(said, list) else [None]):
        if (
            not isinstance(prompt, dict)
            or not prompt.keys() <= known
            or not ("object" in prompt or "mask" in prompt)
            or not all(type(prompt.get(key, 1)) is int for key in ("object", "frame"))
        ):
            raise UserError(
                f'{path}: prompt {number} must be an object with "object", a whole number, and "box", "points" or '
                f'"mask", perhaps "frame"; not {json_format.dumps(prompt)[:80]}'
            )
        if "mask" in prompt:
            prompt["mask"] = str(path.parent / str(prompt["mask"]))
    return said


def _say(session: "Session", said: list[dict[str, Any]]) -> None:
    """Give the prompts to a session."""
    from evaluation.metrics.video_files import VOID, read_ids
    from tracevision_jax.inference.tracker_results import HIGHEST_ID

    for prompt in said:
        frame, number = prompt.get("frame", 0), prompt.get("object")
        if "mask" not in prompt:
            session.add(number, frame=frame, points=prompt.get("points"), box=prompt.get("box"))  # pyright: ignore
            continue
        ids = read_ids(Path(prompt["mask"]))
        present = [one for one in range(1, HIGHEST_ID + 1) if (ids == one).any()]
        if number is not None:
            session.add(number, frame=frame, mask=ids > 0)
        elif present:
            for one in present:
                session.add(one, frame=frame, mask=ids == one)
        elif (ids == VOID).any():
            session.add(1, frame=frame, mask=ids == VOID)
        else:
            raise UserError(f"the mask {prompt['mask']} is empty, so there is nothing to track")
    if most := [number for number in session.objects if number > HIGHEST_ID]:
        raise UserError(f"object {most[0]}: masks are written as pictures of object numbers, 1 to {HIGHEST_ID}")


def _track(
    args: Args, said: list[dict[str, Any]], source: "FrameSource", folder: "TrackFolder", console: Any
) -> str | None:
    """Track what is left to track; gives the signal that ended it early."""
    from tracevision_jax.inference.tracker import Tracker
    from tracevision_jax.training.interruption import Interruption

    settings = {"dtype": args.dtype, "image_size": args.image_size, "batch": args.batch}
    with Tracker.load(args.checkpoint, **settings).session(source) as session, Interruption() as interruption:
        stage = folder.resume(session)
        if not session.objects:
            _say(session, said)
        first = session.steps.first_prompted() or 0
        total = (source.length or 0) - first + (first if args.reverse else 0)
        with _progress(console, "Tracking frames", total, _frames_done(folder)) as advance:
            while stage < DONE:
                saved = time.monotonic()
                for result in session.run(**_range(session, stage, first)):
                    folder.write(result, source.label(result.frame))
                    advance()
                    due = session.at_rest and time.monotonic() - saved > SAVE_EVERY_S
                    if due or interruption.signal is not None:
                        folder.save(session, stage)
                        saved = time.monotonic()
                    if interruption.signal is not None:
                        return interruption.signal.name
                stage = BACKWARDS if stage == FORWARDS and args.reverse and first > 0 else DONE
                folder.save(session, stage)
    return None


def _range(session: "Session", stage: int, first: int) -> dict[str, Any]:
    """From where to track: on from where the session is, in this stage's direction, else from the first prompt."""
    place, reverse = session.steps.memory.place, stage == BACKWARDS
    if place is not None and place.reverse == reverse:
        return {"start": place.frame, "reverse": reverse}
    return {"start": first - 1 if reverse else first, "reverse": reverse}


def _frames_done(folder: "TrackFolder") -> int:
    with folder.lines.open("rb") as lines:
        return sum(1 for _ in lines)


def _finish(args: Args, source: "FrameSource", folder: "TrackFolder", console: Any) -> list[str]:
    """Write what is made of all frames; gives the files' names."""
    import numpy as np
    from PIL import Image

    from evaluation.metrics.video_files import write_masklets
    from tracevision_jax.inference.tracker_pictures import USUAL_RATE, write_overlay
    from tracevision_jax.vision.run_lengths import decode_mask

    numbers = sorted({int(number) for result in folder.results() for number in result["objects"]})
    size = next(source.frames()).shape[:2]

    def masks() -> Iterator[np.ndarray]:
        results, length = folder.results(), source.length or 0
        following = next(results, None)
        for frame in range(length):
            found: dict[str, Any] = {}
            if following is not None and following["frame"] == frame:
                found, following = following["objects"], next(results, None)
            nothing = np.zeros(size, bool)
            rows = [decode_mask(found[str(n)]["mask"]) if str(n) in found else nothing for n in numbers]
            yield np.stack(rows)

    rate = source.frames_per_s or USUAL_RATE
    partial = args.out / ".tracks.json.partial"
    write_masklets(partial, folder.masks.name, numbers, masks(), rate)
    partial.replace(args.out / "tracks.json")
    if args.overlay == "none":
        return ["tracks.json"]

    def ids_of(number: int) -> np.ndarray | None:
        path = folder.masks / f"{source.label(number)}.png"
        return np.asarray(Image.open(path)) if path.is_file() else None

    name = f"overlay.{args.overlay}"
    with _progress(console, "Drawing frames", source.length or 0, 0) as advance:
        write_overlay(args.out / name, source, ids_of, advance)
    return ["tracks.json", name]


@contextmanager
def _progress(console: Any, title: str, total: int, done: int) -> Iterator[Any]:
    """A bar with frames a second on a terminal, a line at the end elsewhere; yields what moves it by a frame."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:>12}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    began, count = time.perf_counter(), 0
    bar: Progress
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, completed=done, rate="")

        def rate() -> str:
            return f"{count / max(time.perf_counter() - began, 1e-9):.2f} frames/s"

        def advance() -> None:
            nonlocal count
            count += 1
            bar.update(task, advance=1, rate=rate())

        yield advance
    if count:
        console.print(
            f"{title}: {count} in {time.perf_counter() - began:.1f} s, {rate()}", markup=False, highlight=False
        )
