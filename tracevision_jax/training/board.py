"""TensorBoard files of a run through tensorboardX, which must never stop the run: what cannot be written is dropped.

tensorboardX writes in a thread of its own, which ends with the first error, as on a full disk; from then on its queue
would fill and the next value would wait for ever. So the thread is looked at before each value.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from tensorboardX import SummaryWriter


class Board:
    """Scalars and pictures by step."""

    def __init__(self, directory: Path, start: int, primary: bool, report: Callable[[str], None]):
        """Continue after step `start`; only the primary process writes. `report` takes a line when writing ended."""
        self._report, self._stopped = report, False
        self._writer: Any = SummaryWriter(
            str(directory), purge_step=start + 1 if start else None, write_to_disk=primary
        )

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Write numbers under GROUP/NAME."""
        for name, value in values.items():
            if self._writes():
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def picture(self, name: str, picture: UInt8[np.ndarray, "height width 3"], step: int) -> None:
        """Write a picture."""
        if self._writes():
            self._writer.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left."""
        if self._writes():
            try:
                self._writer.close()
            except OSError as error:
                self._stop(str(error))

    def _writes(self) -> bool:
        """Whether the writing thread lives; says so once when it does not."""
        worker = getattr(self._events(), "_worker", None)
        if not self._stopped and worker is not None and not worker.is_alive():
            self._stop("the disk may be full")
        return not self._stopped

    def _stop(self, reason: str) -> None:
        self._stopped = True
        self._events()._closed = True  # else it would be closed at exit, and wait for its thread
        self._report(f"TensorBoard's files can no longer be written ({reason}); metrics.jsonl goes on.")

    def _events(self) -> Any:
        """tensorboardX's writer of events; None in a process that writes nothing."""
        return getattr(self._writer.file_writer, "event_writer", None)
