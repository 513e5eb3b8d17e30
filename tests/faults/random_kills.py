"""Fault injection (`make faults`): SIGKILL at random instants, again and again, and the same bits in the end.

    python -m tests.faults.random_kills --kills 20 --seed 7

A small real run (`tests/training/train_tiny.py`) is killed and started again. Every other kill waits for a save to be
under way; the others fall anywhere: while it starts, restores, compiles, steps, or writes the model. Whenever it gets
to its end before all kills are done, it is compared and another begins. Compared with a run that nobody disturbed:
every bit of the last checkpoint (parameters, optimizer, random key) and of the model, how often each record was learned
from, one line a step in metrics.jsonl, and the list of skipped records. Exit code 1 when anything differs.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.training.killing import digest, finish, start
from tests.training.train_tiny import expected, make_plan, seen

SAVING = "*.orbax-checkpoint-tmp*"


def unfinished(directory: Path) -> set[int]:
    """Checkpoints that are being written, or whose hashes are not there yet, by the number of their folder's inode."""
    folder, found = directory / "checkpoints", set()
    for path in (*folder.glob("step_*"), *folder.glob(SAVING)):
        with contextlib.suppress(FileNotFoundError):  # renamed in this very moment
            if not (path / "sha256.json").exists():
                found.add(path.stat().st_ino)
    return found


def kill_once(directory: Path, epochs: int, workers: int, during_save: bool, chance: random.Random) -> str:
    """Start the run and kill it; where it was: "saving", "stepping", "starting", or "" when it ended before."""
    process = start(directory, workers, epochs)
    before, leftover = steps(directory), unfinished(directory)
    deadline = time.monotonic() + 120
    if during_save:
        while not unfinished(directory) - leftover and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.03))
    else:
        wanted = chance.choice((0, 0, 1, 15))  # 0: before the first step
        while wanted and steps(directory) < before + wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.4) if wanted else chance.uniform(0, 8))
    process.kill()
    process.communicate()
    if process.returncode != -9:
        return ""
    if unfinished(directory) - leftover:
        return "saving"
    return "stepping" if steps(directory) > before else "starting"


def steps(directory: Path) -> int:
    """Lines of steps so far."""
    file = directory / "metrics.jsonl"
    return file.read_text().count('"kind": "train"') if file.exists() else 0


def differences(run: Path, undisturbed: Path, epochs: int) -> list[str]:
    """What a finished run has that the undisturbed one has not."""
    found = []
    if digest(run) != digest(undisturbed):
        found.append("the bits of the last checkpoint or of the model differ")
    if seen(run) != expected(epochs):
        found.append(f"records were not learned from once an epoch: {seen(run)}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [line["step"] for line in lines if line["kind"] == "train"]
    if logged != list(range(1, make_plan().steps_in(epochs) + 1)):
        found.append(f"the log has not one line for each step: {logged}")
    if (run / "bad_records.jsonl").read_text() != (undisturbed / "bad_records.jsonl").read_text():
        found.append("other records were skipped")
    return found


def main(kills: int, seed: int, epochs: int, workers: int, folder: Path) -> int:
    """Kill so many times; the exit code."""
    print(f"{kills} kills, seed {seed}, {make_plan().steps_in(epochs)} steps, {workers} data workers")
    chance, where, runs, number = random.Random(seed), Counter(), 0, 0
    finish(folder / "undisturbed", workers, epochs)
    while number < kills or runs == 0:
        run = folder / f"run_{runs}"
        during_save = number % 2 == 0
        while number < kills and (place := kill_once(run, epochs, workers, during_save, chance)):
            number += 1
            where[place] += 1
            print(f"kill {number} of {kills}: {place}, after {steps(run)} logged steps", flush=True)
            during_save = number % 2 == 0
        finish(run, workers, epochs)
        if faults := differences(run, folder / "undisturbed", epochs):
            print(f"run {runs} differs from the undisturbed one:\n  " + "\n  ".join(faults))
            return 1
        runs += 1
        print(f"run {runs} has ended in the same bits as the undisturbed one", flush=True)
    told = ", ".join(f"{count} while {place}" for place, count in where.most_common())
    print(f"{number} kills ({told}) in {runs} runs: every bit as in the undisturbed run")
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how many times")
    parser.add_argument("--seed", type=int, default=None, help="of the instants; by default another each time")
    parser.add_argument("--epochs", type=int, default=16, help="length of a run, in epochs of 13 steps")
    parser.add_argument("--workers", type=int, default=0, help="data worker processes")
    given = parser.parse_args()
    drawn = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    with tempfile.TemporaryDirectory() as temporary:
        # Compiled programs are kept, also against kills, and nobody else's are read.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(temporary) / "programs")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        try:
            sys.exit(main(given.kills, drawn, given.epochs, given.workers, Path(temporary)))
        except subprocess.TimeoutExpired as error:
            sys.exit(f"a run did not end: {error}")
