"""Rows of pieces in the arrays of a bucket: where everything lies, what does not fit, what padding is."""

import dataclasses

import numpy as np
import pytest

from tests.records.conftest import CONFIG, VISION
from tracevision_jax.records.batch import Batch, Bucket, rows_of
from tracevision_jax.records.collate import collate, empty_batch
from tracevision_jax.records.encoded import Piece
from tracevision_jax.records.processor import Processor
from tracevision_jax.records.sample import Conversation, MaskPart, Sample, TracePart, Turn, UnitNamesPart

BUCKET = Bucket(tokens=200, frames=4, windows=8, conversations=3, points=7, masks=5)
UNITS = BUCKET.windows * VISION.window_units**2


@pytest.fixture(scope="module")
def pieces(processor: Processor) -> list[Piece]:
    """A picture with two conversations, one of them with two traces and a mask, and a video with one."""
    random = np.random.default_rng(0)

    def sample(frames: int, height: int, width: int) -> Sample:
        pixels = random.integers(0, 256, (frames, height, width, 3), np.uint8)
        return Sample(f"{frames}", "test", pixels, frames_per_second=2.0 if frames > 1 else 0.0)

    def trace(count: int) -> TracePart:
        return TracePart(random.random((count, 3)))

    mask = MaskPart(random.random((1, 24, 40)) > 0.5)
    first = [
        Conversation("a", (Turn("user", ("where ?",)), Turn("assistant", ("red", mask)))),
        Conversation("b", (Turn("user", (trace(3), trace(2))), Turn("assistant", ("a blue star",)))),
    ]
    masks = MaskPart(random.random((4, 16, 16)) > 0.5)
    second = [Conversation("c", (Turn("user", (trace(2),)), Turn("assistant", (masks, " end"))))]
    return [processor.piece(sample(1, 24, 40), first), processor.piece(sample(4, 16, 16), second)]


def test_every_array_holds_its_conversations_one_after_another(pieces):
    batch = collate([pieces, []], BUCKET, CONFIG)
    row = {name: value[0] for name, value in vars(batch).items()}
    start, frame_start, group = 0, 0, 0
    number = mask = 0
    for piece in pieces:
        frames = len(piece.grid)
        here = slice(frame_start, frame_start + frames)
        assert (row["grid"][here] == piece.grid).all()
        assert np.allclose(row["frame_times"][here], piece.frame_times)
        assert (row["patches"][here, : piece.patches.shape[1]] == piece.patches).all()
        assert not row["patches"][here, piece.patches.shape[1] :].any()
        for encoded in piece.conversations:
            n = len(encoded.tokens)
            span = slice(start, start + n)
            assert (row["tokens"][span] == encoded.tokens).all()
            assert (row["segments"][span] == number + 1).all()
            assert (row["positions"][span] == encoded.positions).all()
            assert (row["targets"][start : start + n - 1] == encoded.tokens[1:]).all()
            assert (row["target_weights"][start : start + n - 1] == encoded.learn[1:]).all()
            assert row["target_weights"][start + n - 1] == 0, "nothing is learned across conversations"
            assert row["frame_owner"][number].nonzero()[0].tolist() == list(range(*here.indices(BUCKET.frames)))
            conversation, rest = np.divmod(row["visual_index"][span], BUCKET.frames * UNITS)
            frame, unit = np.divmod(rest, UNITS)
            shown = encoded.visual[:, 0] >= 0
            assert (row["visual_index"][span][~shown] == -1).all()
            assert (conversation[shown] == number).all()
            assert (np.stack([frame - frame_start, unit], 1)[shown] == encoded.visual[shown]).all()
            count = len(encoded.points)
            assert np.allclose(row["points"][number, :count], encoded.points)
            assert row["point_trace"][number].tolist() == [*encoded.point_trace, *[0] * (BUCKET.points - count)]
            pointed = encoded.point >= 0
            assert (row["point_index"][span][pointed] == number * BUCKET.points + encoded.point[pointed]).all()
            assert (row["point_index"][span][~pointed] == -1).all()
            for k, target in enumerate(encoded.mask_target):
                assert (row["masks"][mask] == target).all()
                assert row["mask_frame"][mask] == frame_start + encoded.mask_frame[k]
                assert row["mask_group"][mask] == group + encoded.mask_frame[k] + 1
                assert (row["tokens"][row["mask_slots"][mask]] == encoded.tokens[encoded.mask_slots[k]]).all()
                mask += 1
            start, number, group = start + n, number + 1, group + frames
        frame_start += frames
    assert (row["segments"][start:] == 0).all() and (row["mask_group"][mask:] == 0).all()
    assert mask == 3 and number == 3


def test_an_empty_row_is_padding(pieces):
    batch, empty = collate([pieces, []], BUCKET, CONFIG), empty_batch(2, BUCKET, CONFIG)
    assert rows_of(batch) == 2
    for name, value in vars(batch).items():
        assert (value[1] == vars(empty)[name][1]).all(), name
    assert (empty.visual_index == -1).all() and (empty.point_index == -1).all()
    assert not any(value.any() for name, value in vars(empty).items() if not name.endswith("_index"))


def test_a_piece_says_what_it_takes_of_a_bucket(pieces):
    tokens = sum(len(c.tokens) for c in pieces[0].conversations)
    assert pieces[0].resources == (tokens, 1, 6, 2, 5, 1)
    assert pieces[1].resources == (len(pieces[1].conversations[0].tokens), 2, 1, 1, 2, 2)


@pytest.mark.parametrize("name", ["tokens", "frames", "windows", "conversations", "points", "masks"])
def test_what_does_not_fit_is_named(pieces, name):
    used = {
        "tokens": sum(len(c.tokens) for piece in pieces for c in piece.conversations),
        **{"frames": 3, "windows": 6, "conversations": 3, "points": 5, "masks": 3},
    }[name]
    collate([pieces], dataclasses.replace(BUCKET, **{name: used}), CONFIG)
    with pytest.raises(ValueError, match=rf"a row needs {used} {name}, its bucket has {used - 1}"):
        collate([pieces], dataclasses.replace(BUCKET, **{name: used - 1}), CONFIG)


def test_each_conversation_has_its_slot_of_the_row(pieces):
    longest = max(len(c.tokens) for piece in pieces for c in piece.conversations)
    config = dataclasses.replace(CONFIG, slot_tokens=longest + 2)
    bucket = dataclasses.replace(BUCKET, tokens=3 * (longest + 2))
    tight = collate([pieces], dataclasses.replace(BUCKET, tokens=bucket.tokens), CONFIG)
    slots = collate([pieces], bucket, config)
    for number in range(3):
        own, packed = slots.segments[0] == number + 1, tight.segments[0] == number + 1
        assert own.nonzero()[0][0] == number * (longest + 2)
        for name in ("tokens", "targets", "target_weights", "sought", "positions", "visual_index", "point_index"):
            assert (vars(slots)[name][0][own] == vars(tight)[name][0][packed]).all(), name
    assert (slots.tokens[0][slots.mask_slots[0, :3]] == tight.tokens[0][tight.mask_slots[0, :3]]).all()
    with pytest.raises(ValueError, match=rf"has {longest} tokens, its slot of the row {longest - 1}"):
        collate([pieces], dataclasses.replace(BUCKET, tokens=3 * (longest - 1)), _slotted(longest - 1))
    with pytest.raises(ValueError, match=rf"a row needs {3 * longest} tokens, its bucket has {2 * longest}"):
        collate([pieces], dataclasses.replace(BUCKET, tokens=2 * longest), _slotted(longest))
    with pytest.raises(ValueError, match="no multiple of slot_tokens"):
        collate([pieces], dataclasses.replace(BUCKET, tokens=3 * longest + 1), _slotted(longest))


def _slotted(tokens: int):
    return dataclasses.replace(CONFIG, slot_tokens=tokens)


def test_a_row_may_not_learn_more_than_its_share(pieces):
    learned = int((collate([pieces], BUCKET, CONFIG).target_weights > 0).sum())
    share = learned / BUCKET.tokens
    collate([pieces], BUCKET, dataclasses.replace(CONFIG, learned_share=share))
    with pytest.raises(ValueError, match=rf"{learned} tokens to learn, its bucket takes {learned - 1}"):
        collate([pieces], BUCKET, dataclasses.replace(CONFIG, learned_share=share - 1.5 / BUCKET.tokens))


def test_words_of_visual_tokens_are_targets_where_the_tokens_stand(processor, picture):
    left = np.zeros((1, 24, 40), bool)
    left[0, :, :16] = True
    part = UnitNamesPart((("red", left),))
    turns = (Turn("user", (part, "?")), Turn("assistant", ("a",)))
    plain = Conversation("plain_names", (Turn("user", ("?",)), turns[1]))
    piece = processor.piece(picture, [plain, Conversation("plain_names", turns)])
    batch = collate([[piece]], BUCKET, CONFIG)
    named = (batch.target_weights[0] > 0) & (batch.visual_index[0] >= 0)
    first = len(piece.conversations[0].tokens)
    assert (np.flatnonzero(named) - first).tolist() == piece.conversations[1].extra_targets[:, 0].tolist()
    assert batch.targets[0][named].tolist() == piece.conversations[1].extra_targets[:, 1].tolist()


def test_a_batch_is_a_pytree_of_its_arrays(pieces):
    import jax

    batch = collate([pieces], BUCKET, CONFIG)
    again = jax.tree.map(lambda x: x, batch)
    assert isinstance(again, Batch)
    assert len(jax.tree.leaves(batch)) == len(dataclasses.fields(Batch))
