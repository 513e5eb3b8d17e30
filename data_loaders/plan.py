"""The epoch plan: which records every row of every step holds, alike on all hosts, from a seed and a table.

    plan = Plan(seed=0, sources=[Lengths("ln_coco", sizes)], buckets=[small, large], rows=[64, 16])
    plan.steps_in(epochs=3)
    plan.step(12_345)     # PlannedStep(epoch, bucket, rows of records)

A source's table has a line for each record, in the order of the buckets' fields. Of a `Bucket` these are (tokens,
frames, windows, conversations, points, masks): tokens, frames, conversations and masks of the records in a row add up,
windows (of a frame) and points (of a conversation) are maxima. Where nothing adds up, as in a `ClipBucket`, a row holds
one record. A record goes to the first bucket, smallest first, that holds it; records too long for all of them are left
out and listed.

An epoch goes once through every record (`repetitions` times for sources that say so: the fraction is carried
on, so that 0.5 is each record exactly once in two epochs). Its records are shuffled, packed into rows in that
order (each goes to the first of a few open rows that has room), rows become batches of one bucket, and the
batches of all buckets are shuffled. The last batch of each bucket is filled up with empty rows, so that no
record is dropped.

A step is looked up by its number: epochs are planned when first asked for and the last few are kept. Where an
epoch begins depends on how the ones before it packed; these are counted in passing, once.
"""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields
from typing import Any

import numpy as np
from jaxtyping import Int

from tracevision_jax.errors import UserError
from tracevision_jax.systems.protocol import Bucket

OPEN_ROWS = 32
"""Rows of a bucket that are filled side by side; more packs tighter and plans more slowly."""
KEPT_EPOCHS = 2

Record = tuple[int, int]
"""(number of the source, number of the record in it)."""


@dataclass(frozen=True)
class Lengths:
    """What the plan knows of a source."""

    name: str
    resources: Int[np.ndarray, "records sizes"]
    """What each record takes of a bucket, in the order of its fields."""
    repetitions: float = 1.0
    """How often an epoch goes through it."""


@dataclass(frozen=True)
class PlannedStep:
    """The records of one global batch."""

    step: int
    epoch: int
    bucket: Bucket
    rows: tuple[tuple[Record, ...], ...]
    """Records packed into each row; empty rows fill the last batch of a bucket."""


@dataclass(frozen=True)
class EpochPlan:
    """One epoch, flat: batch b has the rows batch_rows[b], row r the records records[row_starts[r]:...]."""

    records: Int[np.ndarray, "placed 2"]
    row_starts: Int[np.ndarray, "rows_and_end"]
    batch_first_row: Int[np.ndarray, "batches"]
    batch_rows: Int[np.ndarray, "batches"]
    batch_bucket: Int[np.ndarray, "batches"]

    def __len__(self) -> int:
        return len(self.batch_bucket)


@dataclass
class Plan:
    """Steps to records; see the module's text."""

    seed: int
    sources: Sequence[Lengths]
    buckets: Sequence[Bucket]
    rows: Sequence[int]
    """Rows of a global batch for each bucket."""
    too_long: tuple[Record, ...] = field(init=False)
    """Records that no bucket holds."""
    fingerprint: str = field(init=False)
    """Changes whenever any step would hold other records."""

    def __post_init__(self):
        """Assign buckets; raises UserError when there is nothing to train on, in all or in one of the sources."""
        if len(self.rows) != len(self.buckets) or not self.buckets or min(self.rows) < 1:
            raise UserError(f"{len(self.buckets)} buckets need as many positive numbers of rows: {self.rows}.")
        order = sorted(range(len(self.buckets)), key=lambda b: self.buckets[b])
        self.buckets = [self.buckets[b] for b in order]
        self.rows = [self.rows[b] for b in order]
        names = [size.name for size in fields(self.buckets[0])]
        self._sums = [column for column, name in enumerate(names) if name in self.buckets[0].adds_up]
        self._limits = np.array([astuple(bucket) for bucket in self.buckets], np.int64)
        self._bucket_of = [_assign(source.resources, self._limits) for source in self.sources]
        self.too_long = tuple(
            (number, int(record))
            for number, bucket_of in enumerate(self._bucket_of)
            for record in np.flatnonzero(bucket_of < 0)
        )
        for source, bucket_of in zip(self.sources, self._bucket_of, strict=True):
            if len(bucket_of) and (bucket_of < 0).all():
                raise UserError(
                    f"No record of source {source.name} fits any bucket: the largest take "
                    f"{source.resources.max(0).tolist()} ({', '.join(names)}); the last bucket is {self.buckets[-1]}."
                )
        if not any(map(len, self._bucket_of)):
            raise UserError("There are no records in any source.")
        self.fingerprint = self._hash()
        self._epochs: OrderedDict[int, EpochPlan] = OrderedDict()
        self._starts = [0]
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        """Locks stay in their process."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.RLock())

    def epoch(self, number: int) -> EpochPlan:
        """Plan an epoch, or take it from the last few."""
        with self._lock:
            if number not in self._epochs:
                self._epochs[number] = self._plan(number)
                while len(self._epochs) > KEPT_EPOCHS:
                    self._epochs.popitem(last=False)
            self._epochs.move_to_end(number)
            return self._epochs[number]

    def start_of(self, epoch: int) -> int:
        """First step of an epoch."""
        with self._lock:
            while len(self._starts) <= epoch:
                self._starts.append(self._starts[-1] + len(self.epoch(len(self._starts) - 1)))
            return self._starts[epoch]

    def steps_in(self, epochs: float | int) -> int:
        """Steps of so many epochs; a fraction counts steps of the last one, rounded up."""
        whole = int(epochs)
        rest = epochs - whole
        return self.start_of(whole) + (int(np.ceil(rest * len(self.epoch(whole)))) if rest else 0)

    def step(self, step: int) -> PlannedStep:
        """Records of a step, counted from 0 over all epochs; raises IndexError below 0."""
        if step < 0:
            raise IndexError(f"step {step} is before the first")
        with self._lock:
            while self._starts[-1] <= step:
                self.start_of(len(self._starts))
        number = int(np.searchsorted(self._starts, step, side="right")) - 1
        epoch, batch = self.epoch(number), step - self._starts[number]
        bucket, first = int(epoch.batch_bucket[batch]), int(epoch.batch_first_row[batch])
        rows = []
        for row in range(first, first + int(epoch.batch_rows[batch])):
            records = epoch.records[epoch.row_starts[row] : epoch.row_starts[row + 1]]
            rows.append(tuple((int(source), int(record)) for source, record in records))
        rows += [()] * (self.rows[bucket] - len(rows))
        return PlannedStep(step, number, self.buckets[bucket], tuple(rows))

    def describe(self, listed: int = 5) -> str:
        """Lines for the log: what an epoch holds, how full its rows are, what is left out."""
        epoch = self.epoch(0)
        lines = []
        for number, source in enumerate(self.sources):
            used = int((epoch.records[:, 0] == number).sum())
            lines.append(f"source {source.name}: {len(source.resources):,} records, {used:,} in an epoch")
        for index, bucket in enumerate(self.buckets):
            chosen = epoch.batch_bucket == index
            rows = int(epoch.batch_rows[chosen].sum())
            if rows:
                line = f"bucket of {bucket}: {int(chosen.sum()):,} batches of {self.rows[index]} rows"
                if self._sums:
                    column = self._sums[0]
                    share = self._taken(epoch, index, column) / (rows * self._limits[index][column])
                    line += f", {bucket.adds_up[0]} {share:.0%} full"
                lines.append(line)
        if self.too_long:
            some = ", ".join(f"{self.sources[s].name}[{r}]" for s, r in self.too_long[:listed])
            more = ", ..." if len(self.too_long) > listed else ""
            lines.append(f"left out, too long for every bucket: {len(self.too_long):,} records ({some}{more})")
        return "\n".join(lines)

    def _taken(self, epoch: EpochPlan, bucket: int, column: int) -> int:
        total = 0
        for number, source in enumerate(self.sources):
            records = epoch.records[epoch.records[:, 0] == number, 1]
            inside = self._bucket_of[number][records] == bucket
            total += int(source.resources[records[inside], column].sum())
        return total

    def _hash(self) -> str:
        digest = hashlib.sha256(repr((self.seed, self.buckets, self.rows, OPEN_ROWS)).encode())
        for source in self.sources:
            digest.update(repr((source.name, source.repetitions)).encode())
            digest.update(np.ascontiguousarray(source.resources, np.int64).tobytes())
        return digest.hexdigest()

    def _drawn(self, number: int, epoch: int) -> Int[np.ndarray, "records"]:
        """Records of a source in an epoch: a stretch of an endless sequence of shuffled passes through it."""
        usable = np.flatnonzero(self._bucket_of[number] >= 0)
        if not len(usable):
            return usable
        per_epoch = self.sources[number].repetitions * len(usable)
        first, last = round(epoch * per_epoch), round((epoch + 1) * per_epoch)
        passes = range(first // len(usable), -(-last // len(usable)))
        shuffled = [_generator(self.seed, 1, number, turn).permutation(usable) for turn in passes]
        sequence = np.concatenate([*shuffled, usable[:0]])
        offset = passes.start * len(usable)
        return sequence[first - offset : last - offset]

    def _plan(self, number: int) -> EpochPlan:
        drawn = [self._drawn(source, number) for source in range(len(self.sources))]
        sources = np.concatenate([np.full(len(records), s) for s, records in enumerate(drawn)])
        records = np.stack([sources, np.concatenate(drawn)], axis=1).astype(np.int64)
        records = records[_generator(self.seed, 2, number).permutation(len(records))]
        resources = np.zeros((len(records), self._limits.shape[1]), np.int64)
        bucket_of = np.zeros(len(records), np.int64)
        for s, source in enumerate(self.sources):
            mine = records[:, 0] == s
            resources[mine] = source.resources[records[mine, 1]]
            bucket_of[mine] = self._bucket_of[s][records[mine, 1]]

        placed, row_lengths, first_row, batch_rows, batch_bucket = [], [], [], [], []
        for bucket in range(len(self.buckets)):
            members = np.flatnonzero(bucket_of == bucket)
            row_of = pack(resources[members][:, self._sums], self._limits[bucket][self._sums])
            count = int(row_of.max()) + 1 if len(members) else 0
            placed.append(records[members[np.argsort(row_of, kind="stable")]])
            starts = np.arange(0, count, self.rows[bucket])
            first_row.append(sum(map(len, row_lengths)) + starts)
            batch_rows.append(np.minimum(self.rows[bucket], count - starts))
            batch_bucket.append(np.full(len(starts), bucket))
            row_lengths.append(np.bincount(row_of, minlength=count))
        order = _generator(self.seed, 3, number).permutation(sum(map(len, batch_bucket)))
        return EpochPlan(
            records=np.concatenate(placed),
            row_starts=np.concatenate([[0], np.cumsum(np.concatenate(row_lengths))]),
            batch_first_row=np.concatenate(first_row)[order],
            batch_rows=np.concatenate(batch_rows)[order],
            batch_bucket=np.concatenate(batch_bucket)[order],
        )


def pack(sizes: Int[np.ndarray, "records kinds"], limits: Int[np.ndarray, "kinds"]) -> Int[np.ndarray, "records"]:
    """Row of each record: the first open row with room, else a new one in place of the fullest.

    Every record must fit an empty row. Rows are numbered in the order in which they are opened. Where no size adds up,
    each record has a row of its own.
    """
    if not len(limits) or (len(sizes) and (2 * sizes.min(0) > limits).any()):
        return np.arange(len(sizes))
    free = np.zeros((OPEN_ROWS, len(limits)), np.int64)
    names = np.full(OPEN_ROWS, -1)
    row_of = np.empty(len(sizes), np.int64)
    opened = 0
    for record, size in enumerate(sizes):
        fits = (size <= free).all(1)
        place = int(fits.argmax())
        if not fits[place]:
            place = int((free / limits.clip(1)).min(1).argmin())
            free[place], names[place] = limits, opened
            opened += 1
        free[place] -= size
        row_of[record] = names[place]
    return row_of


def rows_of_process(rows: int, process: int, processes: int) -> slice:
    """Which rows of a global batch a process makes; UserError when they cannot be shared equally."""
    if rows % processes:
        raise UserError(f"{rows} rows a batch cannot be shared equally by {processes} processes.")
    each = rows // processes
    return slice(process * each, (process + 1) * each)


def repetitions_of(weights: Sequence[float | int], records: Sequence[int]) -> list[float]:
    """Repetitions that mix sources in given proportions; an epoch has as many records as there are."""
    total, mass = sum(records), sum(weights)
    return [weight / mass * total / count for weight, count in zip(weights, records, strict=True)]


def _assign(
    resources: Int[np.ndarray, "records sizes"], limits: Int[np.ndarray, "buckets sizes"]
) -> Int[np.ndarray, "records"]:
    """First bucket that holds each record, -1 for none."""
    bucket_of = np.full(len(resources), -1)
    for bucket in reversed(range(len(limits))):
        bucket_of[(resources <= limits[bucket]).all(1)] = bucket
    return bucket_of


def _generator(*key: int) -> np.random.Generator:
    """Philox is the same on every platform and numpy version; the key makes streams independent."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
