"""Tracked masks over their video, as a video (MP4) or an animation (GIF).

    write_overlay(Path("overlay.mp4"), source, lambda number: ids_of_frame)

Frames go through one by one; only a GIF, which is short and small, is held as a whole.
"""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tracevision_jax.errors import UserError
from tracevision_jax.inference.frames import FrameSource
from tracevision_jax.inference.pictures import object_colour

VIDEO_LONGEST_PX, GIF_LONGEST_PX, GIF_FRAMES = 1280, 480, 120
"""Larger pictures are reduced, and of longer videos a GIF shows every n-th frame."""
USUAL_RATE = 25.0
"""Frames a second where the video does not say it."""
SHARE = 0.45
"""Of the object's colour over the picture."""
CODECS = ("libx264", "mpeg4")

Ids = UInt8[np.ndarray, "height width"]
IdsOf = Callable[[int], Ids | None]


def overlay_ids(image: UInt8[np.ndarray, "height width 3"], ids: Ids | None) -> UInt8[np.ndarray, "height width 3"]:
    """Objects in their colours, with an outline, over a frame; None leaves it as it is."""
    if ids is None or not ids.any():
        return image
    colours = np.array([(0, 0, 0), *(object_colour(number) for number in range(255))], np.float32)
    padded = np.pad(ids, 1, mode="edge")
    edge = np.zeros(ids.shape, bool)
    for rows, columns in ((slice(2, None), slice(1, -1)), (slice(1, -1), slice(2, None))):
        edge |= padded[rows, columns] != ids
    for rows, columns in ((slice(None, -2), slice(1, -1)), (slice(1, -1), slice(None, -2))):
        edge |= padded[rows, columns] != ids
    share = np.where(ids > 0, np.where(edge, 1.0, SHARE), 0.0).astype(np.float32)[..., None]
    return np.rint(image * (1 - share) + colours[ids] * share).astype(np.uint8)


def write_overlay(path: Path, source: FrameSource, ids_of: IdsOf, advance: Callable[[], object] = lambda: None) -> None:
    """Write an overlay whose kind the name's ending says.

    Args:
        path: `.mp4` or `.gif`.
        source: the video, which can be read again.
        ids_of: object numbers of a frame, None where it was not tracked.
        advance: called after each frame.

    Raises:
        UserError: another ending, or a file that cannot be written.
    """
    writers = {".mp4": _write_video, ".gif": _write_gif}
    if path.suffix.lower() not in writers:
        raise UserError(f"an overlay is a .mp4 or a .gif, not {path.name}")
    partial = path.with_name(f".partial.{path.name}")

    def frames() -> Iterator[np.ndarray]:
        for number, image in enumerate(source.frames()):
            yield overlay_ids(image, ids_of(number))
            advance()

    try:
        writers[path.suffix.lower()](partial, frames(), source)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error


def _fitted(image: np.ndarray, longest: int, multiple: int = 1) -> Image.Image:
    """At most so long, with sides that are multiples, as video codecs want them even."""
    picture = Image.fromarray(image)
    factor = min(1.0, longest / max(picture.size))
    width, height = (max(multiple, round(side * factor) // multiple * multiple) for side in picture.size)
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.BILINEAR)


def _write_video(path: Path, frames: Iterator[np.ndarray], source: FrameSource) -> None:
    import av

    codec = next(name for name in CODECS if name in av.codecs_available)
    rate = Fraction(source.frames_per_s or USUAL_RATE).limit_denominator(1001)
    with av.open(str(path), "w", format="mp4") as container:
        stream: Any = container.add_stream(codec, rate=rate)
        for number, image in enumerate(frames):
            picture = _fitted(image, VIDEO_LONGEST_PX, multiple=2)
            if number == 0:
                stream.width, stream.height, stream.pix_fmt = *picture.size, "yuv420p"
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def _write_gif(path: Path, frames: Iterator[np.ndarray], source: FrameSource) -> None:
    step = max(1, math.ceil((source.length or 1) / GIF_FRAMES))
    kept = [_fitted(image, GIF_LONGEST_PX) for number, image in enumerate(frames) if number % step == 0]
    shown_ms = round(1000 * step / (source.frames_per_s or USUAL_RATE))
    kept[0].save(path, format="GIF", save_all=True, append_images=kept[1:], duration=max(20, shown_ms), loop=0)
