"""A shard of a built dataset that was damaged on its way: its records are skipped and the file is named."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_loaders.pipeline import Pipeline
from data_loaders.plan import Lengths, Plan
from data_loaders.sources.tfds import TfdsNarratives
from tests.data_loaders.test_tfds import COUNT, VERSION, dataset, released  # noqa: F401 - fixtures
from tests.training.tiny import BUCKET, empty_batch


def make_row(samples):
    return [1 for _ in samples]


def collate(rows, bucket):
    batch = empty_batch(bucket, len(rows))
    for row, ones in enumerate(rows):
        batch.segments[row, : len(ones)] = 1
    return batch


def flip(content):
    """One byte in the middle of the shard's records."""
    middle = len(content) // 3
    return content[:middle] + bytes([content[middle] ^ 0x40]) + content[middle + 1 :]


def cut(content):
    """The second half is missing."""
    return content[: len(content) // 2]


@pytest.mark.parametrize("damage", [flip, cut, None])
def test_records_of_a_damaged_shard_are_skipped_with_its_name_and_the_others_are_read(dataset, tmp_path, damage):  # noqa: F811
    folder = tmp_path / "ln_coco"
    shutil.copytree(dataset, folder)
    shard = sorted((folder / VERSION).glob("*.array_record-*"))[1]
    if damage is None:
        shard.unlink()
    else:
        shard.write_bytes(damage(shard.read_bytes()))
    source = TfdsNarratives(folder, "val")
    inside = [index for index in range(COUNT) if Path(source.place(index)).name == shard.name]
    assert 0 < len(inside) < COUNT
    plan = Plan(0, [Lengths("ln_coco", np.ones((COUNT, 6), int))], [BUCKET], [2])
    items = list(Pipeline(plan, [source], make_row, collate, plan.steps_in(1)).batches())
    reports = [report for item in items for report in item.bad]
    assert reports and {report.record for report in reports} <= set(inside)
    assert all(shard.name in report.file for report in reports), reports
    assert sum(int(item.batch.filled.sum()) for item in items) == COUNT - len(reports)
