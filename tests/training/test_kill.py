"""`kill -9` at random instants and the same command again: the same bits in the end. Ctrl-C saves first."""

import json
import os
import random
import signal
import time

from tests.training.killing import alive, digest, finish, start, steps_logged, wait_for_checkpoint, wait_for_steps
from tests.training.train_tiny import EPOCHS, expected, make_plan, seen

KILLS = 4


def test_a_run_killed_at_random_instants_ends_in_the_bits_of_one_that_was_not(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole)
    instants = random.Random(1)
    deaths = 0
    for kill in range(KILLS):
        before = steps_logged(killed)
        process = start(killed)
        wait_for_steps(killed, before + 1, process)
        if kill == KILLS - 1:  # on a slow machine no save may have been finished yet
            wait_for_checkpoint(killed, process)
        time.sleep(instants.uniform(0, 0.3))
        process.kill()
        process.communicate()
        deaths += process.returncode == -9
    assert deaths == KILLS, "the run ended before it could be killed"
    output = finish(killed)
    assert "Continuing from the checkpoint" in output
    assert digest(killed) == digest(whole)
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(
        range(1, make_plan().steps_in(EPOCHS) + 1)
    )
    assert seen(killed) == expected(), "every usable record once an epoch, whatever happened"
    bad = [json.loads(line) for line in (killed / "bad_records.jsonl").read_text().splitlines()]
    assert bad == [json.loads(line) for line in (whole / "bad_records.jsonl").read_text().splitlines()]
    assert {(line["record"], line["reason"]) for line in bad} == {(3, "torn"), (30, "torn")}


def test_ctrl_c_saves_and_a_killed_run_takes_its_workers_along(tmp_path):
    process = start(tmp_path, workers=1)
    wait_for_steps(tmp_path, 3, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the run and to its workers
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-4000:]
    assert "Stopped by SIGINT" in output and "the same command again continues from there" in output
    before = steps_logged(tmp_path)
    process = start(tmp_path, workers=1)
    wait_for_steps(tmp_path, before + 1, process)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 60
    while alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(process.pid), "data workers outlive the training process"
