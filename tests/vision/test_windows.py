"""The window layout: arithmetic against the rearrangement that the preprocessing does."""

import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

from tracevision_jax.vision.windows import raster_slots, raster_units, slot_coordinates, window_counts

CASES = [(8, 8, 4, 2), (26, 18, 4, 2), (2, 2, 2, 2), (6, 10, 2, 2), (9, 3, 1, 3), (5, 7, 3, 1)]


def slot_numbers(rows, cols, window_units, merge):
    """Raster number of the patch in every (window, slot), -1 for padding, by rearranging a padded picture."""
    side = window_units * merge
    padded = np.full((-(-rows // side) * side, -(-cols // side) * side), -1)
    padded[:rows, :cols] = np.arange(rows * cols).reshape(rows, cols)
    return rearrange(
        padded,
        "(wr ur mr) (wc uc mc) -> (wr wc) (ur uc mr mc)",
        ur=window_units,
        uc=window_units,
        mr=merge,
        mc=merge,
    )


@pytest.mark.parametrize(("rows", "cols", "window_units", "merge"), CASES)
def test_slot_coordinates_equal_a_rearranged_picture(rows, cols, window_units, merge):
    expected = slot_numbers(rows, cols, window_units, merge)
    extra = 3
    row, col, inside = slot_coordinates(
        jnp.array([[rows, cols]]),
        jnp.arange(len(expected) + extra),
        jnp.arange(expected.shape[1]),
        window_units,
        merge,
    )
    found = np.where(inside, row * cols + col, -1)[0]
    np.testing.assert_array_equal(found[: len(expected)], expected)
    assert (found[len(expected) :] == -1).all()


@pytest.mark.parametrize(("rows", "cols", "window_units", "merge"), CASES)
def test_raster_slots_invert_the_layout(rows, cols, window_units, merge):
    expected = slot_numbers(rows, cols, window_units, merge).reshape(-1)
    row, col = np.mgrid[:rows, :cols]
    slots = raster_slots(row, col, cols, window_units, merge)
    np.testing.assert_array_equal(expected[slots], np.arange(rows * cols).reshape(rows, cols))


def test_a_unit_is_a_run_of_slots():
    row, col = np.mgrid[:10, :14]
    units = raster_units(row // 2, col // 2, 14, 4, 2)
    np.testing.assert_array_equal(raster_slots(row, col, 14, 4, 2) // 4, units)


def test_absent_frames_have_no_windows_and_no_slots():
    grid = np.array([[0, 0], [8, 16]])
    _, _, inside = slot_coordinates(grid, np.arange(4), np.arange(64), 4, 2)
    assert not inside[0].any()
    assert inside[1].sum() == 128
    np.testing.assert_array_equal(window_counts(grid, 4, 2), [[0, 0], [1, 2]])
