"""Accelerators that are not here: their names, published peaks, and devices to compile for without them.

A name is KIND:SHAPE. For TPU the shape counts chips along the links of the slice (`v5p:8x8x4`, `v5e:16x16`), for GPU
it is hosts x GPUs of a host (`h100:2x8`). `topology("v5p:8x8x4")` reads a name; `open_devices` asks libtpu (TPU) or
jax's CUDA plugin (GPU) for the devices, which need not exist: nothing runs on them, programs are compiled for them.

Peaks are those of Google Cloud's pages on TPU v4, v5e, v5p and v6e, and of NVIDIA's data sheets of A100 and H100
(SXM, dense). A chip's interconnect is published as the sum over its links of both directions; one direction of one link
stands here.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from tracevision_jax.errors import UserError
from tracevision_jax.nearest import suggest
from tracevision_jax.parallel.collectives import BETWEEN_SLICES
from tracevision_jax.parallel.mesh import AXES, slice_of

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do at best; bandwidths in bytes/s."""

    name: str
    platform: Literal["tpu", "cuda"]
    flops: float
    """bfloat16 products, FLOP/s."""
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    """One direction of one link (TPU), or all of a GPU's NVLinks in one direction."""
    network_bandwidth: float
    """A chip's share of its host's network, one direction: between slices (TPU) or hosts (GPU)."""
    dimensions: int
    """Of the torus that the links form; 1 for a switch."""
    wraps: int = 0
    """A dimension of the torus closes to a ring when its size is a multiple of this."""
    options: tuple[tuple[str, str], ...] = ()
    """What jax must be told besides the name."""
    target: str = ""
    """Description of a GPU for XLA (GpuTargetConfigProto as text)."""

    @property
    def compiler_options(self) -> Mapping[str, bool]:
        """What XLA must be told to compile without the chip: Triton's products are tuned by running them."""
        return {"xla_gpu_enable_triton_gemm": False} if self.platform == "cuda" else {}


def _gpu_target(name: str, major: int, cores: int, fpus: int, shared: int, l2_mib: int, ghz: float, chip: str) -> str:
    """The device description that XLA's GPU compiler reads, from the numbers of a data sheet."""
    bandwidth, memory = chip.split()
    limits = "threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048"
    grid = "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535"
    block = "thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64"
    registers = "registers_per_core_limit: 65536 registers_per_block_limit: 65536"
    memories = (
        f"shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: "
        f"{shared - 1024} memory_bandwidth: {bandwidth} l2_cache_size: {l2_mib << 20} device_memory_size: {memory}"
    )
    units = (
        f"core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {ghz} cuda_compute_capability {{ major: {major} }}"
    )
    version = "dnn_version_info { major: 9 minor: 8 patch: 0 }"
    return (
        f"gpu_device_info {{ {limits} {grid} {block} {registers} {memories} {units} }} "
        f'platform_name: "CUDA" {version} device_description_str: "{name}"'
    )


CHIPS: dict[str, Chip] = {
    "v4": Chip("v4", "tpu", 275e12, 32 * GIB, 1.228e12, 50e9, 6.25e9, 3, 4, (("chip_config_name", "megacore"),)),
    "v5e": Chip("v5e", "tpu", 197e12, 16 * GIB, 0.819e12, 50e9, 3.125e9, 2, 16),
    "v5p": Chip("v5p", "tpu", 459e12, 95 * GIB, 2.765e12, 100e9, 6.25e9, 3, 4),
    "v6e": Chip("v6e", "tpu", 918e12, 32 * GIB, 1.64e12, 100e9, 12.5e9, 2, 16),
    "a100": Chip(
        "a100", "cuda", 312e12, 80 * GIB, 2.039e12, 300e9, 25e9, 1,
        target=_gpu_target("NVIDIA A100-SXM4-80GB", 8, 108, 64, 167936, 40, 1.41, "2039040000000 85100068864"),
    ),
    "h100": Chip(
        "h100", "cuda", 989e12, 80 * GIB, 3.35e12, 450e9, 50e9, 1,
        target=_gpu_target("NVIDIA H100 80GB HBM3", 9, 132, 128, 233472, 50, 1.98, "3352320000000 84942979072"),
    ),
}  # fmt: skip
"""v4 without "megacore" shows two devices a chip. A100 is the one with 80 GB. Networks of GPU hosts: an adapter of
200 (A100) or 400 (H100) Gbit/s a GPU, as in NVIDIA's reference designs."""

POD_LIMITS = {"v4": 4096, "v5e": 256, "v5p": 6144, "v6e": 256}
"""Chips of the largest slice."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """A name that was read."""

    chip: Chip
    shape: tuple[int, ...]
    """Chips along each dimension (TPU), or (hosts, GPUs of a host)."""
    slices: int = 1

    @property
    def name(self) -> str:
        """As it was given."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """Chips of all slices."""
        return self.slices * math.prod(self.shape)

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} slices of {self.name}"


def topology(name: str, slices: int = 1) -> Topology:
    """Read a name.

    Raises:
        UserError: unknown kind or impossible shape; names the nearest that is possible.
    """
    kind, _, shape = name.partition(":")
    if kind not in CHIPS:
        meant = suggest(kind, CHIPS) or suggest(name, [f"{chip}:{shape or '2x2'}" for chip in CHIPS])
        raise UserError(
            f"There is no topology '{name}'.{meant} Known are {', '.join(CHIPS)}, followed by a shape: v5p:8x8x4, "
            f"v5e:16x16, h100:2x8 (hosts x GPUs)."
        )
    chip = CHIPS[kind]
    wanted = 2 if chip.platform == "cuda" else chip.dimensions
    if not re.fullmatch(r"\d+(x\d+)*", shape) or (sizes := [int(size) for size in shape.split("x")]).count(0):
        example = "8x8x4" if wanted == 3 else "16x16" if chip.platform == "tpu" else "2x8"
        raise UserError(f"Topology '{name}' has no shape: write sizes joined by x, as in {kind}:{example}.")
    if len(sizes) != wanted:
        fits = _with_dimensions(math.prod(sizes), wanted)
        raise UserError(
            f"Topology '{name}' has {len(sizes)} dimensions, {kind} has {wanted}. "
            f"The nearest with as many chips: {kind}:{'x'.join(map(str, fits))}."
        )
    if math.prod(sizes) > POD_LIMITS.get(kind, 2**31):
        raise UserError(
            f"Topology '{name}' has {math.prod(sizes)} chips; the largest slice of {kind} has {POD_LIMITS[kind]}. Take "
            f"several slices (--slices)."
        )
    if slices < 1 or (slices > 1 and chip.platform != "tpu"):
        raise UserError(f"--slices is {slices}: TPU has 1 slice or more; more GPU hosts are a larger first number.")
    return Topology(chip, tuple(sizes), slices)


def _with_dimensions(chips: int, count: int) -> tuple[int, ...]:
    """The most even shape of so many chips, largest size first."""
    if count == 1:
        return (chips,)
    side = min((s for s in range(1, chips + 1) if chips % s == 0), key=lambda s: abs(math.log(s**count / chips)))
    return tuple(sorted((side, *_with_dimensions(chips // side, count - 1)), reverse=True))


def prepare_environment() -> None:
    """Keep jax to the CPU for what runs; keep libtpu from asking for a TPU host's metadata and from locking others out.

    Call it before jax starts.
    """
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Of a host that is none; which one does not matter, but without one libtpu complains at length.
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")


def open_devices(wanted: Topology) -> list[Any]:
    """Devices of a topology, to compile for.

    Raises:
        UserError: what compiles for them is not installed, or does not know this shape.
    """
    from jax.experimental import topologies

    chip = wanted.chip
    options: dict[str, Any] = dict(chip.options)
    if chip.platform == "tpu":
        import importlib.util

        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                "Compiling for TPU needs libtpu, which is not installed (no TPU is needed): pip install 'jax[tpu]'."
            )
        name = wanted.name
        if wanted.slices > 1:
            options["num_slices"] = wanted.slices
    else:
        hosts, per_host = wanted.shape
        name, options = "", {"target_config": chip.target, "topology": f"1x{hosts}x{per_host}"}
    try:
        described = topologies.get_topology_desc(name, platform=chip.platform, **options)
    except Exception as error:
        text = str(error)
        if chip.platform == "cuda" and not _has_cuda():
            raise UserError(
                "Compiling for GPU needs jax's CUDA plugin, which is not installed (no GPU is needed): "
                "pip install 'jax[cuda12]'."
            ) from error
        raise UserError(f"{wanted} cannot be compiled for: {text.splitlines()[0]}") from error
    return list(described.devices)


def _has_cuda() -> bool:
    import importlib.util

    return any(importlib.util.find_spec(name) for name in ("jax_cuda12_plugin", "jax_cuda13_plugin"))


def axis_bandwidth(wanted: Topology, devices: np.ndarray, axes: Sequence[str]) -> float:
    """Bytes/s that each chip can send in a ring collective over mesh axes.

    On a torus that is a link's bandwidth for every dimension that the axes run along inside a slice, twice where it
    closes to a ring; XLA writes what goes between slices apart, each chip with its own share of the network. Across
    GPU hosts all bytes of a ring pass through the network once; as many rings as a group has chips there share them out
    (as NCCL's channels do), so the network's bandwidth counts once for each of these chips. Placement is read from the
    coordinates of the mesh's devices.
    """
    chip = wanted.chip
    if BETWEEN_SLICES in axes:
        return chip.network_bandwidth
    picked = tuple(slice(None) if name in axes else 0 for name in AXES)
    group = np.atleast_1d(devices[picked]).ravel()
    if chip.platform == "tpu":
        return _torus_bandwidth(wanted, group[_slices_of(group) == _slices_of(group)[0]])
    hosts = len({device.process_index for device in group})
    return chip.link_bandwidth if hosts == 1 else min(chip.link_bandwidth, group.size / hosts * chip.network_bandwidth)


def _slices_of(devices: np.ndarray) -> np.ndarray:
    """Each device's slice; 0 where there is only one."""
    return np.vectorize(slice_of, otypes=[int])(devices)


def inside_a_slice(devices: np.ndarray) -> dict[str, int]:
    """Sizes of a mesh's axes in one of its slices, from the mesh's devices; of all the mesh where there is one."""
    slices = _slices_of(devices)
    first = slices == slices.flat[0]
    others = [tuple(n for n in range(first.ndim) if n != axis) for axis in range(first.ndim)]
    return {name: int(first.any(axis=rest).sum()) for name, rest in zip(AXES, others, strict=True)}


def _torus_bandwidth(wanted: Topology, group: np.ndarray) -> float:
    chip = wanted.chip
    coordinates = np.array([device.coords for device in group])
    bandwidth = 0.0
    for dimension in range(coordinates.shape[1]):
        reached = len(set(coordinates[:, dimension].tolist()))
        if reached == 1:
            continue
        size = wanted.shape[dimension] if dimension < len(wanted.shape) else 1
        ring = chip.wraps and size % chip.wraps == 0 and reached == size
        bandwidth += chip.link_bandwidth * (2 if ring else 1)
    return bandwidth or chip.link_bandwidth
