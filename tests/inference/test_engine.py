"""Batched answers: alone or together, padded one way or another, on one device or four; masks and their states."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import ROOT
from tests.inference import tiny
from tests.inference.tiny import ROOMY, forced_masks
from tracevision_jax.errors import UserError
from tracevision_jax.inference.attention import block_attention
from tracevision_jax.inference.buckets import bucket_of, bucket_size, plan_batches
from tracevision_jax.inference.engine import Engine, Sampling
from tracevision_jax.records.batch import Bucket
from tracevision_jax.records.collate import collate
from tracevision_jax.records.sample import Conversation, MaskPart, Turn
from tracevision_jax.systems.tracevision import TraceVisionModel
from tracevision_jax.vision.raster import unit_centres


@pytest.fixture(scope="module")
def roomy() -> Engine:
    return Engine(tiny.system().config, tiny.params(), tiny.vocabulary(), buckets=[ROOMY])


def assert_same(ours, theirs, tolerance: float = 2e-5) -> None:
    assert ours.tokens == theirs.tokens and ours.finished == theirs.finished and ours.written == theirs.written
    np.testing.assert_allclose(ours.log_probabilities, theirs.log_probabilities, atol=tolerance)
    assert len(ours.mask_logits) == len(theirs.mask_logits)
    for left, right in zip(ours.mask_logits, theirs.mask_logits, strict=True):
        assert np.linalg.norm(left - right) <= tolerance * np.linalg.norm(right)


def test_unlike_prompts_are_answered_together_as_each_alone(roomy):
    """A batch in a roomy bucket against rows of their own in close ones: padding changes nothing, either way."""
    pieces, force = tiny.unlike_pieces(), forced_masks()
    together = roomy.generate(pieces, max_new_tokens=24, force=force, rows=8)
    assert len({answer.tokens for answer in together}) == len(pieces)
    assert [len(answer.mask_logits) for answer in together] == [0, 1, 1, 2, 1, 0]
    for number in (0, 3, 4):
        (alone,) = tiny.engine().generate([pieces[number]], max_new_tokens=24, force=force[number])
        assert_same(together[number], alone)


def test_masks_and_probabilities_are_those_of_the_training_forward(roomy):
    """What is generated step by step is what one pass over prompt and answer gives, masks of a video included."""
    piece, words = tiny.unlike_pieces()[4], tiny.vocabulary()
    force = [*words.encode("the star"), words.seg, *words.slots]
    answer = roomy.generate([piece], max_new_tokens=24, force=[force], rows=8)[0]
    frames = len(piece.grid)
    assert answer.mask_logits[0].shape == (frames, 16, 16) and frames == 2
    assert answer.frame_times == tuple(piece.frame_times.tolist())

    sample = tiny.sample(4, frames=4, height=16, width=24)
    asked = tiny.asked("the star", 4, points=2)
    said = Turn("assistant", ("the star", MaskPart(np.zeros((4, 16, 24), bool))))
    whole = tiny.processor().piece(sample, [Conversation("trace_qa", (*asked.turns, said))])
    config = roomy.config
    bucket = dataclasses.replace(ROOMY, conversations=1, masks=frames)
    batch = collate([[whole]], bucket, config.processor)
    model = TraceVisionModel(config)
    variables = {"params": jax.device_put(tiny.params())}
    hidden, masks = jax.jit(model.apply)(variables, batch)
    np.testing.assert_allclose(answer.mask_logits[0], masks[0], atol=1e-4)
    start = len(piece.conversations[0].tokens)
    np.testing.assert_array_equal(whole.conversations[0].tokens[start : start + len(force)], force)
    logits = model.apply(variables, hidden[0, start - 1 : start - 1 + len(force)], method="logits")
    chances = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.array(force)[:, None], 1)[:, 0]
    np.testing.assert_allclose(answer.log_probabilities[: len(force)], chances, atol=2e-5)


def test_every_answer_keeps_its_budget_and_its_beginning(roomy):
    pieces, words = tiny.unlike_pieces()[:3], tiny.vocabulary()
    force = [[words.traj_open], [], [words.special("<|box_start|>")]]
    answers = roomy.generate(pieces, max_new_tokens=[6, 3, 20], force=force, rows=8)
    assert [len(answer.tokens) <= budget for answer, budget in zip(answers, (6, 3, 20), strict=True)] == [True] * 3
    assert len(answers[0].points) in (1, 2) and answers[2].box is not None
    assert (answers[2].box[2:] >= answers[2].box[:2]).all()


def test_draws_depend_on_the_seed_and_the_prompts_number_alone(roomy):
    pieces = tiny.unlike_pieces()
    hot = Sampling(temperature=1.5, seed=7)
    drawn = roomy.generate(pieces[:3], max_new_tokens=12, sampling=hot, rows=8)
    again = roomy.generate([*pieces[:3], *pieces[3:]], max_new_tokens=12, sampling=hot, rows=8)
    assert [answer.tokens for answer in drawn] == [answer.tokens for answer in again[:3]]
    other = roomy.generate(pieces[:3], max_new_tokens=12, sampling=Sampling(1.5, seed=8), rows=8)
    assert other[0].tokens != drawn[0].tokens


def test_more_prompts_than_rows_come_back_in_their_order(roomy):
    pieces = tiny.unlike_pieces()
    many = [pieces[number % 6] for number in range(11)]
    once = roomy.generate(pieces, max_new_tokens=12, rows=8)
    answers = roomy.generate(many, max_new_tokens=12, rows=8)
    assert [answer.tokens for answer in answers] == [once[number % 6].tokens for number in range(11)]


def test_a_stream_says_what_the_answer_says(roomy):
    piece = tiny.unlike_pieces()[2]
    said: list[str] = []
    answer = roomy.stream(piece, said.append, max_new_tokens=24)
    assert len(said) > 1 and "".join(said).strip() == answer.text
    assert_same(answer, roomy.generate([piece], max_new_tokens=24, rows=8)[0])


def test_attention_maps_are_shares_over_the_picture(roomy):
    piece = tiny.unlike_pieces()[4]
    blocks = roomy.attention(piece)
    rows, columns = (piece.grid[0] // 2).tolist()
    assert len(blocks) == 2
    for block in blocks:
        assert block.trace_to_vision is not None and block.vision_to_trace is not None
        assert block.trace_to_vision.shape == (4, 2, 2, rows, columns) == block.vision_to_trace.shape
        np.testing.assert_allclose(block.trace_to_vision.sum(axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(block.vision_to_trace.sum(axis=(2, 3, 4)), 1, atol=1e-5)
        np.testing.assert_allclose(block.over_image.sum(), 1, atol=1e-5)
    alone = tiny.engine().attention(piece)
    np.testing.assert_allclose(blocks[1].vision_to_trace, alone[1].vision_to_trace, atol=1e-5)


def test_attention_maps_lie_over_the_picture_as_its_units_do():
    """Weights that tell a unit's own place, in window order and padded, come back in rows and columns."""
    piece = tiny.piece(4, "the star", points=2, frames=4, height=16, width=24)
    (rows, columns), frames, windows = (piece.grid[0] // 2).tolist(), len(piece.grid) + 1, piece.patches.shape[1] + 2
    grid = np.concatenate([piece.grid, np.zeros((1, 2), np.int32)])[None]
    centres, _ = (np.asarray(x) for x in unit_centres(jnp.asarray(grid), windows, 2, 2))
    places = np.arange(frames)[:, None] * 100 + centres[0] @ [columns, 10 * rows]  # frame, column, row in one number
    weights = np.zeros((3, 4, 5, places.size), np.float32)  # rows of the batch, heads, points, units
    weights[0] = places.reshape(-1) + 1000 * np.arange(5)[:, None]
    maps = [{"vision_to_trace": weights, "trace_to_vision": weights.swapaxes(-1, -2)}, {"trace_to_vision": weights.mT}]
    first, second = block_attention(maps, piece, places.shape[1], tiny.system().config.processor.vision)
    point, frame, row, column = np.ogrid[:2, : len(piece.grid), :rows, :columns]
    expected = 1000 * point + 100 * frame + 10 * (row + 0.5) + column + 0.5
    for read in (first.vision_to_trace, first.trace_to_vision, second.trace_to_vision):
        assert read is not None and read.shape == (4, 2, len(piece.grid), rows, columns)
        np.testing.assert_allclose(read, np.broadcast_to(expected, read.shape), rtol=1e-5)
    assert second.vision_to_trace is None
    np.testing.assert_array_equal(second.over_image, second.trace_to_vision.mean(axis=(0, 1)))


def test_buckets_waste_at_most_a_quarter():
    sizes = [bucket_size(needed, 8) for needed in range(1, 3000)]
    assert sorted(set(sizes)) == sorted({bucket_size(size, 8) for size in sizes})
    assert all(needed <= size <= max(8, 1.25 * needed) for needed, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 40


def test_a_prompt_takes_the_first_bucket_with_room_or_one_of_its_own():
    small = Bucket(tokens=64, frames=1, windows=1, conversations=8, points=4, masks=3)
    taken = bucket_of(tiny.piece(1, points=3), [small, ROOMY])
    assert taken == dataclasses.replace(small, conversations=1, masks=0)
    own = bucket_of(tiny.piece(3, height=24, width=32), [small])
    assert (own.windows, own.points, own.conversations) == (4, 0, 1)


def test_batches_are_of_one_bucket_and_hold_every_prompt_once():
    pieces = [tiny.unlike_pieces()[number % 6] for number in range(14)]
    plans = plan_batches(pieces, rows=3, holders=4)
    assert sorted(number for plan in plans for number in plan.numbers) == list(range(14))
    for plan in plans:
        assert plan.rows == 4 and {bucket_of(pieces[number]) for number in plan.numbers} == {plan.bucket}
    assert [plan.bucket for plan in plans] == sorted((plan.bucket for plan in plans), reverse=True)
    assert [plan.rows for plan in plan_batches(pieces[:1] * 70)] == [64, 64]
    assert [plan.rows for plan in plan_batches(pieces[:1] * 5)] == [8]


def test_another_tokenizer_is_refused():
    words = dataclasses.replace(tiny.vocabulary(), coordinates="digits")
    with pytest.raises(UserError, match="another tokenizer"):
        Engine(tiny.system().config, tiny.params(), words)


@pytest.mark.slow
def test_four_devices_answer_as_one_does(roomy):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/inference/answers_on_mesh.py")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["rows_on_a_device"] == 2
    answers = roomy.generate(tiny.unlike_pieces(), max_new_tokens=24, force=forced_masks(), rows=8)
    assert result["tokens"] == [list(answer.tokens) for answer in answers]
    sums = [[float(mask.sum()) for mask in answer.mask_logits] for answer in answers]
    for ours, theirs in zip(result["mask_sums"], sums, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-3)
