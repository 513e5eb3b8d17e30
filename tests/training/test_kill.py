"""`kill -9` at random instants and the same command again: the same bits in the end. Ctrl-C saves first."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from tests.training.train_tiny import STEPS
from tracevision_jax.training.parameters import flatten
from tracevision_jax.weights.model_directory import load_model

ROOT = Path(__file__).resolve().parents[2]
KILLS = 4


def start(directory, workers=0):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.train_tiny", str(directory), str(workers)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(directory):
    process = start(directory)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return output


def steps_logged(directory):
    file = directory / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return sum('"kind": "train"' in line for line in lines)


def wait_for_steps(directory, steps, process):
    """Wait until a run has logged so many steps; it may then be killed at any moment of steps or saves."""
    deadline = time.monotonic() + 240
    while steps_logged(directory) < steps and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def alive(group):
    """Whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def digest(directory):
    leaves = flatten(load_model(directory / "model")[1])
    content = b"".join(path.encode() + np.asarray(leaf).tobytes() for path, leaf in sorted(leaves.items()))
    return hashlib.sha256(content).hexdigest()


def test_a_run_killed_at_random_instants_ends_in_the_bits_of_one_that_was_not(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(whole)
    instants = random.Random(1)
    deaths = 0
    for _ in range(KILLS):
        before = steps_logged(killed)
        process = start(killed)
        wait_for_steps(killed, before + 1, process)
        time.sleep(instants.uniform(0, 0.3))
        process.kill()
        process.communicate()
        deaths += process.returncode == -9
    assert deaths == KILLS, "the run ended before it could be killed"
    output = finish(killed)
    assert "Continuing from the checkpoint" in output
    assert digest(killed) == digest(whole)
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))
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
