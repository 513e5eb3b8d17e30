"""Data workers that die or hang: started again without losing or doubling a step, so many times."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.data_loaders.test_pipeline import COUNT, Records, all_numbers, assert_same, pipeline
from tracevision_jax.errors import Stuck, UserError


class Deadly(Records):
    """Record `at` kills or holds up its reader, the first `times` times; the file counts."""

    def __init__(self, folder, at, times, hang=False):
        super().__init__()
        self.folder, self.at, self.times, self.hang = str(folder), at, times, hang

    def __getitem__(self, index):
        if index == self.at:
            count = len(list(Path(self.folder).glob("time_*")))
            if count < self.times:
                (Path(self.folder) / f"time_{count}").touch()
                if self.hang:
                    time.sleep(3600)
                os.kill(os.getpid(), signal.SIGKILL)
        return index

    def place(self, index):
        return f"shard-{index // 10}"


def troubles(items):
    return [trouble for item in items for trouble in item.troubles]


def test_a_worker_that_dies_is_started_again_and_no_step_is_lost_or_doubled(tmp_path):
    lines = []
    items = list(pipeline(Deadly(tmp_path, 11, 1), workers=1, report=lines.append).batches(1))
    whole = list(pipeline().batches(1))
    assert [item.step for item in items] == [item.step for item in whole]
    assert all_numbers(items) == all_numbers(whole)
    (trouble,) = troubles(items)
    assert "a data worker died, reading record 11 of numbers (shard-1)" in trouble and lines == [trouble]


def test_a_record_that_kills_its_reader_every_time_is_skipped_and_reported(tmp_path):
    items = list(pipeline(Deadly(tmp_path, 11, 99), workers=1, epochs=1, retries=1, report=lambda _: None).batches())
    assert all_numbers(items) == sorted({*range(COUNT)} - {11})
    (report,) = [report for item in items for report in item.bad]
    assert (report.record, report.file) == (11, "shard-1") and "the worker that reads it dies" in report.reason
    assert len(list(tmp_path.iterdir())) == 2, "tried once more, and then no more"


def test_a_worker_that_hangs_is_ended_and_started_again(tmp_path):
    records = Deadly(tmp_path, 11, 1, hang=True)
    items = list(pipeline(records, workers=1, epochs=1, timeout=12.0, report=lambda _: None).batches())
    assert all_numbers(items) == list(range(COUNT))
    assert any("no batch for step" in trouble and "record 11 of numbers" in trouble for trouble in troubles(items))


def test_a_record_whose_reader_always_hangs_ends_the_run_with_its_file(tmp_path):
    source = pipeline(Deadly(tmp_path, 11, 99, hang=True), workers=1, epochs=1, timeout=12.0, retries=0)
    with pytest.raises(UserError, match=r"Reading hangs.*record 11 of numbers \(shard-1\).*data\.timeout") as hung:
        list(source.batches())
    assert not isinstance(hung.value, Stuck)


class Held(Records):
    """Reading waits for a file to appear."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def __getitem__(self, index):
        while index == 11 and not self.gate.exists():
            time.sleep(0.02)
        return index


def test_reading_that_hangs_in_this_process_ends_the_run_with_the_record(tmp_path):
    gate = tmp_path / "gate"
    try:
        with pytest.raises(Stuck, match=r"record 11 of numbers.*data\.workers"):
            list(pipeline(Held(gate), timeout=1.0).batches())
    finally:
        gate.touch()


def test_a_slow_store_is_waited_for_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr("data_loaders.supervision.SLOW", 0.5)
    gate, lines = tmp_path / "gate", []

    def report(line):
        lines.append(line)
        gate.touch()

    items = list(pipeline(Held(gate), timeout=60.0, report=report).batches())
    assert_same(items, list(pipeline().batches()))
    assert lines and "waiting for the data of step" in lines[0] and "record 11 of numbers" in lines[0]


def test_too_many_unusable_records_end_the_run_with_the_reason():
    records = Records(unreadable=range(0, COUNT, 2))
    with pytest.raises(UserError, match=r"records could not be used.*torn picture"):
        list(pipeline(records, epochs=9).batches())
    assert len(list(pipeline(records, epochs=9, bad_limit=0.6).batches())) == pipeline(epochs=9).steps
