"""Which caption word was spoken when: utterance times of a recording laid onto the words of its caption.

A Localized Narratives record has a hand-made `caption` and a `timed_caption` of utterances (words or short
groups of words) with times. The two differ: fillers, repetitions and corrections stand in one only, and case
and punctuation differ. TraceVision's segments (Eq. 1 and 6) and the per-word boxes of the LBM metric both
need the time window of each *caption* word; this file gives it, by a longest common subsequence over words,
then near spellings and joined or split words inside what is left. A word that was not heard has no window.

    aligned = align_words(sample.caption, sample.words)
    boxes, missing = word_boxes(join_strokes(sample.strokes), windows_of(aligned))
"""

import difflib
import functools
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float

from tracevision_jax.errors import UserError

MAX_WORDS = 20_000
"""Longest caption or utterance list, in words, that is aligned; the work grows with their product."""

_NEAR_SPELLING = 0.75
"""Similarity (difflib ratio) from which two words between the same neighbours count as the same word."""

_LOOK_AHEAD = 6
"""How many unmatched heard words are tried for one unmatched caption word."""

# Scripts written without spaces are taken one character at a time: Thai, Lao, Burmese, Khmer, kana, Han.
_UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
    r"\u3005\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_SEPARATORS = (
    r"\s\x00-\x20\x7f!-&(-/:-@\[-`{-~\u00a1-\u00a9\u00ab-\u00b4\u00b6-\u00b9\u00bb-\u00bf\u00d7\u00f7"
    r"\u2000-\u200b\u200e-\u2018\u201a-\u206f\u3000-\u3004\u3006\u3008-\u303f"
    r"\uff00-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
)
_PLAIN = rf"[^{_SEPARATORS}{_UNSPACED}'\u2019]+"
_WORD = re.compile(rf"[{_UNSPACED}]|{_PLAIN}(?:['\u2019]{_PLAIN})*")


@runtime_checkable
class TimedText(Protocol):
    """Text with the time in which it was spoken, in seconds; `records.sample.TimedWord` is one."""

    @property
    def text(self) -> str: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...


class AlignedWord(NamedTuple):
    """A caption word, its place in the caption, and its (start, end) in seconds, None where not heard."""

    text: str
    start_char: int
    end_char: int
    window: tuple[float, float] | None


def word_spans(text: str) -> list[tuple[int, int]]:
    """Character spans of the words of `text`: without punctuation, hyphenated words apart."""
    return [match.span() for match in _WORD.finditer(text)]


@functools.lru_cache(maxsize=1 << 16)
def normal_word(word: str) -> str:
    """The form in which two spellings of one word are equal: compatibility form, no case, no apostrophe."""
    return unicodedata.normalize("NFKC", word).casefold().replace("'", "").replace("\u2019", "")


@functools.lru_cache(maxsize=1 << 16)
def normal_words(text: str) -> tuple[str, ...]:
    """The words of `text` in normal form."""
    return tuple(normal_word(text[start:end]) for start, end in word_spans(text))


def align_words(caption: str, words: Sequence[TimedText]) -> list[AlignedWord]:
    """Give each word of `caption` the time window of the utterance that says it, or None.

    All words of an utterance of several words share its window. Raises `UserError` for a time that is not
    finite, an utterance that ends before it starts, and texts of more than `MAX_WORDS` words.
    """
    spans = word_spans(caption)
    wanted = [normal_word(caption[start:end]) for start, end in spans]
    heard: list[str] = []
    times: list[tuple[float, float]] = []
    for index, word in enumerate(words):
        window = (float(word.start), float(word.end))
        if not -math.inf < window[0] <= window[1] < math.inf:
            raise _impossible_times(index, word)
        spoken = normal_words(word.text)
        heard += spoken
        times += [window] * len(spoken)
    places, runs = _match(wanted, heard)
    windows = [None if place is None else times[place] for place in places]
    for index, (first, last) in runs.items():
        windows[index] = (times[first][0], max(times[first][1], times[last][1]))
    return [
        AlignedWord(caption[start:end], start, end, window) for (start, end), window in zip(spans, windows, strict=True)
    ]


def windows_of(aligned: Sequence[AlignedWord]) -> Float[np.ndarray, "words 2"]:
    """The windows of aligned words as an array of (start, end) in seconds, NaN where a word has none."""
    nothing = (math.nan, math.nan)
    windows = [nothing if word.window is None else word.window for word in aligned]
    return np.array(windows, np.float64).reshape(-1, 2)


def join_strokes(strokes: Sequence[Float[np.ndarray, "_ 3"]]) -> Float[np.ndarray, "points 3"]:
    """All strokes of (x, y, t) as one trace in the order of time; equal times keep their order."""
    if not len(strokes):
        return np.zeros((0, 3), np.float64)
    points = np.concatenate([np.asarray(stroke, np.float64).reshape(-1, 3) for stroke in strokes])
    return points[np.argsort(points[:, 2], kind="stable")]


def word_boxes(
    points: Float[np.ndarray, "points 3"], windows: Float[np.ndarray, "words 2"]
) -> tuple[Float[np.ndarray, "words 4"], Bool[np.ndarray, "words"]]:
    """The smallest box (x1, y1, x2, y2) around the points of each closed window, clipped to [0, 1].

    `points` is in the order of time. Returns the boxes and which of them are missing: a word without a
    window, or without a point in it, has the placeholder (0, 0, 1, 1) of area 1 that the LBM metric leaves
    out.
    """
    first = np.searchsorted(points[:, 2], windows[:, 0], side="left")
    after = np.searchsorted(points[:, 2], windows[:, 1], side="right")
    missing = ~np.isfinite(windows).all(axis=1) | (after <= first)
    boxes = np.tile(np.array([0.0, 0.0, 1.0, 1.0]), (len(windows), 1))
    if missing.all():
        return boxes, missing
    # reduceat takes [first, after) at every even place; one more row lets `after` point past the last point.
    places = np.stack([first[~missing], after[~missing]], axis=1).reshape(-1)
    inside = np.clip(np.concatenate([points[:, :2], points[-1:, :2]]), 0.0, 1.0)
    boxes[~missing, :2] = np.minimum.reduceat(inside, places, axis=0)[::2]
    boxes[~missing, 2:] = np.maximum.reduceat(inside, places, axis=0)[::2]
    return boxes, missing


def _impossible_times(index: int, word: TimedText) -> UserError:
    if math.isfinite(word.start) and math.isfinite(word.end):
        problem = f"ends at {word.end} s, before its start at {word.start} s"
    else:
        problem = f"has the times {word.start} to {word.end}; they must be finite seconds"
    return UserError(f"timed word {index} ({word.text!r}) {problem}")


def _match(wanted: list[str], heard: list[str]) -> tuple[list[int | None], dict[int, tuple[int, int]]]:
    """Where each wanted word was heard: its place or None; of inexact matches the first and last place."""
    if wanted == heard:
        return list(range(len(wanted))), {}
    if max(len(wanted), len(heard)) > MAX_WORDS:
        raise UserError(
            f"a caption of {len(wanted)} words with {len(heard)} timed words is too long to align "
            f"(at most {MAX_WORDS} each); cut the recording into parts"
        )
    exact = _common_subsequence(wanted, heard)
    runs: dict[int, tuple[int, int]] = {}
    gap_start, heard_start = 0, 0
    for index, place in enumerate([*exact, len(heard)]):
        if place is None:
            continue
        if gap_start < index and heard_start < place:
            found = _match_gap(wanted[gap_start:index], heard[heard_start:place])
            for offset, (first, last) in found.items():
                runs[gap_start + offset] = (heard_start + first, heard_start + last)
        gap_start, heard_start = index + 1, place + 1
    return exact, runs


def _common_subsequence(wanted: list[str], heard: list[str]) -> list[int | None]:
    """A longest common subsequence: for each wanted word its place in `heard`, or None.

    Among equally long ones the latest places are taken: of a word said twice ("a, a dog") the one beside its
    neighbour.
    """
    result: list[int | None] = [None] * len(wanted)
    rows, columns = len(wanted), len(heard)
    # Rows of the table of common lengths, kept as bits (Hyyro 2004): bit j of a row is 0 where the length
    # grows from place j to j + 1 of `heard`.
    places: dict[str, int] = {}
    for place, word in enumerate(heard):
        places[word] = places.get(word, 0) | 1 << place
    flat, row = [], (1 << columns) - 1
    for word in wanted:
        matching = row & places.get(word, 0)
        row = (row + matching) | (row - matching)
        flat.append(row)
    while rows and columns:
        if wanted[rows - 1] == heard[columns - 1]:
            rows, columns = rows - 1, columns - 1
            result[rows] = columns
        elif flat[rows - 1] >> (columns - 1) & 1:
            columns -= 1
        else:
            rows -= 1
    return result


def _match_gap(wanted: list[str], heard: list[str]) -> dict[int, tuple[int, int]]:
    """Match what is left between two neighbours: words joined or split differently, near spellings."""
    found: dict[int, tuple[int, int]] = {}
    index, start = 0, 0
    while index < len(wanted) and start < len(heard):
        step = 1
        for place in range(start, min(start + _LOOK_AHEAD, len(heard))):
            said = next((n for n in (2, 3) if "".join(heard[place : place + n]) == wanted[index]), 0)
            written = next((n for n in (2, 3) if "".join(wanted[index : index + n]) == heard[place]), 0)
            if said:
                found[index] = (place, place + said - 1)
                start = place + said
            elif written:
                found.update({index + offset: (place, place) for offset in range(written)})
                start, step = place + 1, written
            elif difflib.SequenceMatcher(None, wanted[index], heard[place]).ratio() >= _NEAR_SPELLING:
                found[index] = (place, place)
                start = place + 1
            else:
                continue
            break
        index += step
    return found
