"""What users hand over, as records: pictures, videos and traces from files, arrays and lists.

sample = read_media("a.jpg")                      # also a Pillow image, an array, a video file
sample = read_media(frames, frames_per_second=25)
points = read_trace("trace.json")                 # also an array or list of (x, y) or (x, y, t)
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from tracevision_jax.errors import UserError
from tracevision_jax.records.sample import Sample
from tracevision_jax.trajectory.checks import check_trace, trace_from_json
from tracevision_jax.vision.pictures import read_image, to_rgb

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ogv"})
LEAST_RATE = 2.0
"""Frames a second that are kept of a video file at least; the processor samples from them."""

Media = str | Path | bytes | Image.Image | np.ndarray | Sequence[Any]
"""A picture (file, its bytes, Pillow image, array), several of one size, or a video (file, or frames with a rate)."""
TraceLike = str | Path | np.ndarray | Sequence[Any] | Mapping[str, Any]
"""Points (x, y) or (x, y, t) as an array or lists, decoded JSON, or a file of it."""


def is_video(source: Any) -> bool:
    """Whether a path is that of a video, by its name."""
    return isinstance(source, str | Path) and Path(source).suffix.lower() in VIDEO_SUFFIXES


def read_media(source: Media, frames_per_second: float | None = None, least_rate: float = LEAST_RATE) -> Sample:
    """A picture, pictures or a video as a sample with nothing but its frames.

    Args:
        source: see `Media`.
        frames_per_second: makes the video of an array (frames, height, width, 3) or of a list of pictures.
        least_rate: frames a second to keep of a video file at least.

    Raises:
        UserError: what cannot be read, or pictures of different sizes.
    """
    if frames_per_second is not None and not (math.isfinite(frames_per_second) and frames_per_second > 0):
        raise UserError(f"frames_per_second is {frames_per_second}; it must be positive")
    if isinstance(source, str | Path) and is_video(source):
        frames, rate = read_video(source, least_rate)
        return Sample(str(source), "user", frames, rate)
    name = str(source) if isinstance(source, str | Path) else "image"
    return Sample(name, "user", _frames(source), frames_per_second or 0.0)


def _frames(source: Media) -> UInt8[np.ndarray, "frames height width 3"]:
    if isinstance(source, str | Path | bytes):
        return read_image(source)[None]
    if isinstance(source, Image.Image) or (isinstance(source, np.ndarray) and source.ndim in (2, 3)):
        return to_rgb(source)[None]
    pictures = [_frames(picture)[0] for picture in source]
    if not pictures:
        raise UserError("there is no picture: the list of pictures (or frames) is empty")
    sizes = sorted({f"{picture.shape[1]} x {picture.shape[0]}" for picture in pictures})
    if len(sizes) > 1:
        raise UserError(f"pictures of one question must have one size, not {', '.join(sizes)}; resize them first")
    return np.stack(pictures)


def read_video(
    path: str | Path, least_rate: float = LEAST_RATE
) -> tuple[UInt8[np.ndarray, "frames height width 3"], float]:
    """Frames of a video file and their rate: every n-th, as few as still give `least_rate` a second.

    Raises:
        UserError: missing, without a picture, or damaged.
    """
    import av
    from av.error import FFmpegError

    if not Path(path).is_file():
        raise UserError(f"the video {path} cannot be read: no such file")
    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"the video {path} holds no pictures, only sound or text")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            if not rate > 0:
                raise UserError(f"the video {path} does not say how many frames a second it has")
            step = max(1, math.floor(rate / least_rate + 1e-6))
            for number, frame in enumerate(container.decode(stream)):
                if number % step == 0:
                    frames.append(frame.to_ndarray(format="rgb24"))
    except FFmpegError as error:
        raise UserError(f"the video {path} is damaged or of an unknown kind: {error}") from error
    if not frames:
        raise UserError(f"the video {path} has no frames")
    return np.stack(frames), rate / step


def read_trace(source: TraceLike, name: str = "trace") -> Float[np.ndarray, "points 3"]:
    """A checked trace (x, y, t).

    Args:
        source: points, or decoded JSON (`trajectory.checks.trace_from_json`), or a file: JSON, or one line of JSON
            lines such as a Localized Narratives record.
        name: what to call it in messages.

    Raises:
        UserError: what cannot be read, or is no trace.
    """
    if isinstance(source, str | Path):
        return trace_from_json(_json_of(Path(source), name), f"{name} in {source}")
    if isinstance(source, np.ndarray):
        return check_trace(source, name)
    return trace_from_json(source, name)


def _json_of(path: Path, name: str) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"the {name} {path} cannot be read: {reason or error}") from error
    try:
        if path.suffix.lower() != ".jsonl":
            return json.loads(text)
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) != 1:
            raise UserError(f"the {name} {path} has {len(lines)} records; keep the line that is meant")
        return json.loads(lines[0])
    except (ValueError, RecursionError) as error:
        raise UserError(f"the {name} {path} is not valid JSON: {error}") from error
