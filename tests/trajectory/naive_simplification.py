"""The simplification as one would write it first, by recursion over lists: what the fast one must equal."""

import math
import sys

import numpy as np


def farthest(places, start, end):
    """(distance, index) of the first farthest point between two others from their line (Eq. 2)."""
    (start_x, start_y), (end_x, end_y) = places[start], places[end]
    length = math.hypot(end_x - start_x, end_y - start_y)
    best, at = -1.0, -1
    for index in range(start + 1, end):
        from_x, from_y = places[index][0] - start_x, places[index][1] - start_y
        if length == 0:
            distance = math.hypot(from_x, from_y)
        else:
            distance = abs((end_x - start_x) / length * from_y - (end_y - start_y) / length * from_x)
        if distance > best:
            best, at = distance, index
    return best, at


def douglas_peucker(places, start, end, epsilon_px):
    """Indices kept of places[start..end], ends included."""
    distance, at = farthest(places, start, end)
    if distance <= epsilon_px:
        return [start] if start == end else [start, end]
    left = douglas_peucker(places, start, at, epsilon_px)
    return left[:-1] + douglas_peucker(places, at, end, epsilon_px)


def simplify_naively(points, windows, importances, size, base_epsilon_px=5.0):
    """Keypoints of a trace whose phrases have closed time windows (None where unheard) and importances."""
    height, width = size
    rows = np.asarray(points).tolist()
    places = [(x * width, y * height) for x, y, _ in rows]

    def owner(time):
        held = (i for i, window in enumerate(windows) if window is not None and window[0] <= time <= window[1])
        return next(held, -1)

    owners = [owner(row[2]) for row in rows]
    kept = []
    start = 0
    sys.setrecursionlimit(max(sys.getrecursionlimit(), len(rows) + 1000))
    for index in range(1, len(rows) + 1):
        if index < len(rows) and owners[index] == owners[start]:
            continue
        importance = 1 if owners[start] < 0 else importances[owners[start]]
        run = douglas_peucker(places, start, index - 1, base_epsilon_px / (importance / 5.0))
        if start and rows[start][:2] == rows[start - 1][:2]:
            run = run[1:]
        kept += run
        start = index
    return np.asarray(points)[kept]
