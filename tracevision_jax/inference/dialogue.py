"""Turns as users write them, as a conversation: texts that speak of traces as `{A}`, and earlier answers.

conversation_of(["What is {A}?", first, "And where is {B}?"], {"A": points, "B": points}, frames=1)
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from tracevision_jax.errors import UserError
from tracevision_jax.inference.answers import Answer, Box, Phrase, Trajectory
from tracevision_jax.records.sample import BoxPart, Conversation, MaskPart, Part, PhrasePart, TracePart, Turn

Ask = str | Answer | Turn
"""A turn of a dialogue: text, an earlier answer, or a record."""

_PLACE = re.compile(r"\{([A-Z])\}")


def conversation_of(turns: str | Sequence[Ask], traces: Mapping[str, np.ndarray], frames: int) -> Conversation:
    """A dialogue that ends with a question.

    Args:
        turns: one question, or turns of user and assistant by turns; records say themselves whose they are.
        traces: checked points by letter; those that no text speaks of are shown before the first question.
        frames: number of frames of the picture or video.

    Raises:
        UserError: no turn, one of the wrong side, or a trace that is not given.
    """
    asked = [turns] if isinstance(turns, str) else list(turns)
    if not asked:
        raise UserError("there is no question: give at least one turn")
    made: list[Turn] = []
    for number, turn in enumerate(asked):
        role = ("user", "assistant")[(len(asked) - 1 - number) % 2]
        made.append(_turn(turn, role, number, traces, frames))
    if made[-1].role != "user":
        raise UserError("the last turn is the assistant's; a dialogue to be answered ends with the user's")
    first = next(number for number, turn in enumerate(made) if turn.role == "user")
    before = [turn.role for turn in made[:first]]
    if "assistant" in before:
        raise UserError(
            f"{len(asked)} turns would begin with the assistant's: a dialogue is question, answer, ..., question"
        )
    spoken_of = {letter for turn in asked if isinstance(turn, str) for letter in _PLACE.findall(turn)}
    shown = _introduced({name: points for name, points in traces.items() if name not in spoken_of}, len(traces))
    made[first] = Turn("user", (*shown, *made[first].parts))
    return Conversation("dialogue" if len(made) > 1 else "trace_qa", tuple(made))


def _turn(turn: Ask, role: str, number: int, traces: Mapping[str, np.ndarray], frames: int) -> Turn:
    if isinstance(turn, Turn):
        return turn
    if isinstance(turn, Answer):
        if role != "assistant":
            raise UserError(f"turn {number + 1} is an answer, where it is the user's turn")
        return Turn("assistant", parts_of_answer(turn, frames))
    if not isinstance(turn, str):
        raise UserError(f"turn {number + 1} is a {type(turn).__name__}; turns are texts, answers or Turn records")
    parts: list[Part] = []
    # Of a split by a pattern with a group, every second entry is the group.
    for place, text in enumerate(_PLACE.split(turn)):
        if place % 2 == 0:
            parts += [text] if text else []
        elif text not in traces:
            given = ", ".join(traces) or "none"
            raise UserError(f"turn {number + 1} speaks of trace {{{text}}}, which is not given (given: {given})")
        else:
            parts.append(TracePart(traces[text]))
    return Turn(role, tuple(parts))


def _introduced(traces: Mapping[str, np.ndarray], all_traces: int) -> list[Part]:
    """Traces before the question: one stands alone, several are named."""
    parts: list[Part] = []
    for name, points in traces.items():
        named = [f"Trajectory {name}: "] if all_traces > 1 else []
        parts += [*named, TracePart(points), " "] if named else [TracePart(points)]
    return parts


def parts_of_answer(answer: Answer, frames: int) -> tuple[Part, ...]:
    """An answer as parts of a turn, so that a dialogue can go on after it."""
    parts: list[Part] = []
    for part in answer.parts:
        if isinstance(part, str):
            parts.append(part)
        elif isinstance(part, Phrase):
            parts.append(PhrasePart(part.text))
        elif isinstance(part, Box):
            parts.append(BoxPart(part.corners))
        elif isinstance(part, Trajectory):
            parts.append(TracePart(np.pad(part.points, ((0, 0), (0, 1)))))
        else:
            # What the model wrote is [SEG] and its slots; which pixels came of it is nothing that it reads.
            parts.append(MaskPart(np.zeros((frames, 1, 1), bool)))
    return tuple(parts)
