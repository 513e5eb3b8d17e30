"""Phrases and their importance from 1 to 5 by rule: the rubric of Appendix E.2 without a language model.

A caption is cut at punctuation and before relations ("on", "next to", "with", ...), openers ("In this image
we can see") are parted from what they introduce, and neighbours are joined until the number of phrases is the
usual one. A phrase scores by the most telling word in it:

    5  colours, outermost places, ordinals, numbers written in figures      "red hat", "leftmost chair"
    4  sizes, materials, counts, and any other word that names a thing      "wooden table", "a dog"
    3  places and postures                                                  "in the corner", "next to"
    2  what only introduces, and bare prepositions                          "In this image we can see"
    1  articles, auxiliaries, pronouns, fillers

Words are English; words of other languages count as names of things (4) and phrases end at punctuation.
"""

import itertools
import re
from typing import NamedTuple

from tracevision_jax.trajectory.alignment import normal_word, word_spans

USUAL_PHRASES = 7
"""Appendix E.2 speaks of 3 to 7 phrases a caption."""

WORDS_A_PHRASE = 6
"""A longer caption may have one phrase per so many words, since longer captions have more segments (E.7)."""

_FUNCTION = """a an the this that these those there here it its i we you he she they them his her their our is
are was were be been being am has have had having do does did can could will would may might must and or but
so also too as of for to which who whom whose what where when while um uh ah oh er hmm okay ok then than very
just some any not no"""

_INTRODUCING = """image images picture pictures photo photos photograph photography frame video clip scene
view see sees seen seeing look looks looking like seem seems appear appears observe observed show shows
showing shown display displays displayed visible contain contains consist consists consisting present find
found notice thing things part kind type something given in on at by with from up down out off"""

_PLACING = """into onto over under above below behind beside besides beneath underneath between among around
across along against near nearby next close adjacent inside outside within front back backside background
foreground left right top bottom middle centre center side sides corner edge end towards toward through far
away opposite ahead upper lower beyond attached surrounding surrounded standing stands stand sitting sits sit
lying lies placed kept situated located hanging hangs resting holding holds wearing wears"""

_DESCRIBING = """big large huge small little tiny tall short long wide narrow thick thin old young new wooden
metal metallic plastic glass leather brick concrete stone marble ceramic paper cloth fabric round square
rectangular triangular circular flat empty full open closed one two three four five six seven eight nine ten
eleven twelve many few several multiple couple pair group bunch"""

_TELLING = """red green blue yellow orange purple violet pink brown black white grey gray beige cyan magenta
turquoise teal maroon golden gold silver navy olive cream tan colour color coloured colored colourful colorful
multicolour multicolor striped stripes dotted spotted checked checkered plaid leftmost rightmost topmost
bottommost uppermost lowermost nearest closest farthest furthest largest smallest biggest tallest shortest
first second third fourth fifth last number letter letters text written labelled labeled reading"""

_IMPORTANCE = {
    word: importance
    for importance, words in enumerate([_FUNCTION, _INTRODUCING, _PLACING, _DESCRIBING, _TELLING], start=1)
    for word in words.split()
}
_NAME = 4

_STARTING = """in on at into onto over under above below behind beside besides beneath underneath between
among around across along against near next close inside outside within by with from through towards toward
and or but while which who where there holding wearing standing sitting lying placed kept hanging attached
surrounded"""
_STARTS = frozenset(_STARTING.split())
"""Words before which a phrase starts, unless all before it in the phrase is of this kind too ("next to")."""

_OPENING = "see observe notice find is are was were has have contains shows consists"
_OPENS = frozenset(_OPENING.split())
"""Words after which a phrase ends, where it has named nothing yet ("there is", "we can see")."""

_SENTENCE_END = re.compile(r"[.!?\u3002\uff01\uff1f\u061f\u0964]")
_BREAK = re.compile(r"[.,;:!?()\n\u2014\u2026\u3001\u3002\uff0c\uff0e\uff01\uff1f\uff1b\uff1a\u060c\u061b\u061f\u0964]")


class ScoredSpan(NamedTuple):
    """A stretch of a caption, in characters, and its importance from 1 to 5."""

    start: int
    end: int
    importance: int


class _Piece(NamedTuple):
    start: int
    end: int
    importance: int
    words: int
    ends_sentence: bool


def word_importance(word: str) -> int:
    """The rubric's score of a single word."""
    normal = normal_word(word)
    known = _IMPORTANCE.get(normal)
    if known is not None:
        return known
    return 5 if normal.isdigit() else _NAME


def score_caption(caption: str) -> list[ScoredSpan]:
    """The phrases of a caption in order, disjoint, from first word to last; none if it has no words."""
    pieces = _cut(caption)
    limit = max(USUAL_PHRASES, -(-sum(piece.words for piece in pieces) // WORDS_A_PHRASE))
    while len(pieces) > limit:
        # The two neighbours that differ least in importance, best of one sentence, then the shortest, become
        # one.
        costs = [
            (abs(one.importance - two.importance), one.ends_sentence, one.words + two.words)
            for one, two in itertools.pairwise(pieces)
        ]
        place = costs.index(min(costs))
        pieces[place : place + 2] = [_join(pieces[place], pieces[place + 1])]
    return [ScoredSpan(piece.start, piece.end, piece.importance) for piece in pieces]


def _cut(caption: str) -> list[_Piece]:
    spans = word_spans(caption)
    pieces: list[_Piece] = []
    first = 0
    for index in range(1, len(spans) + 1):
        if index == len(spans) or _BREAK.search(caption, spans[index - 1][1], spans[index][0]):
            after = spans[index][0] if index < len(spans) else len(caption)
            ends = _SENTENCE_END.search(caption, spans[index - 1][1], after) is not None
            clause = _cut_clause(caption, spans[first:index])
            pieces += [*clause[:-1], clause[-1]._replace(ends_sentence=ends)]
            first = index
    return pieces


def _cut_clause(caption: str, spans: list[tuple[int, int]]) -> list[_Piece]:
    """Pieces of the words between two marks of punctuation."""
    words = [normal_word(caption[start:end]) for start, end in spans]
    scores = [word_importance(word) for word in words]
    starts, named, placed_only = [0], False, True
    for index, word in enumerate(words):
        begins = word in _STARTS and not placed_only
        opened = index > 0 and words[index - 1] in _OPENS and not named and word not in _STARTS
        if index and (begins or opened):
            starts.append(index)
            named, placed_only = False, True
        named |= scores[index] >= _NAME
        placed_only &= scores[index] in (1, 3) or word in _STARTS
    bounds = zip(starts, [*starts[1:], len(words)], strict=True)
    pieces = [
        _Piece(spans[first][0], spans[after - 1][1], max(scores[first:after]), after - first, False)
        for first, after in bounds
    ]
    return _without_lone_function_words(pieces)


def _without_lone_function_words(pieces: list[_Piece]) -> list[_Piece]:
    """A piece of one function word ("and") belongs to the next, or, at the end, to the one before."""
    kept: list[_Piece] = []
    for piece in pieces:
        if kept and kept[-1].words == 1 and kept[-1].importance == 1:
            kept[-1] = _join(kept[-1], piece)
        else:
            kept.append(piece)
    if len(kept) > 1 and kept[-1].words == 1 and kept[-1].importance == 1:
        kept[-2:] = [_join(kept[-2], kept[-1])]
    return kept


def _join(one: _Piece, two: _Piece) -> _Piece:
    importance = max(one.importance, two.importance)
    return _Piece(one.start, two.end, importance, one.words + two.words, two.ends_sentence)
