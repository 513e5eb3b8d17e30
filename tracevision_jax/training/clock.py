"""Follows steps on the devices: when each finished, how long they waited for data, how it was judged.

The host sends a step before the one before it has finished, so a thread waits for each step's metrics and notes the
time; the journal gets them one step late.
"""

import queue
import threading
import time
from concurrent.futures import Future
from typing import Any

import jax

from tracevision_jax.training.goodput import Goodput
from tracevision_jax.training.journal import Journal


class Clock:
    """Hands finished steps to the journal and their times to the account of goodput.

    `rejected` is how many steps in a row were rejected, up to the last finished one.
    """

    def __init__(self, journal: Journal, goodput: Goodput, rejected: int):
        self.journal, self.goodput, self.rejected = journal, goodput, rejected
        self._pending: list[tuple[int, int, float, bool, Future]] = []
        self._last = time.perf_counter()
        self._sent: queue.SimpleQueue[tuple[Any, Future] | None] = queue.SimpleQueue()
        # A daemon: devices that hang must not keep the process from ending.
        threading.Thread(target=self._watch, name="steps on the devices", daemon=True).start()

    def sent(self, step: int, epoch: int, metrics: Any, sent: float, compiled: bool) -> None:
        """Note a step that was sent to the devices at `sent`, and wait for the one before."""
        finished: Future = Future()
        self._sent.put((metrics, finished))
        self._pending.append((step, epoch, sent, compiled, finished))
        while len(self._pending) > 1:
            self._finish()

    def drain(self) -> None:
        """Wait for everything that was sent."""
        while self._pending:
            self._finish()

    def restart(self) -> None:
        """Leave out of the next step's time what has passed since the last."""
        self._last = time.perf_counter()

    def close(self) -> None:
        """End the thread."""
        self._sent.put(None)

    def _watch(self) -> None:
        while (item := self._sent.get()) is not None:
            metrics, finished = item
            try:
                finished.set_result((jax.device_get(metrics), time.perf_counter()))
            except BaseException as error:
                finished.set_exception(error)

    def _finish(self) -> None:
        step, epoch, sent, compiled, future = self._pending.pop(0)
        values, finished = future.result()
        self.rejected = int(values["rejected"])
        waited = self.goodput.step(sent, finished, accepted=not self.rejected)
        self.journal.step(step, epoch, values, finished - self._last, waited, compiled)
        self._last = finished
