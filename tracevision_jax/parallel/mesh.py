"""The device mesh: four named axes, of which any may have size 1.

- `data`: copies of the parameters, each with rows of its own;
- `fsdp`: rows of its own as well, and parameters, gradients and optimizer state in slices;
- `tensor`: heads and MLP columns in slices;
- `context`: tokens of a row in slices; frames and masks as well, together with the rows.

The axes are of type Auto: the compiler places what `rules.py` and the models' constraints leave open
(`jax.make_mesh` would make them Explicit).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tracevision_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis; at most one is -1, which takes the devices that the others leave."""

    data: int = -1
    """Copies of the model."""
    fsdp: int = 1
    """Slices of parameters and optimizer state."""
    tensor: int = 1
    """Slices of heads and MLP columns."""
    context: int = 1
    """Slices of the tokens of a row."""

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """In the order of `AXES`."""
        return self.data, self.fsdp, self.tensor, self.context


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Sizes of the four axes on so many devices.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    asked = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, config.sizes, strict=True))
    if any(size == 0 or size < -1 for size in config.sizes) or config.sizes.count(-1) > 1:
        raise UserError(f"A mesh of {asked} cannot be: sizes are positive, and at most one is -1 (the rest).")
    product = math.prod(size for size in config.sizes if size != -1)
    if devices % product or (-1 not in config.sizes and product != devices):
        fits = [size for size in range(1, devices + 1) if devices % size == 0]
        raise UserError(
            f"A mesh of {asked} needs {'a multiple of ' if -1 in config.sizes else ''}{product} devices, and "
            f"there are {devices}. Sizes that divide {devices}: {', '.join(map(str, fits))}."
        )
    return tuple(devices // product if size == -1 else size for size in config.sizes)


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange devices (all of them by default); raises UserError as `mesh_shape`."""
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(config or MeshConfig(), len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the axes that hold rows of their own."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_rows(rows: int, accumulation: int, mesh: Mesh | AbstractMesh) -> None:
    """Check that every device gets the same number of rows of every microbatch; UserError otherwise."""
    holders = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if rows % (holders * accumulation):
        step = holders * accumulation
        nearest = max(step, round(rows / step) * step)
        raise UserError(
            f"{rows} rows a batch cannot be shared by {holders} devices (data x fsdp) in {accumulation} "
            f"microbatches: the rows must be a multiple of {step}, such as {nearest}."
        )
