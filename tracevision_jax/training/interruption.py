"""Ctrl-C and SIGTERM during training: the running step is finished and saved before the run ends.

With several processes, signals reach them at different steps, or reach one alone. All must stop after the same step:
jax's preemption service, which takes SIGTERM itself, tells the others and agrees with them on one.
"""

import os
import signal
import threading
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Interruption:
    """Context in which SIGINT and SIGTERM set `signal` instead of stopping; a second SIGINT stops at once."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._asked: signal.Signals | None = None
        self._alone = jax.process_count() == 1
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM) if self._alone else (signal.SIGINT,):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def reached(self, step: int) -> bool:
        """Whether to stop after this step, alike on all processes; each must ask after every step."""
        if not self._alone and multihost_utils.reached_preemption_sync_point(step):
            self.signal = self._asked or signal.SIGTERM
        return self.signal is not None

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = signal.Signals(number)
        if self._alone:
            self.signal = self._asked
        else:
            os.kill(os.getpid(), signal.SIGTERM)  # to jax's service
