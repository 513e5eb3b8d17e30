"""Random access to the lines of JSON-lines files: where each record starts, found once and kept beside the
file.

The offsets of `NAME.jsonl` are kept in `.NAME.jsonl.offsets.npz` in the same folder or, where that cannot
be written, in the user's cache folder. They are made anew when the file's size or time of change differ.
"""

import hashlib
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from tracevision_jax.errors import UserError

CHUNK = 16 * 1024 * 1024
"""Bytes read at a time."""
SHOWN = 256 * 1024 * 1024
"""Files from this size in bytes on are worth a progress bar."""
FORMAT = 1


@dataclass(frozen=True)
class LineIndex:
    """Where the lines of a file that are not blank start (bytes), and their numbers, counted from 1."""

    file: Path
    starts: Int[np.ndarray, "records"]
    numbers: Int[np.ndarray, "records"]

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, record: int) -> bytes:
        """The line of one record."""
        with open(self.file, "rb") as file:
            file.seek(int(self.starts[record]))
            return file.readline()


def line_index(file: Path, cache: Path | None = None) -> LineIndex:
    """Load the kept offsets of a file, or find and keep them.

    Args:
        file: A file of lines.
        cache: Folder for the offsets in place of the file's own.

    Raises:
        UserError: The file cannot be read, or is compressed.
    """
    try:
        state = file.stat()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    stamp = np.array([FORMAT, state.st_size, state.st_mtime_ns], np.int64)
    places = [cache / _cache_name(file)] if cache else [_beside(file), _user_cache() / _cache_name(file)]
    for place in places:
        kept = _load(place, stamp)
        if kept is not None:
            return LineIndex(file, *kept)
    starts, numbers = find_lines(file)
    for place in places:
        if _save(place, stamp, starts, numbers):
            break
    return LineIndex(file, starts, numbers)


def find_lines(file: Path) -> tuple[Int[np.ndarray, "records"], Int[np.ndarray, "records"]]:
    """Starts in bytes, and numbers from 1, of the lines that are not blank.

    Raises:
        UserError: The file is compressed.
    """
    ends = []
    position = 0
    size = file.stat().st_size
    columns = TextColumn("Indexing {task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=size < SHOWN, transient=True) as progress, open(file, "rb") as stream:
        task = progress.add_task(file.name, total=size)
        while chunk := stream.read(CHUNK):
            if position == 0 and chunk[:2] == b"\x1f\x8b":
                raise UserError(f"{file} is compressed with gzip: decompress it, to read records by number")
            ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == ord("\n")) + position)
            position += len(chunk)
            progress.update(task, completed=position)
    starts = np.concatenate([[0], *(end + 1 for end in ends)]).astype(np.int64)
    lengths = np.diff(np.append(starts, position))
    # A blank line is at most "\r\n"; spaces alone are rare enough to be left to the reader of the record.
    numbers = np.flatnonzero(lengths > 2).astype(np.int64)
    return starts[numbers], numbers + 1


def _beside(file: Path) -> Path:
    return file.with_name(f".{file.name}.offsets.npz")


def _user_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "tracevision" / "offsets"


def _cache_name(file: Path) -> str:
    return f"{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}.{file.name}.offsets.npz"


def _load(place: Path, stamp: np.ndarray):
    """Kept (starts, numbers) if they belong to the file as it is now."""
    try:
        with open(place, "rb") as file, np.load(file) as kept:
            if np.array_equal(kept["stamp"], stamp):
                return kept["starts"], kept["numbers"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        # Absent, or damaged: found anew.
        return None
    return None


def _save(place: Path, stamp: np.ndarray, starts: np.ndarray, numbers: np.ndarray) -> bool:
    """Keep offsets, whole or not at all; False where the folder cannot be written."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=".offsets")
    except OSError:
        return False
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, stamp=stamp, starts=starts, numbers=numbers)
        os.replace(temporary, place)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        return False
    return True
