"""Where the objects of a synthetic video go: smooth paths through random points, some out of the picture and back."""

import numpy as np
from jaxtyping import Float

from data_loaders.synthetic.videos_config import VideoConfig

CLEAR = 1.15
"""So many radii beyond a border nothing of an object is seen."""


def draw_path(
    config: VideoConfig, radius_px: float, random: np.random.Generator
) -> Float[np.ndarray, "{config.frames} 2"]:
    """Centre (x, y) of an object in each frame, pixels.

    A point every `stretch` frames, a smooth curve through them. The first one, and all that lie inside, are half a
    radius from the borders at least; one that lies outside is followed by one inside.
    """
    sides = np.array([config.width, config.height], np.float64)
    low, high = np.full(2, radius_px / 2), sides - radius_px / 2
    count = -(-(config.frames - 1) // config.stretch) + 1
    place = random.uniform(np.minimum(2 * low, sides / 2), np.maximum(sides - 2 * low, sides / 2))
    points = [place]
    leaves = count > 2 and random.random() < config.leaving
    away = int(random.integers(1, count - 1)) if leaves else -1
    for number in range(1, count):
        if number == away:
            points.append(_beyond(place, sides, CLEAR * radius_px, random))
            continue
        step = config.stretch * min(config.height, config.width) * random.uniform(*config.speed)
        angle = random.uniform(0, 2 * np.pi)
        place = _reflect(place + step * np.array([np.cos(angle), np.sin(angle)]), low, high)
        points.append(place)
    return curve(np.array(points), np.arange(config.frames) / config.stretch)


def curve(points: Float[np.ndarray, "points 2"], times: Float[np.ndarray, "times"]) -> Float[np.ndarray, "times 2"]:
    """The Catmull-Rom curve that is at point k at time k; both ends are held."""
    held = np.concatenate([points[:1], points, points[-1:], points[-1:]])
    whole = np.minimum(times.astype(int), len(points) - 1)
    t = (times - whole)[:, None]
    before, here, after, later = (held[whole + offset] for offset in range(4))
    slope, end_slope = (after - before) / 2, (later - here) / 2
    return (
        here * (1 + t * t * (2 * t - 3))
        + slope * t * (1 - t) ** 2
        + after * t * t * (3 - 2 * t)
        + end_slope * t * t * (t - 1)
    )


def _beyond(place, sides, distance: float, random):
    """The point straight out of the picture from `place`, over the nearest border, and a little to the side."""
    gaps = np.concatenate([place, sides - place])
    border = int(np.argmin(gaps))
    axis = border % 2
    out = place.copy()
    out[axis] = -distance if border < 2 else sides[axis] + distance
    out[1 - axis] += random.uniform(-0.1, 0.1) * sides[1 - axis]
    return out


def _reflect(place, low, high):
    """Put a point that lies beyond a border as far inside of it."""
    room = high - low
    return low + room - np.abs(np.mod(place - low, 2 * room) - room)
