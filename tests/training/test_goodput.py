"""Where the time went: parted without gap or overlap, input charged only while the devices are idle."""

import io
import json

import pytest
from rich.console import Console

from tests.training.tiny import BUCKET, empty_batch
from tracevision_jax.training.goodput import Goodput, describe, input_bound
from tracevision_jax.training.journal import Journal
from tracevision_jax.training.source import BadRecordReport, StepBatch


def test_every_second_belongs_to_one_part():
    account = Goodput(100.0)
    account.note("restore", 101.0, 103.0)
    account.fill(105.0, "start")
    account.note("input", 105.0, 106.0)
    account.note("compile", 106.0, 116.0)
    assert account.step(116.0, 120.0, accepted=True) == 1.0
    account.note("save", 121.0, 124.0)
    account.fill(126.0)
    expected = {"start": 3, "restore": 2, "input": 1, "compile": 10, "useful": 4, "save": 3, "other": 3}
    assert {part: seconds for part, seconds in account.spent.items() if seconds} == expected


def test_input_that_is_read_while_a_step_runs_is_free_and_only_the_rest_is_waited_for():
    account = Goodput(0.0)
    account.note("input", 1.0, 3.0)  # all of it while the first step runs
    account.note("input", 3.5, 7.0)  # the second step ends at 6
    assert account.step(0.0, 3.5, accepted=True) == 0.0
    assert account.step(3.0, 6.0, accepted=True) == 0.0
    assert account.step(7.5, 9.0, accepted=True) == 1.0
    assert account.spent["useful"] == 7.5 and account.spent["other"] == 0.5
    assert account.input_share() == pytest.approx(1 / 8.5) and not input_bound(account.input_share())


def test_what_is_undone_or_rejected_is_not_useful():
    account = Goodput(0.0)
    account.step(0.0, 4.0, accepted=True)
    account.mark(1)
    account.step(4.0, 7.0, accepted=True)
    account.step(7.0, 9.0, accepted=False)
    account.undo(1)
    assert (account.spent["useful"], account.spent["lost"], account.spent["rejected"]) == (4.0, 3.0, 2.0)


def test_the_description_names_what_took_time_most_first():
    assert describe({"useful": 80.0, "input": 5.0, "compile": 14.8, "save": 0.2}) == (
        "80.0% in useful steps; compile 14.8%, input 5.0%"
    )


METRICS = {
    "loss": 1.0,
    "parts": {"text": 1.0},
    "weights": {"text": 1.0},
    "gradient_norm": 1.0,
    "learning_rate": 1.0,
    "tokens": 10,
    "rejected": 0,
}


def journal(directory, start=0, seconds=()):
    """A journal after some steps of so many seconds, half of which is waiting for data; (journal, what it printed)."""
    text, account = io.StringIO(), Goodput(0.0)
    opened = Journal(directory, Console(file=text, width=200), 9, start, 1, account)
    now = 0.0
    for step, length in enumerate(seconds, start + 1):
        account.note("input", now, now + length / 2)
        waited = account.step(now + length / 2, now + length, accepted=True)
        opened.step(step, 0, METRICS, length, waited)
        now += length
    return opened, text


def test_an_input_bound_run_is_named_so_in_the_log_and_at_the_end(tmp_path):
    opened, text = journal(tmp_path, seconds=[2.0, 2.0])
    opened.summary(2, "x", None)
    opened.close()
    printed = text.getvalue()
    assert "input-bound: waits 50%" in printed and "50.0% in useful steps; input 50.0%" in printed
    assert "data.workers" in printed
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["kind"] == "goodput" and last["goodput"]["input"] == last["goodput"]["useful"] == 2.0


def test_a_continued_run_counts_what_was_spent_after_the_checkpoint_as_lost(tmp_path):
    journal(tmp_path, seconds=[2.0, 4.0, 6.0])[0].close()  # killed after step 3; the checkpoint is of step 1
    opened, text = journal(tmp_path, start=1, seconds=[8.0])
    assert opened.goodput.before == {**dict.fromkeys(opened.goodput.spent, 0.0), "useful": 1, "input": 1, "lost": 10}
    opened.summary(2, "x", None)
    opened.close()
    assert "25.0% in useful steps; lost 50.0%, input 25.0%" in text.getvalue()


def test_records_skipped_by_steps_that_are_taken_again_are_written_once(tmp_path):
    def item(step):
        bad = (BadRecordReport(step, "source", step, "torn"),)
        return StepBatch(step, 0, BUCKET, empty_batch(BUCKET, 1), bad)

    first, _ = journal(tmp_path)
    for step in range(3):
        first.data(item(step))
    first.close()
    second, _ = journal(tmp_path, start=2)  # step 2, counted from 0, was sent and not saved
    second.data(item(2))
    second.close()
    lines = (tmp_path / "bad_records.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
