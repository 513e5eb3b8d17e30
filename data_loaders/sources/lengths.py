"""The length index: the `RecordSize` of every record of a dataset, in one small file."""

import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_loaders.sources.protocol import RecordSize
from tracevision_jax.errors import UserError

COLUMNS = (
    "height",
    "width",
    "frames",
    "caption_characters",
    "words",
    "trace_points",
    "regions",
    "questions",
    "question_characters",
)


class LengthIndex:
    """Sizes of records by number; one column of numbers a field, and the sets of tasks by number."""

    def __init__(self, columns: dict[str, np.ndarray], tasks: np.ndarray, task_sets: Sequence[str]):
        self._columns = columns
        self._tasks = tasks
        self._task_sets = [frozenset(names.split()) for names in task_sets]

    def __len__(self) -> int:
        return len(self._tasks)

    def __getitem__(self, index: int) -> RecordSize:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        numbers = {name: int(column[index]) for name, column in self._columns.items()}
        return RecordSize(**numbers, tasks=self._task_sets[int(self._tasks[index])])

    @classmethod
    def of(cls, sizes: Sequence[RecordSize]) -> "LengthIndex":
        """Index these sizes."""
        columns = {name: np.array([getattr(size, name) for size in sizes], np.int64) for name in COLUMNS}
        texts = [" ".join(sorted(size.tasks)) for size in sizes]
        names = sorted(set(texts))
        return cls(columns, np.array([names.index(text) for text in texts], np.int64), names)

    def save(self, file: Path) -> None:
        """Write the file, whole or not at all."""
        part = file.with_name(f".{file.name}.{os.getpid()}.part")
        with open(part, "wb") as stream:
            names = np.array([" ".join(sorted(tasks)) for tasks in self._task_sets], np.str_)
            np.savez_compressed(stream, allow_pickle=False, tasks=self._tasks, task_sets=names, **self._columns)
        os.replace(part, file)

    @classmethod
    def load(cls, file: Path) -> "LengthIndex":
        """Read the file.

        Raises:
            UserError: it is missing or damaged.
        """
        try:
            with open(file, "rb") as stream, np.load(stream) as kept:
                columns = {name: kept[name] for name in COLUMNS}
                return cls(columns, kept["tasks"], kept["task_sets"].tolist())
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"the length index {file} cannot be read ({error}): build the dataset again") from error

    @classmethod
    def joined(cls, parts: Sequence["LengthIndex"]) -> "LengthIndex":
        """One index of the records of several, in order."""
        return cls.of([part[k] for part in parts for k in range(len(part))])
