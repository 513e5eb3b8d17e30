"""Our file beside a narratives file, for what the released format cannot hold: regions, masks, boxes and
questions.

`NAME.sidecar.jsonl` has one JSON object for each record of `NAME.jsonl`, in the same order:
`{"image_id": "17", "regions": [{"phrase", "boxes": [[x1, y1, x2, y2] or null a frame], "masks": [RLE a
frame], "attributes"}], "questions": [{"kind", "turns": [{"role", "parts": [...]}]}]}`. A part is
`{"text"}`, `{"phrase"}`, `{"box"}`, `{"masks"}` or `{"trace", "words"}`. Masks are COCO's compressed RLE,
written as text.
"""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco_mask

from data_loaders.sources.narrative_record import parse_object
from tracevision_jax.records.sample import (
    BadRecord,
    BoxPart,
    MaskPart,
    Part,
    PhrasePart,
    Question,
    Region,
    TimedWord,
    TracePart,
    Turn,
)

SUFFIX = ".sidecar.jsonl"


def sidecar_path(narratives: Path) -> Path:
    """The sidecar's place: beside `NAME.jsonl`, `NAME.sidecar.jsonl`."""
    return narratives.with_name(narratives.stem + SUFFIX)


def encode_sidecar(image_id: str, regions: tuple[Region, ...], questions: tuple[Question, ...]) -> dict:
    """The JSON object of one record."""
    return {
        "image_id": image_id,
        "regions": [_encode_region(region) for region in regions],
        "questions": [_encode_question(question) for question in questions],
    }


def decode_sidecar(line: bytes, image_id: str) -> tuple[tuple[Region, ...], tuple[Question, ...]]:
    """Regions and questions of one record.

    Raises:
        BadRecord: the line is damaged, or belongs to another image.
    """
    value = parse_object(line)
    if value.get("image_id") != image_id:
        raise BadRecord(f"the sidecar's line is of image {value.get('image_id')}, not of {image_id}")
    try:
        regions = tuple(_decode_region(region) for region in value["regions"])
        questions = tuple(_decode_question(question) for question in value["questions"])
    except (KeyError, TypeError, ValueError) as error:
        raise BadRecord(f"the sidecar's line is malformed: {type(error).__name__} {error}") from error
    return regions, questions


def encode_masks(masks: Bool[np.ndarray, "frames height width"]) -> list[dict]:
    """COCO RLE of each frame."""
    encoded: Any = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    return [{"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()} for rle in encoded]


def decode_masks(encoded: list[dict]) -> Bool[np.ndarray, "frames height width"]:
    """Masks of all frames from their RLE."""
    rle: Any = [{"size": mask["size"], "counts": mask["counts"].encode()} for mask in encoded]
    return np.ascontiguousarray(coco_mask.decode(rle).transpose(2, 0, 1)).astype(bool)


def _encode_region(region: Region) -> dict:
    return {
        "phrase": region.phrase,
        "boxes": [box.tolist() if np.isfinite(box).all() else None for box in region.box],
        "masks": None if region.mask is None else encode_masks(region.mask),
        "attributes": dict(region.attributes),
    }


def _decode_region(value: dict) -> Region:
    boxes = [[np.nan] * 4 if box is None else box for box in value["boxes"]]
    return Region(
        phrase=value["phrase"],
        box=np.array(boxes, np.float64).reshape(len(boxes), 4),
        mask=None if value["masks"] is None else decode_masks(value["masks"]),
        attributes=dict(value["attributes"]),
    )


def _encode_question(question: Question) -> dict:
    turns = [{"role": turn.role, "parts": [_encode_part(part) for part in turn.parts]} for turn in question.turns]
    return {"kind": question.kind, "turns": turns}


def _decode_question(value: dict) -> Question:
    turns = [Turn(turn["role"], tuple(_decode_part(part) for part in turn["parts"])) for turn in value["turns"]]
    return Question(tuple(turns), value["kind"])


def _encode_part(part: Part) -> dict:
    if isinstance(part, str):
        return {"text": part}
    if isinstance(part, PhrasePart):
        return {"phrase": part.text}
    if isinstance(part, BoxPart):
        return {"box": part.box.tolist()}
    if isinstance(part, MaskPart):
        return {"masks": encode_masks(part.mask)}
    if isinstance(part, TracePart):
        words = [[word.text, word.start, word.end] for word in part.words]
        return {"trace": part.points.tolist(), "words": words}
    raise TypeError(f"a question cannot hold a {type(part).__name__}")


def _decode_part(value: dict) -> Part:
    if "text" in value:
        return value["text"]
    if "phrase" in value:
        return PhrasePart(value["phrase"])
    if "box" in value:
        return BoxPart(np.array(value["box"], np.float64))
    if "masks" in value:
        return MaskPart(decode_masks(value["masks"]))
    points = np.array(value["trace"], np.float64).reshape(-1, 3)
    return TracePart(points, tuple(TimedWord(text, start, end) for text, start, end in value["words"]))
