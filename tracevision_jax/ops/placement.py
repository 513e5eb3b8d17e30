"""Where attention will run: the mesh, and which of its axes split the rows, the tokens and the heads of a call.

A caller says what its rows are (`Cut`), since that decides what the axis `context` is good for. "tokens": rows of the
batch, whose queries are cut over it, while keys and values, whose heads are few, are gathered, so that each shard
computes what its own queries see. "sets": frames, windows or masks of all rows, which never see each other, so that the
axis holds some of them. "rows": anything else, which is computed alike along it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from jax.sharding import AbstractMesh, Mesh, PartitionSpec

Cut = Literal["rows", "tokens", "sets"]


def dividing(mesh: Mesh | AbstractMesh, axes: Sequence[str], size: int, used: Sequence[str] = ()) -> tuple[str, ...]:
    """Those of the mesh axes, in order, that cut an array's axis into equal slices; `used` ones are passed over."""
    taken = []
    for axis in axes:
        if axis not in used and size % mesh.shape[axis] == 0:
            taken.append(axis)
            size //= mesh.shape[axis]
    return tuple(taken)


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a call will run: the mesh (None for one device) and its axes that split rows, heads and queries."""

    mesh: Mesh | AbstractMesh | None
    batch_axes: tuple[str, ...]
    head_axes: tuple[str, ...]
    platform: str
    token_axes: tuple[str, ...] = ()
    """Of queries."""
    set_axes: tuple[str, ...] = ()
    """Of rows that are sets."""

    def shards(self, axes: tuple[str, ...]) -> int:
        """Number of parts into which the given mesh axes split an array axis."""
        count = 1
        for axis in axes:
            count *= self.mesh.shape[axis] if self.mesh is not None else 1
        return count

    @property
    def token_shards(self) -> int:
        """Number of parts into which queries are cut."""
        return self.shards(self.token_axes)

    def of(self, cut: Cut, rows: int) -> "Placement":
        """The placement of a call with so many rows of a kind."""
        if cut == "tokens" or self.mesh is None:
            return self
        if cut == "rows":
            return dataclasses.replace(self, token_axes=())
        return dataclasses.replace(self, batch_axes=dividing(self.mesh, self.set_axes, rows), token_axes=())

    def specs(self) -> tuple[PartitionSpec, PartitionSpec]:
        """Layouts of (batch, queries, heads, head_dim) and of (batch, keys, kv_heads, head_dim)."""
        rows, heads = self.batch_axes or None, self.head_axes or None
        return PartitionSpec(rows, self.token_axes or None, heads, None), PartitionSpec(rows, None, heads, None)
