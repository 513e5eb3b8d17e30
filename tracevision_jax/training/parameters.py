"""Parameter trees by path: flattening, and the split into trained and frozen parts.

A path joins the keys of the nested dictionaries with "/" ("host/language/embed/embedding"); stages,
learning-rate multipliers and sharding rules all speak in paths.
"""

from collections.abc import Callable, Container, Mapping
from typing import Any

import jax
from flax import traverse_util

from tracevision_jax.errors import UserError

Params = Any


def flatten(params: Params) -> dict[str, Any]:
    """Nested dictionaries -> {path: leaf}."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> Params:
    """{path: leaf} -> nested dictionaries; the inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def split(params: Params, trainable: Callable[[str], bool]) -> tuple[Params, Params]:
    """Part a tree into (trained, frozen) trees; `merge` puts them together again."""
    leaves = flatten(params)
    trained = {path: leaf for path, leaf in leaves.items() if trainable(path)}
    frozen = {path: leaf for path, leaf in leaves.items() if path not in trained}
    return unflatten(trained), unflatten(frozen)


def split_for_stage(params: Params, trainable: Callable[[str], bool], stage: str) -> tuple[Params, Params]:
    """As `split`; a stage that trains nothing raises UserError."""
    trained, frozen = split(params, trainable)
    if not trained:
        raise UserError(f"Stage '{stage}' trains no parameter of this system: check the recipe's stage.")
    return trained, frozen


def merge(trained: Params, frozen: Params) -> Params:
    """Join the two parts of `split`."""
    return unflatten({**flatten(trained), **flatten(frozen)})


def owner_of(path: tuple[Any, ...], parameters: Container[str]) -> str | None:
    """The parameter that a leaf of an optimizer's state is about: the one whose path ends the leaf's own, or None.

    Args:
        path: where the leaf is, as `jax.tree_util.tree_map_with_path` says it.
        parameters: paths of the parameters.
    """
    keys = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
    ends = ("/".join(keys[first:]) for first in range(len(keys)))
    return next((end for end in ends if end in parameters), None)


def count(params: Params) -> int:
    """Number of scalars in a tree of arrays or of shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
