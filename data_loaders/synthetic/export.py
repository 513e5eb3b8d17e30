"""Writes synthetic scenes as a Localized Narratives data set: released JSON lines, and a folder of images.

    export_narratives(SyntheticScenes(1, 200), Path("ln"), split="val")

makes `ln/coco_val_localized_narratives.jsonl`, its sidecar with regions and questions (`sources/sidecar.py`),
and `ln/val2017/000000000001.png` and so on, so that `sources/localized_narratives.py` reads it like the real
one.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from data_loaders.sources.sidecar import encode_sidecar, sidecar_path
from data_loaders.synthetic.scenes import SyntheticScenes
from tracevision_jax.errors import UserError
from tracevision_jax.records.sample import Sample

SPLITS = ("train", "val")
FORMATS = {"png": {}, "jpg": {"quality": 95, "subsampling": 0}}
"""Extension -> Pillow's options; only PNG keeps every pixel."""


def export_narratives(
    scenes: SyntheticScenes, folder: Path, split: str, image_format: str = "png", first_id: int = 1
) -> Path:
    """Write all scenes, and return the narratives file, which is there only once all is written.

    Raises:
        UserError: scenes are videos, a name is unknown, or the folder cannot be written.
    """
    if scenes.config.frames > 1:
        raise UserError("Localized Narratives holds still images: export scenes of one frame")
    if split not in SPLITS:
        raise UserError(f"no split '{split}': choose from {', '.join(SPLITS)}")
    if image_format not in FORMATS:
        raise UserError(f"no image format '{image_format}': choose from {', '.join(FORMATS)}")
    narratives = folder / f"coco_{split}_localized_narratives.jsonl"
    try:
        (folder / f"{split}2017").mkdir(parents=True, exist_ok=True)
        sidecar = sidecar_path(narratives)
        parts = [path.with_name(f".{path.name}.part") for path in (narratives, sidecar)]
        with open(parts[0], "w", encoding="utf-8") as lines, open(parts[1], "w", encoding="utf-8") as extras:
            numbers: Iterable[int] = track(range(len(scenes)), f"Exporting {split} scenes", transient=True)
            for number in numbers:
                sample, image_id = scenes[number], str(first_id + number)
                image = folder / f"{split}2017" / f"{image_id.zfill(12)}.{image_format}"
                Image.fromarray(sample.frames[0]).save(image, **FORMATS[image_format])
                lines.write(_line(narrative_object(sample, f"mscoco_{split}2017", image_id)))
                extras.write(_line(encode_sidecar(image_id, sample.regions, sample.questions)))
        # The sidecar first: a narratives file without it would be read as one that has none.
        os.replace(parts[1], sidecar)
        os.replace(parts[0], narratives)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or folder}: {error.strerror}") from error
    return narratives


def narrative_object(sample: Sample, dataset_id: str, image_id: str) -> dict:
    """A sample as a record of the released format; it has no voice recording."""
    return {
        "dataset_id": dataset_id,
        "image_id": image_id,
        "annotator_id": 0,
        "caption": sample.caption,
        "timed_caption": [
            {"utterance": word.text, "start_time": word.start, "end_time": word.end} for word in sample.words
        ],
        "traces": [[_point(row) for row in stroke] for stroke in sample.strokes],
        "voice_recording": "",
    }


def _point(row: np.ndarray) -> dict:
    x, y, t = row.tolist()
    return {"x": x, "y": y, "t": t}


def _line(value: dict) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n"
