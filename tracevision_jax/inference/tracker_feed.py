"""Frames of a video in batches, as the model takes them: read, squared and normalised ahead; recent ones stay encoded.

Frames kB to kB + B - 1 are always one batch, whoever asks for them, so that an embedding is computed once however often
its frame is looked at, and tracking gives the same bits wherever it starts. At most `cached` batches stay, with their
pictures and embeddings: those used last.
"""

from collections import OrderedDict
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from tracevision_jax.errors import UserError
from tracevision_jax.hosts.sam import Maps
from tracevision_jax.inference.frames import FrameSource, Picture, Prefetch
from tracevision_jax.inference.tracker_steps import Encode
from tracevision_jax.vision.sam_preprocess import Fitting, fit_square


class _Read(NamedTuple):
    number: int
    images: list[Picture]
    pixels: Float32[np.ndarray, "batch side side 3"]
    failure: Exception | None


@dataclass
class Group:
    """A batch of frames."""

    number: int
    images: list[Picture]
    """Fewer than a batch holds at the end of the video."""
    pixels: Float32[np.ndarray, "batch side side 3"] | None
    """None once the frames are encoded."""
    failure: Exception | None
    """Why the frame after the last one could not be read, where that is why it is the last."""
    maps: Maps | None = None


class Feed:
    """The batches of one video."""

    def __init__(self, source: FrameSource, batch: int, side: int, cached: int, ahead: int = 2):
        """
        Args:
            source: of the frames.
            batch: frames of a batch.
            side: of the model's pictures.
            cached: batches that stay, at least two: the current one, and the next, which is encoded ahead.
            ahead: batches that wait, read but not encoded.
        """
        self.source, self.batch, self.side = source, batch, side
        self.fitting: Fitting | None = None
        """Of the video's frames; None until one was read."""
        self._cached, self._ahead = max(2, cached), ahead
        self._groups: OrderedDict[int, Group] = OrderedDict()
        self._thread: Prefetch[_Read] | None = None
        self._next, self._reverse = 0, False

    def size(self) -> tuple[int, int]:
        """(height, width) of the frames; reads the first if none was read.

        Raises:
            UserError: there is no frame, or it cannot be read.
        """
        if self.fitting is None:
            if self.source.again:
                first = next(self.source.frames(), None)
                if first is not None:
                    self._fit(0, first)
            else:
                group = self._fetch(0, reverse=False, going_on=True)
                if group is not None and not group.images and group.failure is not None:
                    raise group.failure
        if self.fitting is None:
            raise UserError(f"{self.source.name} has no frames")
        return self.fitting.height, self.fitting.width

    def holds(self, number: int) -> bool:
        """Whether a batch can be had: of a stream only those that stay, and those to come."""
        return self.source.again or number in self._groups or number >= self._next

    def close(self) -> None:
        """End the thread and let the frames go."""
        if self._thread is not None:
            self._thread.close()
            self._thread = None
        self._groups.clear()

    def at_hand(self, number: int) -> bool:
        """Whether a batch can be had without waiting for a stream."""
        return self.source.again or number in self._groups or (self._thread is not None and self._thread.ready)

    def group(self, number: int, reverse: bool = False, going_on: bool = False) -> Generator[Encode, Any, Group | None]:
        """A batch with its embeddings, None beyond the end. Asks for encoding what is not encoded yet.

        Args:
            number: of the batch.
            reverse: in which direction one goes on.
            going_on: whether the next batches will be asked for, too, and are read ahead.
        """
        group = self._fetch(number, reverse, going_on)
        if group is not None and group.maps is None:
            group.maps = yield Encode(jnp.asarray(group.pixels))
            group.pixels = None
        return group

    def _fetch(self, number: int, reverse: bool, going_on: bool) -> Group | None:
        if self.source.length is not None and number * self.batch >= self.source.length:
            return None
        if number not in self._groups:
            read = self._read_ahead(number, reverse) if going_on or not self.source.again else self._read_one(number)
            if read is None:
                return None
            self._groups[number] = Group(*read)
            while len(self._groups) > self._cached:
                self._groups.popitem(last=False)
        self._groups.move_to_end(number)
        return self._groups[number]

    def _read_one(self, number: int) -> _Read | None:
        return next(self._groups_from(number, False), None)

    def _read_ahead(self, number: int, reverse: bool) -> _Read | None:
        if self._thread is None or (self._next, self._reverse) != (number, reverse):
            if self._thread is not None:
                if not self.source.again:
                    return None
                self._thread.close()
            self._thread = Prefetch(self._groups_from(number, reverse), self._ahead)
            self._reverse = reverse
        read = next(self._thread, None)
        self._next = number if read is None else number + (-1 if reverse else 1)
        return read

    def _groups_from(self, number: int, reverse: bool) -> Iterator[_Read]:
        """Batches from one on; runs in the thread."""
        if reverse:
            for earlier in range(number, -1, -1):
                yield from islice(self._groups_from(earlier, False), 1)
            return
        frames = self.source.frames(number * self.batch)
        while True:
            images, pixels = [], np.zeros((self.batch, self.side, self.side, 3), np.float32)
            failure = None
            try:
                for place, image in enumerate(islice(frames, self.batch)):
                    self._fit(number * self.batch + place, image)
                    pixels[place], _ = fit_square(image, self.side, "bicubic_8bit")
                    images.append(image)
            except Exception as error:
                failure = error  # told when its frame is asked for; those before it count
            if images or failure:
                yield _Read(number, images, pixels, failure)
            if len(images) < self.batch:
                return
            number += 1

    def _fit(self, number: int, image: Picture) -> None:
        """The first frame says the size, which the others must have.

        Raises:
            UserError: they do not.
        """
        height, width = image.shape[:2]
        if self.fitting is None:
            self.fitting = Fitting(height, width, self.side, self.side, self.side, padded=False)
        elif (height, width) != (self.fitting.height, self.fitting.width):
            raise UserError(
                f"frame {number} of {self.source.name} is {width} x {height} px, the frames before are "
                f"{self.fitting.width} x {self.fitting.height}: cut the video where its size changes, or resize it"
            )
