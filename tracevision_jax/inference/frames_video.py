"""Frames of a video file, read from any frame on, with PyAV.

A file is looked through once without decoding: how many frames it has and at what times, so that reading may begin
near any of them, and whether it is whole. Frame number n is the n-th that a player would show.

    source = VideoFrames("clip.mp4")
    source.length, source.frames_per_s
    next(source.frames(start=120))
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from tracevision_jax.errors import UserError
from tracevision_jax.inference.frames import Picture, numbered_label

HIDDEN_PACKETS = frozenset({"vp8"})
"""Codecs with packets that no frame comes of: their packets cannot be counted as frames."""
DURATION_IN_HEADER = ("mov", "mp4", "matroska", "webm")
"""Formats that say how long the video is before its frames, so that one that was cut short shows it."""
SHORT_BY_S, SHORT_BY_SHARE = 0.5, 0.02
"""Less than this may be missing of what the header says: sound and picture end at slightly different times."""


class _Index(NamedTuple):
    """What a look through the packets tells."""

    times: Int64[np.ndarray, "frames"]
    """When frames are shown, in the stream's own unit, in order."""
    exact: bool
    """Whether each packet is a frame with a time of its own, so that a time finds a frame."""
    frames_per_s: float | None


class VideoFrames:
    """A video file as a source of frames, see `frames.FrameSource`."""

    def __init__(self, path: str | Path):
        """
        Raises:
            UserError: missing, of an unknown kind, damaged, cut short, or without a frame.
        """
        self._path = Path(path)
        if not self._path.is_file():
            raise UserError(f"the video {path} cannot be read: no such file")
        index = _look_through(self._path)
        self.name, self.again, self.frames_per_s = str(path), True, index.frames_per_s
        self._times, self._exact = index.times, index.exact and self._first_time() == index.times[0]
        self.length: int | None = len(index.times) if self._exact else sum(1 for _ in self._decoded())

    def label(self, number: int) -> str:
        """Five digits."""
        return numbered_label(number)

    def frames(self, start: int = 0) -> Iterator[Picture]:
        """See `frames.FrameSource`."""
        number = start
        for frame in self._decoded(start):
            yield frame.to_ndarray(format="rgb24")
            number += 1
        if self.length is not None and number < self.length:
            raise UserError(
                f"the video {self._path} is damaged: {number} of its {self.length} frames can be read. To keep those, "
                f"write them anew: ffmpeg -i {self._path.name} whole.mp4"
            )

    def _first_time(self) -> int | None:
        return next((frame.pts for frame in self._decoded()), None)

    def _decoded(self, start: int = 0) -> Iterator[Any]:
        """Decoded frames from number `start` on; by way of the keyframe before it where times are reliable."""
        import av
        from av.error import FFmpegError

        number, wanted = 0, int(self._times[start]) if start and self._exact else None
        try:
            with av.open(str(self._path)) as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                if wanted is not None:
                    container.seek(wanted, stream=stream, backward=True, any_frame=False)
                found = False
                for frame in container.decode(stream):
                    if wanted is not None and not found:
                        found = frame.pts == wanted
                        if frame.pts is None or frame.pts > wanted:
                            break  # the keyframe's place in the file misled us
                        number = start
                        if not found:
                            continue
                    if number >= start:
                        if frame.is_corrupt:
                            raise UserError(f"frame {number} of the video {self._path} is damaged")
                        yield frame
                    number += 1
                if wanted is None or found:
                    return
        except FFmpegError as error:
            raise UserError(
                f"the video {self._path} is damaged after {number} frames: {error}. To keep what can be read, write "
                f"it anew: ffmpeg -i {self._path.name} whole.mp4"
            ) from error
        self._exact = False
        yield from self._decoded(start)


def _look_through(path: Path) -> _Index:
    import av
    from av.error import FFmpegError

    times: list[int | None] = []
    first_s, last_s = float("inf"), float("-inf")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"the video {path} holds no pictures, only sound or text")
            stream = container.streams.video[0]
            for packet in container.demux():
                if not packet.size or packet.is_discard:
                    continue
                if packet.stream is stream or packet.stream.index == stream.index:
                    times.append(packet.pts)
                if packet.pts is not None and packet.time_base is not None:
                    first_s = min(first_s, float(packet.pts * packet.time_base))
                    last_s = max(last_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if not times:
                raise UserError(f"the video {path} has no frames")
            promised = stream.frames
            duration_s = (container.duration or 0) / 1e6
            rate = float(stream.average_rate or stream.guessed_rate or 0) or None
            kind, codec = container.format.name, stream.codec_context.name
    except FFmpegError as error:
        raise UserError(f"the video {path} is damaged or of an unknown kind: {error}") from error
    missing_s = duration_s - (last_s - first_s)
    in_header = any(name in kind for name in DURATION_IN_HEADER)
    short = in_header and missing_s > max(SHORT_BY_S, SHORT_BY_SHARE * duration_s)
    if promised > len(times) or short:
        said = f"{promised} frames" if promised else f"{duration_s:.1f} s"
        there = f"{len(times)}" if promised else f"{max(0.0, last_s - first_s):.1f} s"
        raise UserError(
            f"the video {path} is cut short: its header says {said}, {there} are there. Get the whole file, or keep "
            f"what there is with: ffmpeg -i {path.name} whole.mp4"
        )
    known = sorted(time for time in times if time is not None)
    exact = len(known) == len(times) == len(set(known)) and codec not in HIDDEN_PACKETS
    return _Index(np.array(known or [0], np.int64), exact, rate)
