"""Questions about a scene, with answers that follow from its layout: one method of `QuestionMaker` a kind.

Traces in questions hover for 2 to 3 seconds over one object, with a short phrase spoken meanwhile.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from data_loaders.synthetic.hand import Visit, hover, time_words
from data_loaders.synthetic.language import Said, place_of, relation_of, short_phrase, with_article
from tracevision_jax.records.sample import BoxPart, MaskPart, Part, PhrasePart, Question, TracePart, Turn

if TYPE_CHECKING:
    from data_loaders.synthetic.scenes import Scene

WHAT = (
    "What is this?",
    "What am I pointing at?",
    "What does the trace show?",
    "Name the object under the trace.",
)
COLOUR = ("What colour is this?", "Which colour does the traced object have?", "What is its colour?")
SHAPE = ("What shape is this?", "Which shape does the traced object have?", "What is its shape?")
SIZE = ("How large is this object?", "Is this object large or small?")
TEXTURE = ("Which texture does this object have?", "Is this plain, striped or dotted?")
PLACE = ("Where in the image is this?", "Where is the traced object?")
BOX = ("Where is {0}?", "Give the box of {0}.", "Locate {0}.")
SEGMENT = ("Segment {0}.", "Give the mask of {0}.", "Please segment {0}.")
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _turns(*sides: tuple[Part, ...]) -> tuple[Turn, ...]:
    """Turns of user and assistant by turns."""
    return tuple(Turn(("user", "assistant")[k % 2], parts) for k, parts in enumerate(sides))


class QuestionMaker:
    """Asks questions about one scene."""

    def __init__(self, scene: "Scene", random: np.random.Generator):
        self.scene, self.random = scene, random
        self.objects = scene.layout.objects

    def ask(self, kinds: tuple[str, ...], count: int) -> tuple[Question, ...]:
        """Draw `count` questions, their kinds evenly, their objects all different as far as they suffice."""
        things = [int(k) for k in self.random.permutation(len(self.objects))]
        first = int(self.random.integers(len(kinds)))
        questions = []
        for k in range(count):
            kind = kinds[(first + k) % len(kinds)]
            questions.append(Question(KINDS[kind](self, things[k % len(things)]), kind))
        return tuple(questions)

    def pick(self, options):
        """One of `options`."""
        return options[int(self.random.integers(len(options)))]

    def trace(self, number: int) -> TracePart:
        """A trace over one object alone, with its short phrase as words."""
        said = [Said(word, number) for word in short_phrase(self.objects[number]).split()]
        end = self.random.uniform(1.9, 2.9)
        words = time_words(said, 2.5, min(end, 1.5), self.random)
        scene = self.scene
        points, _ = hover(
            [Visit(number, 0.0, end)],
            scene.radii,
            scene.layout.centres,
            scene.config.points_per_second,
            self.random,
        )
        return TracePart(points, tuple(words))

    def what(self, number: int) -> tuple[Turn, ...]:
        """Name the traced object."""
        answer = with_article(self.objects[number].name).capitalize() + "."
        return _turns((self.trace(number), self.pick(WHAT)), (answer,))

    def attribute(self, number: int, questions: tuple[str, ...], answer: str) -> tuple[Turn, ...]:
        """Ask one property of the traced object."""
        return _turns((self.trace(number), self.pick(questions)), (answer.capitalize() + ".",))

    def place(self, number: int) -> tuple[Turn, ...]:
        """Say where the traced object is."""
        return self.attribute(number, PLACE, place_of(self.scene.layout.centre(number)))

    def other(self, number: int) -> int:
        """Another object, drawn evenly; the same one in a scene of one."""
        others = [k for k in range(len(self.objects)) if k != number] or [number]
        return self.pick(others)

    def which_trace(self, number: int) -> tuple[Turn, ...]:
        """Say which of two traces shows a named object."""
        pair = [number, self.other(number)]
        first = int(self.random.integers(2))
        name = short_phrase(self.objects[number])
        question = self.pick(("Which trajectory describes {0}?", "Which trajectory is over {0}?")).format(name)
        parts = (
            "Trajectory A: ",
            self.trace(pair[first]),
            " Trajectory B: ",
            self.trace(pair[1 - first]),
            " ",
        )
        return _turns((*parts, question), (f"Trajectory {'AB'[first]}.",))

    def relation(self, number: int) -> tuple[Turn, ...]:
        """Say how the traced object lies against a named one, where that is clear; else what it is."""
        centre = self.scene.layout.centre
        clear = [k for k in range(len(self.objects)) if k != number and relation_of(centre(number), centre(k))]
        if not clear:
            return self.what(number)
        other = self.pick(clear)
        relation, name = relation_of(centre(number), centre(other)), short_phrase(self.objects[other])
        question = f"How does this object lie against {name}?"
        return _turns((self.trace(number), question), (f"It is {relation} {name}.",))

    def counting(self, number: int) -> tuple[Turn, ...]:
        """Count the objects, or those that share a colour or a shape with one."""
        thing = self.objects[number]
        form = int(self.random.integers(3))
        if form == 0:
            return self.counted("objects", len(self.objects))
        if form == 1:
            return self.counted(f"{thing.colour} objects", sum(k.colour == thing.colour for k in self.objects))
        plural = thing.shape + ("es" if thing.shape.endswith("s") else "s")
        return self.counted(plural, sum(k.shape == thing.shape for k in self.objects))

    def counted(self, name: str, count: int) -> tuple[Turn, ...]:
        """A question of how many, with its answer in words."""
        answer = NUMBERS[count] if count < len(NUMBERS) else str(count)
        return _turns((f"How many {name} are there?",), (answer.capitalize() + ".",))

    def boxed(self, number: int) -> tuple[Part, ...]:
        """The object's phrase and its box in the first frame."""
        return PhrasePart(short_phrase(self.objects[number])), BoxPart(self.scene.box(number)[0])

    def box(self, number: int) -> tuple[Turn, ...]:
        """Give the box of a named object."""
        name = short_phrase(self.objects[number])
        return _turns((self.pick(BOX).format(name),), self.boxed(number))

    def segment(self, number: int) -> tuple[Turn, ...]:
        """Give the mask of a named object."""
        name = short_phrase(self.objects[number])
        return _turns((self.pick(SEGMENT).format(name),), self.masked(number))

    def masked(self, number: int) -> tuple[Part, ...]:
        """The object's phrase and its masks."""
        return PhrasePart(short_phrase(self.objects[number])), MaskPart(self.scene.drawn[1][number])

    def trace_box(self, number: int) -> tuple[Turn, ...]:
        """Give the box of the traced object."""
        return _turns((self.trace(number), self.pick(BOX).format("this object")), self.boxed(number))

    def trace_segment(self, number: int) -> tuple[Turn, ...]:
        """Give the mask of the traced object."""
        return _turns((self.trace(number), self.pick(SEGMENT).format("this object")), self.masked(number))

    def dialogue(self, number: int) -> tuple[Turn, ...]:
        """What it is, two more exchanges about it, and something about another object: 6 to 8 turns."""
        thing, other = self.objects[number], self.other(number)
        follow_ups: list[tuple[tuple[Part, ...], tuple[Part, ...]]] = [
            (("Where is it?",), (place_of(self.scene.layout.centre(number)).capitalize() + ".",)),
            (("Is it large or small?",), (thing.size.capitalize() + ".",)),
            (("Segment it.",), self.masked(number)),
            (("Give its box.",), self.boxed(number)),
            (
                ("And what is this? ", self.trace(other)),
                (with_article(self.objects[other].name).capitalize() + ".",),
            ),
        ]
        sides = list(self.what(number))
        chosen = self.random.permutation(len(follow_ups))[: int(self.random.integers(2, 4))]
        # What "it" means stays the first object, so the new trace comes last.
        for k in sorted(int(k) for k in chosen):
            sides.extend(_turns(*follow_ups[k]))
        return tuple(sides)


KINDS: dict[str, Callable[[QuestionMaker, int], tuple[Turn, ...]]] = {
    "what": QuestionMaker.what,
    "colour": lambda maker, k: maker.attribute(k, COLOUR, maker.objects[k].colour),
    "shape": lambda maker, k: maker.attribute(k, SHAPE, maker.objects[k].shape),
    "size": lambda maker, k: maker.attribute(k, SIZE, maker.objects[k].size),
    "texture": lambda maker, k: maker.attribute(k, TEXTURE, maker.objects[k].texture),
    "place": QuestionMaker.place,
    "which_trace": QuestionMaker.which_trace,
    "relation": QuestionMaker.relation,
    "counting": QuestionMaker.counting,
    "box": QuestionMaker.box,
    "segment": QuestionMaker.segment,
    "trace_box": QuestionMaker.trace_box,
    "trace_segment": QuestionMaker.trace_segment,
    "dialogue": QuestionMaker.dialogue,
}
