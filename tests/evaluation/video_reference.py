"""J, F and their statistics once more, pixel by pixel and distance by distance, for tests to compare with."""

import math
from fractions import Fraction

import numpy as np


def boundary_pixels(mask) -> set[tuple[int, int]]:
    """Pixels unlike one of their right, lower and lower-right neighbours, those beyond the frame left out.

    The last row has a right neighbour only, the last column a lower one only, the last corner none.
    """
    height, width = mask.shape
    found = set()
    for y in range(height):
        for x in range(width):
            if y == height - 1:
                neighbours = [(y, x + 1)]
            elif x == width - 1:
                neighbours = [(y + 1, x)]
            else:
                neighbours = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            if any(mask[y, x] != mask[j, i] for j, i in neighbours if j < height and i < width):
                found.add((y, x))
    return found


def share_near(pixels, others, radius) -> float:
    """Share of pixels with another one at most the radius away."""
    near = sum(any((y - j) ** 2 + (x - i) ** 2 <= radius**2 for j, i in others) for y, x in pixels)
    return near / len(pixels)


def frame_scores(predicted, true) -> tuple[float, float]:
    """J and F of a frame."""
    both = either = 0
    for p, t in zip(predicted.ravel(), true.ravel(), strict=True):
        both, either = both + bool(p and t), either + bool(p or t)
    j = both / either if either else 1.0
    edges = boundary_pixels(predicted), boundary_pixels(true)
    if not edges[0] and not edges[1]:
        return j, 1.0
    if not edges[0] or not edges[1]:
        return j, 0.0
    radius = math.ceil(0.008 * np.linalg.norm(true.shape))
    precision, recall = share_near(edges[0], edges[1], radius), share_near(edges[1], edges[0], radius)
    return j, 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def statistics(values) -> tuple[float, float, float]:
    """Mean, recall and decay; the ends of quarters in exact fractions, halves rounded up."""
    count = len(values)
    ends = [math.floor(Fraction(quarter * (count - 1), 4) + Fraction(1, 2)) for quarter in range(5)]
    quarters = [values[ends[k] : ends[k + 1] + 1] for k in (0, 3)]
    decay = sum(quarters[0]) / len(quarters[0]) - sum(quarters[1]) / len(quarters[1])
    return sum(values) / count, sum(value > 0.5 for value in values) / count, decay
