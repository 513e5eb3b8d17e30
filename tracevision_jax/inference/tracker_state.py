"""What a session knows of its objects as one small file, so that tracking can go on in another process.

An `.npz` of arrays: the memory bank, results of prompts and of the frames tracked last, what was said; and of JSON:
rows of objects, and where tracking goes on. Its size depends on the number of objects and prompts, not on the length of
the video. It appears whole or not at all: a crash while it is written leaves the one before.
"""

import io
import json
import os
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from tracevision_jax.errors import UserError
from tracevision_jax.hosts.sam2_video import new_bank
from tracevision_jax.inference.tracker_prompts import Prompt
from tracevision_jax.inference.tracker_results import Found

if TYPE_CHECKING:
    from tracevision_jax.inference.tracker_session import SessionSteps

BANK = ("memories", "memory_times", "memory_valid", "pointers", "pointer_times", "pointer_valid")
FORMAT = 1


def save(path: str | Path, session: "SessionSteps", note: Any = None) -> None:
    """Write a session whose prompts were all given to the model; errors as `tracker.Session.save`.

    `note` is JSON values that `read_note` gives back.
    """
    if session.waiting:
        raise UserError(f"frame {min(session.waiting)} has a prompt and has not come yet; save after it")
    memory = session.memory
    arrays: dict[str, np.ndarray] = {}
    head: dict[str, Any] = {
        "format": FORMAT,
        "note": note,
        "config": repr(session.config),
        "rows": list(memory.rows.items()),
        "conditioning": sorted(memory.conditioning),
        "place": memory.place,
        "said": [],
        "stored": _put_found(arrays, "stored", memory.stored),
        "recent": _put_found(arrays, "recent", memory.recent),
    }
    if memory.bank is not None:
        kinds: dict[str, Any] = {"conditioning": memory.bank.conditioning}
        head["bank"] = kinds
        for name in BANK:
            values = np.asarray(getattr(memory.bank, name))
            kinds[name] = str(values.dtype)
            # numpy's files know no bfloat16; its bits do not care.
            arrays[f"bank.{name}"] = values.view(np.uint16) if values.dtype.itemsize == 2 else values
    for number, (key, prompt) in enumerate(memory.said.items()):
        fields = {"points": prompt.points_px, "labels": prompt.labels, "box": prompt.box_px, "mask": prompt.mask_binary}
        arrays.update({f"said.{number}.{name}": value for name, value in fields.items() if value is not None})
        head["said"].append(key)
    arrays["head"] = np.frombuffer(json.dumps(head).encode(), np.uint8)
    _write_whole(Path(path), arrays)


def restore(path: str | Path, session: "SessionSteps") -> None:
    """Fill a session; errors as `tracker.Session.restore`."""
    if not session.source.again:
        raise UserError(f"{session.source.name} cannot go on where another one was: its frames come once")
    arrays, head = _read(path)
    if head.get("format") != FORMAT or head["config"] != repr(session.config):
        raise UserError(f"the saved session {path} is of another model, or of another version of this program")
    from tracevision_jax.inference.tracker_session import Place

    memory = session.forget_all()
    memory.rows.update({number: row for number, row in head["rows"]})
    memory.conditioning.update((frame, number) for frame, number in head["conditioning"])
    for name, kept in (("stored", memory.stored), ("recent", memory.recent)):
        for place, (frame, number) in enumerate(head[name]):
            logits, (iou, object_logit) = arrays[f"{name}.logits"][place], arrays[f"{name}.scores"][place]
            kept.setdefault(frame, {})[number] = Found(logits, float(iou), float(object_logit))
    for number, (frame, one) in enumerate(head["said"]):
        said = {name: arrays.get(f"said.{number}.{name}") for name in ("points", "labels", "box", "mask")}
        memory.said[frame, one] = Prompt(said["points"], said["labels"], said["box"], said["mask"])  # pyright: ignore
    if head["place"] is not None:
        memory.place = Place(*head["place"])
    if "bank" in head:
        kinds = head["bank"]
        values = {name: arrays[f"bank.{name}"].view(jnp.dtype(kinds[name])) for name in BANK}
        slots, pointer_slots = values["memory_times"].shape[1], values["pointer_times"].shape[1]
        kept = kinds["conditioning"]
        options = {"recent": slots - kept, "recent_pointers": pointer_slots - kept}
        empty = new_bank(session.config, len(values["memory_times"]), conditioning=kept, **options)
        memory.bank = empty.replace(**{name: jnp.asarray(value) for name, value in values.items()})  # pyright: ignore


def read_note(path: str | Path) -> Any:
    """What was saved beside a session; errors as `tracker.Session.restore`."""
    return _read(path)[1]["note"]


def _read(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    try:
        with Path(path).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = dict(file)
        return arrays, json.loads(arrays["head"].tobytes())
    except OSError as error:
        raise UserError(f"the saved session {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"the saved session {path} is damaged: {error}") from error


def _put_found(arrays: dict[str, np.ndarray], name: str, kept: Any) -> list[tuple[int, int]]:
    """Put results into arrays; gives (frame, object) of each."""
    every = [(frame, number, found) for frame, results in kept.items() for number, found in results.items()]
    if every:
        arrays[f"{name}.logits"] = np.stack([found.logits for *_, found in every])
        arrays[f"{name}.scores"] = np.array([found[1:] for *_, found in every], np.float64)
    return [(frame, number) for frame, number, _ in every]


def _write_whole(path: Path, arrays: dict[str, np.ndarray]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    try:
        with partial.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
