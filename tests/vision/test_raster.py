"""Features on a square against a plain bilinear resize of the raster they stand for."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tracevision_jax.vision.raster import features_on_square, unit_boxes, unit_centres
from tracevision_jax.vision.windows import raster_slots

WINDOW_UNITS, MERGE, WIDTH = 2, 2, 3
SIDE_OF_WINDOW = WINDOW_UNITS * MERGE
GRIDS = [(2, 2), (4, 4), (6, 10), (10, 2), (2, 14), (8, 12)]
"""Whole windows, and windows that are cut by the picture's border on either side."""


def in_windows(raster: np.ndarray, windows: int, filler: float) -> np.ndarray:
    """A raster (rows, cols, width) in window order, written from the contract; padding is `filler`."""
    rows, cols, width = raster.shape
    across = math.ceil(cols / SIDE_OF_WINDOW)
    places = np.full((windows, WINDOW_UNITS, WINDOW_UNITS, MERGE, MERGE, width), filler, np.float32)
    for r in range(rows):
        for c in range(cols):
            window = r // SIDE_OF_WINDOW * across + c // SIDE_OF_WINDOW
            down, right = r % SIDE_OF_WINDOW, c % SIDE_OF_WINDOW
            places[window, down // MERGE, right // MERGE, down % MERGE, right % MERGE] = raster[r, c]
    return places.reshape(-1, width)


def naive_resize(raster: np.ndarray, side: int) -> np.ndarray:
    """Bilinear at the centres of the cells, borders repeated (no widening of the filter)."""
    rows, cols, width = raster.shape
    out = np.zeros((side, side, width))
    for i in range(side):
        for j in range(side):
            y = min(max((i + 0.5) * rows / side - 0.5, 0), rows - 1)
            x = min(max((j + 0.5) * cols / side - 0.5, 0), cols - 1)
            top, left = int(y), int(x)
            low, right = min(top + 1, rows - 1), min(left + 1, cols - 1)
            b, a = y - top, x - left
            upper = raster[top, left] * (1 - a) + raster[top, right] * a
            lower = raster[low, left] * (1 - a) + raster[low, right] * a
            out[i, j] = upper * (1 - b) + lower * b
    return out


def frames_of(rng, windows: int = 12):
    """One row a pair of grids, the second frame of the last row absent; padding is huge, so that it would show."""
    rasters = [rng.normal(size=(*grid, WIDTH)) for grid in GRIDS]
    features = np.stack([in_windows(raster, windows, 1e6) for raster in rasters])
    return rasters, features.reshape(3, 2, -1, WIDTH).astype(np.float32), np.array(GRIDS, np.int32).reshape(3, 2, 2)


@pytest.mark.parametrize("side", [3, 8])
def test_the_square_is_a_bilinear_resize_of_the_raster(side, rng):
    rasters, features, grid = frames_of(rng)
    square = jax.jit(lambda f, g: features_on_square(f, g, side, WINDOW_UNITS, MERGE))(features, grid)
    for ours, raster in zip(np.asarray(square).reshape(-1, side, side, WIDTH), rasters, strict=True):
        assert np.allclose(ours, naive_resize(raster, side), atol=1e-5)


def test_an_absent_frame_is_finite_and_disturbs_no_other(rng):
    rasters, features, grid = frames_of(rng)
    grid[0, 1] = 0
    square = np.asarray(features_on_square(jnp.asarray(features), jnp.asarray(grid), 4, WINDOW_UNITS, MERGE))
    assert np.isfinite(square).all()
    assert np.allclose(square[0, 0], naive_resize(rasters[0], 4), atol=1e-5)


def test_the_square_has_a_gradient_at_the_features_and_none_at_padding(rng):
    _, features, grid = frames_of(rng)
    sizes = jnp.asarray(grid)
    gradient = jax.grad(lambda f: features_on_square(f, sizes, 8, WINDOW_UNITS, MERGE).sum())(jnp.asarray(features))
    flat = np.asarray(gradient).reshape(len(GRIDS), -1, WIDTH)
    for (rows, cols), here in zip(GRIDS, flat, strict=True):
        inside = np.zeros(len(here), bool)
        row, col = np.divmod(np.arange(rows * cols), cols)
        inside[raster_slots(row, col, cols, WINDOW_UNITS, MERGE)] = True
        assert (here[~inside] == 0).all()
        assert np.allclose(here.sum(), 8 * 8 * WIDTH, rtol=1e-5)


def test_unit_centres_are_where_the_units_lie_in_the_picture():
    windows = 12
    grid = np.array(GRIDS, np.int32)[:, None]
    xy, inside = unit_centres(jnp.asarray(grid), windows, WINDOW_UNITS, MERGE)
    units = WINDOW_UNITS**2
    for index, (rows, cols) in enumerate(GRIDS):
        across = math.ceil(cols / SIDE_OF_WINDOW)
        expected = {}
        for r in range(rows // MERGE):
            for c in range(cols // MERGE):
                window = r // WINDOW_UNITS * across + c // WINDOW_UNITS
                place = window * units + r % WINDOW_UNITS * WINDOW_UNITS + c % WINDOW_UNITS
                expected[place] = ((c + 0.5) * MERGE / cols, (r + 0.5) * MERGE / rows)
        assert set(np.flatnonzero(inside[index, 0]).tolist()) == set(expected)
        for place, centre in expected.items():
            assert np.allclose(xy[index, 0, place], centre, atol=1e-6)


def test_an_absent_frame_has_no_units():
    _, inside = unit_centres(jnp.zeros((1, 2, 2), jnp.int32), 4, WINDOW_UNITS, MERGE)
    assert not inside.any()


def test_unit_boxes_tile_the_picture_around_their_centres():
    grid = jnp.asarray(np.array(GRIDS, np.int32)[:, None])
    xy, inside = unit_centres(grid, 12, WINDOW_UNITS, MERGE)
    boxes = np.asarray(unit_boxes(grid, 12, WINDOW_UNITS, MERGE))
    assert (boxes[~np.asarray(inside)] == 0).all()
    assert np.allclose((boxes[..., :2] + boxes[..., 2:]) / 2, xy, atol=1e-6)
    areas = np.prod(boxes[..., 2:] - boxes[..., :2], axis=-1)
    assert np.allclose(areas.sum(axis=(1, 2)), 1.0, atol=1e-5)
    assert boxes.min() >= -1e-6 and boxes.max() <= 1 + 1e-6
