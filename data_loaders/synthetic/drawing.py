"""Drawing of a scene: backgrounds, textured objects with soft edges and shadows, and masks of what is seen.

All shapes are drawn from signed distances on the crop that they touch, in float32.
"""

from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, UInt8

from data_loaders.synthetic.config import SceneConfig
from data_loaders.synthetic.layout import Layout, SceneObject
from data_loaders.synthetic.shapes import signed_distance

TONES = np.array(
    [
        (232, 228, 220), (214, 220, 226), (196, 202, 192), (226, 214, 200), (178, 184, 192),
        (158, 152, 146), (120, 128, 136), (98, 104, 98), (84, 80, 88), (62, 68, 78),
        (146, 160, 168), (205, 196, 206),
    ],
    np.float32,
) / 255  # fmt: skip
"""Colours of backgrounds, all of low saturation."""
Picture = Float[np.ndarray, "height width 3"]


def draw(
    layout: Layout, config: SceneConfig, random: np.random.Generator
) -> tuple[UInt8[np.ndarray, "frames height width 3"], Bool[np.ndarray, "objects frames height width"]]:
    """Draw all frames, and the mask of what is seen of every object in each."""
    behind = background(layout.height, layout.width, config.backgrounds, random)
    style = random.uniform(0, 1, (len(layout.objects), 2))
    times = np.arange(config.frames) / config.frames_per_second
    centres = [layout.centres(k, times) for k in range(len(layout.objects))]
    frames = np.empty((config.frames, layout.height, layout.width, 3), np.uint8)
    masks = np.zeros((len(layout.objects), config.frames, layout.height, layout.width), bool)
    for frame in range(config.frames):
        picture = behind.copy()
        for number, thing in enumerate(layout.objects):
            x, y = centres[number][frame] * (layout.width, layout.height)
            _draw_object(picture, masks[:, frame], number, thing, x, y, style[number])
        picture *= 255
        np.clip(picture, 0, 255, out=picture)
        frames[frame] = picture.astype(np.uint8)
    return frames, masks


@lru_cache(maxsize=1)
def _grain() -> Float[np.ndarray, "512 512"]:
    """A fixed tile of film grain around 1: fresh noise would cost more than all the rest of a drawing."""
    return 1 + np.float32(0.012) * np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)


@lru_cache(maxsize=64)
def _stretch(cells: int, length: int) -> Float[np.ndarray, "length cells"]:
    """Matrix that smoothly interpolates `cells` values to `length` (raised cosines between neighbours)."""
    place = np.linspace(0, cells - 1, length)
    weight = np.clip(1 - np.abs(place[:, None] - np.arange(cells)), 0, 1)
    return (weight * weight * (3 - 2 * weight)).astype(np.float32)


def _clouds(height: int, width: int, cells: int, random) -> Float[np.ndarray, "height width"]:
    """Smooth noise of about unit spread."""
    return _stretch(cells, height) @ random.standard_normal((cells, cells), dtype=np.float32) @ _stretch(cells, width).T


def background(height: int, width: int, kinds: tuple[str, ...], random: np.random.Generator) -> Picture:
    """What lies behind all objects, values in [0, 1]; `kinds` are names of `config.BACKGROUNDS`, drawn evenly."""
    kind = kinds[int(random.integers(len(kinds)))]
    first, second = TONES[random.choice(len(TONES), 2, replace=False)]
    down = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    across = np.linspace(0, 1, width, dtype=np.float32)[None, :]
    if kind == "plain":
        blend = np.zeros((height, width), np.float32)
    elif kind == "gradient":
        angle = random.uniform(0, 2 * np.pi)
        blend = 0.5 + (down - 0.5) * np.float32(np.sin(angle)) + (across - 0.5) * np.float32(np.cos(angle))
    elif kind == "noise":
        blend = 0.5 + 0.16 * _clouds(height, width, 5, random) + 0.1 * _clouds(height, width, 13, random)
    else:
        level, slope = random.uniform(0.4, 0.7), random.uniform(-0.05, 0.05)
        edge = (down - np.float32(level) - np.float32(slope) * (across - 0.5)) * (height / 1.5)
        blend = np.clip(edge, 0, 1)
        # The ground darkens towards the viewer and the sky towards the zenith.
        blend = blend * (0.8 + 0.25 * down) + (1 - blend) * 0.25 * (1 - down)
    picture = np.clip(blend, 0, 1)[..., None] * (second - first)
    picture += first
    picture *= _light(height, width, random)[..., None]
    return picture


def _light(height: int, width: int, random) -> Float[np.ndarray, "height width"]:
    """Brightness with film grain, cut at a random place of the tile."""
    tile = _grain()
    side = len(tile)
    if max(height, width) > side:
        tile = np.tile(tile, (-(-height // side), -(-width // side)))
    top = int(random.integers(0, tile.shape[0] - height + 1))
    left = int(random.integers(0, tile.shape[1] - width + 1))
    return tile[top : top + height, left : left + width]


def _draw_object(picture: Picture, masks, number: int, thing: SceneObject, x: float, y: float, style) -> None:
    """Paint one object over `picture`, set its mask and take it out of the masks of those behind it."""
    height, width, _ = picture.shape
    radius = np.float32(thing.radius_px)
    reach = thing.radius_px * 1.25 + 2
    top, bottom = max(int(y - reach), 0), min(int(y + reach) + 2, height)
    left, right = max(int(x - reach), 0), min(int(x + reach) + 2, width)
    # The shadow is the shape moved by whole pixels, so both are cut from one field of distances.
    down, across = max(1, round(0.1 * thing.radius_px)), max(1, round(0.06 * thing.radius_px))
    ys = ((np.arange(top - down, bottom, dtype=np.float32) + 0.5 - np.float32(y)) / radius)[:, None]
    xs = ((np.arange(left - across, right, dtype=np.float32) + 0.5 - np.float32(x)) / radius)[None, :]
    field = signed_distance(thing.shape, xs, ys, thing.angle)
    shadow, distance = field[: bottom - top, : right - left], field[down:, across:]
    xs, ys = xs[:, across:], ys[down:]
    crop = picture[top:bottom, left:right]
    crop *= (1 - 0.35 * np.clip(0.5 - shadow * 4, 0, 1))[..., None]
    coverage = np.clip(0.5 - distance * radius, 0, 1)[..., None]
    crop += coverage * (surface(thing, xs, ys, distance, style) - crop)
    seen = distance < 0
    masks[:number, top:bottom, left:right] &= ~seen
    masks[number, top:bottom, left:right] = seen


def surface(thing: SceneObject, xs, ys, distance, style) -> Picture:
    """The object's own colours: texture, light from the top left, and a darker rim.

    Args:
        thing: what is drawn.
        xs, ys: row (1, width) and column (height, 1) of places, in units of the object's radius from its centre.
        distance: signed distances at these places, see `shapes.signed_distance`.
        style: two numbers in [0, 1] that move the texture.
    """
    rgb = np.array(thing.rgb, np.float32)
    light = 1.0 - 0.09 * (xs + ys)
    light = light * (1 - 0.28 * np.clip(1.5 + distance * np.float32(thing.radius_px), 0, 1))
    plain = light[..., None] * rgb
    if thing.texture == "plain":
        return plain
    tone = np.float32(thing.radius_px)
    if thing.texture == "striped":
        angle = np.float32(style[0] * np.pi)
        period = max(0.42, 5.0 / thing.radius_px)
        wave = np.abs(np.mod((xs * np.cos(angle) + ys * np.sin(angle)) / period + style[1], 1) - 0.5) - 0.25
        pattern = np.clip(0.5 + wave * period * tone, 0, 1)
    else:
        period = max(0.46, 5.5 / thing.radius_px)
        u = np.mod(xs / period + style[0], 1) - 0.5
        v = np.mod(ys / period + style[1], 1) - 0.5
        pattern = np.clip(0.5 + (0.27 - np.sqrt(u * u + v * v)) * period * tone, 0, 1)
    # Bright colours get a darker pattern, dark ones a lighter one; the named colour stays the main one.
    bright = rgb.mean() > 0.55
    other = rgb * np.float32(0.55) if bright else rgb + (1 - rgb) * np.float32(0.6)
    return plain + (pattern[..., None] * light[..., None]) * (other - rgb)
