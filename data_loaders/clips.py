"""Clips of the videos of a source: which stretch and which objects a training step sees of a video.

    records = ClipRecords(source, frames=8, objects=2, seed=0)
    clip = records[17]                                      # `tracevision_jax.records.clips.Clip`

As in the public training of SAM 2, a clip is any stretch of the video, played backwards half of the time, and its
objects are among those that are seen on its first frame. A choice follows from (seed, record number) alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from data_loaders.sources.protocol import Source
from tracevision_jax.records.clips import Clip
from tracevision_jax.records.sample import BadRecord


@dataclass(frozen=True)
class ClipRecords:
    """One clip of each video of a source."""

    source: Source
    frames: int
    """Of a clip; shorter videos give all they have."""
    objects: int
    """At most."""
    seed: int = 0
    least_px: int = 16
    """Pixels that an object must show on the first frame."""
    reverse: bool = True
    """Whether half of the clips are played backwards."""

    def __len__(self) -> int:
        return len(self.source)

    def place(self, index: int) -> str:
        """The file that a clip is read from, where the source can say so."""
        place = getattr(self.source, "place", None)
        return place(index) if place else ""

    def __getitem__(self, index: int) -> Clip:
        """Read a video and choose.

        Raises:
            BadRecord: no object with a mask is seen on the first frame of the clip.
        """
        sample = self.source[index]
        random = np.random.default_rng((self.seed, index))
        start = int(random.integers(0, max(len(sample.frames) - self.frames, 0) + 1))
        stretch = slice(start, start + self.frames)
        known = [region.mask[stretch] for region in sample.regions if region.mask is not None]
        frames = sample.frames[stretch]
        if self.reverse and random.random() < 0.5:
            frames, known = frames[::-1], [mask[::-1] for mask in known]
        seen = [mask for mask in known if mask[0].sum() >= self.least_px]
        if not seen:
            raise BadRecord("no object is seen on the first frame of the clip", record=sample.id)
        chosen = random.permutation(len(seen))[: self.objects]
        return Clip(sample.id, frames, np.stack([seen[number] for number in sorted(chosen)]))


def make_row(clips: Sequence[Clip]) -> Clip | None:
    """The row of the clip that the plan put into it, if it could be read."""
    return clips[0] if clips else None


def size_table(records: ClipRecords) -> Int[np.ndarray, "records 3"]:
    """What each record takes of a `ClipBucket`, in the order of its fields, at most."""
    sizes = [records.source.sizes(index) for index in range(len(records))]
    rows = [(min(s.frames, records.frames), min(s.regions, records.objects), max(s.height, s.width)) for s in sizes]
    return np.asarray(rows, np.int64).reshape(-1, 3)
