"""Reads files of predictions and references to be scored, and refuses malformed ones with entry and reason.

A file is one JSON object: id -> value. Both files must hold the same ids. All problems of a pair are told at
once (the first few, and how many more there are), each with its file, entry and reason:

    predictions, references = read_pair(p, r, prediction=check_trace, reference=check_trace)

A check takes one value as JSON gives it, and returns it in the form that is scored or raises ValueError.
"""

import json
import math
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float

from tracevision_jax.errors import UserError

Prediction = TypeVar("Prediction")
Reference = TypeVar("Reference")

PROBLEMS_SHOWN = 10
IDS_SHOWN = 10


def read_pair(
    predictions: Path,
    references: Path,
    prediction: Callable[[Any], Prediction],
    reference: Callable[[Any], Reference],
) -> tuple[dict[str, Prediction], dict[str, Reference]]:
    """Read both files and check every entry; ids in the order of the references.

    Raises:
        UserError: a file cannot be read, an id is on one side only, or a check refuses an entry.
    """
    predicted, true = read_entries(predictions, "predictions"), read_entries(references, "references")
    problems = []
    for lacking, path, other in (
        (true.keys() - predicted.keys(), predictions, "references"),
        (predicted.keys() - true.keys(), references, "predictions"),
    ):
        if lacking:
            problems.append(f"{path} lacks {counted(len(lacking), 'id')} of the {other}: {some(lacking)}")
    checked_predictions = _check(predicted, prediction, predictions, problems)
    checked_references = _check(true, reference, references, problems)
    refuse(problems)
    return {name: checked_predictions[name] for name in true}, checked_references


def read_entries(path: Path, side: str) -> dict[str, Any]:
    """The entries of one file, unchecked; `side` names the file in messages.

    Raises:
        UserError: the file is missing, unreadable, not JSON, not an object, empty, or repeats an id.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"the {side} file {path} does not exist") from None
    except OSError as error:
        raise UserError(f"the {side} file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the {side} file {path} is not UTF-8 text: {error.reason}") from error
    if not text.strip():
        raise UserError(f"the {side} file {path} is empty; it must hold a JSON object, id -> value")
    repeated: list[str] = []

    def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) != len(pairs):
            names = [name for name, _ in pairs]
            repeated.extend(name for name in entries if names.count(name) > 1)
        return entries

    try:
        entries = json.loads(text, object_pairs_hook=without_repeats)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the {side} file {path} is not JSON: {error}") from error
    if not isinstance(entries, dict):
        kind = "a list" if isinstance(entries, list) else "a single value"
        raise UserError(f"the {side} file {path} must hold a JSON object, id -> value, not {kind}")
    if repeated:
        raise UserError(f"the {side} file {path} repeats {counted(len(repeated), 'id')}: {some(repeated)}")
    if not entries:
        raise UserError(f"the {side} file {path} holds no entries")
    return entries


def refuse(problems: Collection[str]) -> None:
    """Raise one UserError that lists the problems, if there are any."""
    if not problems:
        return
    lines = list(problems)[:PROBLEMS_SHOWN]
    if len(problems) > PROBLEMS_SHOWN:
        lines.append(f"and {len(problems) - PROBLEMS_SHOWN} more")
    raise UserError(f"{counted(len(problems), 'problem')} in the files:\n  " + "\n  ".join(lines))


def quoted(name: str) -> str:
    """An id as it stands in the file, whatever characters it is made of."""
    return json.dumps(name, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()


def check_trace(value: Any) -> Float[np.ndarray, "length columns"]:
    """A list of points [x, y], of boxes [x1, y1, x2, y2], or of boxes with their area, all within [0, 1].

    Raises:
        ValueError: it is anything else; the message names the row and the reason.
    """
    if not isinstance(value, list):
        raise ValueError(f"must be a list of boxes or points, not {_kind(value)}")
    for number, row in enumerate(value):
        reason = _refusal_of_row(row, len(value[0]) if number else None)
        if reason:
            raise ValueError(f"row {number} (counted from 0) {reason}")
    return np.array(value, dtype=np.float64).reshape(len(value), len(value[0]) if value else 4)


def check_predicted_trace(value: Any) -> Float[np.ndarray, "length columns"]:
    """A trace as `check_trace` takes it, with a row or more.

    Raises:
        ValueError: it is no such trace.
    """
    trace = check_trace(value)
    if len(trace) == 0:
        raise ValueError("is empty, and LBM is undefined for a prediction without boxes or points")
    return trace


def check_caption(value: Any) -> str:
    """One text.

    Raises:
        ValueError: it is something else, or holds half a surrogate pair, which no tokenizer can read.
    """
    if not isinstance(value, str):
        raise ValueError(f"must be a text, not {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    return value


def check_captions(value: Any) -> list[str]:
    """A list of one or more texts, none of them blank.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(value, list):
        raise ValueError(f"must be a list of texts, not {_kind(value)}")
    if not value:
        raise ValueError("is an empty list, but needs a text at least")
    for number, text in enumerate(value):
        try:
            if not check_caption(text).strip():
                raise ValueError("is blank")
        except ValueError as error:
            raise ValueError(f"text {number} (counted from 0) {error}") from error
    return value


def _refusal_of_row(row: Any, columns: int | None) -> str | None:
    """Why a point or box is refused; None if it is fine. `columns` is what rows before it have."""
    if not isinstance(row, list):
        return f"must be [x1, y1, x2, y2] or [x, y], not {_kind(row)}"
    if len(row) not in (2, 4, 5):
        return f"has {counted(len(row), 'number')}; a box has 4 (5 with its area), a point 2"
    if columns is not None and len(row) != columns:
        return f"has {len(row)} numbers, those before it {columns}: a trace holds points or boxes, not both"
    for number in row:
        if isinstance(number, bool) or not isinstance(number, int | float):
            return f"holds {_kind(number)} where a number belongs"
        if isinstance(number, float) and not math.isfinite(number):
            return f"holds {number}, which is not a finite number"
        if not 0 <= number <= 1:
            return f"holds {str(number)[:20]}, outside [0, 1]: divide x by the picture's width, y by its height"
    if len(row) >= 4 and (row[2] < row[0] or row[3] < row[1]):
        low, high, axis = (row[0], row[2], "x") if row[2] < row[0] else (row[1], row[3], "y")
        return f"is reversed: {axis}2 = {high:.6g} is less than {axis}1 = {low:.6g}"
    return None


def _check(entries: dict, check: Callable[[Any], Any], path: Path, problems: list[str]) -> dict:
    """The checked entries; those refused are told in `problems` instead."""
    checked = {}
    for name, value in entries.items():
        try:
            checked[name] = check(value)
        except ValueError as error:
            problems.append(f"{path}, entry {quoted(name)}: {error}")
    return checked


def some(names: Iterable[str]) -> str:
    """The first few names in order, each as in the file, and how many more there are."""
    names = sorted(names)
    more = f" and {len(names) - IDS_SHOWN} more" if len(names) > IDS_SHOWN else ""
    return ", ".join(quoted(name) for name in names[:IDS_SHOWN]) + more


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 id", "2 ids"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _kind(value: Any) -> str:
    """What a JSON value is, for messages."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")
