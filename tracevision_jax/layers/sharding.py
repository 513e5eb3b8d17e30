"""Names for activations' axes, and `constrain`, which pins an activation's layout where a mesh is in force.

Model code says what an axis is (`constrain(x, "batch", "tokens", "width")`); `activation_sharding(mesh,
rules)` says over which mesh axes each name is split. Without that context `constrain` does nothing.
"""

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from tracevision_jax.ops.attention import attention_mesh
from tracevision_jax.ops.placement import dividing

AXIS_NAMES = (
    "batch",
    "tokens",
    "width",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "vocab",
    "sets",
    "copies",
    "sliced_width",
)
"""The logical axes that model code may name. "sets" are frames, windows or masks of all rows as one axis: they know
nothing of each other, so that any mesh axis may hold some."""

Rules = Mapping[str, str | tuple[str, ...] | None]

_active: ContextVar[tuple[Mesh, Rules] | None] = ContextVar("activation_sharding", default=None)


def _mesh_axes(rules: Rules, name: str | None) -> tuple[str, ...]:
    axes = rules.get(name) if name is not None else None
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


@contextlib.contextmanager
def activation_sharding(mesh: Mesh, rules: Rules, platform: str | None = None) -> Iterator[None]:
    """Lay out activations traced inside over `mesh`: `rules` maps logical axis names to mesh axes or None.

    Attention kernels learn the mesh, too. Raises ValueError for names that are no logical axis.
    """
    unknown = sorted(set(rules) - set(AXIS_NAMES))
    if unknown:
        raise ValueError(f"no logical axes: {', '.join(unknown)}; known are {', '.join(AXIS_NAMES)}")
    token = _active.set((mesh, rules))
    try:
        axes = {name: _mesh_axes(rules, name) for name in ("batch", "heads", "tokens", "sets")}
        with attention_mesh(mesh, axes["batch"], axes["heads"], platform, axes["tokens"], axes["sets"]):
            yield
    finally:
        _active.reset(token)


def may_merge(mesh: Mesh | AbstractMesh, rules: Rules) -> bool:
    """Whether no axis that follows an array's first is split over the mesh: neither tokens nor heads."""
    inner = ("tokens", "heads", "kv_heads", "mlp")
    return all(mesh.shape[axis] == 1 for name in inner for axis in _mesh_axes(rules, name))


def leading_axes_merge() -> bool:
    """Whether (batch, tokens) or (q k v, heads, channels) can become one axis without moving data between devices."""
    active = _active.get()
    return active is None or may_merge(*active)


def layout(
    shape: tuple[int, ...], names: tuple[str | None, ...], mesh: Mesh | AbstractMesh, rules: Rules
) -> PartitionSpec:
    """Return the layout of an array: a mesh axis is used once, and only where it divides the axis."""
    spec, used = [], []
    for size, name in zip(shape, names, strict=True):
        taken = dividing(mesh, _mesh_axes(rules, name), size, used)
        used += taken
        spec.append(taken or None)
    return PartitionSpec(*spec)


def constrain(x: Shaped[Array, "..."], *names: str | None) -> Shaped[Array, "..."]:
    """Pin the layout of `x`, one logical name (or None) an axis; unchanged when no context is active."""
    unknown = [name for name in names if name is not None and name not in AXIS_NAMES]
    if unknown or len(names) != x.ndim:
        raise ValueError(f"names {names} for an array of shape {x.shape}; known are {', '.join(AXIS_NAMES)}")
    active = _active.get()
    if active is None:
        return x
    mesh, rules = active
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, layout(x.shape, names, mesh, rules)))


def exchange_slices(x: Shaped[Array, "batch ... width"], *inner: str | None) -> Shaped[Array, "batch ... width"]:
    """Lay out rows that were looked up in a table whose width is cut; `inner` names the axes between.

    Each device reads its slice of every row, and slices are exchanged for rows. Left alone, the compiler may as well
    gather the table, which for a vocabulary is larger by orders of magnitude, and so is its gradient.
    """
    return constrain(constrain(x, "copies", *inner, "sliced_width"), "batch", *inner, "width")


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh over which arrays are laid out; None where they lie on one device."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    return next((each.mesh for each in shardings if isinstance(each, NamedSharding)), None)  # pyright: ignore


def gathered(tree: Any) -> Any:
    """Arrays on the host, whole on every process; all processes must ask for them at the same time."""

    def fetch(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return np.asarray(leaf)

    return jax.tree.map(fetch, tree)
