"""Phrases of a caption with their importance from 1 to 5 (Sec. 3.2.3, App. E.2), from one of three providers.

    RubricPhrases()                                    offline, by rule (rubric.py); the default
    FilePhrases("phrases.json")                        from a file, by caption or by sample id
    EndpointPhrases(ChatEndpoint(url, model), cache)   from a language model, as the paper does (App. E.7)

All have `phrases(caption, sample_id="") -> list[Phrase]`: in order, disjoint, inside the caption. A file is a
JSON object {caption or id: [{"text": ..., "importance": ...}, ...]} or, named .jsonl, has lines {"caption":
..., "phrases": [...]}. "start_char" and "end_char" may be given; without them, a phrase is looked for in the
caption word by word, whatever the case and punctuation.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from tracevision_jax.errors import UserError
from tracevision_jax.trajectory.alignment import AlignedWord, normal_word, normal_words, word_spans
from tracevision_jax.trajectory.chat_endpoint import ChatEndpoint
from tracevision_jax.trajectory.rubric import score_caption

HIGHEST_IMPORTANCE = 5

LEAST_FOUND = 0.5
"""Share of an endpoint's phrases that must stand in the caption for the answer to be believed."""


class Phrase(NamedTuple):
    """A stretch of a caption (`caption[start_char:end_char] == text`) and its importance, 1 to 5."""

    text: str
    start_char: int
    end_char: int
    importance: int


@runtime_checkable
class PhraseProvider(Protocol):
    """What gives phrases."""

    def phrases(self, caption: str, sample_id: str = "") -> list[Phrase]:
        """Phrases of `caption` in order and disjoint; an empty list where it has no words."""
        ...


class RubricPhrases:
    """Phrases by rule, without a model or a network."""

    def phrases(self, caption: str, sample_id: str = "") -> list[Phrase]:
        """See `rubric.score_caption`."""
        return [Phrase(caption[a:b], a, b, importance) for a, b, importance in score_caption(caption)]


class FilePhrases:
    """Phrases from a JSON or JSON lines file, checked as a whole when it is opened.

    Raises `UserError`, naming the entry and the fault, when the file is opened or, for entries under ids,
    asked.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._entries: dict[str, list[Any]] = {}
        lines = self.path.suffix == ".jsonl"
        for key, entry in _read_lines(self.path) if lines else _read_object(self.path):
            _check_entry(entry, f"{self.path}: entry {key!r:.60}")
            self._entries[key] = entry

    def phrases(self, caption: str, sample_id: str = "") -> list[Phrase]:
        """The phrases under the sample's id, or else under its caption."""
        key = sample_id if sample_id and sample_id in self._entries else caption
        if key not in self._entries:
            wanted = f"id {sample_id!r} or caption {caption!r:.60}" if sample_id else f"caption {caption!r:.60}"
            raise UserError(f"{self.path} has no phrases for {wanted}; add them or choose another provider")
        return _place_entry(caption, self._entries[key], f"{self.path}: entry {key!r:.60}")


class EndpointPhrases:
    """Phrases from a language model, each caption asked once; answers are kept in `cache`.

    `cache` is a JSON lines file, one a model, which `FilePhrases` reads as well if named .jsonl.
    """

    def __init__(self, endpoint: ChatEndpoint, cache: str | Path | None = None, attempts: int = 2):
        self.endpoint, self.attempts = endpoint, attempts
        self.cache = None if cache is None else Path(cache)
        self._known: dict[str, list[Phrase]] = {}
        if self.cache is not None and self.cache.exists():
            for caption, entry in _read_lines(self.cache, may_be_cut=True):
                self._known[caption] = _place_entry(caption, entry, f"{self.cache}: entry {caption!r:.60}")

    def phrases(self, caption: str, sample_id: str = "") -> list[Phrase]:
        """Ask the cache, or the model. Raises `UserError` where no readable answer comes."""
        if not word_spans(caption):
            return []
        if caption not in self._known:
            self._known[caption] = self._ask(caption)
            self._append(caption, self._known[caption])
        return list(self._known[caption])

    def _ask(self, caption: str) -> list[Phrase]:
        reply = ""
        for _ in range(self.attempts):
            reply = self.endpoint.ask(question(caption))
            scored = parse_reply(reply)
            found = locate(caption, scored)
            if found and len(found) >= LEAST_FOUND * len(scored):
                return found
        raise UserError(
            f"{self.endpoint.model} gave no readable phrases for {caption!r:.60}; its last answer: {reply!r:.200}"
        )

    def _append(self, caption: str, phrases: Sequence[Phrase]) -> None:
        if self.cache is None:
            return
        line = json.dumps({"caption": caption, "phrases": [phrase._asdict() for phrase in phrases]})
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        with open(self.cache, "ab+") as file:
            # A line cut by a killed process is ended, so that it spoils nothing but itself.
            if file.tell() and _last_byte(file) != b"\n":
                file.write(b"\n")
            file.write(line.encode() + b"\n")


def question(caption: str) -> str:
    """What a language model is asked (after Appendix E.7)."""
    return (
        "Split this description into meaningful phrases, word for word and in order. Rate each from 1 to 5 "
        "by how much it helps to identify what is described: 5 telling attributes, 4 modifiers and names of "
        "things, 3 places, 2 minor context, 1 articles and auxiliaries. Answer in one line of this form and "
        "nothing else:\n"
        f"[phrase]: score, [phrase]: score, ...\n\nDescription: {caption}"
    )


_BRACKETED = re.compile(r"\[([^\[\]]+)\][\s*_`]*[:=\uff1a-]\s*(?:score\s*)?\**\s*([0-9]+)(?:\.0+)?(?!\.?[0-9])")
_QUOTED = re.compile(r"[\"\u201c]([^\"\u201c\u201d]+)[\"\u201d]\s*[:=\uff1a-]\s*([0-9]+)(?:\.0+)?(?!\.?[0-9])")
_PLAIN = re.compile(
    r"(?:^|[\n,;])\s*(?:[-*\u2022]|[0-9]+[.)])?\s*([^:\n]*?[^:\n\s])\s*[:\uff1a]\s*([0-9]+)(?:\.0+)?(?=\s*(?:[,;.\n]|$))"
)


def parse_reply(reply: str) -> list[tuple[str, int]]:
    """(phrase, score) pairs of a model's answer: in brackets as asked, else in quotes, else `phrase: score`.

    Pairs whose score is not from 1 to 5 are left out; the list is empty where nothing can be read.
    """
    for form in (_BRACKETED, _QUOTED, _PLAIN):
        pairs = [(text.strip().strip("\"'"), int(score[:9])) for text, score in form.findall(reply)]
        pairs = [(text, score) for text, score in pairs if text and 1 <= score <= HIGHEST_IMPORTANCE]
        if pairs:
            return pairs
    return []


def locate(caption: str, scored: Iterable[tuple[str, int]]) -> list[Phrase]:
    """Find phrases in a caption by their words; those that are not there, or overlap an earlier one, are left
    out.

    Each is looked for after the one before it first, then from the start. The result is in the caption's
    order.
    """
    spans = word_spans(caption)
    words = [normal_word(caption[start:end]) for start, end in spans]
    taken = np.zeros(len(words), bool)
    found, cursor = [], 0
    for text, importance in scored:
        wanted = list(normal_words(text))
        if not wanted:
            continue
        last = len(words) - len(wanted)
        places = [*range(cursor, last + 1), *range(min(cursor, last + 1))]
        fits = (p for p in places if words[p : p + len(wanted)] == wanted and not taken[p : p + len(wanted)].any())
        place = next(fits, None)
        if place is None:
            continue
        cursor = place + len(wanted)
        taken[place:cursor] = True
        start, end = spans[place][0], spans[cursor - 1][1]
        found.append(Phrase(caption[start:end], start, end, importance))
    return sorted(found, key=lambda phrase: phrase.start_char)


def check_phrases(caption: str, phrases: Sequence[Phrase]) -> None:
    """Raise `UserError` where phrases leave the caption, overlap, or have no importance from 1 to 5."""
    _check_spans(caption, phrases, "the phrases")


def phrase_windows(phrases: Sequence[Phrase], aligned: Sequence[AlignedWord]) -> Float[np.ndarray, "phrases 2"]:
    """(start, end) in seconds of each phrase: from its first word's start to its last one's end, NaN if
    unheard.

    `phrases` are in order and disjoint, `aligned` are the words of the same caption.
    """
    windows = [(np.nan, np.nan)] * len(phrases)
    row = 0
    for _, start_char, end_char, window in aligned:
        while row < len(phrases) and phrases[row].end_char <= start_char:
            row += 1
        if row == len(phrases):
            break
        if window is not None and phrases[row].start_char < end_char:
            start, end = windows[row]
            # Comparisons with NaN are false, so that the first window replaces it.
            windows[row] = (start if start < window[0] else window[0], end if end > window[1] else window[1])
    return np.array(windows, np.float64).reshape(-1, 2)


# Files


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the phrase file {path} cannot be read: {error}") from error


def _read_object(path: Path) -> list[tuple[str, Any]]:
    """(caption or id, phrases) pairs of a JSON file."""
    try:
        entries = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        hint = "; name a file of JSON lines .jsonl" if str(error).startswith("Extra data") else ""
        raise UserError(f"the phrase file {path} is not JSON: {error}{hint}") from error
    if not isinstance(entries, dict):
        raise UserError(f"the phrase file {path} must hold an object {{caption or id: [phrases]}}")
    return list(entries.items())


def _read_lines(path: Path, may_be_cut: bool = False) -> list[tuple[str, Any]]:
    """(caption, phrases) pairs of a JSON lines file; `may_be_cut` passes over a killed writer's."""
    entries = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            entries.append((str(entry["caption"]), entry["phrases"]))
        except (json.JSONDecodeError, RecursionError) as error:
            if not may_be_cut:
                raise UserError(f"{path}: line {number} is not JSON: {error}") from error
        except (KeyError, TypeError) as error:
            raise UserError(f'{path}: line {number} must be an object with "caption" and "phrases"') from error
    return entries


def _check_entry(entry: Any, where: str) -> None:
    if not isinstance(entry, list):
        raise UserError(f"{where} must be a list of phrases, not {type(entry).__name__}")
    for index, phrase in enumerate(entry):
        if not isinstance(phrase, dict) or not isinstance(phrase.get("text"), str):
            raise UserError(f'{where}: phrase {index} must be {{"text": ..., "importance": 1 to 5}}')
        _check_importance(phrase.get("importance"), f"{where}: phrase {index} ({phrase['text']!r:.40})")
        places = [phrase.get(key) for key in ("start_char", "end_char")]
        if places != [None, None] and not all(type(place) is int for place in places):
            raise UserError(f"{where}: phrase {index} needs both start_char and end_char as whole numbers, or none")


def _check_importance(importance: Any, where: str) -> None:
    if type(importance) is not int or not 1 <= importance <= HIGHEST_IMPORTANCE:
        raise UserError(f"{where} has the importance {importance!r}; it must be a whole number from 1 to 5")


def _place_entry(caption: str, entry: Any, where: str) -> list[Phrase]:
    """The phrases of a file's entry as places in the caption."""
    _check_entry(entry, where)
    if all("start_char" in phrase for phrase in entry):
        placed = [
            Phrase(phrase["text"], phrase["start_char"], phrase["end_char"], phrase["importance"]) for phrase in entry
        ]
    else:
        placed = locate(caption, [(phrase["text"], phrase["importance"]) for phrase in entry])
        if len(placed) < len(entry):
            texts = {phrase.text for phrase in placed}
            lost = next((p["text"] for p in entry if p["text"] not in texts), entry[-1]["text"])
            raise UserError(f"{where}: phrase {lost!r:.60} does not stand in the caption, or overlaps another")
    placed.sort(key=lambda phrase: phrase.start_char)
    _check_spans(caption, placed, where)
    return placed


def _check_spans(caption: str, phrases: Sequence[Phrase], where: str) -> None:
    end = 0
    for phrase in phrases:
        _check_importance(phrase.importance, f"{where}: phrase {phrase.text!r:.40}")
        if not 0 <= phrase.start_char < phrase.end_char <= len(caption):
            raise UserError(
                f"{where}: phrase {phrase.text!r:.40} has the characters {phrase.start_char} to "
                f"{phrase.end_char}, outside a caption of {len(caption)}"
            )
        if caption[phrase.start_char : phrase.end_char] != phrase.text:
            there = caption[phrase.start_char : phrase.end_char]
            raise UserError(f"{where}: phrase {phrase.text!r:.40} is not what its characters say: {there!r:.40}")
        if phrase.start_char < end:
            raise UserError(f"{where}: phrase {phrase.text!r:.40} overlaps the one before it, or is out of order")
        end = phrase.end_char


def _last_byte(file: Any) -> bytes:
    file.seek(-1, 2)
    return file.read(1)
