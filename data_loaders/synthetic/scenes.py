"""`SyntheticScenes`: the embedded data set, images or short videos drawn on the fly from a seed.

    config = SceneConfig(questions=("what", "colour"), questions_per_scene=2)
    scenes = SyntheticScenes(seed=0, count=10_000, config=config)
    sample = scenes[17]                # frames, caption, words, strokes, regions with masks, questions
    held_out = SyntheticScenes(seed=1, count=200, config=config)

A sample depends on (seed, index, config) alone. The picture, the words, the hand and the questions have
random streams of their own: asking for other questions, or for none, leaves the rest of the sample as it
was.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float

from data_loaders.sources.tasks import tasks_of
from data_loaders.synthetic.config import SceneConfig
from data_loaders.synthetic.drawing import draw
from data_loaders.synthetic.hand import hover, leave_image, split_strokes, time_words, visits_of
from data_loaders.synthetic.language import Narrative, narrate, place_of
from data_loaders.synthetic.layout import Layout, make_layout
from data_loaders.synthetic.questions import QuestionMaker
from tracevision_jax.records.sample import Question, Region, Sample, TimedWord

STREAMS = ("layout", "picture", "words", "hand", "questions")


def visible_box(mask: Bool[np.ndarray, "height width"]) -> Float[np.ndarray, "4"]:
    """Box (x1, y1, x2, y2) in [0, 1] around a mask's pixels; NaN for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.full(4, np.nan)
    height, width = mask.shape
    return np.array([columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height])


class Scene:
    """One scene; its parts are made when first asked for."""

    def __init__(self, seed: int, index: int, config: SceneConfig):
        self.config = config
        self._key = (seed, index)
        self._boxes: dict[int, np.ndarray] = {}

    def random(self, stream: str) -> np.random.Generator:
        """A new generator of one of the scene's streams."""
        return np.random.Generator(np.random.PCG64((*self._key, STREAMS.index(stream))))

    @cached_property
    def layout(self) -> Layout:
        return make_layout(self.config, self.random("layout"))

    @cached_property
    def narrative(self) -> Narrative:
        return narrate(self.layout, self.config, self.random("words"))

    @cached_property
    def drawn(self):
        """Frames (frames, height, width, 3) and visible masks (objects, frames, height, width)."""
        return draw(self.layout, self.config, self.random("picture"))

    @cached_property
    def radii(self) -> Float[np.ndarray, "objects 2"]:
        """Half sizes of the objects along x and y, in units of the image's sides."""
        radius = np.array([thing.radius_px for thing in self.layout.objects])
        return np.stack([radius / self.layout.width, radius / self.layout.height], axis=1)

    def box(self, number: int) -> Float[np.ndarray, "frames 4"]:
        """Boxes of what is seen of object `number`."""
        if number not in self._boxes:
            self._boxes[number] = np.array([visible_box(mask) for mask in self.drawn[1][number]])
        return self._boxes[number]

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """The named objects, in the order of the caption."""
        return tuple(
            self.region(number, phrase)
            for number, phrase in zip(self.narrative.order, self.narrative.phrases, strict=True)
        )

    def region(self, number: int, phrase: str) -> Region:
        """Object `number` under the name `phrase`."""
        thing = self.layout.objects[number]
        return Region(
            phrase=phrase,
            box=self.box(number),
            mask=self.drawn[1][number],
            attributes={
                "colour": thing.colour,
                "shape": thing.shape,
                "size": thing.size,
                "texture": thing.texture,
                "place": place_of(self.layout.centre(number)),
            },
        )

    @cached_property
    def recording(self) -> tuple[tuple[TimedWord, ...], tuple[Float[np.ndarray, "_ 3"], ...]]:
        """Timed words and strokes of the narrative; in videos, the words last as long as the video."""
        config, random = self.config, self.random("hand")
        speed = random.uniform(*config.words_per_second)
        duration = config.frames / config.frames_per_second if config.frames > 1 else None
        words = time_words(self.narrative.said, speed, duration, random)
        visits = visits_of(self.narrative.said, words)
        trace, travels = hover(visits, self.radii, self.layout.centres, config.points_per_second, random)
        if random.random() < config.outside:
            trace = leave_image(trace, config.points_per_second, random)
        strokes = (trace,)
        if len(travels) and random.random() < config.two_strokes:
            strokes = split_strokes(trace, travels[int(random.integers(len(travels)))])
        return tuple(words), strokes

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """`questions_per_scene` questions of the configured kinds."""
        if not self.config.questions_per_scene:
            return ()
        return QuestionMaker(self, self.random("questions")).ask(self.config.questions, self.config.questions_per_scene)


@dataclass(frozen=True)
class SyntheticScenes:
    """`count` scenes of one seed."""

    seed: int
    count: int
    config: SceneConfig = SceneConfig()

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> Scene:
        """Scene `index` with its parts made lazily."""
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        return Scene(self.seed, index, self.config)

    def __getitem__(self, index: int) -> Sample:
        scene = self.scene(index)
        words, strokes = scene.recording if self.config.narrative else ((), ())
        caption = scene.narrative.caption
        return Sample(
            id=f"{self.seed}-{index}",
            source="synthetic",
            frames=scene.drawn[0],
            frames_per_second=self.config.frames_per_second if self.config.frames > 1 else 0.0,
            caption=caption,
            words=words,
            strokes=strokes,
            regions=scene.regions,
            questions=scene.questions,
            tasks=tasks_of(caption, strokes, scene.regions, scene.questions),
        )
