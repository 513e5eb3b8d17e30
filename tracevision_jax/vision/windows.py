"""Where each patch lies in the window layout of the vision tower: arithmetic alone, for numpy and jax arrays
alike.

A frame of (rows, cols) patches is tiled in raster order by windows of `window_units * merge` patches a side;
inside a window the slots run over (unit row, unit column, row in unit, column in unit), always as if the
window were whole. Slots outside the picture, and windows beyond the frame's own, are padding. `merge ** 2`
consecutive slots are a unit.
"""

from typing import Any

from jaxtyping import Bool, Int

Indices = Any
"""An integer array of numpy or jax, or an int."""


def window_counts(grid: Int[Any, "*frames 2"], window_units: int, merge: int) -> Int[Any, "*frames 2"]:
    """Rows and columns of windows that cover each frame; 0 where the frame is absent."""
    side = window_units * merge
    return (grid + side - 1) // side


def slot_coordinates(
    grid: Int[Any, "*frames 2"],
    window: Int[Any, "windows"],
    slot: Int[Any, "slots"],
    window_units: int,
    merge: int,
) -> tuple[Int[Any, "*frames windows slots"], Int[Any, "*frames windows slots"], Bool[Any, "*frames windows slots"]]:
    """Row and column of patches of every slot, and whether it lies inside the picture.

    `window` and `slot` are `arange`s of the two axes. Coordinates of padding mean nothing but are not
    negative.
    """
    unit = merge * merge
    row_in_window = slot // (window_units * unit) * merge + slot // merge % merge
    col_in_window = slot // unit % window_units * merge + slot % merge
    # An absent frame has no windows; one column keeps the division defined, and no slot of it is inside.
    across = window_counts(grid, window_units, merge)[..., 1:]
    across = across + (across == 0)
    side = window_units * merge
    row = (window // across * side)[..., None] + row_in_window
    col = (window % across * side)[..., None] + col_in_window
    inside = (row < grid[..., 0][..., None, None]) & (col < grid[..., 1][..., None, None])
    return row, col, inside


def raster_slots(row: Indices, col: Indices, cols: Indices, window_units: int, merge: int) -> Indices:
    """Place of patch (row, col) among a frame's (windows, slots) flattened; `cols` is that of the frame."""
    side = window_units * merge
    window = row // side * ((cols + side - 1) // side) + col // side
    row, col = row % side, col % side
    unit = row // merge * window_units + col // merge
    return (window * window_units**2 + unit) * merge**2 + row % merge * merge + col % merge


def raster_units(unit_row: Indices, unit_col: Indices, cols: Indices, window_units: int, merge: int) -> Indices:
    """Place of a merged unit among a frame's units, given the frame's columns of patches (not of units)."""
    return raster_slots(unit_row * merge, unit_col * merge, cols, window_units, merge) // merge**2
