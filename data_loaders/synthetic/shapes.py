"""Signed distances of the shapes: where each pixel of a grid lies against a shape's outline.

Distances are in units of the shape's radius, negative inside, and exact near the outlines but for corners,
which is all that antialiasing, rims and shadows need.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

Grid = Float[np.ndarray, "height width"]


def _circle(x: Grid, y: Grid) -> Grid:
    return np.sqrt(x * x + y * y) - 0.92


def _square(x: Grid, y: Grid) -> Grid:
    return np.maximum(np.abs(x), np.abs(y)) - 0.8


def _triangle(x: Grid, y: Grid) -> Grid:
    side, drop = 0.98, 1.72
    norm = np.float32(np.hypot(side, drop))
    return np.maximum(y - 0.74, (np.abs(x) * drop - (y + 0.98) * side) / norm)


def _diamond(x: Grid, y: Grid) -> Grid:
    half_width = 0.7
    return (np.abs(x) / half_width + np.abs(y) - 1.0) / np.float32(np.hypot(1 / half_width, 1.0))


def _cross(x: Grid, y: Grid) -> Grid:
    ax, ay = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(ax - 0.94, ay - 0.3), np.maximum(ax - 0.3, ay - 0.94))


def _ring(x: Grid, y: Grid) -> Grid:
    return np.abs(np.sqrt(x * x + y * y) - 0.7) - 0.24


def _star(x: Grid, y: Grid) -> Grid:
    """Five points: the plane is folded to one half of one point, whose outline is a straight line."""
    sector = np.float32(np.pi / 5)
    angle = np.abs(np.mod(np.arctan2(x, -y) + sector, 2 * sector) - sector)
    radius = np.sqrt(x * x + y * y)
    outer, inner = 1.04, 0.46
    edge = np.array([inner * np.cos(sector) - outer, inner * np.sin(sector)])
    normal = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return (radius * np.cos(angle) - outer) * np.float32(normal[0]) + radius * np.sin(angle) * np.float32(normal[1])


def _heart(x: Grid, y: Grid) -> Grid:
    """A square on its corner, with a disc on each of its two upper sides."""
    half = np.float32(0.56)
    turn = np.float32(np.sqrt(0.5))
    x, y = np.abs(x), y - np.float32(0.12)
    square = (x + np.abs(y)) * turn - half
    disc = np.sqrt((x - half * turn) ** 2 + (y + half * turn) ** 2) - half
    return np.minimum(square, disc)


DISTANCES: dict[str, Callable[[Grid, Grid], Grid]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "diamond": _diamond,
    "heart": _heart,
}


def signed_distance(
    shape: str,
    x: Float[np.ndarray, "#height #width"],
    y: Float[np.ndarray, "#height #width"],
    angle: float,
) -> Float[np.ndarray, "_ _"]:
    """Signed distance to `shape`, turned clockwise by `angle` radians, at (x, y) in units of its radius."""
    cosine, sine = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return DISTANCES[shape](cosine * x + sine * y, cosine * y - sine * x)
