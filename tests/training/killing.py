"""Starts, kills and compares runs of `train_tiny.py`; for `test_kill.py` and `tests/faults`."""

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from tests.training.train_tiny import EPOCHS, saved_state
from tracevision_jax.weights.model_directory import load_model

ROOT = Path(__file__).resolve().parents[2]


def start(directory, workers=0, epochs=EPOCHS):
    """Start, or continue, the run of a folder in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.train_tiny", str(directory), str(workers), str(epochs)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(directory, workers=0, epochs=EPOCHS):
    """Run to the end; what it printed."""
    process = start(directory, workers, epochs)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    return output


def steps_logged(directory):
    """Steps that a run has logged so far."""
    file = directory / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return sum('"kind": "train"' in line for line in lines)


def wait_for_steps(directory, steps, process):
    """Wait until a run has logged so many steps; it may then be killed at any moment of steps or saves."""
    deadline = time.monotonic() + 240
    while steps_logged(directory) < steps and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)


def wait_for_checkpoint(directory, process):
    """Wait until a run has a whole checkpoint."""
    deadline = time.monotonic() + 240
    while not list((directory / "checkpoints").glob("step_*/sha256.json")) and time.monotonic() < deadline:
        if process.poll() is not None:
            return
        time.sleep(0.01)


def alive(group):
    """Whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def digest(directory):
    """Hash of all that the newest checkpoint holds: parameters, optimizer, counts, random key; and of the model."""
    _, params = load_model(directory / "model")
    leaves, _ = jax.tree_util.tree_flatten_with_path({"checkpoint": saved_state(directory), "model": params})
    content = b"".join(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes() for path, leaf in leaves)
    return hashlib.sha256(content).hexdigest()
