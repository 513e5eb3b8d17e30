"""Synthetic scenes as a `Source`: samples as `SyntheticScenes` draws them, sizes without drawing."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_loaders.sources.protocol import RecordSize, question_characters
from data_loaders.sources.tasks import tasks_of
from data_loaders.synthetic.config import SceneConfig
from data_loaders.synthetic.scenes import Scene, SyntheticScenes
from tracevision_jax.records.sample import Sample

DRAWING = 1
"""Raised whenever the same seed gives other scenes than before, so that caches of sizes are made anew."""


class _UndrawnScene(Scene):
    """A scene whose picture stays empty: its words, trace and questions are the drawn scene's."""

    @cached_property
    def drawn(self):
        size = (self.config.frames, self.layout.height, self.layout.width)
        frames = np.broadcast_to(np.zeros((), np.uint8), (*size, 3))
        return frames, np.broadcast_to(np.zeros((), bool), (len(self.layout.objects), *size))

    def box(self, number):
        return np.zeros((self.config.frames, 4))


@dataclass(frozen=True)
class SyntheticSource:
    """`count` scenes of one seed. Use another seed to hold out."""

    seed: int
    count: int
    config: SceneConfig = SceneConfig()

    @property
    def name(self) -> str:
        """As in `Sample.source`."""
        return "synthetic"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        return SyntheticScenes(self.seed, self.count, self.config)[index]

    def sizes(self, index: int) -> RecordSize:
        """Size of a scene, from its layout and words."""
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        scene = _UndrawnScene(self.seed, index, self.config)
        words, strokes = scene.recording if self.config.narrative else ((), ())
        caption = scene.narrative.caption
        return RecordSize(
            height=scene.layout.height,
            width=scene.layout.width,
            frames=self.config.frames,
            caption_characters=len(caption),
            words=len(words),
            trace_points=sum(len(stroke) for stroke in strokes),
            regions=len(scene.regions),
            questions=len(scene.questions),
            question_characters=max((question_characters(q) for q in scene.questions), default=0),
            tasks=tasks_of(caption, strokes, scene.regions, scene.questions),
        )

    def fingerprint(self) -> str:
        """Hash of seed, count, config and the version of the drawing."""
        text = f"synthetic {DRAWING} {self.seed} {self.count} {self.config}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]
