"""Trajectories as tokens and as text (Sec. 3.2.3), and users' text kept free of token strings.

A coordinate in [0, 1] is one of 1000 bins, clip(floor(1000 x), 0, 999), read back at the bin's centre. The
format "bins" has one added token a bin, `<traj>` x y x y ... `</traj>`; the format "digits" writes
`<traj>(12,345), (7,8)</traj>` in ordinary tokens. The prompts of Appendix G use pixels in two more spellings,
which `parse_pixels` reads.

    format_trajectory(points)                # "<traj>(12,345), (7,8)</traj>"
    from_bins(parse_digits(answer))          # (n, 2) in [0, 1]
    bins_to_ids(to_bins(points), first_added)
"""

import re
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from tracevision_jax.errors import UserError

BINS = 1000
CODEBOOK_SLOTS = 6
START, END, SEGMENT = "<traj>", "</traj>", "[SEG]"
SLOTS = tuple(f"[SEG_{slot}]" for slot in range(CODEBOOK_SLOTS))
START_OFFSET, END_OFFSET, SEGMENT_OFFSET, FIRST_SLOT_OFFSET = 0, 1, 2, 3
FIRST_BIN_OFFSET = FIRST_SLOT_OFFSET + CODEBOOK_SLOTS
"""Offsets of the added tokens from the first added id, in the order of `added_tokens`."""

Format = Literal["bins", "digits"]


def added_tokens(format: Format) -> list[str]:
    """The strings of the tokens that a format adds to the vocabulary, in the order of their ids."""
    bins = [f"<{value}>" for value in range(BINS)] if format == "bins" else []
    return [START, END, SEGMENT, *SLOTS, *bins]


# Coordinates and bins


def to_bins(points: Float[np.ndarray, "points columns"]) -> Int[np.ndarray, "points 2"]:
    """Bins of (x, y); further columns (time) are left out. Raises `UserError` for what is not finite."""
    places = np.asarray(points, np.float64)[:, :2]
    if not np.isfinite(places).all():
        raise UserError(f"point {int(np.argmin(np.isfinite(places).all(axis=1)))} of the trajectory is not finite")
    # Clipping before the scaling gives the same bins and cannot overflow.
    return np.minimum(np.floor(np.clip(places, 0.0, 1.0) * BINS), BINS - 1).astype(np.int32)


def from_bins(bins: Int[np.ndarray, "points 2"]) -> Float[np.ndarray, "points 2"]:
    """The centres (bin + 0.5) / 1000 of bins."""
    return (np.asarray(bins, np.float64).reshape(-1, 2) + 0.5) / BINS


# The format "bins": token ids


def bins_to_ids(bins: Int[np.ndarray, "points 2"], first_added: int) -> Int[np.ndarray, "tokens"]:
    """Token ids `<traj>` x y x y ... `</traj>`; `first_added` is the id of `<traj>`."""
    inner = np.asarray(bins, np.int32).reshape(-1) + FIRST_BIN_OFFSET
    return np.concatenate([[START_OFFSET], inner, [END_OFFSET]]).astype(np.int32) + np.int32(first_added)


def ids_to_bins(ids: Int[np.ndarray, "tokens"], first_added: int) -> Int[np.ndarray, "points 2"]:
    """Inverse of `bins_to_ids`. Raises `UserError` naming the first token that breaks the form."""
    offsets = np.asarray(ids, np.int64) - first_added
    if len(offsets) < 2 or offsets[0] != START_OFFSET:
        raise UserError(f"the trajectory's tokens do not start with {START}")
    if offsets[-1] != END_OFFSET:
        raise UserError(f"the trajectory's tokens do not end with {END}")
    bins = offsets[1:-1] - FIRST_BIN_OFFSET
    wrong = (bins < 0) | (bins >= BINS)
    if wrong.any():
        place = int(np.argmax(wrong)) + 1
        raise UserError(f"token {place} of the trajectory (id {ids[place]}) is not a coordinate")
    if len(bins) % 2:
        raise UserError(f"the trajectory has {len(bins)} coordinates; x and y must alternate")
    return bins.reshape(-1, 2).astype(np.int32)


# The format "digits": text

_PAIR = re.compile(r"\s*[(\[]\s*([^,()\[\]]*?)\s*,\s*([^,()\[\]]*?)\s*[)\]]\s*")
_WHOLE = re.compile(r"[0-9]{1,9}")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]{1,9}(?:\.[0-9]{0,17})?|\.[0-9]{1,17})")


def format_digits(points: Float[np.ndarray, "points columns"]) -> str:
    """`(x,y), (x,y)` of points in [0, 1], without the tags, which are tokens of their own."""
    return ", ".join(f"({x},{y})" for x, y in to_bins(points).tolist())


def format_trajectory(points: Float[np.ndarray, "points columns"]) -> str:
    """`<traj>(x,y), (x,y)</traj>` of points in [0, 1]."""
    return START + format_digits(points) + END


def parse_digits(text: str) -> Int[np.ndarray, "points 2"]:
    """Bins of the one trajectory in `text`; spaces are free, and text around it is left out.

    Raises `UserError` saying what is malformed: a tag missing or repeated, a pair that is none, a coordinate
    that is no whole number from 0 to 999.
    """
    found = parse_all_digits(text)
    if len(found) != 1:
        raise UserError(f"the text has {len(found)} trajectories, not one: {text!r:.80}")
    return found[0][1]


def parse_all_digits(text: str) -> list[tuple[tuple[int, int], Int[np.ndarray, "_ 2"]]]:
    """The character span (tags included) and the bins of each trajectory in `text`; see `parse_digits`."""
    return [((start, end), _parse_bins(inner)) for start, end, inner in _tagged(text, START, END)]


def parse_pixels(text: str, size: tuple[int, int]) -> Float[np.ndarray, "points 2"]:
    """Points in [0, 1] of the pixel trajectory of Appendix G's prompts in `text`; `size` is (height, width)
    in pixels.

    Reads `<Trajectory>(x,y), (x,y)</Trajectory>`, `<Traj>[x,y]</Traj> <Traj>[x,y]</Traj>` and either bracket
    in either tag, in any case; several tags are one trajectory. Raises `UserError` for what is malformed, and
    for pixels outside the image.
    """
    height, width = size
    if height < 1 or width < 1:
        raise UserError(f"an image of {height} x {width} pixels has no places")
    points: list[tuple[float, float]] = []
    for tag in ("trajectory", "traj"):
        for _, _, inner in _tagged(text, f"<{tag}>", f"</{tag}>", any_case=True):
            points += [(_pixel(x), _pixel(y)) for x, y in _pairs(inner)]
        if points:
            break
    if not points:
        raise UserError(f"the text has no <Trajectory> or <Traj> with points: {text!r:.80}")
    places = np.array(points) / np.array([width, height], np.float64)
    outside = ((places < 0) | (places > 1)).any(axis=1)
    if outside.any():
        bad = points[int(np.argmax(outside))]
        raise UserError(f"point {bad} lies outside the image of {width} x {height} pixels")
    return places


def _tagged(text: str, start: str, end: str, any_case: bool = False) -> list[tuple[int, int, str]]:
    """(start, end, inside) of each tagged stretch of `text`; raises `UserError` for unpaired tags."""
    pattern = re.compile(f"({re.escape(start)})|({re.escape(end)})", re.IGNORECASE if any_case else 0)
    stretches, opened = [], None
    for tag in pattern.finditer(text):
        if tag.group(1):
            if opened is not None:
                raise UserError(f"{start} at character {tag.start()} stands inside another one; {end} is missing")
            opened = tag
        else:
            if opened is None:
                raise UserError(f"{end} at character {tag.start()} has no {start} before it")
            stretches.append((opened.start(), tag.end(), text[opened.end() : tag.start()]))
            opened = None
    if opened is not None:
        raise UserError(f"{start} at character {opened.start()} is never closed by {end}")
    return stretches


def _pairs(inner: str) -> list[tuple[str, str]]:
    """The texts of x and y of each pair in `(x,y), (x,y)`; the comma between pairs may be missing."""
    pairs, place = [], 0
    while inner[place:].strip():
        match = _PAIR.match(inner, place)
        if match is None:
            raise UserError(f"point {len(pairs) + 1} of the trajectory is not (x,y): {inner[place:].strip()!r:.40}")
        pairs.append(match.groups())
        place = match.end()
        if inner[place : place + 1] == ",":
            place += 1
            if not inner[place:].strip():
                raise UserError("the trajectory ends with a comma: a point is missing")
    return pairs


def _parse_bins(inner: str) -> Int[np.ndarray, "points 2"]:
    bins = []
    for index, pair in enumerate(_pairs(inner)):
        for value in pair:
            if not _WHOLE.fullmatch(value):
                raise UserError(f"coordinate {value!r} of point {index + 1} is not a whole number")
            if int(value) >= BINS:
                raise UserError(f"coordinate {value} of point {index + 1} is not from 0 to {BINS - 1}")
        bins.append([int(value) for value in pair])
    return np.array(bins, np.int32).reshape(-1, 2)


def _pixel(value: str) -> float:
    if not _DECIMAL.fullmatch(value):
        raise UserError(f"coordinate {value!r} of a trajectory is not a number")
    return float(value)


# Users' text

# A string that the tokenizer reads as one token: an added one, or one of Qwen's own `<|...|>`. Backslashes
# may stand after its first character; a body holds no backslash and no first character, so matches never
# touch each other.
_BODY = r"/?traj>|[0-9]{1,3}>|\|[^<>\[\]|\\]*\|>"
_SEGMENT_BODY = r"SEG(?:_[0-9]+)?\]"
_PLAIN_OR_ESCAPED = re.compile(rf"<(?=\\*(?:{_BODY}))|\[(?=\\*{_SEGMENT_BODY})")
_ESCAPED = re.compile(rf"(<)\\(?=\\*(?:{_BODY}))|(\[)\\(?=\\*{_SEGMENT_BODY})")


def escape(text: str) -> str:
    r"""Put a backslash into every token string in a user's text (`<traj>` becomes `<\traj>`).

    The result holds none of `<traj>`, `</traj>`, `[SEG]`, `[SEG_k]`, `<123>` and `<|...|>`, and `unescape`
    gives back the text whatever it held, also where it had been escaped before.
    """
    return _PLAIN_OR_ESCAPED.sub(lambda match: match.group() + "\\", text)


def unescape(text: str) -> str:
    """Inverse of `escape`."""
    return _ESCAPED.sub(lambda match: match.group(1) or match.group(2), text)
