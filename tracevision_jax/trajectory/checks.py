"""What a trace must be before anything is done with it: `check_trace` cleans what is harmless, refuses the
rest.

A checked trace is a float64 array (points, 3) of (x, y, t): finite, in the order of time, normalised by width
and height. Points a little outside the image are real (the pointer left it) and are kept as recorded; tokens
and boxes clip them. Points far outside are pixels by mistake and are refused.

    points = check_trace([[0.1, 0.2, 0.0], [0.3, 0.2, 0.1]])
    points = trace_from_json(json.load(file))
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from tracevision_jax.errors import UserError

ASSUMED_RATE_HZ = 60.0
"""Points a second of a trace without times: the lower rate that Appendix E.1 names."""

FARTHEST = 2.0
"""A coordinate beyond this, in units of the image's side, cannot come from a pointer near the image."""


def check_trace(points: Any, name: str = "trace") -> Float[np.ndarray, "points 3"]:
    """Return `points` as a clean trace, sorted by time (equal times keep their order).

    `points` is an array or nested lists (points, 3) of (x, y, t), or (points, 2) of (x, y), which are taken
    to be `ASSUMED_RATE_HZ` apart. One point is a trace. Raises `UserError`, naming `name` and the point, for
    an empty trace, another shape, what is not a number, NaN, infinity, and coordinates beyond `FARTHEST`.
    """
    array = _numbers(points, name)
    if array.size == 0:
        raise UserError(f"the {name} is empty; it needs at least one point (x, y) or (x, y, t)")
    if array.ndim != 2 or array.shape[1] not in (2, 3):
        shape = "x".join(str(side) for side in array.shape)
        hint = " (it looks transposed)" if array.ndim == 2 and array.shape[0] in (2, 3) else ""
        raise UserError(f"the {name} has shape {shape}{hint}; it must be n x 3 (x, y, t) or n x 2 (x, y)")
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        bad = int(np.argmin(finite))
        raise UserError(
            f"the {name} has {int((~finite).sum())} of {len(array)} points that are not finite, the first at "
            f"index {bad}: {_show(array[bad])}; remove or repair them"
        )
    far = (np.abs(array[:, :2]) > FARTHEST).any(axis=1)
    if far.any():
        bad = int(np.argmax(far))
        raise UserError(
            f"point {bad} of the {name} is {_show(array[bad])}, far outside the image: "
            "these look like pixels; divide x by the image's width and y by its height"
        )
    if array.shape[1] == 2:
        return np.column_stack([array, np.arange(len(array)) / ASSUMED_RATE_HZ])
    times = array[:, 2]
    return array if (np.diff(times) >= 0).all() else array[np.argsort(times, kind="stable")]


def trace_from_json(value: Any, name: str = "trace") -> Float[np.ndarray, "points 3"]:
    """Read a trace from decoded JSON and check it.

    Takes a list of [x, y] or [x, y, t] or {"x", "y", "t"} ("t" may be absent everywhere), a list of strokes
    of these (as in Localized Narratives; joined and sorted by time), or an object that holds one under
    "traces", "trace" or "points". Raises `UserError` as `check_trace` does, and where a point lacks "x" or
    "y" or only some have times.
    """
    if isinstance(value, Mapping):
        key = next((key for key in ("traces", "trace", "points") if key in value), None)
        if key is None:
            found = ", ".join(map(str, list(value)[:8])) or "nothing"
            raise UserError(f'the {name} is an object without "traces", "trace" or "points" (it has {found})')
        return trace_from_json(value[key], name)
    if not _is_list(value):
        raise UserError(f"the {name} must be a list of points, not {type(value).__name__}")
    points = [point for stroke in value for point in stroke] if _holds_strokes(value) else list(value)
    rows = [_row(point, index, name) for index, point in enumerate(points)]
    if len({len(row) for row in rows}) > 1:
        raise UserError(f"some points of the {name} have a time and some have none; give all or none")
    return check_trace(rows, name)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _holds_strokes(value: Sequence[Any]) -> bool:
    """Whether each entry is a list of points, and not a point (of numbers, or an object) itself."""
    return len(value) > 0 and all(
        _is_list(entry) and all(isinstance(part, Mapping) or _is_list(part) for part in entry) for entry in value
    )


def _row(point: Any, index: int, name: str) -> list[Any]:
    if isinstance(point, Mapping):
        lacking = [key for key in ("x", "y") if key not in point]
        if lacking:
            raise UserError(f'point {index} of the {name} has no "{lacking[0]}": {dict(point)!r:.80}')
        return [point[key] for key in ("x", "y", "t") if key in point]
    if _is_list(point) and len(point) in (2, 3):
        return list(point)
    raise UserError(f"point {index} of the {name} is {point!r:.80}; it must be [x, y] or [x, y, t]")


def _numbers(points: Any, name: str) -> np.ndarray:
    try:
        array = np.asarray(points)
        if array.size and array.dtype.kind not in "fiu":
            raise TypeError(f"they hold {array.dtype}")
        return array.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"the {name} is not a table of numbers (points of 2 or 3 numbers each, all alike): {error}"
        ) from error


def _show(point: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:g}" for value in point) + ")"
