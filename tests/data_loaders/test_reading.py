"""Reading from a store that is not well: new attempts, notes, and a bound on what is lost."""

import errno
import os
import subprocess
import sys

import pytest

from data_loaders.reading import Notes, Tolerance, may_pass, read
from tracevision_jax.errors import UserError
from tracevision_jax.records.sample import BadRecord
from tracevision_jax.training.source import BadRecordReport


class Flaky:
    """Fails so many times with an error, then gives the record's number."""

    def __init__(self, failures, error):
        self.failures, self.error, self.asked = failures, error, 0

    def __getitem__(self, index):
        self.asked += 1
        if self.asked <= self.failures:
            raise self.error
        return index


def test_what_may_pass_is_tried_again_after_longer_and_longer_waits():
    waits, records = [], Flaky(2, OSError(errno.ESTALE, "Stale file handle"))
    assert read(records, 7, 3, waits.append) == 7
    assert waits == pytest.approx([0.1, 0.4])


def test_the_attempts_are_bounded():
    waits, records = [], Flaky(9, TimeoutError("no answer"))
    with pytest.raises(TimeoutError):
        read(records, 7, 3, waits.append)
    assert records.asked == 4 and len(waits) == 3


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "gone"), ValueError("torn"), OSError("truncated")])
def test_what_is_missing_or_damaged_is_not_tried_again(error):
    records = Flaky(1, error)
    with pytest.raises(type(error)):
        read(records, 7, 3, pytest.fail)
    assert records.asked == 1


def test_the_cause_of_a_bad_record_decides_whether_it_may_pass():
    for number, expected in ((errno.EIO, True), (errno.ENOENT, False)):
        try:
            try:
                raise OSError(number, os.strerror(number))
            except OSError as error:
                raise BadRecord("the picture cannot be read", "a.jpg") from error
        except BadRecord as bad:
            assert may_pass(bad) is expected


def test_a_note_says_what_is_read_while_it_is_read(tmp_path):
    notes = Notes(tmp_path)
    with notes.reading((1, 17)):
        (reading,) = notes.all()
        assert (reading.process, reading.record) == (os.getpid(), (1, 17))
        assert notes.older_than(0.0) and not notes.older_than(60.0)
    assert notes.all() == []


def test_what_a_dead_worker_was_reading_is_known(tmp_path):
    program = (
        "import os, sys, pathlib; from data_loaders.reading import Notes; notes = Notes(pathlib.Path(sys.argv[1])); "
        "notes.enrol(); held = notes.reading((0, 5)); held.__enter__(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    notes = Notes(tmp_path)
    notes.enrol()
    with notes.reading((0, 6)):
        assert notes.of_dead() == [(0, 5)] and notes.workers() == [os.getpid()]
    notes.forget_workers()
    assert notes.of_dead() == [] == notes.workers()


def bad(record, file="shard-3"):
    return BadRecordReport(0, "coco", record, "cannot be read", file)


def test_a_few_unusable_records_are_tolerated_and_a_lost_shard_is_named():
    tolerance = Tolerance(0.1)
    for step in range(100):
        tolerance.add(20, [bad(step, f"{step}.jpg"), bad(step, f"{step}.png")])  # a tenth
    with pytest.raises(UserError, match=r"of the last 1000 records .*bad_limit \(10%\).* are of coco.*shard-3"):
        for _ in range(20):
            tolerance.add(20, [bad(record) for record in range(20)])


def test_the_first_records_are_not_judged_alone():
    tolerance = Tolerance(0.1)
    tolerance.add(99, [bad(record) for record in range(99)])
    with pytest.raises(UserError, match="99 of the last 100"):
        tolerance.add(1, [])
