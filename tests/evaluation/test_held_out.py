"""Evaluation during training: the loss over held-out rows, and answers as pictures."""

import functools

import jax
import numpy as np
import pytest

from evaluation.held_out import HeldOutLoss, HeldOutPictures
from tests.inference import tiny
from tracevision_jax.records.batch import Bucket
from tracevision_jax.records.collate import collate
from tracevision_jax.records.sample import Conversation, MaskPart, Turn
from tracevision_jax.training.step import part_values, total_loss

BUCKET = Bucket(tokens=64, frames=1, windows=1, conversations=1, points=4, masks=1)


def row(seed: int, answer: tuple = ("the star",), question: str = "a red circle ?", points: int = 2):
    """A row of one conversation with its answer."""
    asked = tiny.asked(question, seed, points)
    told = Conversation(asked.task, (*asked.turns, Turn("assistant", answer)))
    return [tiny.processor().piece(tiny.sample(seed), [told])]


@functools.cache
def rows():
    mask = MaskPart(np.random.default_rng(0).random((1, 16, 16)) > 0.5)
    return [row(0), row(1, ("a", mask)), row(2, ("the blue square and the green star .",), points=0)]


def held_out(made, batch_rows: int) -> HeldOutLoss:
    together = functools.partial(collate, config=tiny.system().config.processor)
    return HeldOutLoss(tiny.system(), lambda: made, together, BUCKET, batch_rows)


@pytest.fixture(scope="module")
def whole():
    """The loss of all rows in one batch, by the system itself."""
    batch = collate(rows(), BUCKET, tiny.system().config.processor)
    loss = jax.jit(lambda params, batch: tiny.system().loss(params, (), batch, jax.random.key(0)))
    sums, weights, _ = loss(tiny.params(), batch)
    values = {name: float(value) for name, value in part_values(sums, weights).items()}
    return {"loss": float(total_loss(tiny.system().coefficients, sums, weights))} | values


@pytest.mark.parametrize("batch_rows", [2, 3])
def test_the_loss_is_that_of_all_rows_whatever_the_batch(whole, batch_rows):
    found = held_out(rows(), batch_rows)(tiny.params(), 7)
    assert found.keys() == whole.keys() == {"loss", "text", "refinement", "dice", "accuracy"}
    for name, value in whole.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


def test_rows_are_read_once_and_those_that_do_not_fit_are_left_out(whole):
    reads = []

    def read():
        reads.append(1)
        return [*rows(), row(3, question="the blue square near " * 20), row(4, points=6)]

    evaluator = held_out(None, 3)
    evaluator.read_rows = read
    assert evaluator(tiny.params(), 0)["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert evaluator(tiny.params(), 1) == evaluator(tiny.params(), 2)
    assert len(reads) == 1


def test_no_usable_row_gives_no_number():
    assert held_out([], 2)(tiny.params(), 0) == {}
    assert held_out([row(3, question="the blue square near " * 20)], 2)(tiny.params(), 0) == {}


def test_pictures_show_every_prompt_with_its_answer():
    prompts = [
        (tiny.sample(seed), tiny.asked("a red circle ?", seed, points=2), tiny.piece(seed, points=2)) for seed in (0, 1)
    ]
    reads = []
    evaluator = HeldOutPictures(
        tiny.system().config, tiny.vocabulary(), lambda: reads.append(1) or prompts, max_new_tokens=24
    )
    pictures = evaluator(tiny.params(), 5)
    assert list(pictures) == ["answer_0", "answer_1"]
    for picture in pictures.values():
        assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
        assert picture.std() > 1
    again = evaluator(jax.tree.map(np.zeros_like, tiny.params()), 6)
    assert len(reads) == 1
    assert any(not np.array_equal(again[name], pictures[name]) for name in pictures)
