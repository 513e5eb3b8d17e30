"""The device mesh: four named axes, of which any may have size 1.

- `data`: copies of the parameters, each with rows of its own;
- `fsdp`: rows of its own as well, and parameters, gradients and optimizer state in parts;
- `tensor`: heads and MLP columns in parts;
- `context`: tokens of a row in parts; frames and masks as well, together with the rows.

TPU slices, which the data-centre network (DCN) joins, are the outer part of `data`, of `fsdp`, or of both; `tensor` and
`context` stay on a slice's own links (ICI).

The axes are of type Auto: the compiler places what `rules.py` and the models' constraints leave open
(`jax.make_mesh` would make them Explicit, and refuses several slices).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from tracevision_jax.errors import UserError

AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")


@dataclass(frozen=True)
class DcnConfig:
    """How many TPU slices lie along an axis; they multiply to the number of slices."""

    data: int = -1
    """Slices along data, whose size is a multiple; -1: as many as go."""
    fsdp: int = -1
    """Slices along fsdp, whose size is a multiple; -1: those that data leaves."""


@dataclass(frozen=True)
class MeshConfig:
    """Number of devices along each axis; at most one is -1, which takes the devices that the others leave."""

    data: int = -1
    """Copies of the model."""
    fsdp: int = 1
    """Parts of parameters and optimizer state."""
    tensor: int = 1
    """Parts of heads and MLP columns."""
    context: int = 1
    """Parts of the tokens of a row."""
    dcn: DcnConfig = DcnConfig()
    """Which part of data and fsdp lies across TPU slices; the sizes above are totals."""

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
        raise UserError(
            f"A mesh of {asked} needs {'a multiple of ' if -1 in config.sizes else ''}{product} devices, and "
            f"there are {devices}. Sizes that divide {devices}: {', '.join(map(str, divisors(devices)))}."
        )
    return tuple(devices // product if size == -1 else size for size in config.sizes)


def make_mesh(config: MeshConfig | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange devices (all of them by default); raises UserError as `mesh_shape` and `across_slices`."""
    config = config or MeshConfig()
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(config, len(devices))
    across = across_slices(config, shape, len({slice_of(device) for device in devices}))
    return Mesh(arrange(devices, shape, across), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slice_of(device: Any) -> int:
    """Number of a TPU's slice; all other devices are of one, whatever they call a slice."""
    return (getattr(device, "slice_index", None) or 0) if device.platform == "tpu" else 0


def arrange(devices: Sequence[Any], shape: Sequence[int], across: Sequence[int]) -> np.ndarray:
    """Devices in the shape of a mesh, of which `across` lies across slices.

    TPUs follow the links of each slice, slices are the outer part of their axis. Others keep the order of their
    numbers, hosts one after the other, so that the last axes lie within a host.
    """
    if math.prod(across) == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    inside = [size // outer for size, outer in zip(shape, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def across_slices(config: MeshConfig, shape: Sequence[int], slices: int) -> tuple[int, int, int, int]:
    """How many of so many slices lie along each axis of a mesh of this shape.

    Raises:
        UserError: `config.dcn` does not multiply to the slices or does not divide its axes, or data and fsdp cannot
            take the slices at all; names the nearest that fits.
    """
    fitting = ways_across(shape, slices)
    asked = {axis: size for axis in BATCH_AXES if (size := getattr(config.dcn, axis)) != -1}
    sizes: dict[str, int] = dict(zip(AXES, shape, strict=True))
    number = f"{slices} slice{'s' * (slices > 1)}"
    if not fitting:
        nearest = nearest_mesh(sizes, math.prod(shape), lambda other: bool(ways_across(list(other.values()), slices)))
        raise UserError(
            f"{number} cannot be shared by data {shape[0]} and fsdp {shape[1]}; tensor and context stay inside a slice."
            f" The nearest mesh that fits: {as_flags(nearest) if nearest else 'none of so many devices'}."
        )
    if agreed := [way for way in fitting if all(way[axis] == size for axis, size in asked.items())]:
        return agreed[-1]["data"], agreed[-1]["fsdp"], 1, 1
    nearest = min(
        reversed(fitting), key=lambda way: sum(abs(math.log2(way[axis] / max(asked[axis], 1))) for axis in asked)
    )
    raise UserError(
        f"{as_flags(asked, 'mesh.dcn')} does not fit {number}, data {shape[0]} and fsdp {shape[1]}: the slices along "
        f"data and fsdp multiply to all slices, and each divides its axis. The nearest that fits: "
        f"{as_flags(nearest, 'mesh.dcn')}."
    )


def ways_across(shape: Sequence[int], slices: int) -> list[dict[str, int]]:
    """Every way to lay so many slices along data and fsdp, those with most along data last."""
    ways = [{"data": data, "fsdp": slices // data} for data in divisors(slices)]
    return [way for way in ways if shape[0] % way["data"] == shape[1] % way["fsdp"] == 0]


def meshes(devices: int, largest_tensor: int | None = None, largest_context: int = 1) -> Iterator[dict[str, int]]:
    """All meshes of so many devices; `context` and `tensor` up to a limit."""
    for context in divisors(devices):
        if context > largest_context:
            continue
        for tensor in divisors(devices // context):
            if largest_tensor is not None and tensor > largest_tensor:
                continue
            rest = devices // context // tensor
            for data in divisors(rest):
                yield dict(zip(AXES, (data, rest // data, tensor, context), strict=True))


def nearest_mesh(
    asked: Mapping[str, int], devices: int, fits: Callable[[Mapping[str, int]], bool]
) -> dict[str, int] | None:
    """The mesh that fits and whose sizes are the fewest doublings away from those asked for; None if none fits."""

    def distance(sizes: Mapping[str, int]) -> float:
        return sum(abs(math.log2(sizes[axis] / max(asked[axis], 1))) for axis in AXES)

    candidates = sorted(meshes(devices, largest_context=max(asked["context"], 1)), key=distance)
    return next((sizes for sizes in candidates if fits(sizes)), None)


def divisors(number: int) -> list[int]:
    """The smallest first."""
    return [size for size in range(1, number + 1) if number % size == 0]


def as_flags(sizes: Mapping[str, int], prefix: str = "mesh") -> str:
    """Sizes of axes as flags of the command."""
    return " ".join(f"--{prefix}.{axis} {size}" for axis, size in sizes.items())


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
