"""What tracking writes, frame by frame, into a folder, so that it can be interrupted at any instant and go on.

    FOLDER/masks/NAME/00000.png     object numbers as palette indices, DAVIS's layout and colours
    FOLDER/frames.jsonl             a line a frame: box, scores and run lengths of each object
    FOLDER/state.npz                how far it is: the session (`tracker_state.py`) and the length of frames.jsonl

The state is replaced as a whole, after what it counts was written. Who goes on cuts `frames.jsonl` to the length that
the state says, and tracks from there; pictures of later frames are written again, the same.

    folder = TrackFolder(Path("out"), "clip", fingerprint)
    stage = folder.resume(session)                  # 0 at first
    folder.write(result, label); folder.save(session, stage)
"""

import hashlib
import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from tracevision_jax.errors import UserError
from tracevision_jax.inference import tracker_state
from tracevision_jax.inference.tracker import Session
from tracevision_jax.inference.tracker_results import TrackedFrame

MASKS, LINES, STATE = "masks", "frames.jsonl", "state.npz"


class TrackFolder:
    """The folder of one tracked video."""

    def __init__(self, folder: Path, name: str, fingerprint: str):
        """
        Args:
            folder: made if it is not there.
            name: of the video.
            fingerprint: of all that results depend on; see `fingerprint`.

        Raises:
            UserError: the folder cannot be made.
        """
        self.folder, self.masks = folder, folder / MASKS / name
        self.lines, self.state = folder / LINES, folder / STATE
        self._fingerprint = fingerprint
        try:
            self.masks.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"the folder {self.masks} cannot be made: {error.strerror or error}") from error

    def resume(self, session: Session) -> int:
        """Bring a session to where the folder is, and say in which stage that was (0 in an empty folder).

        Raises:
            UserError: the folder holds results of something else, or is damaged.
        """
        if not self.state.is_file():
            self.lines.write_bytes(b"")
            return 0
        note = tracker_state.read_note(self.state)
        if note.get("fingerprint") != self._fingerprint:
            raise UserError(
                f"{self.folder} holds results of another video, model, prompt or setting; give another folder, or "
                f"delete it"
            )
        size = self.lines.stat().st_size if self.lines.is_file() else 0
        if size < note["bytes"]:
            raise UserError(f"{self.lines} has lost lines since it was written; delete {self.folder} and begin anew")
        os.truncate(self.lines, note["bytes"])
        session.restore(self.state)
        return note["stage"]

    def write(self, result: TrackedFrame, label: str) -> None:
        """Write a frame's masks and its line."""
        write_ids(self.masks / f"{label}.png", result.ids)
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_line(result)) + "\n")

    def save(self, session: Session, stage: int) -> None:
        """Make what was written until now count."""
        note = {"fingerprint": self._fingerprint, "bytes": self.lines.stat().st_size, "stage": stage}
        session.save(self.state, note)

    def results(self) -> Iterator[dict[str, Any]]:
        """All lines, in the order of frames; those of a frame tracked twice as it was last."""
        places: dict[int, int] = {}
        with self.lines.open("rb") as file:
            place = 0
            for line in file:
                places[json.loads(line)["frame"]] = place
                place += len(line)
            for _, place in sorted(places.items()):
                file.seek(place)
                yield json.loads(file.readline())


def _line(result: TrackedFrame) -> dict[str, Any]:
    boxes, scores, ious, lengths = result.boxes, result.scores, result.ious, result.run_lengths
    return {
        "frame": result.frame,
        "objects": {
            str(number): {"box": boxes[number], "score": scores[number], "iou": ious[number], "mask": lengths[number]}
            for number in sorted(result.found)
        },
    }


@cache
def palette() -> tuple[int, ...]:
    """DAVIS's colours, which are those of PASCAL VOC: bits 0, 1, 2 of a number, then 3, 4, 5, ... are the highest bits
    of red, green, blue, then their next, ..."""
    colours = []
    for number in range(256):
        for channel in range(3):
            bits = (number >> channel) & 1, (number >> (3 + channel)) & 1, (number >> (6 + channel)) & 1
            colours.append(bits[0] << 7 | bits[1] << 6 | bits[2] << 5)
    return tuple(colours)


def write_ids(path: Path, ids: UInt8[np.ndarray, "height width"]) -> None:
    """Write object numbers as a palette PNG.

    Raises:
        UserError: the file cannot be written.
    """
    picture = Image.fromarray(ids, mode="P")
    picture.putpalette(palette())
    try:
        picture.save(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def fingerprint(content: Any, *paths: Path) -> str:
    """What changes whenever JSON values, or files (of folders all), do: told by names, sizes and times of change."""
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    for path in paths:
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                state = file.stat()
                digest.update(f"{file.relative_to(path)} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:32]
