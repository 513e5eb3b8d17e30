"""What has to be known of a kind of model to move its weights: its tables, and its configuration in both worlds.

A family gives functions; all that reads, checks and writes files is the same for every one (`hugging_face.py`,
`conversion.py`). `families.py` lists those there are.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracevision_jax.weights.arrays import Leaf
from tracevision_jax.weights.engine import Table
from tracevision_jax.weights.sources import TensorInfo

Config = Any
"""The host's configuration, a frozen dataclass."""
Leaves = Mapping[str, Leaf]
"""Parameters by path."""


@dataclass(frozen=True)
class Original:
    """The layout of the authors' own files: other names, no configuration."""

    recognise: Callable[[Iterable[str]], bool]
    """Whether tensors of these names are in this layout."""
    nearest: Callable[[Mapping[str, TensorInfo]], tuple[str, Config]]
    """Name and configuration of the released model with the most similar tensors."""
    table: Callable[[Config], Table]
    stem: Callable[[Config], str]
    """Name of the file, without its ending."""
    key: str | None
    """Under which the file keeps its tensors; None for a file that is nothing but a dictionary of tensors."""


@dataclass(frozen=True)
class Family:
    """What has to be known of a kind of model to move its weights."""

    name: str
    """`model_type` of its config.json."""
    table: Callable[[Config], Table]
    canonical_name: Callable[[str], str]
    """A tensor's name in any spelling -> the one in the table (the one on disk)."""
    for_export: Callable[[Leaves, Config], tuple[Leaves, Config]]
    """Parameters and configuration -> what `transformers` can hold of them."""
    read_config: Callable[[Mapping[str, Any], Mapping[str, Any]], Config]
    """(config.json, generation_config.json or {}) -> configuration."""
    write_config: Callable[[Config, np.dtype, Mapping[str, Any]], dict[str, Any]]
    """(configuration, dtype, the config.json to start from or {}) -> config.json."""
    other_files: Callable[[Config], Mapping[str, Mapping[str, Any]]]
    """{name: content} of JSON files that are written beside the weights where the source has none."""
    config_to_json: Callable[[Config], dict[str, Any]]
    """For our own checkpoints."""
    config_from_json: Callable[[Mapping[str, Any]], Config]
    with_dtype: Callable[[Config, str], Config]
    """The configuration of a model whose parameters have this dtype and that computes in it."""
    original: Original | None = None
    """How the authors' own files differ, if those are known."""
