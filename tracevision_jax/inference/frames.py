"""Frames of a video, from wherever they come, one after the other: arrays, folders of pictures, video files, streams.

    source = open_frames("clip.mp4")            # a folder; an array (frames, height, width, 3); pictures in a list;
    source = open_frames(camera())              # a generator, or anything else that can be iterated, is a stream
    for picture in source.frames(start=10): ...

Nothing but the current frame is held. All sources but streams can be read again, from any frame. `Prefetch` makes
things ahead in a thread of its own. Video files are in `frames_video.py`.
"""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tracevision_jax.errors import UserError
from tracevision_jax.vision.pictures import read_image, to_rgb

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
POLL_SECONDS = 0.1
"""How often a thread that waits for room looks whether it is still wanted."""
PATIENCE_SECONDS = 5.0
"""How long closing waits for a thread that is in the midst of something; it is then left to end by itself."""

Picture = UInt8[np.ndarray, "height width 3"]
Videos = str | Path | np.ndarray | Sequence[Any] | Iterable[Any]
"""A video file, a folder of pictures, an array, pictures in a list, or a stream of pictures (arrays or Pillow's)."""
Item = TypeVar("Item")


@runtime_checkable
class FrameSource(Protocol):
    """Where frames come from."""

    name: str
    """As messages call it."""
    length: int | None
    """Frames, None where nobody knows."""
    again: bool
    """Whether frames can be read again, and from anywhere."""
    frames_per_s: float | None
    """None where nobody knows."""

    def frames(self, start: int = 0) -> Iterator[Picture]:
        """Frames from number `start` on, as RGB.

        Raises:
            UserError: a frame that cannot be read.
        """
        ...

    def label(self, number: int) -> str:
        """What files about a frame are called: its picture's name, else its number."""
        ...


def numbered_label(number: int) -> str:
    """Five digits, as in DAVIS."""
    return f"{number:05d}"


class ArrayFrames:
    """Frames that are in memory."""

    def __init__(self, pictures: np.ndarray | Sequence[Any], frames_per_s: float | None = None):
        """
        Raises:
            UserError: no frame, or an array of another kind than (frames, height, width, 3) uint8.
        """
        if isinstance(pictures, np.ndarray) and (pictures.ndim != 4 or pictures.dtype != np.uint8):
            raise UserError(
                "a video as an array must be uint8 of shape (frames, height, width, 3), not "
                f"{pictures.dtype} of {pictures.shape}"
            )
        if not len(pictures):
            raise UserError("the video has no frames: its array (or list) is empty")
        self.name, self.again, self.frames_per_s = "the video", True, frames_per_s
        self.length: int | None = len(pictures)
        self._pictures = pictures

    def frames(self, start: int = 0) -> Iterator[Picture]:
        """See `FrameSource`."""
        for number in range(start, len(self._pictures)):
            yield to_rgb(self._pictures[number])

    def label(self, number: int) -> str:
        """See `FrameSource`."""
        return numbered_label(number)


class FolderFrames:
    """A folder of pictures, in the order of their numbers, or of their names where not all are numbers."""

    def __init__(self, folder: str | Path, frames_per_s: float | None = None):
        """
        Raises:
            UserError: no such folder, or no picture in it.
        """
        folder = Path(folder)
        try:
            found = [path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES]
        except OSError as error:
            raise UserError(f"the folder {folder} cannot be read: {error.strerror or error}") from error
        found = [path for path in found if not path.name.startswith(".")]
        if not found:
            raise UserError(
                f"the video {folder} has no frames: no picture ({', '.join(sorted(PICTURE_SUFFIXES))}) is in the folder"
            )
        numbers = all(path.stem.isdecimal() for path in found)
        self._paths = sorted(found, key=lambda path: (int(path.stem) if numbers else 0, path.name))
        twice = len({path.stem for path in found}) < len(found)
        if twice:
            raise UserError(f"{folder} has pictures whose names differ in their endings alone; keep one kind")
        self.name, self.again, self.frames_per_s = str(folder), True, frames_per_s
        self.length: int | None = len(found)

    def frames(self, start: int = 0) -> Iterator[Picture]:
        """See `FrameSource`."""
        for path in self._paths[start:]:
            yield read_image(path)

    def label(self, number: int) -> str:
        """See `FrameSource`."""
        return self._paths[number].stem


class StreamFrames:
    """Frames that come as they come, once: a generator, a camera."""

    def __init__(self, pictures: Iterable[Any], frames_per_s: float | None = None):
        self.name, self.again, self.frames_per_s = "the stream", False, frames_per_s
        self.length: int | None = None
        self._pictures = iter(pictures)

    def frames(self, start: int = 0) -> Iterator[Picture]:
        """All that is still to come; a stream is read once, from its beginning."""
        if start:
            raise ValueError("a stream can be read from its beginning only")
        for picture in self._pictures:
            if not isinstance(picture, np.ndarray | Image.Image):
                raise UserError(f"a stream of frames gave a {type(picture).__name__}: give arrays or Pillow images")
            yield to_rgb(picture)

    def label(self, number: int) -> str:
        """See `FrameSource`."""
        return numbered_label(number)


def open_frames(video: Videos | FrameSource | Any, frames_per_s: float | None = None) -> FrameSource:
    """Open a video of any kind.

    Args:
        video: see `Videos`; a source is given back as it is.
        frames_per_s: where the video does not say it itself.

    Raises:
        UserError: what cannot be read, or holds no frame.
    """
    if isinstance(video, FrameSource):
        return video
    if isinstance(video, str | Path):
        if Path(video).is_dir():
            return FolderFrames(video, frames_per_s)
        from tracevision_jax.inference.frames_video import VideoFrames

        return VideoFrames(video)
    if isinstance(video, np.ndarray | Sequence):
        return ArrayFrames(video, frames_per_s)
    if isinstance(video, Iterable):
        return StreamFrames(video, frames_per_s)
    raise UserError(f"a video cannot be a {type(video).__name__}: give a file, a folder, an array or a generator")


class _Failure:
    """An error on its way from the thread to whoever asks for the next thing."""

    def __init__(self, error: BaseException):
        self.error = error


_END = object()


class Prefetch(Generic[Item]):
    """What an iterator gives, made ahead by a thread; at most `ahead` things wait.

    An error comes out where the thing would have come that it prevented, and again whoever asks after that. The thread
    ends with the iterator, with `close`, or when nobody holds this object any more.
    """

    def __init__(self, items: Iterator[Item], ahead: int = 2):
        self._waiting: queue.Queue[Any] = queue.Queue(maxsize=ahead)
        self._unwanted = threading.Event()
        self._over = False
        self._failure: BaseException | None = None
        # The thread must not hold this object, or it would never be let go.
        arguments = (items, self._waiting, self._unwanted)
        self._thread = threading.Thread(target=_make_ahead, args=arguments, name="frames", daemon=True)
        self._thread.start()

    def __iter__(self) -> "Prefetch[Item]":
        return self

    def __next__(self) -> Item:
        if self._failure is not None:
            raise self._failure
        if self._over:
            raise StopIteration
        item = self._waiting.get()
        if item is _END:
            self._over = True
            raise StopIteration
        if isinstance(item, _Failure):
            self._over, self._failure = True, item.error
            raise item.error
        return item

    @property
    def ready(self) -> bool:
        """Whether the next thing is there, or the end, without waiting."""
        return self._over or not self._waiting.empty()

    def close(self) -> None:
        """End the thread; what waits is dropped."""
        self._over = True
        self._unwanted.set()
        with contextlib.suppress(queue.Empty):
            while True:
                self._waiting.get_nowait()
        self._thread.join(PATIENCE_SECONDS)

    def __del__(self) -> None:
        self._unwanted.set()


def _make_ahead(items: Iterator[Any], waiting: "queue.Queue[Any]", unwanted: threading.Event) -> None:
    """What the thread does."""

    def put(item: Any) -> bool:
        while not unwanted.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(item, timeout=POLL_SECONDS)
                return True
        return False

    try:
        for item in items:
            if not put(item):
                break
            del item  # while the next one is waited for, nothing is held here
        else:
            put(_END)
    except BaseException as error:
        put(_Failure(error))
    finally:
        if hasattr(items, "close"):
            items.close()  # pyright: ignore[reportAttributeAccessIssue]
