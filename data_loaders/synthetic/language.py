"""English for scenes: places, relations, phrases and narratives.

A narrative is a list of `Said` words, each with the object that the speaker's hand is at while saying it,
so that the times and the trace (`hand.py`) can be made from it.
"""

from dataclasses import dataclass

import numpy as np

from data_loaders.synthetic.config import SceneConfig
from data_loaders.synthetic.layout import Layout, SceneObject

PLACES = (
    ("in the top left", "at the top", "in the top right"),
    ("on the left", "in the middle", "on the right"),
    ("in the bottom left", "at the bottom", "in the bottom right"),
)
"""By row and column of thirds."""
OPENINGS = (
    "in this image there is",
    "in this image we can see",
    "in this picture there is",
    "this picture shows",
    "this image shows",
    "here I can see",
    "here we can see",
    "I can see",
    "there is",
)
FIRST = ("there is", "we can see", "I can see")
MORE = ("there is", "there is also", "we can see", "I can see", "I also see", "we can also see")
FILLERS = ("um", "uh", "and um", "so")
SYNONYMS = {"large": ("large", "big"), "small": ("small", "little")}


@dataclass(frozen=True)
class Said:
    """One spoken word (with its punctuation), and the number of the object that it makes the hand go to."""

    text: str
    target: int
    filler: bool = False
    """Spoken, but left out of the caption, as transcribers do."""


@dataclass(frozen=True)
class Narrative:
    """What is said of a scene; `order` and `phrases` are the named objects and how each is named first.

    A phrase at the start of a sentence has a capital in the caption, and none in `phrases`.
    """

    said: tuple[Said, ...]
    order: tuple[int, ...]
    phrases: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The written caption: all words but the fillers."""
        return " ".join(word.text for word in self.said if not word.filler)


def place_of(centre: tuple[float, float]) -> str:
    """The name of the third of the image, by row and column, that a centre (x, y) lies in."""
    column, row = (min(int(3 * value), 2) for value in centre)
    return PLACES[max(row, 0)][max(column, 0)]


def relation_of(a: tuple[float, float], b: tuple[float, float]) -> str | None:
    """How `a` lies against `b`: "to the left of", "to the right of", "above", "below"; None if not clear."""
    dx, dy = a[0] - b[0], a[1] - b[1]
    if max(abs(dx), abs(dy)) < 0.15 or min(abs(dx), abs(dy)) > 0.6 * max(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        return "to the right of" if dx > 0 else "to the left of"
    return "below" if dy > 0 else "above"


def with_article(words: str) -> str:
    """`words` after "a" or "an"."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def short_phrase(thing: SceneObject) -> str:
    """The shortest unambiguous reference to an object, such as "the red circle"."""
    return f"the {thing.name}"


def full_phrase(thing: SceneObject, brief: bool, random: np.random.Generator) -> str:
    """A first mention, such as "a large striped red circle", with size and texture now and then."""
    words = []
    if not brief and random.random() < 0.5:
        words.append(SYNONYMS[thing.size][int(random.integers(2))])
    if thing.texture != "plain" and not brief and random.random() < 0.7:
        words.append(thing.texture)
    return with_article(" ".join([*words, thing.name]))


def _pick(options, random):
    return options[int(random.integers(len(options)))]


def _sentence(parts: list[tuple[str, int]], random, fillers: float) -> list[Said]:
    """Words of a sentence from (text, target) parts, with capital, full stop and now and then a filler."""
    said: list[Said] = []
    for text, target in parts:
        if said and random.random() < fillers:
            said.extend(Said(word, target, filler=True) for word in _pick(FILLERS, random).split())
        said.extend(Said(word, target) for word in text.split())
    first = next(k for k, word in enumerate(said) if not word.filler)
    said[first] = Said(said[first].text[0].upper() + said[first].text[1:], said[first].target)
    said[-1] = Said(said[-1].text + ".", said[-1].target)
    return said


def _motion(layout: Layout, number: int) -> str:
    """How an object starts to move, "" for one at rest."""
    vx, vy = layout.objects[number].velocity_px
    if vx == vy == 0:
        return ""
    if abs(vx) > abs(vy):
        return "moving to the right" if vx > 0 else "moving to the left"
    return "moving down" if vy > 0 else "moving up"


def narrate(layout: Layout, config: SceneConfig, random: np.random.Generator) -> Narrative:
    """Name some of the objects: the first by its place, each other by place or against an earlier one."""
    count = len(layout.objects)
    named = min(count, *(int(k) for k in random.integers(config.named[0], config.named[1] + 1, 2)))
    order = [int(k) for k in random.permutation(count)[:named]]
    fillers = 0.0 if config.brief else 0.08 * float(random.random() < 0.5)
    phrases, said = [], []
    for rank, number in enumerate(order):
        phrase = full_phrase(layout.objects[number], config.brief, random)
        phrases.append(phrase)
        parts = _mention(layout, order[:rank], number, phrase, config.brief, random)
        motion = _motion(layout, number)
        if motion and random.random() < 0.7:
            parts[-1] = (f"{parts[-1][0]}, {motion}", parts[-1][1])
        said.extend(_sentence(parts, random, fillers))
    return Narrative(tuple(said), tuple(order), tuple(phrases))


def _mention(layout: Layout, earlier, number: int, phrase: str, brief: bool, random) -> list[tuple[str, int]]:
    """Parts of a sentence that names object `number` for the first time, after the objects `earlier`."""
    place = place_of(layout.centre(number))
    relations = [(k, relation_of(layout.centre(number), layout.centre(k))) for k in earlier]
    relations = [(k, relation) for k, relation in relations if relation]
    if relations and random.random() < 0.6:
        anchor, relation = _pick(relations, random)
        return _relative(layout, anchor, relation, earlier[-1], number, phrase, place, brief, random)
    if brief:
        return [(f"{phrase} {place}", number)]
    form = int(random.integers(3))
    if form == 0:
        return [(f"{place} {_pick(MORE if earlier else FIRST, random)} {phrase}", number)]
    if form == 1 and earlier:
        return [(f"{phrase} is {place}", number)]
    return [(f"{_pick(MORE if earlier else OPENINGS, random)} {phrase} {place}", number)]


def _relative(layout, anchor: int, relation: str, last: int, number: int, phrase, place, brief, random):
    """Parts of a sentence that places object `number` against the object `anchor`; `last` was named last."""
    reference = "it" if anchor == last and random.random() < 0.4 else short_phrase(layout.objects[anchor])
    if brief:
        return [(f"{phrase} {relation} {reference}", number)]
    # The hand still rests on the object just named; a more distant one is not visited again.
    at = anchor if anchor == last else number
    extra = random.random() < 0.2
    form = int(random.integers(3))
    if form == 0:
        return [(f"{relation} {reference}", at), (f"there is {phrase}{' ' + place if extra else ''}", number)]
    against = f"{relation} {reference}{', ' + place if extra else ''}"
    if form == 1:
        return [(f"{_pick(MORE, random)} {phrase}", number), (against, number)]
    return [(f"{phrase} is", number), (against, number)]
