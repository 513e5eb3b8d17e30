"""Executes the epoch plan with Grain: rows are read and laid out ahead, in threads or worker processes.

    pipeline = Pipeline(plan, sources, make_row, collate, steps=plan.steps_in(3), workers=8)
    for item in pipeline.batches(start=step):        # StepBatch, in order, from any step

The state is the step number. A batch depends on it alone (not on workers, threads or what was read before),
so a resumed run continues exactly, also with other numbers of workers or processes.

A record that cannot be used (BadRecord, any exception while decoding or laying it out) becomes an empty slot
of weight 0 and a `BadRecordReport` with its reason and file; the rest of its row is kept. What may pass is tried again
(`data_loaders/reading.py`), workers that die or hang are started again (`data_loaders/supervision.py`), both so many
times; too large a share of bad records ends the run.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import absl.flags
import grain
import jax
import numpy as np

from data_loaders.plan import Plan, Record, rows_of_process
from data_loaders.reading import Notes, Tolerance, read
from data_loaders.supervision import Supervision
from tracevision_jax.records.sample import BadRecord
from tracevision_jax.systems.protocol import Batch, Bucket
from tracevision_jax.training.source import BadRecordReport, StepBatch

LINGER_SECONDS = 60.0
"""How long a worker goes on after SIGTERM."""

Row = Any
MakeRow = Callable[[list[Any]], Row]
"""Samples packed into a row -> the row; an empty list gives an empty row."""
Collate = Callable[[list[Row], Bucket], Batch]
"""Rows of this process -> its part of the batch, as numpy arrays."""


@runtime_checkable
class Records(Protocol):
    """Random access to the samples of a source; raises BadRecord for those that cannot be used.

    A method `place(index)`, where there is one, names the file that a record is read from, without opening it.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass
class Pipeline:
    """Batches by step number (`tracevision_jax.training.source.BatchSource`)."""

    plan: Plan
    records: Sequence[Records]
    """In the order of the plan's sources; sent to worker processes, so picklable and lazy in opening."""
    make_row: MakeRow
    collate: Collate
    steps: int
    workers: int = 0
    """Processes that make batches; 0 makes them in threads of this one."""
    prefetch: int = 4
    """Batches made ahead."""
    process: int | None = None
    processes: int | None = None
    """Which share of each batch is made here; by default, jax's process number and count."""
    retries: int = 3
    """How often to try again what may pass: a read that fails, a worker that dies or hangs."""
    timeout: float = 600.0
    """Seconds to wait for a batch; then the reading hangs."""
    bad_limit: float = 0.2
    """Share of the last records that may be unusable."""
    report: Callable[[str], None] = print
    """Takes a line when data are slow or a worker was started again."""

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of a global batch of each bucket."""
        return tuple(self.plan.rows)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Shapes of batches, in the order of `rows`."""
        return tuple(self.plan.buckets)

    @property
    def fingerprint(self) -> str:
        """The plan's."""
        return self.plan.fingerprint

    def describe(self) -> str:
        """The plan's description, and the number of steps."""
        where = f"{self.workers} worker processes" if self.workers else "threads"
        return f"{self.plan.describe()}\n{self.steps:,} steps; rows are made in {where}"

    def batches(self, start: int = 0) -> Iterator[StepBatch]:
        """Yield the batches of the steps from `start` on; closing the iterator ends the workers.

        Raises:
            UserError: workers die or hang again and again, or too many records cannot be used.
        """
        if start >= self.steps:
            return
        tolerance = Tolerance(self.bad_limit)
        with tempfile.TemporaryDirectory(prefix="tracevision-data-", ignore_cleanup_errors=True) as folder:
            notes = Notes(Path(folder))
            supervision = Supervision(
                functools.partial(self._open, notes),
                notes,
                steps=self.steps,
                timeout=self.timeout,
                retries=self.retries,
                workers=self.workers,
                name=self._name,
                report=self.report,
            )
            # On the CPU jax takes numpy arrays as they are, and would hold on to the workers' shared memory.
            copies = bool(self.workers) and jax.default_backend() == "cpu"
            with contextlib.closing(supervision.steps_from(start)) as every:
                for made in every:
                    planned = self.plan.step(made["step"])
                    arrays = made["arrays"]
                    if copies:
                        arrays = {name: np.array(array) for name, array in arrays.items()}
                    batch, bad = made["kind"](**arrays), made["bad"]
                    troubles = supervision.take_troubles()
                    yield StepBatch(planned.step, planned.epoch, planned.bucket, batch, bad, troubles)
                    tolerance.add(made["records"], bad)  # after the step has been taken, and its bad records noted

    def _open(self, notes: Notes, start: int, skipped: dict[Record, str]) -> Iterator[dict[str, Any]]:
        """Grain's iterator over what `_StepMaker` makes, from a step on."""
        process = jax.process_index() if self.process is None else self.process
        processes = jax.process_count() if self.processes is None else self.processes
        maker = _StepMaker(
            self.plan,
            tuple(self.records),
            self.make_row,
            self.collate,
            start,
            self.steps,
            process,
            processes,
            self.retries,
            notes,
            dict(skipped),
        )
        # Python's threads share one core: two keep it busy while one waits for a file.
        threads, ahead = (1, 1) if self.workers else (2, max(self.prefetch, 2))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        dataset = grain.MapDataset.source(maker).to_iter_dataset(options)
        if self.workers:
            if not absl.flags.FLAGS.is_parsed():  # Grain reads its flags when it starts workers
                absl.flags.FLAGS.mark_as_parsed()
            each = grain.multiprocessing.MultiprocessingOptions(
                num_workers=self.workers, per_worker_buffer_size=max(1, self.prefetch // self.workers)
            )
            dataset = dataset.mp_prefetch(each, worker_init_fn=functools.partial(start_worker, notes))
        return iter(dataset)

    def _name(self, record: Record) -> str:
        """What messages call a record."""
        place = place_of(self.records[record[0]], record[1])
        return f"record {record[1]} of {self.plan.sources[record[0]].name}" + (f" ({place})" if place else "")


def place_of(records: Records, index: int) -> str:
    """The file that a record is read from, where its source can say so."""
    place: Callable[[int], str] | None = getattr(records, "place", None)
    return place(index) if place else ""


def start_worker(notes: Notes, worker: int, workers: int) -> None:
    """Set up a worker process: it keeps off accelerators, and ends when the training process does.

    Ctrl-C and SIGTERM may reach the workers as well; they go on, since the training process finishes its step first
    and then ends them (within a minute: what ends a process also sends it SIGTERM).
    """

    def end_later(*_: object) -> None:
        timer = threading.Timer(LINGER_SECONDS, os._exit, (1,))
        timer.daemon = True
        timer.start()

    notes.enrol()
    with contextlib.suppress(ValueError):  # only the main thread may say so
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, end_later)
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()  # type: ignore[union-attr]
        os._exit(1)

    if parent is not None:
        threading.Thread(target=end_with_parent, daemon=True, name=f"worker {worker} of {workers}").start()


@dataclass(repr=False)
class _StepMaker:
    """Random access to made steps, as Grain reads them; holds all that a worker needs."""

    plan: Plan
    records: tuple[Records, ...]
    make_row: MakeRow
    collate: Collate
    start: int
    steps: int
    process: int
    processes: int
    retries: int
    notes: Notes
    skipped: dict[Record, str]
    """Records that are not to be read, and why."""

    def __len__(self) -> int:
        return self.steps - self.start

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Make a step; arrays travel by name, since Grain may put them into shared memory."""
        planned = self.plan.step(self.start + int(index))
        share = planned.rows[rows_of_process(len(planned.rows), self.process, self.processes)]
        bad: list[BadRecordReport] = []
        rows = [self._row(planned.step, records, bad) for records in share]
        batch = self._batch(planned.step, planned.bucket, rows, share, bad)
        records = sum(len(row) for row in share)
        arrays = dict(vars(batch))
        return {"step": planned.step, "kind": type(batch), "arrays": arrays, "bad": tuple(bad), "records": records}

    def _row(self, step: int, records: tuple[Record, ...], bad: list[BadRecordReport]) -> Row:
        """Lay a row out; records that cannot be read or laid out are left out of it and reported."""
        samples: list[tuple[Record, Any]] = []
        for record in records:
            try:
                if record in self.skipped:
                    raise BadRecord(self.skipped[record])
                with self.notes.reading(record):
                    samples.append((record, read(self.records[record[0]], record[1], self.retries)))
            except Exception as error:
                bad.append(self._report(step, record, error))
        try:
            return self.make_row([sample for _, sample in samples])
        except Exception as error:
            whole = error
        usable: list[tuple[Record, Any]] = []
        for record, sample in samples:
            try:
                self.make_row([sample])
                usable.append((record, sample))
            except Exception as error:
                bad.append(self._report(step, record, error))
        if len(usable) < len(samples):
            return self.make_row([sample for _, sample in usable])
        bad.extend(self._report(step, record, whole) for record, _ in samples)
        return self.make_row([])

    def _batch(
        self,
        step: int,
        bucket: Bucket,
        rows: list[Row],
        records: Sequence[tuple[Record, ...]],
        bad: list[BadRecordReport],
    ) -> Batch:
        """Collate; a row that does not fit the bucket becomes an empty one and its records are reported."""
        try:
            return self.collate(rows, bucket)
        except Exception as error:
            whole, kept = error, []
        for row, packed in zip(rows, records, strict=True):
            try:
                self.collate([row], bucket)
                kept.append(row)
            except Exception as error:
                if not packed:
                    raise
                reported = {(report.source, report.record) for report in bad}
                for record in packed:
                    report = self._report(step, record, error)
                    if (report.source, report.record) not in reported:
                        bad.append(report)
                kept.append(self.make_row([]))
        if not bad:
            raise whole
        return self.collate(kept, bucket)

    def _report(self, step: int, record: Record, error: Exception) -> BadRecordReport:
        name = self.plan.sources[record[0]].name
        place = place_of(self.records[record[0]], record[1])
        if isinstance(error, BadRecord):
            return BadRecordReport(step, name, record[1], error.reason, error.file or place)
        file = str(getattr(error, "filename", None) or place)
        return BadRecordReport(step, name, record[1], f"{type(error).__name__}: {error}", file)
