"""Where tensors come from: one small interface over safetensors, PyTorch files and dictionaries.

A source lists its tensors without reading them and then reads one at a time. PyTorch is
imported only for its own files and tensors; those are unpickled with `weights_only=True`, which runs no code.
"""

import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from tracevision_jax.errors import UserError


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    place: str
    """The file that holds it, for messages."""

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(self.shape) * self.dtype.itemsize


@runtime_checkable
class TensorSource(Protocol):
    """Tensors by name, read one at a time."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """All tensors, in the order in which reading is fastest."""
        ...

    def read(self, name: str) -> np.ndarray:
        """A tensor, in memory that nobody else writes to."""
        ...


def numpy_from_torch(tensor: Any) -> np.ndarray:
    """A CPU view of a `torch.Tensor`, bfloat16 included (numpy knows it through ml_dtypes)."""
    import torch

    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def numpy_dtype_of_torch(tensor: Any) -> np.dtype:
    """The numpy dtype that `numpy_from_torch` gives."""
    name = str(tensor.dtype).removeprefix("torch.")
    return np.dtype(getattr(ml_dtypes, name, None) or name)


class DictSource:
    """A state dictionary in memory, of torch tensors or of arrays."""

    def __init__(self, state: Mapping[str, Any], place: str = "the state dictionary"):
        self._state = state
        self._tensors = {name: TensorInfo(tuple(value.shape), _dtype(value), place) for name, value in state.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """See `TensorSource`."""
        return self._tensors

    def read(self, name: str) -> np.ndarray:
        """See `TensorSource`; a copy, since jax may keep the memory that it is given."""
        value = self._state[name]
        return np.array(value if isinstance(value, np.ndarray) else numpy_from_torch(value))


def _dtype(value: Any) -> np.dtype:
    return value.dtype if isinstance(value, np.ndarray) else numpy_dtype_of_torch(value)


class RenamedSource:
    """A source whose tensors are called by other names.

    Raises:
        UserError: two tensors come to the same name.
    """

    def __init__(self, source: TensorSource, rename: Callable[[str], str]):
        self._source = source
        self._original: dict[str, str] = {}
        twice = []
        for name in source.tensors:
            if (new := rename(name)) in self._original:
                twice.append(f"{self._original[new]} and {name}")
            self._original[new] = name
        if twice:
            raise UserError("the checkpoint holds tensors twice, under two names: " + "; ".join(twice))
        self._tensors = {new: source.tensors[name] for new, name in self._original.items()}

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """See `TensorSource`."""
        return self._tensors

    def read(self, name: str) -> np.ndarray:
        """See `TensorSource`."""
        return self._source.read(self._original[name])


def torch_files(directory: Path) -> list[Path]:
    """PyTorch weight files of a directory: those of the index, else `pytorch_model.bin`, else all."""
    import json

    index = directory / "pytorch_model.bin.index.json"
    if index.is_file():
        names = json.loads(index.read_text()).get("weight_map", {}).values()
        return [directory / name for name in sorted(set(names))]
    if (directory / "pytorch_model.bin").is_file():
        return [directory / "pytorch_model.bin"]
    found = sorted(path for path in directory.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    return [path for path in found if path.name != "training_args.bin"]


def open_torch_files(paths: list[Path]) -> DictSource:
    """Open `.bin`, `.pt` or `.pth` files of tensors, mapped into memory, not read.

    Raises:
        UserError: torch is missing, or a file is damaged, holds anything but tensors, or repeats a name.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{paths[0].name} is a PyTorch file and torch is not installed: "
            "pip install 'tracevision-jax[torch]', or save the checkpoint as safetensors"
        ) from error
    state: dict[str, Any] = {}
    for path in paths:
        try:
            # Files from before torch 1.6 are no archives and cannot be mapped.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except FileNotFoundError as error:
            raise UserError(f"the index names {path.name}, which is not there: {path}") from error
        except pickle.UnpicklingError as error:
            raise UserError(_refused(path, str(error))) from error
        except Exception as error:  # torch raises whatever the damage leads to
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{path} is no file of tensors, or a damaged one: {reason}") from error
        for name, value in _tensors_within(loaded, path):
            if name in state:
                raise UserError(f"the tensor {name} stands in several files, one of them {path}")
            state[name] = value
    return DictSource(state, ", ".join(path.name for path in paths))


def _refused(path: Path, reason: str) -> str:
    """Why a pickle is not read; torch's own words would advise to read it all the same."""
    named = re.search(r"GLOBAL (\S+)", reason)
    fault = f"reading it would run code or build objects ({named[1]})" if named else "it is damaged, or would run code"
    return (
        f"{path} is refused: {fault}, and only tensors are ever read. If you trust the file, save its state dictionary "
        "alone, as safetensors or with torch.save"
    )


def _tensors_within(loaded: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """Tensors of a loaded file; a training checkpoint keeps them under "state_dict" or "model"."""
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise UserError(f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors")
    for name, value in loaded.items():
        if not hasattr(value, "detach"):
            raise UserError(f"{path}: '{name}' is a {type(value).__name__}, not a tensor")
        yield str(name), value
