"""One line of a Localized Narratives file: from JSON to checked words, strokes and names.

The format is that of the release (google/localized-narratives): `dataset_id`, `image_id`, `annotator_id`,
`caption`, `timed_caption` of {utterance, start_time, end_time}, and `traces`, a list of strokes of {x, y,
t}. Points a little outside the image, fillers that the caption leaves out, and missing traces are normal.
"""

import json
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from tracevision_jax.records.sample import BadRecord, TimedWord

FARTHEST = 2.0
"""Coordinates beyond -FARTHEST..1+FARTHEST are no normalised coordinates (pixels, mostly)."""


@dataclass(frozen=True)
class NarrativeRecord:
    """A checked record."""

    dataset_id: str
    image_id: str
    annotator_id: int
    caption: str
    words: tuple[TimedWord, ...]
    strokes: tuple[Float[np.ndarray, "_ 3"], ...]


def parse_object(line: bytes) -> dict:
    """A line of JSON as an object.

    Raises:
        BadRecord: invalid JSON, not UTF-8, or not an object.
    """
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"invalid JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadRecord(f"a record must be a JSON object, not {_kind(value)}")
    return value


def parse_narrative(line: bytes) -> NarrativeRecord:
    """Read one record.

    Raises:
        BadRecord: a field is missing or of a wrong kind, or a number is not finite or out of range.
    """
    value = parse_object(line)
    missing = [name for name in ("image_id", "caption") if name not in value]
    if missing:
        raise BadRecord(f"missing {' and '.join(missing)}")
    image_id = value["image_id"]
    if isinstance(image_id, bool) or not isinstance(image_id, str | int):
        raise BadRecord(f"image_id must be text, not {_kind(image_id)}")
    annotator = value.get("annotator_id", 0)
    if isinstance(annotator, bool) or not isinstance(annotator, int):
        raise BadRecord(f"annotator_id must be a whole number, not {_kind(annotator)}", record=str(image_id))
    try:
        return NarrativeRecord(
            dataset_id=_text(value.get("dataset_id", ""), "dataset_id"),
            image_id=str(image_id),
            annotator_id=annotator,
            caption=_text(value["caption"], "caption"),
            words=_words(value.get("timed_caption") or []),
            strokes=_strokes(value.get("traces") or []),
        )
    except BadRecord as bad:
        raise BadRecord(bad.reason, record=str(image_id)) from None


def _kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _text(value, name: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{name} must be text, not {_kind(value)}")
    if any("\ud800" <= letter <= "\udfff" for letter in value):
        raise BadRecord(f"{name} holds half of a surrogate pair, which is no text")
    return value


def _number(value, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRecord(f"{name} must be a number, not {_kind(value)}")
    if not abs(value) < 1e9 or not math.isfinite(value):
        raise BadRecord(f"{name} is {str(value)[:20]}, not a finite number of usable size")
    return float(value)


def _list(value, name: str) -> list:
    if not isinstance(value, list):
        raise BadRecord(f"{name} must be a list, not {_kind(value)}")
    return value


def _words(entries) -> tuple[TimedWord, ...]:
    words = []
    for number, entry in enumerate(_list(entries, "timed_caption"), 1):
        name = f"utterance {number}"
        if not isinstance(entry, dict) or not {"utterance", "start_time", "end_time"} <= entry.keys():
            raise BadRecord(f"{name} must have utterance, start_time and end_time")
        start = _number(entry["start_time"], f"{name} start_time")
        end = _number(entry["end_time"], f"{name} end_time")
        if end < start:
            raise BadRecord(f"{name} ends at {end} s, before its start at {start} s")
        words.append(TimedWord(_text(entry["utterance"], name), start, end))
    return tuple(words)


def _strokes(entries) -> tuple[Float[np.ndarray, "_ 3"], ...]:
    """Strokes as arrays of (x, y, t); empty ones are left out."""
    strokes = []
    for number, entry in enumerate(_list(entries, "traces"), 1):
        points = _list(entry, f"stroke {number}")
        if points:
            strokes.append(_stroke(points, f"stroke {number}"))
    return tuple(strokes)


def _stroke(points: list, name: str) -> Float[np.ndarray, "points 3"]:
    try:
        array = np.array([(point["x"], point["y"], point["t"]) for point in points], np.float64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise BadRecord(f"{name} must be a list of points with numbers x, y and t") from error
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        raise BadRecord(f"{name}, point {int(np.argmin(finite)) + 1}: a coordinate or time is not finite")
    near = np.abs(array[:, :2] - 0.5).max(axis=1) <= FARTHEST + 0.5
    if not near.all():
        x, y, _ = array[np.argmin(near)]
        raise BadRecord(
            f"{name}, point {int(np.argmin(near)) + 1} at ({x:g}, {y:g}): coordinates must be fractions of "
            "the image's width and height"
        )
    return array
