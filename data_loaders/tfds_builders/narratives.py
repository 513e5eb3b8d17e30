"""Localized Narratives as TFDS examples: the features, and records to examples and back, bit for bit.

Images are kept as the bytes of their files. Numbers are `Tensor`s of raw bytes, since the ordinary encoding
of TFDS rounds to float32. Nothing here needs TensorFlow.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_loaders.sources.localized_narratives import LocalizedNarratives, NarrativeParts, size_of
from data_loaders.sources.narrative_record import NarrativeRecord
from data_loaders.sources.protocol import RecordSize
from data_loaders.sources.sidecar import decode_sidecar
from tracevision_jax.records.sample import TimedWord

VERSION = "1.0.0"
"""Of the features below; readers find datasets in the folder of this name."""


def narrative_features() -> Any:
    """The features of an example, a `tfds.features.FeaturesDict`."""
    import tensorflow_datasets as tfds

    def numbers(shape: tuple, dtype) -> tfds.features.Tensor:
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=tfds.features.Encoding.ZLIB)

    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(None, None, 3), doc="bytes of the distributed file"),
            "dataset_id": tfds.features.Text(),
            "image_id": tfds.features.Text(),
            "annotator_id": tfds.features.Scalar(np.int64),
            "caption": tfds.features.Text(),
            "utterances": tfds.features.Sequence(tfds.features.Text()),
            "utterance_times": numbers((None, 2), np.float64),
            "trace": numbers((None, 3), np.float64),
            "stroke_lengths": numbers((None,), np.int64),
            "sidecar": tfds.features.Text(doc="regions and questions as JSON, or empty"),
        }
    )


def to_example(parts: NarrativeParts, image: bytes) -> dict[str, Any]:
    """A record and its image file as an example of `narrative_features`."""
    record = parts.record
    return {
        "id": parts.id,
        "image": image,
        "dataset_id": record.dataset_id,
        "image_id": record.image_id,
        "annotator_id": record.annotator_id,
        "caption": record.caption,
        "utterances": [word.text for word in record.words],
        "utterance_times": np.array([(w.start, w.end) for w in record.words], np.float64).reshape(-1, 2),
        "trace": np.concatenate([np.zeros((0, 3)), *record.strokes]),
        "stroke_lengths": np.array([len(stroke) for stroke in record.strokes], np.int64),
        # A line of JSON without its end, so that what is read back is what was written.
        "sidecar": json.dumps(json.loads(parts.sidecar), separators=(",", ":")) if parts.sidecar else "",
    }


def from_example(example: dict[str, Any]) -> tuple[NarrativeParts, bytes]:
    """A record and its image file from an example read with `SkipDecoding` for the image.

    Raises:
        BadRecord: the sidecar is damaged.
    """
    image_id = example["image_id"].decode()
    words = tuple(
        TimedWord(text.decode(), float(start), float(end))
        for text, (start, end) in zip(example["utterances"], example["utterance_times"], strict=True)
    )
    ends = np.cumsum(example["stroke_lengths"])
    strokes = tuple(np.array(stroke) for stroke in np.split(example["trace"], ends)[:-1])
    record = NarrativeRecord(
        dataset_id=example["dataset_id"].decode(),
        image_id=image_id,
        annotator_id=int(example["annotator_id"]),
        caption=example["caption"].decode(),
        words=words,
        strokes=strokes,
    )
    sidecar = example["sidecar"]
    regions, questions = decode_sidecar(sidecar, image_id) if sidecar else ((), ())
    return NarrativeParts(example["id"].decode(), record, None, regions, questions, sidecar), example["image"]


@dataclass(frozen=True)
class NarrativeInput:
    """The records of the distributed files, for `build.build_split`."""

    source: LocalizedNarratives

    def __len__(self) -> int:
        return len(self.source)

    def fingerprint(self) -> str:
        """Changes with the files and with the features."""
        return f"{self.source.fingerprint()} {VERSION}"

    def encoded(self, index: int) -> tuple[dict[str, Any], RecordSize]:
        """Example and size of a record.

        Raises:
            BadRecord: the record or its image cannot be used.
        """
        parts = self.source.parts(index)
        image, (height, width) = self.source.image_file(parts)
        return to_example(parts, image), size_of(parts, height, width)
