"""Localized Narratives as distributed: JSON-lines files and folders of images, read by record number.

    source = LocalizedNarratives("/data/ln/coco_val_localized_narratives.jsonl", "/data/coco", dataset="coco")
    sample = source[0]                        # caption, timed words, strokes, the image

Files: https://google.github.io/localized-narratives (arXiv 1912.03098). No record stays in memory: an index
of byte offsets is made once for each file (`offsets.py`). Where a file has a sidecar (`sidecar.py`), the
sample has its regions and questions too.
"""

import glob
import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np

from data_loaders.sources.image_folders import DATASETS, find_image, image_size
from data_loaders.sources.narrative_record import NarrativeRecord, parse_narrative
from data_loaders.sources.offsets import LineIndex, line_index
from data_loaders.sources.protocol import RecordSize, question_characters
from data_loaders.sources.sidecar import SUFFIX, decode_sidecar, sidecar_path
from data_loaders.sources.tasks import tasks_of
from tracevision_jax.errors import UserError
from tracevision_jax.nearest import suggest
from tracevision_jax.records.sample import BadRecord, Question, Region, Sample
from tracevision_jax.vision.pictures import read_image


@dataclass(frozen=True)
class NarrativeParts:
    """All that the files say of one record, but for the pixels."""

    id: str
    record: NarrativeRecord
    image: Path | None
    """The image's file; None where its bytes came with the record."""
    regions: tuple[Region, ...]
    questions: tuple[Question, ...]
    sidecar: bytes
    """The sidecar's line as it stands, empty without one."""

    @property
    def tasks(self) -> frozenset[str]:
        """The tasks that the record can serve."""
        return tasks_of(self.record.caption, self.record.strokes, self.regions, self.questions)


def size_of(parts: NarrativeParts, height: int, width: int) -> RecordSize:
    """The size of a record whose image is so large."""
    return RecordSize(
        height=height,
        width=width,
        caption_characters=len(parts.record.caption),
        words=len(parts.record.words),
        trace_points=sum(len(stroke) for stroke in parts.record.strokes),
        regions=len(parts.regions),
        questions=len(parts.questions),
        question_characters=max((question_characters(question) for question in parts.questions), default=0),
        tasks=parts.tasks,
    )


@dataclass(frozen=True)
class LocalizedNarratives:
    """Records of one or more narratives files, in the order of the files' names and lines."""

    annotations: str | Path | Sequence[str | Path]
    """Files, or patterns such as "/data/ln/coco_train_localized_narratives-*.jsonl"."""
    images: str | Path
    """The data set's folder of images, or the folder above it."""
    dataset: str = "coco"
    """coco, ade20k, flickr30k or open_images: how image ids become files."""
    cache: str | Path | None = None
    """Folder for the indices; by default they lie beside the files, or in the user's cache."""
    files: tuple[Path, ...] = field(init=False)
    """The annotation files found."""

    def __post_init__(self):
        """Find the files.

        Raises:
            UserError: an unknown data set, no such folder, or no such file.
        """
        if self.dataset not in DATASETS:
            hint = suggest(self.dataset, DATASETS)
            raise UserError(f"no dataset '{self.dataset}'.{hint} Known: {', '.join(DATASETS)}")
        if not Path(self.images).is_dir():
            raise UserError(f"no folder of images {self.images}: give the folder that holds the {self.dataset} images")
        given = [self.annotations] if isinstance(self.annotations, str | Path) else list(self.annotations)
        files = tuple(file for pattern in given for file in _matching(str(pattern)))
        if not files:
            raise UserError("no annotation files given")
        object.__setattr__(self, "files", files)

    @property
    def name(self) -> str:
        """Such as "ln_coco"; `Sample.source`."""
        return f"ln_{self.dataset}"

    def __getstate__(self):
        # Indices are left out when a worker process receives the source: it loads the kept ones.
        return {key: value for key, value in self.__dict__.items() if key not in ("_indices", "_ends", "_sidecars")}

    def __setstate__(self, state):
        self.__dict__.update(state)

    @cached_property
    def _indices(self) -> tuple[LineIndex, ...]:
        cache = Path(self.cache) if self.cache else None
        return tuple(line_index(file, cache) for file in self.files)

    @cached_property
    def _ends(self) -> list[int]:
        """Number of records up to the end of each file."""
        return list(accumulate(len(index) for index in self._indices))

    @cached_property
    def _sidecars(self) -> tuple[LineIndex | None, ...]:
        cache = Path(self.cache) if self.cache else None
        found = []
        for file, index in zip(self.files, self._indices, strict=True):
            sidecar = line_index(sidecar_path(file), cache) if sidecar_path(file).is_file() else None
            if sidecar is not None and len(sidecar) != len(index):
                raise UserError(
                    f"{sidecar.file} has {len(sidecar)} records and {file} has {len(index)}: they belong to "
                    "different exports; export again, or take the sidecar away"
                )
            found.append(sidecar)
        return tuple(found)

    def __len__(self) -> int:
        return self._ends[-1]

    def parts(self, index: int) -> NarrativeParts:
        """Read all of a record but its image's pixels.

        Raises:
            BadRecord: with file and line.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        lines = self._indices[number]
        row = index - (self._ends[number] - len(lines))
        place = f"{lines.file}:{lines.numbers[row]}"
        try:
            record = parse_narrative(lines.read(row))
            split = _split(record.dataset_id, lines.file)
            image = find_image(Path(self.images), self.dataset, record.image_id, split)
        except BadRecord as bad:
            raise BadRecord(bad.reason, place, bad.record) from None
        sidecar, regions, questions = self._sidecars[number], (), ()
        extra = b""
        if sidecar is not None:
            extra = sidecar.read(row)
            try:
                regions, questions = decode_sidecar(extra, record.image_id)
            except BadRecord as bad:
                place = f"{sidecar.file}:{sidecar.numbers[row]}"
                raise BadRecord(bad.reason, place, record.image_id) from None
        # The line makes narratives distinct that one annotator gave on one image.
        name = f"{record.image_id}/{record.annotator_id}/{lines.file.stem}:{lines.numbers[row]}"
        return NarrativeParts(name, record, image, regions, questions, extra)

    def place(self, index: int) -> str:
        """The line of a record."""
        number = bisect_right(self._ends, index)
        lines = self._indices[number]
        return f"{lines.file}:{lines.numbers[index - (self._ends[number] - len(lines))]}"

    def __getitem__(self, index: int) -> Sample:
        """Read one record and its image.

        Raises:
            BadRecord: the record or its image cannot be used.
        """
        parts = self.parts(index)
        _, pixels = _image_of(parts)
        return sample_of(parts, pixels, self.name)

    def image_file(self, parts: NarrativeParts) -> tuple[bytes, tuple[int, int]]:
        """The bytes of a record's image, and its (height, width), after decoding it as a check.

        Raises:
            BadRecord: the image cannot be used.
        """
        encoded, pixels = _image_of(parts)
        return encoded, pixels.shape[:2]

    def sizes(self, index: int) -> RecordSize:
        """Size of a record from its line and the header of its image.

        Raises:
            BadRecord: the record, or the image's header, cannot be used.
        """
        parts = self.parts(index)
        assert parts.image is not None
        return size_of(parts, *image_size(parts.image))

    def fingerprint(self) -> str:
        """Hash of the files' names, sizes and times of change; images are taken to stay as they are."""
        text = [f"{self.name} {Path(self.images).resolve()}"]
        for file in self.files:
            for path in (file, sidecar_path(file)):
                if path.is_file():
                    state = path.stat()
                    text.append(f"{path.name} {state.st_size} {state.st_mtime_ns}")
        return hashlib.sha256("\n".join(text).encode()).hexdigest()[:32]


def _image_of(parts: NarrativeParts) -> tuple[bytes, np.ndarray]:
    """Bytes and pixels of a record's image file."""
    assert parts.image is not None
    try:
        encoded = parts.image.read_bytes()
        return encoded, read_image(encoded)
    except OSError as error:
        reason = f"the picture cannot be read: {error.strerror}"
        raise BadRecord(reason, str(parts.image), parts.id) from error
    except UserError as error:
        raise BadRecord(str(error), str(parts.image), parts.id) from error


def sample_of(parts: NarrativeParts, pixels, source: str) -> Sample:
    """The sample of a record and its image (height, width, 3)."""
    return Sample(
        id=parts.id,
        source=source,
        frames=pixels[None],
        caption=parts.record.caption,
        words=parts.record.words,
        strokes=parts.record.strokes,
        regions=parts.regions,
        questions=parts.questions,
        tasks=parts.tasks,
    )


def _matching(pattern: str) -> list[Path]:
    """Files of a name or pattern, without sidecars, in order of their names.

    Raises:
        UserError: there is none.
    """
    names = [pattern] if Path(pattern).is_file() else sorted(glob.glob(pattern))
    found = [Path(name) for name in names if Path(name).is_file() and not name.endswith(SUFFIX)]
    if not found:
        near = sorted(path.name for path in Path(pattern).parent.glob("*.jsonl"))
        listed = f" That folder has: {', '.join(near[:8])}." if near else ""
        hint = suggest(Path(pattern).name, near) or listed
        raise UserError(f"no annotation file matches {pattern}.{hint}")
    return found


def _split(dataset_id: str, file: Path) -> str:
    """The split (train, val, test or "") that a record says it is from, or else its file's name."""
    for text in (dataset_id.lower(), file.name.lower()):
        for word, split in (("train", "train"), ("val", "val"), ("test", "test")):
            if word in text:
                return split
    return ""
