"""Keeps batches coming when data workers die or hang: they are started again at the next step, so many times.

A step's batch depends on its number alone, so nothing is lost or doubled. A record whose reader dies again and again is
skipped and reported. One whose reader hangs again and again ends the run with its name, as does reading that hangs in
threads of the training process, where it cannot be stopped.

    supervision = Supervision(open_at, notes, steps=100, timeout=600.0, retries=3, workers=8, name=name, report=print)
    for made in supervision.steps_from(17):     # what open_at(step, skipped) yields
        supervision.take_troubles()             # what was mended since
"""

import contextlib
import os
import queue
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

from data_loaders.reading import Notes, Reading
from tracevision_jax.errors import Stuck, UserError

Record = tuple[int, int]
SLOW = 30.0
"""Seconds of waiting for a batch after which it is said what is being read; then again after twice as long."""
DIED = "Worker process was terminated unexpectedly"
"""How Grain's error begins when a worker is gone."""


class Supervision:
    """Iterates over the steps of a run, and mends what can be mended."""

    def __init__(
        self,
        open_at: Callable[[int, dict[Record, str]], Any],
        notes: Notes,
        steps: int,
        timeout: float,
        retries: int,
        workers: int,
        name: Callable[[Record], str],
        report: Callable[[str], None],
    ):
        """Args:
        open_at: (step, records to skip with their reasons) -> iterator of what is made from that step on, with `close`.
        notes: where the readers note what they read.
        steps: of the run.
        timeout: seconds to wait for a batch.
        retries: how often the same record may make a reader die or hang, and readers die without a batch between.
        workers: number of worker processes; 0 where threads of this process read.
        name: how a record is called in messages, with its file.
        report: takes a line.
        """
        self._open_at, self._notes, self._steps = open_at, notes, steps
        self._timeout, self._retries, self._workers = timeout, retries, workers
        self._name, self._report = name, report
        self._skipped: dict[Record, str] = {}
        self._counts: Counter[tuple[str, Record]] = Counter()
        self._troubles: list[str] = []

    def take_troubles(self) -> tuple[str, ...]:
        """What was mended since the last call."""
        troubles, self._troubles = tuple(self._troubles), []
        return troubles

    def steps_from(self, start: int) -> Generator[Any, None, None]:
        """Yield what is made of each step, in order.

        Raises:
            UserError: workers die or hang too often, or reading hangs in this process.
        """
        step, deaths = start, 0
        while step < self._steps:
            feeder = _Feeder(self._open_at(step, self._skipped), self._notes)
            try:
                while step < self._steps:
                    made = self._wait(feeder, step)
                    yield made
                    step, deaths = step + 1, 0
            except RuntimeError as error:
                if not str(error).startswith(DIED):
                    raise
                deaths = 0 if self._skip(feeder.of_dead, str(error)) else deaths + 1
                self._restart(feeder.of_dead, str(error), step, deaths)
            finally:
                feeder.close()
                self._notes.forget_workers()

    def _wait(self, feeder: "_Feeder", step: int) -> Any:
        """The next batch; what is slow is said, workers that hang are ended (which the feeder then raises)."""
        began, said, ended = time.monotonic(), SLOW, False
        while True:
            with contextlib.suppress(queue.Empty):
                return feeder.get(min(1.0, self._timeout / 4))
            waited = time.monotonic() - began
            if waited >= self._timeout and not ended:
                self._end_hanging(step, waited)
                ended = True
            elif waited >= said and not ended:
                said *= 2
                self._report(f"waiting for the data of step {step + 1} for {waited:.0f} s{self._what_is_read()}")

    def _end_hanging(self, step: int, waited: float) -> None:
        """Kill the workers that have been at one record all the time, or all; UserError where that does not help."""
        hanging = self._notes.older_than(self._timeout / 2)
        text = f"no batch for step {step + 1} in {waited:.0f} s (data.timeout){self._what_is_read()}"
        for reading in hanging:
            self._counts["hang", reading.record] += 1
        too_often = [reading for reading in hanging if self._counts["hang", reading.record] > self._retries]
        if not self._workers or too_often:
            kind = UserError if self._workers else Stuck
            advice = "Look at that file and its store, or wait longer (data.timeout)."
            also = (
                "" if self._workers else " With worker processes (data.workers) a reader that hangs is started again."
            )
            raise kind(f"Reading hangs: {text}. {advice}{also}")
        for pid in {reading.process for reading in hanging} or self._notes.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._trouble(f"{text}; the workers that hang are ended")

    def _skip(self, records: list[Record], error: str) -> bool:
        """Skip what workers die of again and again; whether there is such a record."""
        for record in records:
            self._counts["death", record] += 1
            if self._counts["death", record] > self._retries and not self._counts["hang", record]:
                self._skipped[record] = f"the worker that reads it dies ({error.split('.')[0]})"
                self._trouble(f"{self._name(record)} is skipped from now on: {self._skipped[record]}")
                return True
        return False

    def _restart(self, records: list[Record], error: str, step: int, deaths: int) -> None:
        """Say that the workers are started again; UserError when they died too often without a batch between."""
        where = f", reading {', '.join(map(self._name, records))}" if records else ""
        if deaths > 2 * self._retries + 1:
            raise UserError(
                f"Data workers died {deaths} times before one batch of step {step + 1} was made{where}: {error} A "
                "worker that runs out of memory wants fewer data.workers or data.prefetch."
            )
        if deaths:
            self._trouble(f"a data worker died{where}; the workers are started again at step {step + 1}: {error}")

    def _trouble(self, text: str) -> None:
        self._troubles.append(text)
        self._report(text)

    def _what_is_read(self) -> str:
        """ "; longest at record 7 of coco (a.jpg), for 31 s"."""
        oldest: Reading | None = next(iter(self._notes.all()), None)
        return f"; longest at {self._name(oldest.record)}, for {oldest.seconds:.0f} s" if oldest else ""


class _Feeder:
    """Advances an iterator in a thread, so that waiting for it can end."""

    def __init__(self, iterator: Any, notes: Notes):
        self._iterator, self._notes, self._stop = iterator, notes, threading.Event()
        self.of_dead: list[Record] = []
        """What workers that have died were reading."""
        self._made: queue.Queue[tuple[bool, Any]] = queue.Queue(1)
        # A daemon: a reader that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._feed, name="data", daemon=True)
        self._thread.start()

    def get(self, timeout: float) -> Any:
        """The next item, or what the iterator raised; raises queue.Empty after so many seconds."""
        good, made = self._made.get(timeout=timeout)
        if not good:
            raise made
        return made

    def close(self) -> None:
        """End the thread, the iterator and its workers; by force where they do not end by themselves."""
        self._stop.set()
        self._thread.join(5.0)
        if self._thread.is_alive() and (workers := self._notes.workers()):
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._thread.join(5.0)

    def _feed(self) -> None:
        try:
            for made in self._iterator:
                if not self._put((True, made)):
                    return
            self._put((False, RuntimeError("the data ended before the last step")))
        except BaseException as error:
            self.of_dead = self._notes.of_dead()  # before the iterator ends the others
            self._put((False, error))
        finally:
            if hasattr(self._iterator, "close"):
                self._iterator.close()

    def _put(self, item: tuple[bool, Any]) -> bool:
        while not self._stop.is_set():
            with contextlib.suppress(queue.Full):
                self._made.put(item, timeout=0.2)
                return True
        return False
