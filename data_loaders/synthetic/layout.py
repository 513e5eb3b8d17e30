"""Where the objects of a scene are: attributes, places without much overlap, and motion in videos."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from data_loaders.synthetic.config import COLOURS, SIZES, SceneConfig

CANDIDATES = 48
"""Places tried for each object."""
CLOSE = 0.3
"""Chance that an object goes where it overlaps most; drawn evenly, places would hardly ever overlap."""


@dataclass(frozen=True)
class SceneObject:
    """One object; lengths in pixels. Objects are drawn in their order in the layout, later ones in front."""

    colour: str
    shape: str
    size: str
    texture: str
    rgb: tuple[float, float, float]
    radius_px: float
    angle: float
    """Radians."""
    centre_px: tuple[float, float]
    """(x, y) at time 0."""
    velocity_px: tuple[float, float]
    """Pixels per second; (0, 0) in stills."""

    @property
    def name(self) -> str:
        """Colour and shape, which no other object of the scene shares."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Layout:
    """The objects of one scene and the picture's size."""

    height: int
    width: int
    objects: tuple[SceneObject, ...]

    def centres(self, number: int, seconds: Float[np.ndarray, "times"]) -> Float[np.ndarray, "times 2"]:
        """Centre (x, y) in [0, 1] of object `number` at each time; objects bounce off the borders."""
        thing = self.objects[number]
        if thing.velocity_px == (0.0, 0.0):
            return np.broadcast_to(np.array(self.centre(number)), (len(seconds), 2))
        sides = np.array([self.width, self.height], np.float64)
        low = np.full(2, thing.radius_px)
        room = np.maximum(sides - 2 * low, 1e-6)
        free = np.asarray(thing.centre_px) + np.asarray(seconds)[:, None] * np.asarray(thing.velocity_px) - low
        return (room - np.abs(np.mod(free, 2 * room) - room) + low) / sides

    def centre(self, number: int) -> tuple[float, float]:
        """Centre (x, y) in [0, 1] at time 0."""
        x, y = self.objects[number].centre_px
        return x / self.width, y / self.height


def make_layout(config: SceneConfig, random: np.random.Generator) -> Layout:
    """Draw the size of the picture and its objects."""
    height = int(random.integers(config.height[0], config.height[1] + 1))
    width = int(random.integers(config.width[0], config.width[1] + 1))
    side = min(height, width)
    count = int(random.integers(config.objects[0], config.objects[1] + 1))
    pairs = random.choice(len(config.colours) * len(config.shapes), count, replace=False)
    large = min(count, int(random.integers(1, 3)))
    placed: list[tuple[float, float, float]] = []
    objects = []
    for number, pair in enumerate(pairs):
        size = "large" if number < large else "small"
        radius = side * random.uniform(*SIZES[size]) / 2
        x, y = _place(placed, radius, height, width, config.overlap, random)
        placed.append((x, y, radius))
        colour = config.colours[pair // len(config.shapes)]
        objects.append(
            SceneObject(
                colour=colour,
                shape=config.shapes[pair % len(config.shapes)],
                size=size,
                texture=_texture(config, random),
                rgb=vary(COLOURS[colour], config.palette_variation, random),
                radius_px=radius,
                angle=random.uniform(-0.2, 0.2),
                centre_px=(x, y),
                velocity_px=_velocity(side, random) if config.frames > 1 else (0.0, 0.0),
            )
        )
    order = random.permutation(count)
    return Layout(height, width, tuple(objects[k] for k in order))


def _place(placed, radius: float, height: int, width: int, overlap: float, random) -> tuple[float, float]:
    """Centre (x, y) for a new object among those `placed` as (x, y, radius).

    It is the first of some random ones where the squares around the objects share at most `overlap` of the
    smaller one's area, all earlier objects together; where there is none, the one that shares least.
    """
    low, high = min(radius, width / 2), max(width - radius, width / 2)
    xs = random.uniform(low, high, CANDIDATES)
    low, high = min(radius, height / 2), max(height - radius, height / 2)
    ys = random.uniform(low, high, CANDIDATES)
    if not placed:
        return float(xs[0]), float(ys[0])
    x, y, r = np.array(placed).T
    smaller = 2 * np.minimum(r, radius)
    shared_x = np.clip(r + radius - np.abs(xs[:, None] - x), 0, smaller)
    shared_y = np.clip(r + radius - np.abs(ys[:, None] - y), 0, smaller)
    worst = (shared_x * shared_y / smaller**2).sum(axis=1)
    good = np.flatnonzero(worst <= overlap)
    if not len(good):
        best = int(np.argmin(worst))
    else:
        best = good[np.argmax(worst[good])] if random.random() < CLOSE else good[0]
    return float(xs[best]), float(ys[best])


def _texture(config: SceneConfig, random) -> str:
    others = [name for name in config.textures if name != "plain"]
    if not others or ("plain" in config.textures and random.random() >= config.textured):
        return "plain"
    return others[int(random.integers(len(others)))]


def vary(rgb: tuple[int, int, int], amount: float, random) -> tuple[float, float, float]:
    """The colour a little brighter or darker, with a little tint; values 0 to 1."""
    brightness = 1 + random.uniform(-amount, amount)
    tint = random.uniform(-amount, amount, 3) / 2
    r, g, b = np.clip(np.array(rgb) / 255 * brightness + tint, 0, 1)
    return float(r), float(g), float(b)


def _velocity(side: int, random) -> tuple[float, float]:
    """One object in four stands still; the others cross a tenth to a third of the side in a second."""
    if random.random() < 0.25:
        return 0.0, 0.0
    speed, direction = side * random.uniform(0.1, 0.33), random.uniform(0, 2 * np.pi)
    return float(speed * np.cos(direction)), float(speed * np.sin(direction))
