"""Builds a TFDS dataset of ArrayRecord files that continues where it was interrupted.

`tfds build` starts over after an interruption. Here the records of a split are cut into shards beforehand,
evenly and in order, so that each shard depends on the source alone; a shard is written beside its place and
moved there when whole; and the metadata that make TFDS see a dataset come last:

    NAME/1.0.0/NAME-SPLIT.array_record-00000-of-00004 ...   the records (tfds.data_source)
    NAME/1.0.0/NAME-SPLIT.lengths.npz                       sizes of the records (sources/lengths.py)
    NAME/1.0.0/NAME-SPLIT.bad_records.jsonl                 what was left out, and why
    NAME/1.0.0/build.json                                   what is built from which files
    NAME/1.0.0/features.json, dataset_info.json             TFDS's own

Records are in the order of the source: shuffling is the epoch plan's work.
"""

import json
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from data_loaders.sources.lengths import LengthIndex
from data_loaders.sources.protocol import RecordSize
from tracevision_jax.errors import UserError
from tracevision_jax.records.sample import BadRecord

RECORDS_PER_SHARD = 2048
"""About 250 MB of COCO images and narratives."""
TELLING = 64
"""Where a shard starts with so many bad records, the folders are wrong rather than the records."""
Outcome = tuple[dict[str, Any], RecordSize] | BadRecord
"""What became of a record: an example with its size, or the reason why there is none."""


@runtime_checkable
class Input(Protocol):
    """Records to build from."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Changes with the records."""
        ...

    def encoded(self, index: int) -> tuple[dict[str, Any], RecordSize]:
        """An example of the dataset's features, and its size; raises BadRecord."""
        ...


@dataclass(frozen=True)
class BuiltSplit:
    """A finished split."""

    records: int
    bad: int
    shards: int
    bytes: int


@dataclass(frozen=True)
class Target:
    """The folder of one version of a dataset, and the names of the files in it."""

    folder: Path
    name: str

    def shard(self, split: str, shard: int, shards: int) -> Path:
        """File of a shard, named as TFDS does."""
        return self.folder / f"{self.name}-{split}.array_record-{shard:05d}-of-{shards:05d}"

    def lengths(self, split: str) -> Path:
        """File of the length index."""
        return self.folder / f"{self.name}-{split}.lengths.npz"

    def bad_records(self, split: str) -> Path:
        """File that lists what was left out."""
        return self.folder / f"{self.name}-{split}.bad_records.jsonl"

    def part(self, split: str, shard: int, suffix: str) -> Path:
        """File of a shard's share of the length index or of the bad records."""
        return self.folder / f".{self.name}-{split}-{shard:05d}{suffix}"

    @property
    def state(self) -> Path:
        """File that says what is built from which files."""
        return self.folder / "build.json"


def build_split(
    source: Input,
    features: Any,
    target: Target,
    split: str,
    workers: int,
    per_shard: int = RECORDS_PER_SHARD,
    console: Console | None = None,
) -> BuiltSplit:
    """Build one split, or what is left of it, and make TFDS see it.

    Raises:
        UserError: the folder holds a build from other files, all records are bad, or it cannot be written.
    """
    if not len(source):
        raise UserError(f"nothing to build: the {split} split has no records")
    shards = -(-len(source) // per_shard)
    try:
        target.folder.mkdir(parents=True, exist_ok=True)
        state = _claim(target, split, source.fingerprint(), shards)
        if "finished" not in state["splits"][split]:
            _write_shards(source, features, target, split, shards, workers, console)
            state["splits"][split]["finished"] = _join(target, split, shards)
            _write_json(target.state, state)
        _write_metadata(features, target, state)
        _remove_parts(target, split)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or target.folder}: {error.strerror}") from error
    done = state["splits"][split]["finished"]
    return BuiltSplit(sum(done["shard_lengths"]), done["bad"], shards, done["bytes"])


def _claim(target: Target, split: str, fingerprint: str, shards: int) -> dict:
    """The state of the folder, with this split noted in it."""
    state: dict = {"name": target.name, "splits": {}}
    if target.state.exists():
        state = json.loads(target.state.read_text(encoding="utf-8"))
        found = state["splits"].get(split)
        if found and (found["fingerprint"], found["shards"]) != (fingerprint, shards):
            raise UserError(
                f"{target.folder} holds a {split} split that was built, in full or in part, from other "
                "files or with other settings: remove that folder, or give another one"
            )
    if split not in state["splits"]:
        state["splits"][split] = {"fingerprint": fingerprint, "shards": shards}
        _write_json(target.state, state)
    return state


class _Rate(ProgressColumn):
    """Records a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} records/s")


def _write_shards(
    source: Input,
    features: Any,
    target: Target,
    split: str,
    shards: int,
    workers: int,
    console: Console | None,
) -> None:
    """Write the shards that are not there yet."""
    for stale in target.folder.glob(f".{target.name}-{split}.*.part"):
        stale.unlink()
    bounds = [round(shard * len(source) / shards) for shard in range(shards + 1)]
    left = [shard for shard in range(shards) if not target.shard(split, shard, shards).exists()]
    total = sum(bounds[shard + 1] - bounds[shard] for shard in left)
    there = f" ({len(source) - total:,} records are there already)" if total < len(source) else ""
    bars = BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
    with Progress(TextColumn("{task.description}"), *bars, console=console) as progress:
        task = progress.add_task(f"Building {target.name} {split}{there}", total=total)
        with ThreadPoolExecutor(workers) as pool:
            for shard in left:
                outcomes = _in_order(pool, source, range(bounds[shard], bounds[shard + 1]), 4 * workers)
                _write_shard(features, target, split, shard, shards, outcomes, lambda: progress.advance(task))


def _in_order(
    pool: ThreadPoolExecutor, source: Input, indices: Iterable[int], ahead: int
) -> Iterator[tuple[int, Outcome]]:
    """Encoded records, or the BadRecord in their place, in order, with `ahead` of them under way."""

    def encode(index: int) -> tuple[int, Outcome]:
        try:
            return index, source.encoded(index)
        except BadRecord as bad:
            return index, bad

    waiting: deque[Future[tuple[int, Outcome]]] = deque()
    for index in indices:
        waiting.append(pool.submit(encode, index))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()


def _write_shard(
    features: Any,
    target: Target,
    split: str,
    shard: int,
    shards: int,
    outcomes: Iterable[tuple[int, Outcome]],
    advance: Callable[[], None],
) -> None:
    """Write one shard: its parts of the indices first, the records last, whose file says that it is done."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    serializer = tfds.core.ExampleSerializer(features.get_serialized_info())
    part = target.folder / f".{target.name}-{split}.{shard:05d}.{os.getpid()}.part"
    sizes: list[RecordSize] = []
    bad: list[dict] = []
    written = 0
    writer = ArrayRecordWriter(os.fspath(part), "group_size:1")
    try:
        for index, outcome in outcomes:
            if isinstance(outcome, BadRecord):
                note = {"reason": outcome.reason, "file": outcome.file, "record": outcome.record}
                bad.append({"number": index, **note})
                if len(bad) == TELLING and not sizes:
                    raise UserError(f"{TELLING} records in a row are bad; the first one: {bad[0]['reason']}")
            else:
                example, size = outcome
                # Otherwise the order of the fields differs from one process to the next.
                line = serializer.get_tf_example(features.encode_example(example)).SerializeToString(deterministic=True)
                writer.write(line)
                written += len(line)
                sizes.append(size)
            advance()
    except BaseException:
        writer.close()
        part.unlink(missing_ok=True)
        raise
    writer.close()
    LengthIndex.of(sizes).save(target.part(split, shard, ".lengths.npz"))
    _write_json(target.part(split, shard, ".json"), {"records": len(sizes), "bytes": written, "bad": bad})
    os.replace(part, target.shard(split, shard, shards))


def _join(target: Target, split: str, shards: int) -> dict:
    """Join the parts of the shards, and return what TFDS wants to know of them."""
    notes = [json.loads(target.part(split, k, ".json").read_text(encoding="utf-8")) for k in range(shards)]
    if not sum(note["records"] for note in notes):
        reason = notes[0]["bad"][0]["reason"]
        raise UserError(f"no record of the {split} split can be used; the first one: {reason}")
    parts = [LengthIndex.load(target.part(split, shard, ".lengths.npz")) for shard in range(shards)]
    LengthIndex.joined(parts).save(target.lengths(split))
    lines = [json.dumps(bad, ensure_ascii=False) + "\n" for note in notes for bad in note["bad"]]
    _write_text(target.bad_records(split), "".join(lines))
    return {
        "shard_lengths": [note["records"] for note in notes],
        "bytes": sum(note["bytes"] for note in notes),
        "bad": len(lines),
    }


def _write_metadata(features: Any, target: Target, state: dict) -> None:
    """TFDS's files for all finished splits; `dataset_info.json`, by which it knows a dataset, last."""
    import tensorflow_datasets as tfds

    identity = tfds.core.DatasetIdentity(
        name=target.name,
        version=tfds.core.Version(target.folder.name),
        data_dir=os.fspath(target.folder),
        module_name="",
    )
    information = tfds.core.DatasetInfo(builder=identity, features=features)
    information.set_file_format(tfds.core.FileFormat.ARRAY_RECORD)
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=entry["finished"]["shard_lengths"],
            num_bytes=entry["finished"]["bytes"],
            filename_template=tfds.core.ShardedFileTemplate(
                data_dir=tfds.core.Path(target.folder),
                dataset_name=target.name,
                split=split,
                filetype_suffix="array_record",
            ),
        )
        for split, entry in sorted(state["splits"].items())
        if "finished" in entry
    ]
    information.set_splits(tfds.core.SplitDict(splits))
    with tempfile.TemporaryDirectory(dir=target.folder, prefix=".metadata") as folder:
        information.write_to_directory(folder)
        for name in sorted(os.listdir(folder), key=lambda name: name == "dataset_info.json"):
            os.replace(Path(folder) / name, target.folder / name)


def _remove_parts(target: Target, split: str) -> None:
    for file in target.folder.glob(f".{target.name}-{split}-[0-9]*"):
        file.unlink()


def _write_json(file: Path, value: dict) -> None:
    _write_text(file, json.dumps(value, ensure_ascii=False, indent=1))


def _write_text(file: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)
