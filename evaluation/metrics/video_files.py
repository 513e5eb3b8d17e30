"""Masks of videos in files: PNG folders in DAVIS layout, and JSON in SA-V layout, which is also written.

**DAVIS layout**: FOLDER/sequence/frame.png, a palette PNG (or an 8-bit grey one) whose pixel values are object ids.
Frames are in the order of their numbers, or of their names where not all are numbers. The objects of a sequence are
the ids up to the highest in its first mask, as DAVIS's code counts them. 255 marks void pixels there and is no object,
unless the first mask holds no other id: then 255 is the white of a binary mask, and the only object.

**SA-V layout**: FOLDER/video.json, {"masklet": frame -> object -> COCO RLE, "masklet_id": ids, ...}, with ids from 0
on, and masks free to overlap. All masklets are objects, whenever they appear. Frames are numbered from 0 as in the
list.

    masklets = open_masklets(Path("masks/bear"))          # or masks/sav_000001.json
    masklets.read(masklets.names[0]).mask(1)              # (height, width), bool
    write_masklets(Path("out/clip.json"), "clip", ids=[0, 1], frames=masks_of_each_frame, frames_per_s=24.0)
"""

import io
import json
import struct
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from evaluation.metrics import files, run_lengths
from tracevision_jax.errors import UserError
from tracevision_jax.vision.run_lengths import encode_mask

VOID = 255
SMALL_BELOW_PX, MEDIUM_BELOW_PX = 32**2, 96**2
"""SA-V's buckets of masklets, by mean area where in sight."""


class Frame(NamedTuple):
    """What a file says of a frame: (height, width), and the masks of the ids that have pixels."""

    size: tuple[int, int]
    masks: dict[int, Bool[np.ndarray, "height width"]]

    def mask(self, number: int) -> Bool[np.ndarray, "height width"]:
        """The mask of an id, empty if it has no pixel."""
        return self.masks[number] if number in self.masks else np.zeros(self.size, bool)


class DavisMasklets:
    """A folder of PNG files, one a frame, read when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._paths = {path.stem: path for path in folder.iterdir() if is_png(path)}
        numbered = all(name.isdecimal() for name in self._paths)
        self.names = sorted(self._paths, key=lambda name: (int(name) if numbered else 0, name))

    @cached_property
    def first(self) -> Frame:
        """The masks of the first frame."""
        return self.read(self.names[0])

    @property
    def void(self) -> frozenset[int]:
        """Ids that are no objects, but mark pixels as belonging to none."""
        return frozenset({VOID} if self.first.masks.keys() - {VOID} else ())

    @property
    def objects(self) -> list[int]:
        """Ids that may be objects: a frame holds only those in sight."""
        ids = self.first.masks.keys() - self.void
        return list(range(1, max(ids, default=0) + 1)) if VOID not in ids else [VOID]

    def read(self, name: str) -> Frame:
        """The masks of a frame.

        Raises:
            UserError: the file is no mask that can be read.
        """
        ids = read_ids(self._paths[name])
        present = np.flatnonzero(np.bincount(ids.ravel())).tolist()
        return Frame(ids.shape, {number: ids == number for number in present if number})

    def place(self, name: str) -> str:
        """Path of the frame's file, there or not."""
        return str(self._paths.get(name, self.folder / f"{name}.png"))


class SavMasklets:
    """A JSON file of run lengths, checked at once and decoded when asked for."""

    void: frozenset[int] = frozenset()

    def __init__(self, path: Path) -> None:
        self.path = path
        entries = files.read_entries(path, "masklet")
        try:
            self.objects, self._frames = _check_masklets(entries)
            self._size = _check_size(entries, self._frames)
        except ValueError as error:
            raise UserError(f"{path} is not in SA-V's layout: {error}") from error
        self.names = [str(number) for number in range(len(self._frames))]

    @cached_property
    def first(self) -> Frame:
        """The masks of the first frame."""
        return self.read(self.names[0])

    def read(self, name: str) -> Frame:
        """The masks of a frame."""
        masks = {number: decode(mask) for number, mask in zip(self.objects, self._frames[int(name)], strict=True)}
        return Frame(self._size, {number: mask for number, mask in masks.items() if mask.any()})

    def place(self, name: str) -> str:
        """The file, and the frame."""
        return f"{self.path}, frame {name}"


Masklets = DavisMasklets | SavMasklets
"""The masks of one video, whatever the layout."""


def is_png(path: Path) -> bool:
    """Whether it is a PNG file by its name, and not a hidden one that a file manager left."""
    return path.suffix.lower() == ".png" and not path.name.startswith(".")


def open_masklets(path: Path) -> Masklets:
    """The masks of a video: a folder in DAVIS layout, or a JSON file in SA-V layout.

    Raises:
        UserError: the JSON file is not in that layout; the message says where.
    """
    return DavisMasklets(path) if path.is_dir() else SavMasklets(path)


def read_ids(path: Path) -> UInt8[np.ndarray, "height width"]:
    """Pixel values of a PNG mask: palette indices, or grey values as they are stored.

    Raises:
        UserError: missing, no PNG, truncated, a colour picture, or of 16 bits.
    """
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise UserError(f"the mask {path} cannot be read: {error.strerror or error}") from error
    if not encoded:
        raise UserError(f"the mask {path} is empty (zero bytes)")
    if not encoded.startswith(b"\x89PNG\r\n\x1a\n"):
        raise UserError(f"the mask {path} is not a PNG file, whatever its name says; save it as a palette PNG")
    try:
        # Of the header: bits a value, and what values are (0 grey, 2 RGB, 3 palette, 4 and 6 with transparency).
        bits, kind = encoded[24], encoded[25]
        with Image.open(io.BytesIO(encoded)) as image:
            values = np.asarray(image)
    except (OSError, SyntaxError, ValueError, IndexError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"the mask {path} is damaged or truncated: {error}") from error
    if kind not in (0, 3) or bits == 16:
        found = "grey of 16 bits" if kind == 0 else "grey with transparency" if kind == 4 else "in colour"
        raise UserError(
            f"the mask {path} is {found}, so its pixels are no object ids; save it as a palette PNG whose indices "
            "are the ids, or as 8-bit grey"
        )
    # Pillow spreads grey values of 2 and 4 bits over 0 to 255.
    spread = 255 // (2**bits - 1) if kind == 0 and bits in (2, 4) else 1
    return values.astype(np.uint8) // np.uint8(spread)


def decode(mask: run_lengths.RunLengths) -> Bool[np.ndarray, "height width"]:
    """A checked COCO mask as pixels."""
    lengths = np.diff(mask.ends, prepend=0)
    return np.repeat(np.arange(len(lengths)) % 2 == 1, lengths).reshape(mask.width, mask.height).T


def write_masklets(
    path: Path,
    video_id: str,
    ids: Sequence[int],
    frames: Iterable[Bool[np.ndarray, "objects height width"]],
    frames_per_s: float,
    video_frame_count: int | None = None,
) -> None:
    """Write tracked masks in SA-V's layout, with the figures of each masklet that follow from its masks.

    `frames` may be a generator: only run lengths stay in memory. Where not every frame of the video has masks
    (SA-V: every fourth), `video_frame_count` says how many it has. An object that is never in sight has area 0 and
    null as its first frame.

    Raises:
        UserError: the file cannot be written.
        ValueError: there is no frame, ids repeat, or a frame does not hold a mask of one size for each id.
    """
    if len(set(ids)) != len(ids):
        raise ValueError(f"object ids must differ, but are {list(ids)}")
    encoded, areas, size = [], [], None
    for masks in frames:
        size = size or masks.shape[1:]
        if masks.shape != (len(ids), *size):
            raise ValueError(f"frame {len(encoded)} has masks of {masks.shape}, but should of {(len(ids), *size)}")
        encoded.append([encode_mask(mask) for mask in masks])
        areas.append(masks.sum(axis=(1, 2)))
    if size is None:
        raise ValueError("there is no frame to write")
    height, width = size
    count = len(encoded) if video_frame_count is None else video_frame_count
    content = {
        "video_id": video_id,
        "video_duration": count / frames_per_s,
        "video_frame_count": count,
        "video_height": height,
        "video_width": width,
        "video_resolution": height * width,
        "masklet": encoded,
        "masklet_id": list(ids),
        **_figures(np.stack(areas), height * width),
    }
    try:
        path.write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def _figures(areas: Int[np.ndarray, "frames objects"], resolution: int) -> dict[str, Any]:
    """SA-V's figures of each masklet, from its area in each frame."""
    in_sight = areas > 0
    frames = in_sight.sum(axis=0)
    mean_area = areas.sum(axis=0) / np.maximum(frames, 1)
    first = [int(column.argmax()) if column.any() else None for column in in_sight.T]
    # A first appearance later than the first frame is no change.
    changes = (in_sight[1:] != in_sight[:-1]).sum(axis=0) - np.array([bool(number) for number in first], dtype=int)
    buckets = np.array(["small", "medium", "large"])[np.digitize(mean_area, [SMALL_BELOW_PX, MEDIUM_BELOW_PX])]
    return {
        "masklet_size_rel": (mean_area / resolution).tolist(),
        "masklet_size_abs": mean_area.tolist(),
        "masklet_size_bucket": buckets.tolist(),
        "masklet_visibility_changes": changes.tolist(),
        "masklet_first_appeared_frame": first,
        "masklet_frame_count": [len(areas)] * areas.shape[1],
        "masklet_type": ["auto"] * areas.shape[1],
        "masklet_num": areas.shape[1],
    }


def _check_masklets(entries: dict[str, Any]) -> tuple[list[int], list[list[run_lengths.RunLengths]]]:
    """Ids and checked masks of each frame; without ids, the objects are numbered from 0.

    Raises:
        ValueError: "masklet" or "masklet_id" is not what it should be.
    """
    frames = entries.get("masklet")
    if not isinstance(frames, list) or not frames or not all(isinstance(frame, list) for frame in frames):
        raise ValueError('"masklet" must be a list of frames, each a list of COCO RLE objects')
    ids = entries.get("masklet_id", list(range(len(frames[0]))))
    if not isinstance(ids, list) or not all(type(number) is int for number in ids) or len(set(ids)) != len(ids):
        raise ValueError('"masklet_id" must be a list of whole numbers, all different')
    checked = []
    for number, frame in enumerate(frames):
        if len(frame) != len(ids):
            raise ValueError(f"frame {number} holds {len(frame)} masks for {files.counted(len(ids), 'masklet id')}")
        checked.append([])
        for identity, mask in zip(ids, frame, strict=True):
            try:
                checked[-1].append(run_lengths.parse(mask))
            except ValueError as error:
                raise ValueError(f"frame {number}, masklet {identity}: {error}") from error
    return ids, checked


def _check_size(entries: dict[str, Any], frames: list[list[run_lengths.RunLengths]]) -> tuple[int, int]:
    """(height, width) of all masks; of a video without masklets, as the file gives them.

    Raises:
        ValueError: masks differ in size, or there is neither a mask nor a size.
    """
    sizes = {(mask.height, mask.width): number for number, frame in enumerate(frames) for mask in frame}
    if len(sizes) > 1:
        told = " and ".join(f"{height} x {width} (frame {number})" for (height, width), number in sizes.items())
        raise ValueError(f"masks differ in size (height x width): {told}")
    if sizes:
        return next(iter(sizes))
    sides = [entries.get(key) for key in ("video_height", "video_width")]
    if not all(isinstance(side, int | float) and side > 0 for side in sides):
        raise ValueError('there is neither a mask nor a "video_height" and "video_width"')
    return int(sides[0]), int(sides[1])  # pyright: ignore[reportArgumentType]
