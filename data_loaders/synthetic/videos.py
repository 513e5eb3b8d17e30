"""`SyntheticVideos`: short videos of moving objects with exact masks, drawn on the fly from a seed.

    videos = SyntheticVideos(seed=0, count=10_000, config=VideoConfig(frames=8))
    video = videos.video(17)            # frames, masks of what is seen, and whether anything is
    sample = videos[17]                 # the same as a `Sample`, its objects as regions
    held_out = SyntheticVideos(seed=1, count=64)

Objects keep their depth order, pass over each other and behind posts, leave the picture and come back; some look
alike, so that only who remembers where each was can tell them apart. A video depends on (seed, index, config) alone.
Objects are drawn once a video and moved by whole pixels, which makes hundreds of small videos a second.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from data_loaders.sources.protocol import RecordSize
from data_loaders.synthetic.config import COLOURS
from data_loaders.synthetic.drawing import TONES, background, surface
from data_loaders.synthetic.layout import SceneObject, vary
from data_loaders.synthetic.scenes import visible_box
from data_loaders.synthetic.shapes import signed_distance
from data_loaders.synthetic.videos_config import VideoConfig
from data_loaders.synthetic.videos_paths import draw_path
from tracevision_jax.records.sample import Region, Sample

DRAWING = 1
"""Raised whenever the same seed gives other videos than before."""
REACH = 1.1
"""Of the shapes, in radii."""


class Video(NamedTuple):
    """Frames and truth; objects in depth order, the last one in front."""

    frames: UInt8[np.ndarray, "time height width 3"]
    masks: Bool[np.ndarray, "time objects height width"]
    """What is seen of each object."""
    visible: Bool[np.ndarray, "time objects"]
    """Whether anything is seen of it."""
    objects: tuple[SceneObject, ...]


class Sprite(NamedTuple):
    """An object, ready to be put anywhere."""

    colour: Float32[np.ndarray, "side side 3"]
    cover: Float32[np.ndarray, "side side 1"]
    inside: Bool[np.ndarray, "side side"]


class Post(NamedTuple):
    """A bar across the whole picture."""

    rows: slice
    columns: slice
    colour: Float32[np.ndarray, "3"]


def draw_video(config: VideoConfig, random: np.random.Generator) -> Video:
    """Draw one video."""
    height, width = config.height, config.width
    objects = _objects(config, random)
    paths = [draw_path(config, thing.radius_px, random) for thing in objects]
    behind = background(height, width, config.backgrounds, random)
    sprites = [_sprite(thing, random.uniform(0, 1, 2)) for thing in objects]
    posts = [_post(config, random) for _ in range(random.integers(config.posts[0], config.posts[1] + 1))]
    frames = np.empty((config.frames, height, width, 3), np.uint8)
    masks = np.zeros((config.frames, len(objects), height, width), bool)
    for time in range(config.frames):
        picture = behind.copy()
        for number, sprite in enumerate(sprites):
            _put(picture, masks[time], number, sprite, paths[number][time])
        for post in posts:
            picture[post.rows, post.columns] = post.colour
            masks[time, :, post.rows, post.columns] = False
        frames[time] = np.clip(picture * 255, 0, 255)
    return Video(frames, masks, np.asarray(masks.any((-2, -1))), objects)


def _objects(config: VideoConfig, random: np.random.Generator) -> tuple[SceneObject, ...]:
    """Looks of all objects, in depth order."""
    count = int(random.integers(config.objects[0], config.objects[1] + 1))
    colours = [config.colours[k] for k in random.permutation(len(config.colours))]
    shapes = [config.shapes[k] for k in random.permutation(len(config.shapes))]
    made = [_object(config, colours[k], shapes[k], random) for k in range(count)]
    for _ in range(random.integers(config.alike[0], config.alike[1] + 1)):
        model = made[int(random.integers(count))]
        other = _object(config, colours[-1], shapes[-1], random)
        if random.random() < config.twins:
            shared: dict[str, Any] = {
                "colour": model.colour,
                "rgb": model.rgb,
                "shape": model.shape,
                "texture": model.texture,
            }
        elif random.random() < 0.5:
            shared = {"colour": model.colour, "rgb": model.rgb}
        else:
            shared = {"shape": model.shape}
        made.append(SceneObject(**vars(other) | shared))
    return tuple(made[k] for k in random.permutation(len(made)))


def _object(config: VideoConfig, colour: str, shape: str, random: np.random.Generator) -> SceneObject:
    textured = random.random() < config.textured
    return SceneObject(
        colour=colour,
        shape=shape,
        size="",
        texture=("striped", "dotted")[int(random.integers(2))] if textured else "plain",
        rgb=vary(COLOURS[colour], config.palette_variation, random),
        radius_px=min(config.height, config.width) * random.uniform(*config.diameter) / 2,
        angle=random.uniform(-0.6, 0.6),
        centre_px=(0.0, 0.0),
        velocity_px=(0.0, 0.0),
    )


def _sprite(thing: SceneObject, style: Float[np.ndarray, "2"]) -> Sprite:
    """Draw an object in a square with its centre in the middle."""
    reach = int(np.ceil(REACH * thing.radius_px)) + 1
    line = np.arange(-reach, reach + 1, dtype=np.float32) / np.float32(thing.radius_px)
    xs, ys = line[None, :], line[:, None]
    distance = signed_distance(thing.shape, xs, ys, thing.angle)
    cover = np.clip(0.5 - distance * np.float32(thing.radius_px), 0, 1)[..., None]
    colour = surface(thing, xs, ys, distance, style)
    return Sprite(colour.astype(np.float32), cover.astype(np.float32), distance < 0)


def _post(config: VideoConfig, random: np.random.Generator) -> Post:
    thickness = max(1, round(min(config.height, config.width) * random.uniform(*config.post_width)))
    upright = random.random() < 0.5
    length = config.width if upright else config.height
    start = int(random.integers(0, max(length - thickness, 0) + 1))
    bar, whole = slice(start, start + thickness), slice(None)
    colour = TONES[int(random.integers(len(TONES)))] * np.float32(random.uniform(0.7, 1.0))
    return Post(whole, bar, colour) if upright else Post(bar, whole, colour)


def _put(picture, masks, number: int, sprite: Sprite, centre_px) -> None:
    """Paint a sprite over `picture`, set its mask and take it out of the masks of those behind it."""
    height, width, _ = picture.shape
    side = len(sprite.inside)
    left, top = (int(np.floor(value)) - side // 2 for value in centre_px)
    rows, columns = slice(max(top, 0), min(top + side, height)), slice(max(left, 0), min(left + side, width))
    if rows.start >= rows.stop or columns.start >= columns.stop:
        return
    part = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
    crop = picture[rows, columns]
    crop += sprite.cover[part] * (sprite.colour[part] - crop)
    inside = sprite.inside[part]
    masks[:number, rows, columns] &= ~inside
    masks[number, rows, columns] = inside


@dataclass(frozen=True)
class SyntheticVideos:
    """`count` videos of one seed, as a `Source`. Use another seed to hold out."""

    seed: int
    count: int
    config: VideoConfig = VideoConfig()

    @property
    def name(self) -> str:
        """As in `Sample.source`."""
        return "synthetic_videos"

    def __len__(self) -> int:
        return self.count

    def video(self, index: int) -> Video:
        """Frames and masks of a video."""
        if not 0 <= index < self.count:
            raise IndexError(f"video {index} of {self.count}")
        return draw_video(self.config, np.random.Generator(np.random.PCG64((self.seed, index))))

    def __getitem__(self, index: int) -> Sample:
        video = self.video(index)
        return Sample(
            id=f"{self.seed}-{index}",
            source=self.name,
            frames=video.frames,
            frames_per_second=self.config.frames_per_second,
            regions=tuple(
                Region(
                    phrase=thing.name,
                    box=np.array([visible_box(mask) for mask in video.masks[:, number]]),
                    mask=video.masks[:, number],
                    attributes={"colour": thing.colour, "shape": thing.shape, "texture": thing.texture},
                )
                for number, thing in enumerate(video.objects)
            ),
        )

    def sizes(self, index: int) -> RecordSize:
        """Size of a video; of objects, the most that one can have."""
        if not 0 <= index < self.count:
            raise IndexError(f"video {index} of {self.count}")
        config = self.config
        most = config.objects[1] + config.alike[1]
        return RecordSize(height=config.height, width=config.width, frames=config.frames, regions=most)

    def fingerprint(self) -> str:
        """Hash of seed, count, config and the version of the drawing."""
        text = f"{self.name} {DRAWING} {self.seed} {self.count} {self.config}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]
