"""Reading records from a store that is not quite well: new attempts, notes of what is read, a bound on what is lost.

sample = read(records, 17, retries=3)           # tries again what may pass, such as a stale handle or a timeout
notes = Notes(folder)                           # shared by the training process and its data workers
with notes.reading((source, record)):           # so that a reader that hangs or dies can be told by its record
    ...
notes.of_dead(), notes.older_than(600.0)
Tolerance(0.1).add(records, reports)            # UserError once too many records were unusable
"""

import contextlib
import errno
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracevision_jax.errors import UserError
from tracevision_jax.training.source import BadRecordReport

MAY_PASS = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "EAGAIN", "EBUSY", "EINTR", "ETIMEDOUT", "ESTALE", "EREMOTEIO", "EPIPE", "ECONNRESET", "ECONNABORTED"),
        *("ECONNREFUSED", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH"),
    )
    if hasattr(errno, name)
)
"""Errors of a store or a network that is away for a moment. A file that is missing or damaged is none of them."""

FIRST_WAIT = 0.1
"""Seconds before the first new attempt; each further one waits four times as long."""


def may_pass(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, may be gone at the next attempt."""
    while error is not None:
        if isinstance(error, TimeoutError | ConnectionError):
            return True
        if isinstance(error, OSError) and error.errno in MAY_PASS:
            return True
        error = error.__cause__ or error.__context__
    return False


def read(records: Any, index: int, retries: int, wait: Callable[[float], None] = time.sleep) -> Any:
    """`records[index]`, with so many new attempts at what may pass; raises what the last attempt raised."""
    for attempt in range(retries):
        try:
            return records[index]
        except Exception as error:
            if not may_pass(error):
                raise
        wait(FIRST_WAIT * 4**attempt)
    return records[index]


@dataclass(frozen=True)
class Reading:
    """A record that a thread of some process began to read and has not finished."""

    process: int
    record: tuple[int, int]
    """(source, record), as in the epoch plan."""
    seconds: float
    """For so long."""


@dataclass(frozen=True)
class Notes:
    """Who reads what: a small file for each thread at work, named by its process, and one for each data worker."""

    folder: Path

    @contextlib.contextmanager
    def reading(self, record: tuple[int, int]) -> Iterator[None]:
        """Note a record while it is read. A note that cannot be written is left out."""
        file = self.folder / f"reading-{os.getpid()}-{threading.get_ident()}"
        with contextlib.suppress(OSError):
            file.write_text(f"{record[0]} {record[1]}")
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.unlink()

    def enrol(self) -> None:
        """Note that this process is a data worker."""
        (self.folder / f"worker-{os.getpid()}").touch()

    def workers(self) -> list[int]:
        """Data workers that are alive."""
        return [pid for pid in self._pids() if _alive(pid)]

    def forget_workers(self) -> None:
        """Drop all notes of workers, before others are started."""
        for file in (*self.folder.glob("worker-*"), *self.folder.glob("reading-*")):
            file.unlink(missing_ok=True)

    def of_dead(self) -> list[tuple[int, int]]:
        """Records that workers were reading when they died."""
        dead = {pid for pid in self._pids() if not _alive(pid)}
        return [reading.record for reading in self.all() if reading.process in dead]

    def older_than(self, seconds: float) -> list[Reading]:
        """Records that have been read for so long."""
        return [reading for reading in self.all() if reading.seconds >= seconds]

    def all(self) -> list[Reading]:
        """All that is being read, the longest first."""
        found = []
        for file in self.folder.glob("reading-*"):
            with contextlib.suppress(OSError, ValueError):  # finished in this very moment
                source, record = file.read_text().split()
                age = time.time() - file.stat().st_mtime
                found.append(Reading(int(file.name.split("-")[1]), (int(source), int(record)), age))
        return sorted(found, key=lambda reading: -reading.seconds)

    def _pids(self) -> list[int]:
        return [int(file.name.split("-")[1]) for file in self.folder.glob("worker-*")]


class Tolerance:
    """Bounds the share of records that cannot be used: single ones are skipped, a lost shard or folder is not."""

    WINDOW = 1000
    """So many of the last records are looked at."""
    LEAST = 100
    """None is judged before there are so many."""

    def __init__(self, limit: float):
        """Allow this share."""
        self.limit = limit
        self._steps: deque[tuple[int, Sequence[BadRecordReport]]] = deque()
        self._records = 0

    def add(self, records: int, bad: Sequence[BadRecordReport]) -> None:
        """Count a step of so many records, of which some were bad.

        Raises:
            UserError: more than the limit; the file or source that holds most of them is named.
        """
        self._steps.append((records, bad))
        self._records += records
        while self._records - self._steps[0][0] >= self.WINDOW:
            self._records -= self._steps.popleft()[0]
        reports = [report for _, step in self._steps for report in step]
        if self._records < self.LEAST or len(reports) <= self.limit * self._records:
            return
        (place, reason), count = Counter((r.file or r.source, r.reason) for r in reports).most_common(1)[0]
        (source, of_source), *_ = Counter(report.source for report in reports).most_common(1)
        raise UserError(
            f"{len(reports)} of the last {self._records} records could not be used, which is more than data.bad_limit "
            f"({self.limit:.0%}) allows. {of_source} are of {source}; most often ({count} times): {reason}, {place}. "
            "The run's bad_records*.jsonl list them. Mend the data, or allow more, and give the same command again."
        )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
