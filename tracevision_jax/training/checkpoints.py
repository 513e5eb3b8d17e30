"""Checkpoints of a run: asynchronous, hashed, some of them kept, a damaged one passed over.

Each is a directory `step_00001200` that holds all of the run at that step: trained and frozen parameters,
optimizer state, the system's state, the step number, the random key, and as `meta` the recipe and the plan's
fingerprint. Orbax writes into a temporary directory while training goes on and renames it; then the hashes
are written (`weights/hashes.py`), and only then are older checkpoints removed (`training/retention.py`). What
lacks its hashes was never finished. A save that fails, as on a full disk, removes what it wrote and nothing else.

    checkpoints = Checkpoints("runs/x/checkpoints", CheckpointConfig(keep=3))
    step = checkpoints.latest()             # newest whole one, or None
    tree = checkpoints.restore(shapes, step)
    checkpoints.save(step, tree, meta)      # returns once the arrays are copied
    checkpoints.check()                     # raises what went wrong with it, if that is known already
    checkpoints.wait()
"""

import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tracevision_jax.errors import UserError
from tracevision_jax.parallel.processes import of_first
from tracevision_jax.training.retention import CheckpointConfig, best_steps, kept
from tracevision_jax.weights import hashes

NAME = re.compile(r"step_(\d{8,})")
TEMPORARY = ".orbax-checkpoint-tmp"
SCORES = "scores.json"


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(
        self,
        directory: str | Path,
        config: CheckpointConfig | None = None,
        report: Callable[[str], None] = print,
    ):
        """Open a directory, made by the first save; `report` receives a line for all that is found damaged."""
        self.directory, self.config, self.report = Path(directory).absolute(), config or CheckpointConfig(), report
        self._primary = jax.process_index() == 0
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        logging.getLogger("absl").addFilter(_is_no_failed_save)
        self._finisher: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._pruning = threading.Lock()
        self._scores = self._read_scores()
        if self._primary:
            for leftover in self.directory.glob(f"*{TEMPORARY}*"):
                self.report(f"Removed a checkpoint that was not finished: {leftover.name}")
                shutil.rmtree(leftover, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of all checkpoints that are there, whole or not, ascending."""
        names = (NAME.fullmatch(path.name) for path in self.directory.glob("step_*"))
        return sorted(int(name.group(1)) for name in names if name)

    def path(self, step: int) -> Path:
        """Directory of a step's checkpoint."""
        return self.directory / f"step_{step:08d}"

    def latest(self, until: int | None = None) -> int | None:
        """Step of the newest checkpoint, of none after `until`, whose files are as they were written.

        Damaged ones are put aside. With several processes the first looks and decides.
        """
        found = of_first(self._newest_whole(until) if self._primary else -1)
        return None if found < 0 else found

    def restore(self, shapes: Any, step: int) -> Any:
        """Read the tree that was saved at a step.

        Args:
            shapes: tree of `jax.ShapeDtypeStruct` with the sharding that each array shall have.
            step: what `latest` gave.
        """
        arguments = ocp.args.Composite(tree=ocp.args.StandardRestore(shapes))
        return self._checkpointer.restore(self.path(step), args=arguments)["tree"]

    def meta(self, step: int) -> dict[str, Any]:
        """What was saved as `meta` with a step."""
        arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._checkpointer.restore(self.path(step), args=arguments)["meta"]

    def save(self, step: int, tree: Any, meta: dict[str, Any]) -> None:
        """Start saving; returns when the arrays are copied, so that the step may overwrite them.

        Raises:
            UserError: this save or the one before could not be written.
        """
        self.wait()
        self.directory.mkdir(parents=True, exist_ok=True)
        arguments = ocp.args.Composite(tree=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta))
        try:
            self._checkpointer.save(self.path(step), args=arguments)
        except Exception as error:
            raise self._failed(step, error) from error
        self._finisher = threading.Thread(target=self._finish, args=(step,), name=f"finish step {step}")
        self._finisher.start()

    def check(self) -> None:
        """Raise what went wrong with a save in the background, without waiting for it."""
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def wait(self) -> None:
        """Wait until the last save is complete, hashes included; raises what went wrong with it, as `save`."""
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        self.check()

    def close(self) -> None:
        """Wait, and free what Orbax holds."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def score(self, step: int, value: float) -> bool:
        """Note what an evaluation gave at a step; whether it is one of the best so far, alike on all processes."""
        with self._pruning:
            self._scores[step] = value
            self._write_scores()
        return bool(of_first(int(step in best_steps(self._scores, self.config))))

    def forget_scores_after(self, step: int) -> None:
        """Drop what later steps were given, as they will be taken again."""
        with self._pruning:
            self._scores = {at: value for at, value in self._scores.items() if at <= step}
            self._write_scores()

    def prune(self) -> None:
        """Remove the checkpoints that need not be kept."""
        if self._primary:
            with self._pruning:
                steps = self.steps()
                for step in sorted({*steps} - kept(steps, self._scores, self.config)):
                    shutil.rmtree(self.path(step))

    def _newest_whole(self, until: int | None) -> int:
        """See `latest`; -1 when there is none."""
        for step in reversed([step for step in self.steps() if until is None or step <= until]):
            damage = hashes.faults(self.path(step))
            if not damage:
                return step
            aside = self.directory / f"damaged_{self.path(step).name}"
            self.report(f"Checkpoint of step {step} is damaged and put aside as {aside.name}:")
            for line in damage:
                self.report(f"  {line}")
            shutil.rmtree(aside, ignore_errors=True)
            self.path(step).rename(aside)
        return -1

    def _finish(self, step: int) -> None:
        try:
            self._checkpointer.wait_until_finished()
            if self._primary:
                hashes.write_hashes(self.path(step))
                self.prune()
        except BaseException as error:
            self._failure = self._failed(step, error)

    def _failed(self, step: int, error: BaseException) -> BaseException:
        """What to raise for a save that failed, after making room of what it wrote: a UserError if the system refused
        to write, else the error itself."""
        if self._primary and not (self.path(step) / hashes.FILE).exists():
            for leftover in (self.path(step), *self.directory.glob(f"{self.path(step).name}{TEMPORARY}*")):
                shutil.rmtree(leftover, ignore_errors=True)
        reason = refusal(error)
        if reason is None:
            return error
        whole = [at for at in self.steps() if (self.path(at) / hashes.FILE).exists()]
        before = (
            f"Those before it are whole, the newest is of step {whole[-1]}." if whole else "There is none before it."
        )
        free = shutil.disk_usage(self.directory).free
        failure = UserError(
            f"The checkpoint of step {step} could not be written to {self.directory}: {reason} "
            f"({free / 2**30:,.1f} GiB are free there). {before} Make room, or keep fewer (checkpoint.keep), and give "
            "the same command again: it goes on from the newest."
        )
        failure.__cause__ = error
        return failure

    def _read_scores(self) -> dict[int, float]:
        file = self.directory / SCORES
        try:
            return {int(step): float(value) for step, value in json.loads(file.read_text()).items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError):
            self.report(f"{file} is damaged: which checkpoints were best so far is forgotten.")
            return {}

    def _write_scores(self) -> None:
        if self._primary and self.config.keep_best:
            self.directory.mkdir(parents=True, exist_ok=True)
            hashes.write_whole(self.directory / SCORES, json.dumps(self._scores))


def refusal(error: BaseException) -> str | None:
    """Why the operating system refused to write, as Python or TensorStore tells it; None for another kind of error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code.group(1))) if code else None


def _is_no_failed_save(record: logging.LogRecord) -> bool:
    """Whether to log a record: Orbax prints the failure of a save with its traceback, and then raises it as well."""
    return "_SignalingThread.run() raised an exception" not in record.getMessage()
