"""Runs tasks over a model: batches by bucket, a record of every answer kept, resumable, tables at the end.

    sweep = Sweep(engine, processor, out="runs/x/evaluation", model="name and hash of the checkpoint")
    tables = sweep.run("trace_prediction", TracePrediction(), samples, limit=200)

For each task OUT holds NAME.jsonl, whose first line says what was asked of which model and data and whose other lines
are records in the order in which answers came. The same call again asks only what is not there yet; a file of another
model, data or task is refused. Prompts wait until a bucket has a full batch, so that none is padded but the last.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from evaluation.task import Prompt, Record, Samples, Table, Task
from tracevision_jax.errors import UserError
from tracevision_jax.inference.answers import Answer
from tracevision_jax.inference.buckets import bucket_of
from tracevision_jax.inference.engine import Engine
from tracevision_jax.records.batch import Bucket
from tracevision_jax.records.encoded import Piece
from tracevision_jax.records.processor import Processor
from tracevision_jax.records.sample import BadRecord, Sample

ROWS = 50
REMEMBERED = 32
"""Samples kept in memory: prompts of one sample, and controls, read it again."""
REPORTED_REASONS = 5


@dataclass
class Outcome:
    """What a task came to."""

    tables: list[Table]
    records: list[Record]
    skipped: Counter[str] = field(default_factory=Counter)
    """Reasons why samples could not be used, with their number."""


@dataclass
class Sweep:
    """Tasks over one model; see the module's text."""

    engine: Engine
    processor: Processor
    out: str | Path
    model: str
    """What identifies the parameters."""
    rows: int = ROWS
    """Rows of a batch."""
    console: Console | None = None

    def run(self, name: str, task: Task, samples: Samples, limit: int | None = None) -> Outcome:
        """Ask what is left to ask, and make the tables of all records.

        Args:
            name: of the result's file and of its progress bar.
            task: what is asked.
            samples: about what.
            limit: only the first so many samples.

        Raises:
            UserError: the file holds results of something else, or is damaged.
        """
        count = len(samples) if limit is None else min(limit, len(samples))
        path = Path(self.out) / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        records = open_records(path, self.fingerprint(name, task, samples))
        done = {record["id"]: record for record in records}
        remembering = _Remembering(samples)
        skipped: Counter[str] = Counter()
        asked: set[str] = set()
        with path.open("a", encoding="utf-8") as file, self._progress() as progress:
            bar = progress.add_task(name, total=count, rate="")
            for prompts in self._batches(task, remembering, count, done, asked, skipped, progress, bar):
                for record in self._answer(task, prompts):
                    file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
                    done[record["id"]] = record
                file.flush()
        # Of an earlier run with a larger limit there may be more; the tables are of what was asked for now.
        kept = [record for identity, record in done.items() if identity in asked]
        for reason, number in skipped.most_common(REPORTED_REASONS):
            self._say(f"{name}: {number} samples left out: {reason}")
        return Outcome(task.tables(kept), kept, skipped)

    def fingerprint(self, name: str, task: Task, samples: Samples) -> dict[str, str]:
        """What must be the same for records to belong together."""
        return {
            "benchmark": name,
            "task": repr(task),
            "model": self.model,
            "data": samples.fingerprint(),
            "configuration": hashlib.sha256(repr(self.engine.config).encode()).hexdigest()[:32],
        }

    def _batches(
        self,
        task: Task,
        samples: "_Remembering",
        count: int,
        done: dict[str, Record],
        asked: set[str],
        skipped: Counter[str],
        progress: Progress,
        bar: Any,
    ) -> Iterator[list[tuple[Prompt, Piece]]]:
        """Prompts that are not done yet, in batches of one bucket; pieces are made while the devices answer."""

        def make(index: int) -> list[tuple[Prompt, Piece | None]] | str:
            try:
                prompts = task.prompts(samples, index)
                return [(prompt, None if prompt.id in done else self._piece(prompt)) for prompt in prompts]
            except BadRecord as error:
                return error.reason
            except UserError as error:
                return str(error)

        waiting: dict[Bucket, list[tuple[Prompt, Piece]]] = {}
        with ThreadPoolExecutor(1) as pool:
            ahead = 2 * self.rows
            futures = [pool.submit(make, index) for index in range(min(ahead, count))]
            for index in range(count):
                made = futures.pop(0).result()
                if index + ahead < count:
                    futures.append(pool.submit(make, index + ahead))
                if isinstance(made, str):
                    skipped[made] += 1
                else:
                    asked.update(prompt.id for prompt, _ in made)
                    for prompt, piece in made:
                        if piece is not None:
                            bucket = bucket_of(piece, self.engine.buckets)
                            full = waiting.setdefault(bucket, [])
                            full.append((prompt, piece))
                            if len(full) == self.rows:
                                yield waiting.pop(bucket)
                speed = progress.tasks[bar].speed
                progress.update(bar, advance=1, rate=f"{speed:.1f}/s" if speed else "")
        for bucket in sorted(waiting, reverse=True):
            yield waiting[bucket]

    def _piece(self, prompt: Prompt) -> Piece:
        return self.processor.piece(prompt.sample, [prompt.conversation], answer=False)

    def _answer(self, task: Task, prompts: Sequence[tuple[Prompt, Piece]]) -> Iterator[Record]:
        """Records of a batch of prompts."""
        force = [prompt.outline(self.processor) if prompt.outline else [] for prompt, _ in prompts]
        answers = self.engine.generate(
            [piece for _, piece in prompts],
            max_new_tokens=[len(outline) + task.budget(self.processor) for outline in force],
            force=force,
            rows=self.rows,
        )
        for (prompt, _), answer in zip(prompts, answers, strict=True):
            yield record_of(task, prompt, replace(answer, size=prompt.sample.size), self.processor)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:>8}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console or Console(stderr=True),
        )

    def _say(self, text: str) -> None:
        (self.console or Console(stderr=True)).print(text, markup=False, highlight=False)


def record_of(task: Task, prompt: Prompt, answer: Answer, processor: Processor) -> Record:
    """All that is kept of an answer."""
    kept = {"id": prompt.id, "sample": prompt.sample.id, "control": prompt.control, **prompt.truth}
    told = {"text": answer.text, "finished": answer.finished, "log_probability": sum(answer.log_probabilities)}
    return kept | task.record(prompt, answer, processor) | told


def open_records(path: Path, fingerprint: dict[str, str]) -> list[Record]:
    """Records that are there already, a line cut short by a crash removed; the file begins with the fingerprint.

    Raises:
        UserError: records of something else, or a damaged line.
    """
    text = path.read_bytes() if path.is_file() else b""
    whole = text[: text.rfind(b"\n") + 1]
    lines = whole.splitlines()
    if not lines:
        path.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
        return []
    try:
        header, *records = [json.loads(line) for line in lines]
        found = header["fingerprint"]
        known = {record["id"] for record in records}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it, or give another --out") from error
    differing = [key for key, value in fingerprint.items() if found.get(key) != value]
    if differing:
        raise UserError(
            f"{path} holds results of something else ({', '.join(differing)} differ); give another --out, or remove it"
        )
    if len(known) < len(records):
        raise UserError(f"{path} holds some record twice; remove it, or give another --out")
    if len(whole) < len(text):
        path.write_bytes(whole)
    return records


class _Remembering:
    """Samples, of which the last ones stay in memory."""

    def __init__(self, samples: Samples):
        self._samples = samples
        self._kept: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int, /) -> Sample:
        if index not in self._kept:
            self._kept[index] = self._samples[index]
            if len(self._kept) > REMEMBERED:
                self._kept.pop(next(iter(self._kept)))
        return self._kept[index]

    def fingerprint(self) -> str:
        return self._samples.fingerprint()
