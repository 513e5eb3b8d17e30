"""Safetensors files: read tensor by tensor, written as a stream, checked before use.

The format (github.com/huggingface/safetensors, "Format"): 8 bytes with the header's length, the header in
JSON with each tensor's dtype, shape, first and last byte, then the bytes of all tensors without gaps. Reading
and writing are done here, not by the library, since it can neither read rows without mapping the file nor
write a file that does not fit into memory.
"""

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tracevision_jax.errors import UserError
from tracevision_jax.weights.copying import contiguous
from tracevision_jax.weights.sources import TensorInfo

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LFS_POINTER = b"version https://git-lfs"
MAX_HEADER_BYTES = 100_000_000
"""The library's own limit."""

Progress = Callable[[str, int], None]
"""Told the name of each tensor (or part of one) when it is done, and its bytes."""


class SafetensorsSource:
    """The tensors of some safetensors files, see `sources.TensorSource`; headers are checked at once."""

    def __init__(self, paths: Sequence[Path]):
        """
        Raises:
            UserError: with everything that is wrong with any of the files.
        """
        self._places: dict[str, tuple[Path, int]] = {}
        self._tensors: dict[str, TensorInfo] = {}
        problems: list[str] = []
        for path in paths:
            try:
                infos, starts = _read_header(path)
            except _Damaged as error:
                problems.append(f"{path}: {error}")
                continue
            for name, info in infos.items():
                if name in self._tensors:
                    problems.append(f"{path}: the tensor {name} stands in {self._tensors[name].place}, too")
                self._tensors[name], self._places[name] = info, (path, starts[name])
        if problems:
            raise UserError("damaged or incomplete safetensors:\n" + "\n".join(f"  {line}" for line in problems))

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """File by file, in the order of the bytes."""
        return self._tensors

    def read(self, name: str) -> np.ndarray:
        """A whole tensor."""
        shape = self._tensors[name].shape
        return self.read_block(name, (0,) * len(shape), shape)

    def read_block(self, name: str, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        """The block of a tensor with its first corner at `start`; little more than its own bytes are read."""
        info, (path, offset) = self._tensors[name], self._places[name]
        # Contiguous are: leading axes of length 1, a stretch of the next axis, whole axes after it.
        cut = next((axis for axis, length in enumerate(shape) if length != 1), max(len(shape) - 1, 0))
        strides = [math.prod(info.shape[axis + 1 :]) * info.dtype.itemsize for axis in range(len(shape))]
        offset += sum(begin * stride for begin, stride in zip(start[: cut + 1], strides, strict=False))
        array = np.empty((*shape[: cut + 1], *info.shape[cut + 1 :]), info.dtype)
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            _read_into(file, array)
        inner = [slice(begin, begin + length) for begin, length in zip(start, shape, strict=True)]
        return array[(*[slice(None)] * min(cut + 1, len(shape)), *inner[cut + 1 :], ...)]


def find_safetensors(directory: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory: those of its index, else all that lie there.

    Raises:
        UserError: the index is damaged, names files that are not there or tensors that are not in them.
    """
    indices = sorted(directory.glob("*.safetensors.index.json"))
    if not indices:
        found = sorted(directory.glob("*.safetensors"))
        if len(found) > 1 and any("-of-" in path.name for path in found):
            raise UserError(
                f"{directory} holds a checkpoint in {len(found)} parts without its index "
                "(model.safetensors.index.json); copy that file as well"
            )
        return found
    try:
        weight_map = json.loads(indices[0].read_text())["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{indices[0]} is damaged: {error!r}") from error
    if absent := [name for name in names if not (directory / name).is_file()]:
        raise UserError(f"{indices[0]} names files that are not there: {', '.join(absent)}")
    return [directory / name for name in names]


def check_index(directory: Path, source: SafetensorsSource) -> None:
    """Compare the index of a directory, where there is one, with what its files hold.

    Raises:
        UserError: with every tensor that is not where the index says.
    """
    for index in directory.glob("*.safetensors.index.json"):
        weight_map: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        wrong = [
            f"{name} (in {file})"
            for name, file in sorted(weight_map.items())
            if name not in source.tensors or source.tensors[name].place != file
        ]
        if wrong:
            raise UserError(f"{index} names tensors that are not in their files:\n  " + "\n  ".join(wrong))


class _Damaged(Exception):
    """What is wrong with one file."""


def _read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """Tensors of a file in the order of their bytes, and where each starts."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if prefix == LFS_POINTER[:8]:
                raise _Damaged("a Git LFS pointer instead of the file: fetch it with 'git lfs pull'")
            if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise _Damaged(f"no safetensors header, or a truncated one (the file has {size} bytes)")
            header = json.loads(file.read(length))
    except OSError as error:
        raise _Damaged(f"cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise _Damaged(f"its header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise _Damaged("its header is no JSON object")
    header.pop("__metadata__", None)
    infos: dict[str, TensorInfo] = {}
    spans: dict[str, tuple[int, int]] = {}
    for name, entry in header.items():
        infos[name], spans[name] = _parse_entry(name, entry, path)
    expected = 0
    for name in sorted(spans, key=lambda name: spans[name]):
        if spans[name][0] != expected:
            raise _Damaged(f"the bytes of {name} do not follow those before it")
        expected = spans[name][1]
    if 8 + length + expected != size:
        kind = "truncated" if size < 8 + length + expected else "too long"
        raise _Damaged(f"{kind}: it has {size} bytes, its header describes {8 + length + expected}")
    order = sorted(infos, key=lambda name: spans[name])
    return {name: infos[name] for name in order}, {name: 8 + length + spans[name][0] for name in order}


def _parse_entry(name: str, entry: Any, path: Path) -> tuple[TensorInfo, tuple[int, int]]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(isinstance(value, int) and value >= 0 for value in (*shape, begin, end)):
            raise ValueError("sizes must be whole numbers from 0")
    except (TypeError, KeyError, ValueError) as error:
        raise _Damaged(f"the header's entry for {name} is damaged: {error!r}") from error
    if dtype not in DTYPES:
        raise _Damaged(f"{name} has the dtype {dtype}, which is not known here")
    info = TensorInfo(shape, DTYPES[dtype], path.name)
    if end - begin != math.prod(shape) * info.dtype.itemsize:
        raise _Damaged(f"{name} has {end - begin} bytes, its shape {list(shape)} asks for {info.bytes}")
    return info, (begin, end)


def _read_into(file: Any, array: np.ndarray) -> None:
    """Fill an array from a file, as many reads as the system needs."""
    view = array.reshape(-1).view(np.uint8).data
    while view:
        count = file.readinto(view)
        if not count:
            raise UserError(f"{file.name} ended too early: was it changed while it was read?")
        view = view[count:]


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to be written: its bytes come in pieces, in memory order, when they are asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[np.ndarray]]

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class WrittenFile:
    """A file that was written, with what is needed to find and check it again."""

    name: str
    bytes: int
    sha256: str
    tensors: tuple[str, ...]


def write_sharded(
    directory: Path,
    stem: str,
    plans: Sequence[TensorPlan],
    max_shard_bytes: int,
    progress: Progress | None = None,
) -> list[WrittenFile]:
    """Write tensors as `stem.safetensors`, or as several `stem-00001-of-0000N.safetensors`, no tensor split.

    One piece of one tensor is in memory at a time. Files are flushed to the disk before this returns.
    """
    shards: list[list[TensorPlan]] = [[]]
    for plan in plans:
        if shards[-1] and sum(other.bytes for other in shards[-1]) + plan.bytes > max_shard_bytes:
            shards.append([])
        shards[-1].append(plan)
    names = [f"{stem}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    names = [f"{stem}.safetensors"] if len(shards) == 1 else names
    return [_write_file(directory / name, shard, progress) for name, shard in zip(names, shards, strict=True)]


def _write_file(path: Path, plans: Sequence[TensorPlan], progress: Progress | None) -> WrittenFile:
    # Wide dtypes first, so that every tensor is aligned, as the library writes them.
    plans = sorted(plans, key=lambda plan: -plan.dtype.itemsize)
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for plan in plans:
        entries[plan.name] = {
            "dtype": DTYPE_NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [place, place + plan.bytes],
        }
        place += plan.bytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def write(data: Any) -> None:
            file.write(data)
            digest.update(data)

        write(struct.pack("<Q", len(header)) + header)
        for plan in plans:
            written = 0
            for piece in plan.pieces():
                if piece.dtype != plan.dtype:
                    raise ValueError(f"{plan.name}: a piece of {piece.dtype}, announced as {plan.dtype}")
                write(contiguous(piece).reshape(-1).view(np.uint8).data)
                written += piece.nbytes
                if progress:
                    progress(plan.name, piece.nbytes)
            if written != plan.bytes:
                raise ValueError(f"{plan.name}: {written} bytes came, {plan.bytes} were announced")
        file.flush()
        os.fsync(file.fileno())
    tensors = tuple(plan.name for plan in plans)
    return WrittenFile(path.name, 8 + len(header) + place, digest.hexdigest(), tensors)
