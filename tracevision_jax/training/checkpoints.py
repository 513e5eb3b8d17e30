"""Checkpoints of a run: asynchronous, hashed, the last k kept, a damaged one passed over.

Each is a directory `step_00001200` that holds all of the run at that step: trained and frozen parameters,
optimizer state, the system's state, the step number, the random key, and as `meta` the recipe and the plan's
fingerprint. Orbax writes into a temporary directory while training goes on and renames it; then the hashes
are written (`weights/hashes.py`), and only then are older checkpoints removed. What lacks its hashes was
never finished.

    checkpoints = Checkpoints("runs/x/checkpoints", keep=3)
    step = checkpoints.latest()             # newest whole one, or None
    tree = checkpoints.restore(shapes, step)
    checkpoints.save(step, tree, meta)      # returns once the arrays are copied
    checkpoints.wait()
"""

import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from tracevision_jax.parallel.processes import of_first
from tracevision_jax.weights import hashes

NAME = re.compile(r"step_(\d{8,})")
TEMPORARY = ".orbax-checkpoint-tmp"


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, directory: str | Path, keep: int = 3, report: Callable[[str], None] = print):
        """Open a directory, made if absent; `report` receives a line for all that is found damaged."""
        self.directory, self.keep, self.report = Path(directory).absolute(), keep, report
        self.directory.mkdir(parents=True, exist_ok=True)
        self._primary = jax.process_index() == 0
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._finisher: threading.Thread | None = None
        self._failure: BaseException | None = None
        if self._primary:
            for leftover in self.directory.glob(f"*{TEMPORARY}*"):
                self.report(f"Removed a checkpoint that was not finished: {leftover.name}")
                shutil.rmtree(leftover, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of all checkpoints that are there, whole or not, ascending."""
        names = (NAME.fullmatch(path.name) for path in self.directory.iterdir())
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

        Raises what went wrong with the save before, if anything did.
        """
        self.wait()
        arguments = ocp.args.Composite(tree=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta))
        self._checkpointer.save(self.path(step), args=arguments)
        self._finisher = threading.Thread(target=self._finish, args=(step,), name=f"finish step {step}")
        self._finisher.start()

    def wait(self) -> None:
        """Wait until the last save is complete, hashes included; raises what went wrong with it."""
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Wait, and free what Orbax holds."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    def _finish(self, step: int) -> None:
        try:
            self._checkpointer.wait_until_finished()
            if self._primary:
                hashes.write_hashes(self.path(step))
                for old in self.steps()[: -self.keep]:
                    shutil.rmtree(self.path(old))
        except BaseException as error:
            self._failure = error
