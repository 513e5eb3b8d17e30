"""The pipeline: the same batches from any step with any number of workers, and bad records as empty slots."""

import dataclasses

import numpy as np
import pytest

from data_loaders.pipeline import Pipeline
from data_loaders.plan import Lengths, Plan
from tests.training.tiny import BUCKET, empty_batch
from tracevision_jax.records.batch import Batch
from tracevision_jax.records.sample import BadRecord
from tracevision_jax.training.source import BatchSource

COUNT = 40


class Records:
    """Record i is i; some cannot be read, some cannot be laid out."""

    def __init__(self, unreadable=(), odd=()):
        self.unreadable, self.odd = unreadable, odd

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        if index in self.unreadable:
            raise BadRecord("torn picture", f"{index}.jpg", str(index))
        return str(index) if index in self.odd else index


def make_row(samples):
    """Numbers from 1; text is a fault, as a sample might be that the processor refuses."""
    return [sample + 1 for sample in samples]


def collate(rows, bucket):
    """Numbers as tokens; 1000 and more do not fit."""
    batch = empty_batch(bucket, len(rows))
    for row, numbers in enumerate(rows):
        if numbers and max(numbers) >= 1000:
            raise ValueError("longer than the bucket")
        batch.tokens[row, : len(numbers)] = numbers
        batch.segments[row, : len(numbers)] = 1
    return batch


def pipeline(records=None, workers=0, process=0, processes=1, epochs=2, **changes):
    resources = np.ones((COUNT, 6), int)
    resources[:, 0] = 5
    plan = Plan(0, [Lengths("numbers", resources)], [BUCKET], [4])
    arguments = {"make_row": make_row, "collate": collate, "steps": plan.steps_in(epochs)} | changes
    return Pipeline(plan, [records or Records()], workers=workers, process=process, processes=processes, **arguments)


def numbers(batch):
    return sorted(int(token) - 1 for token in batch.tokens.ravel() if token)


def all_numbers(items):
    return sorted(number for item in items for number in numbers(item.batch))


def assert_same(ours, theirs):
    assert [(item.step, item.epoch, item.bucket, item.bad) for item in ours] == [
        (item.step, item.epoch, item.bucket, item.bad) for item in theirs
    ]
    for mine, other in zip(ours, theirs, strict=True):
        for field in dataclasses.fields(Batch):
            np.testing.assert_array_equal(getattr(mine.batch, field.name), getattr(other.batch, field.name))


def test_it_is_what_the_training_loop_takes():
    assert isinstance(pipeline(), BatchSource)


def test_every_record_arrives_once_an_epoch():
    items = list(pipeline().batches())
    for epoch in (0, 1):
        assert all_numbers(item for item in items if item.epoch == epoch) == list(range(COUNT))


@pytest.mark.parametrize("start", [1, 5, 6])
def test_a_run_continues_from_any_step_as_if_it_had_never_stopped(start):
    whole = list(pipeline().batches())
    assert_same(list(pipeline().batches(start)), whole[start:])


def test_worker_processes_give_the_same_batches_and_reports():
    records = Records(unreadable=(3,), odd=(17,))
    assert_same(list(pipeline(records, workers=2).batches(2)), list(pipeline(records).batches(2)))


def test_processes_make_shares_of_the_same_batch():
    whole = list(pipeline().batches())
    shares = [list(pipeline(process=process, processes=2).batches()) for process in range(2)]
    for item, first, second in zip(whole, *shares, strict=True):
        joined = np.concatenate([first.batch.tokens, second.batch.tokens])
        np.testing.assert_array_equal(joined, item.batch.tokens)


def test_an_unreadable_record_is_an_empty_slot_with_reason_and_file():
    items = list(pipeline(Records(unreadable=(3, 8)), epochs=1).batches())
    assert all_numbers(items) == sorted({*range(COUNT)} - {3, 8})
    bad = sorted((report.record, report.reason, report.file) for item in items for report in item.bad)
    assert bad == [(3, "torn picture", "3.jpg"), (8, "torn picture", "8.jpg")]
    assert all(report.source == "numbers" for item in items for report in item.bad)


def test_a_record_that_cannot_be_laid_out_takes_no_other_of_its_row_with_it():
    items = list(pipeline(Records(odd=(5,)), epochs=1).batches())
    assert all_numbers(items) == sorted({*range(COUNT)} - {5})
    (report,) = [report for item in items for report in item.bad]
    assert report.record == 5 and report.reason.startswith("TypeError")


class Long(Records):
    """Record 7 is far longer than the table said."""

    def __getitem__(self, index):
        return 5000 if index == 7 else super().__getitem__(index)


def test_a_row_longer_than_its_bucket_becomes_an_empty_row():
    items = list(pipeline(Long(), epochs=1).batches())
    reports = [report for item in items for report in item.bad]
    lost = {report.record for report in reports}
    assert 7 in lost and len(lost) <= 2  # with the record that shares its row
    assert {report.reason for report in reports} == {"ValueError: longer than the bucket"}
    assert all_numbers(items) == sorted({*range(COUNT)} - lost)


def broken_collate(rows, bucket):
    raise RuntimeError("a defect of the program")


def test_a_collate_that_fails_on_nothing_is_a_defect_and_is_raised():
    with pytest.raises(RuntimeError, match="a defect"):
        next(iter(pipeline(collate=broken_collate).batches()))


def test_past_the_last_step_there_is_nothing():
    source = pipeline()
    assert list(source.batches(source.steps)) == []
