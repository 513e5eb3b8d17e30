"""Turns as users write them: letters of traces, earlier answers, whose turn it is."""

import numpy as np
import pytest

from tests.inference import tiny
from tests.inference.test_answers import answer_of, disc
from tracevision_jax.errors import UserError
from tracevision_jax.inference.answers import Box, Phrase, Trajectory
from tracevision_jax.inference.dialogue import conversation_of
from tracevision_jax.records.sample import BoxPart, MaskPart, PhrasePart, TracePart, Turn

A, B = np.full((2, 3), 0.25), np.full((3, 3), 0.75)


def shape_of(turn: Turn) -> list:
    """Texts as they are, traces as their number of points."""
    return [part if isinstance(part, str) else len(part.points) for part in turn.parts]


def test_letters_stand_for_traces():
    asked = conversation_of("Does {A} meet {B}, or {A}?", {"A": A, "B": B}, 1)
    (turn,) = asked.turns
    assert turn.role == "user"
    assert shape_of(turn) == ["Does ", 2, " meet ", 3, ", or ", 2, "?"]


def test_a_trace_that_no_text_speaks_of_is_shown_first():
    (turn,) = conversation_of("What is this?", {"A": A}, 1).turns
    assert shape_of(turn) == [2, "What is this?"]
    (turn,) = conversation_of("Which is longer?", {"A": A, "B": B}, 1).turns
    assert shape_of(turn) == ["Trajectory A: ", 2, " ", "Trajectory B: ", 3, " ", "Which is longer?"]
    first, _, last = conversation_of(["What?", "A star.", "And {B}?"], {"A": A, "B": B}, 1).turns
    assert shape_of(first) == ["Trajectory A: ", 2, " ", "What?"] and shape_of(last) == ["And ", 3, "?"]


def test_turns_alternate_and_records_keep_their_role():
    asked = conversation_of([Turn("system", ("Be brief.",)), Turn("user", ("Hi.",)), "Hello.", "Bye?"], {}, 1)
    assert [turn.role for turn in asked.turns] == ["system", "user", "assistant", "user"]
    assert asked.task == "dialogue"


def test_an_earlier_answer_goes_back_in_as_it_was_written():
    """Its tokens are those that the model wrote, masks with their slots included."""
    box = Box(np.array([0.1005, 0.2005, 0.3005, 0.4005]))
    answer = answer_of("see ", Phrase("it"), box, disc(0, 0), Trajectory(np.array([[0.5005, 0.6005]])))
    asked = conversation_of(["What?", answer, "And?"], {}, 1)
    kinds = [type(part) for part in asked.turns[1].parts]
    assert kinds == [str, PhrasePart, BoxPart, MaskPart, TracePart]
    words = tiny.vocabulary()
    piece = tiny.processor().piece(tiny.sample(0), [asked], answer=False)
    written = words.decode(piece.conversations[0].tokens.tolist())
    slots = "".join(f"[SEG_{k}]" for k in range(6))
    inside = f"see <|object_ref_start|>it<|object_ref_end|><|box_start|><100><200><300><400><|box_end|>[SEG]{slots}"
    assert f"{inside}<traj><500><600></traj><|im_end|>" in written


def test_braces_that_name_no_letter_stay_text():
    (turn,) = conversation_of("a {b} {AB} {1} {}", {}, 1).turns
    assert turn.parts == ("a {b} {AB} {1} {}",)


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([], "no question"),
        (["a", "b"], "2 turns would begin with the assistant's"),
        ("What is {B}?", r"speaks of trace \{B\}, which is not given \(given: A\)"),
        ([Turn("user", ("a",)), Turn("assistant", ("b",))], "ends with the user's"),
        ([answer_of("x")], "turn 1 is an answer"),
    ],
)
def test_what_is_no_dialogue_is_refused(turns, words):
    with pytest.raises(UserError, match=words):
        conversation_of(turns, {"A": A}, 1)
