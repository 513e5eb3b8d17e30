"""Token ids read back as typed parts, and what an answer says about them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco

from tests.inference import tiny
from tracevision_jax.inference.answers import (
    Answer,
    Box,
    Mask,
    MaskPlace,
    Phrase,
    Trajectory,
    binary_mask,
    box_of_mask,
    read_tokens,
    readable,
)
from tracevision_jax.records.vocabulary import Vocabulary


def tokens_of(*parts, words: Vocabulary | None = None) -> list[int]:
    """Ids of texts, phrases, boxes (4 numbers), trajectories (pairs) and masks (None)."""
    words = words or tiny.vocabulary()
    ids: list[int] = []

    def coordinates(values) -> list[int]:
        return words.encode_coordinates(np.asarray(values, np.float64).reshape(-1, 2))

    for part in parts:
        if isinstance(part, str):
            ids += words.encode(part)
        elif isinstance(part, Phrase):
            ids += [words.special("<|object_ref_start|>"), *words.encode(part.text)]
            ids += [words.special("<|object_ref_end|>")]
        elif part is None:
            ids += [words.seg, *words.slots]
        elif np.ndim(part) == 1:
            ids += [words.special("<|box_start|>"), *coordinates(part), words.special("<|box_end|>")]
        else:
            ids += [words.traj_open, *coordinates(part), words.traj_close]
    return ids


def answer_of(*parts, size=(8, 12), frames=1) -> Answer:
    return Answer((), tuple(parts), (), "end", "", size, tuple(float(frame) for frame in range(frames)))


def disc(row: float, column: float, frames: int = 1) -> Mask:
    """Logits that are positive in a quarter of a 16 x 16 grid."""
    grid = np.full((frames, 16, 16), -5.0)
    grid[:, int(8 * row) : int(8 * row) + 8, int(8 * column) : int(8 * column) + 8] = 5.0
    return Mask(grid)


def test_parts_come_back_in_their_order():
    ids = tokens_of("see ", Phrase("a red circle"), [0.1, 0.2, 0.3, 0.4], None, " and ", [[0.5, 0.6], [0.7, 0.8]], None)
    parts = read_tokens(ids, tiny.vocabulary())
    kinds = [type(part) for part in parts]
    assert kinds == [str, Phrase, Box, MaskPlace, str, Trajectory, MaskPlace]
    assert (parts[0], parts[1].text, parts[4]) == ("see ", "a red circle", " and ")
    np.testing.assert_allclose(parts[2].corners, [0.1005, 0.2005, 0.3005, 0.4005])
    np.testing.assert_allclose(parts[5].points, [[0.5005, 0.6005], [0.7005, 0.8005]])
    for part in (parts[3], parts[6]):
        assert ids[part.first_slot] == tiny.vocabulary().slots[0] and ids[part.first_slot - 1] == tiny.vocabulary().seg


def test_written_digits_are_read_as_bins_are():
    words = Vocabulary(tiny.vocabulary().tokenizer, "digits")
    ids = [words.traj_open, *words.encode("(12,345), (7,8)"), words.traj_close]
    ids += [words.special("<|box_start|>"), *words.encode("(1,2), (3,4)"), words.special("<|box_end|>")]
    trajectory, box = read_tokens(ids, words)
    np.testing.assert_allclose(trajectory.points, [[0.0125, 0.3455], [0.0075, 0.0085]])
    np.testing.assert_allclose(box.corners, [0.0015, 0.0025, 0.0035, 0.0045])


@given(st.integers(0, 40))
def test_any_beginning_of_an_answer_can_be_read(length):
    """As a stream does: what is said only ever grows, and what is open is left out."""
    ids = tokens_of("see ", Phrase("the star"), [0.1, 0.2, 0.3, 0.4], None, " and ", [[0.5, 0.6]], " .")
    shorter, longer = (readable(read_tokens(ids[:end], tiny.vocabulary())) for end in (length, length + 1))
    assert longer.startswith(shorter)
    assert readable(read_tokens(ids, tiny.vocabulary())) == "see the star and  ."


def test_text_that_looks_like_markers_stays_text():
    (part,) = read_tokens(tokens_of("[SEG] <traj> <5>"), tiny.vocabulary())
    assert part == "[SEG] <traj> <5>"


def test_an_answer_without_places_has_empty_ones():
    answer = answer_of(" just text ")
    assert answer.text == "just text" and answer.points.shape == (0, 2) and answer.boxes.shape == (0, 4)
    assert answer.box is None and answer.phrases == [] and answer.grounded == []
    assert answer.masks.shape == (0, 1, 8, 12)


def test_phrases_get_the_box_and_the_mask_that_follow_them():
    corners = np.array([0.1, 0.1, 0.4, 0.4])
    answer = answer_of(Phrase("one"), Box(corners), disc(0, 0), " and ", Phrase("two"), disc(1, 1), disc(1, 0))
    lines = answer.grounded
    assert [line.phrase for line in lines] == ["one", "two", ""]
    np.testing.assert_array_equal(lines[0].box, corners)
    # Without a written box, it is drawn around the mask.
    np.testing.assert_allclose(lines[1].box, [0.5, 0.5, 1, 1])
    np.testing.assert_allclose(lines[2].box, [0, 0.5, 0.5, 1])
    assert [line.mask.mean() for line in lines] == [0.25] * 3
    assert answer.text == "one and two"


def test_masks_are_stretched_over_the_picture():
    for height, width in ((16, 16), (7, 100), (200, 3), (1, 1)):
        mask = binary_mask(disc(0, 1).logits, (height, width))
        assert mask.shape == (1, height, width) and mask.dtype == bool
        if min(height, width) > 8:
            assert mask[0, height // 4, 3 * width // 4] and not mask[0, 3 * height // 4, width // 4]
            assert abs(mask.mean() - 0.25) < 0.02


def test_a_mask_edge_lies_where_the_logits_cross_zero():
    """Bilinear between centres of cells: of a ramp from -1 to 3 over two cells the edge is a quarter of the way."""
    ramp = np.array([[[-1.0, 3.0], [-1.0, 3.0]]])
    row = binary_mask(ramp, (1, 400))[0, 0]
    assert abs(int(row.argmax()) - (100 + 50)) <= 1


def test_an_empty_mask_has_no_box():
    assert box_of_mask(np.zeros((2, 4, 4), bool)) is None
    later = np.zeros((2, 4, 4), bool)
    later[1, 2, 1:3] = True
    np.testing.assert_allclose(box_of_mask(later), [0.25, 0.5, 0.75, 0.75])


def test_json_holds_everything_and_masks_decode():
    answer = answer_of("a ", Phrase("b"), disc(0, 1, frames=2), Trajectory(np.array([[0.5, 0.25]])), frames=2)
    content = json.loads(json.dumps(answer.as_json(), allow_nan=False))
    assert content["text"] == "a b" and content["trajectories"] == [[[0.5, 0.25]]]
    (line,) = content["grounded"]
    assert line["phrase"] == "b" and len(line["mask"]) == 2 == len(content["frame_times"])
    np.testing.assert_array_equal(coco.decode(line["mask"][1]).astype(bool), answer.masks[0, 1])


@pytest.mark.parametrize("finished", ["end", "budget"])
def test_json_says_how_the_answer_ended(finished):
    assert Answer((1, 2), ("x",), (-1.0, -0.5), finished, "x").as_json()["finished"] == finished
