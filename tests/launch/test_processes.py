"""Real runs of two processes with four virtual devices each: jax.distributed, gloo, shared checkpoints, deaths.

The run that nothing disturbs is started by the rendered SLURM script through a stand-in for srun; it is the reference
that the disturbed ones must equal.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from configs import registry
from launch.launch import Slurm, render
from tests.conftest import ROOT
from tests.launch import tiny_command
from tests.training.killing import alive, digest, steps_logged, wait_for_checkpoint, wait_for_steps
from tracevision_jax.training.parameters import flatten
from tracevision_jax.weights.model_directory import load_model

TRAIN = [sys.executable, "-m", "tests.launch.tiny_command", "train", "tiny"]
BOUND = 30.0
"""Seconds from a death to the end of the supervisor; three or so on an idle machine."""

SRUN = """#!{python}
import os, subprocess, sys
words, options = sys.argv[1:], {{}}
while words[0].startswith("--"):
    name, _, value = words.pop(0).partition("=")
    options[name] = value
assert options["--kill-on-bad-exit"] == "1"
shared = {{**os.environ, "SLURM_NTASKS": options["--ntasks"], "SLURM_STEP_NODELIST": "localhost"}}
tasks = [
    subprocess.Popen(words, env={{**shared, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}})
    for task in range(int(options["--ntasks"]))
]
sys.exit(max(task.wait() for task in tasks))
"""


def environment(devices: int) -> dict[str, str]:
    """Of a program with so many virtual devices; optimising machine code would take most of the time."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def supervise(folder: Path, *flags: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "supervise", "--processes", "2", "--", *TRAIN, "--out", str(folder), *flags],
        cwd=ROOT,
        env=environment(4),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def child(process: subprocess.Popen, number: int) -> int:
    """Process id of a supervised process."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == process.pid and f"JAX_PROCESS_ID={number}".encode() in (entry / "environ").read_bytes():
                    return int(entry.name)
            except OSError:
                continue
    raise AssertionError(f"process {number} of {process.args} is not there")


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, tiny_command.STEPS + 1))
    return [line["loss"] for line in lines if line["kind"] == "train"]


def parameters(folder: Path) -> np.ndarray:
    leaves = flatten(load_model(folder / "model")[1])
    return np.concatenate([np.asarray(leaf).ravel() for _, leaf in sorted(leaves.items())])


@pytest.fixture(scope="module")
def by_slurm(tmp_path_factory):
    """A whole run by the SLURM script: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("slurm")
    programs = folder / "bin"
    programs.mkdir()
    (programs / "srun").write_text(SRUN.format(python=sys.executable))
    (programs / "tracevision").write_text(f'#!/bin/sh\nexec {sys.executable} -m tests.launch.tiny_command "$@"\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        for store in ("_recipes", "_systems", "_sources", "_announced"):
            patch.setattr(registry, store, {})
        patch.setattr(registry, "_loaded", [True])
        tiny_command.register()
        job = Slurm("tiny", nodes=1, gpus=2, flags=("--out", str(folder / "run")))
        text = render(job)
    (folder / "job.sh").write_text(text)
    numbered = {"SLURM_JOB_ID": str(random.SystemRandom().randrange(1, 1 << 20))}  # jax makes a port of it
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", str(folder / "job.sh")],
        cwd=ROOT,
        env={**environment(4), **numbered, "PATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return folder / "run", result.stdout


def test_the_slurm_script_trains_with_a_process_a_task_and_the_first_one_speaks(by_slurm):
    folder, out = by_slurm
    assert "on 8 x cpu" in out and "tiny: finished." in out
    assert out.count(f"step {tiny_command.STEPS}/{tiny_command.STEPS}") == 1
    assert len(losses(folder)) == tiny_command.STEPS
    bad = {name: (folder / name).read_text() for name in ("bad_records.jsonl", "bad_records_1.jsonl")}
    met = [(line["step"], line["record"]) for text in bad.values() for line in map(json.loads, text.splitlines())]
    assert {record for _, record in met} == {3, 30} and len(set(met)) == len(met)


def test_two_processes_of_four_devices_give_what_one_of_eight_gives(by_slurm, tmp_path):
    subprocess.run([*TRAIN, "--out", str(tmp_path)], cwd=ROOT, env=environment(8), check=True, capture_output=True)
    ours, theirs = parameters(by_slurm[0]), parameters(tmp_path)
    distance = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    print(f"parameters after {tiny_command.STEPS} steps differ by {distance:.1e}")
    assert distance <= 1e-5
    np.testing.assert_allclose(losses(by_slurm[0]), losses(tmp_path), rtol=1e-5)


def test_a_killed_process_ends_the_run_with_one_message_and_the_same_command_ends_in_the_same_bits(by_slurm, tmp_path):
    process = supervise(tmp_path)
    wait_for_checkpoint(tmp_path, process)  # of step 4; it is written beside the steps, which may be faster
    wait_for_steps(tmp_path, 5, process)
    groups = [child(process, number) for number in range(2)]
    os.kill(groups[1], signal.SIGKILL)
    killed = time.monotonic()
    _, error = process.communicate(timeout=120)
    assert time.monotonic() - killed < BOUND
    assert process.returncode == 128 + signal.SIGKILL, error[-4000:]
    assert error.count("tracevision supervise:") == 1
    assert "process 1 of 2 was ended by SIGKILL" in error and "the same command continues" in error.lower()
    assert "Traceback" not in error and "fatal" not in error.lower(), error
    while any(alive(group) for group in groups) and time.monotonic() - killed < BOUND:  # until they are reaped
        time.sleep(0.05)
    assert not any(alive(group) for group in groups), "something that the processes started is left"
    process = supervise(tmp_path)
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error[-4000:]
    assert "Continuing from the checkpoint of step" in out
    assert digest(tmp_path) == digest(by_slurm[0])
    assert losses(tmp_path) == losses(by_slurm[0])


def test_sigterm_saves_at_one_step_of_all_processes_and_exits_with_its_own_code(tmp_path):
    process = supervise(tmp_path, "--steps", "100000", "--checkpoint.every", "0")
    wait_for_steps(tmp_path, 3, process)
    for _ in range(2):  # a scheduler may say it twice
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
    out, error = process.communicate(timeout=240)
    assert process.returncode == 75, error[-4000:]
    said = "tracevision supervise: saved after SIGTERM. The same command continues from there."
    assert error.splitlines()[-1] == said and "Traceback" not in error  # jax notes the signal before
    done = steps_logged(tmp_path)
    assert f"Stopped by SIGTERM after step {done}" in out
    assert (tmp_path / "checkpoints" / f"step_{done:08d}" / "sha256.json").is_file()


def test_processes_with_other_recipes_are_stopped_at_the_start_and_told_what_differs(tmp_path):
    differing = f'exec "$@" --seed $JAX_PROCESS_ID --out {tmp_path}'
    command = ["supervise", "--processes", "2", "--", "bash", "-c", differing, "bash", *TRAIN]
    result = subprocess.run(
        [sys.executable, "-m", "launch", *command],
        cwd=ROOT,
        env=environment(1),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 2, result.stderr[-4000:]
    assert "recipe.seed: 0 on process 0; 1 on process 1" in result.stderr
    assert result.stderr.count("are about to do different things") == 1 and "Traceback" not in result.stderr
    assert not any(tmp_path.iterdir())
