"""Names of topologies, meshes on them, and their bandwidths; what needs libtpu says so where it is not installed."""

import dataclasses
import importlib.util
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tracevision_jax.errors import UserError
from tracevision_jax.parallel.ahead_of_time import costs
from tracevision_jax.parallel.collectives import BETWEEN_SLICES, by_axes, collectives
from tracevision_jax.parallel.hlo import parse
from tracevision_jax.parallel.mesh import AXES, DcnConfig, MeshConfig, make_mesh
from tracevision_jax.parallel.topologies import (
    CHIPS,
    Topology,
    axis_bandwidth,
    inside_a_slice,
    open_devices,
    topology,
)

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'jax[tpu]'"
)


def grid(shape: tuple[int, ...], mesh: tuple[int, int, int, int], slices: int = 1) -> np.ndarray:
    """Pretended chips of a mesh, in the order of their coordinates."""
    places = [(part, *place) for part in range(slices) for place in np.ndindex(*shape)]
    chips = np.empty(len(places), object)
    chips[:] = [SimpleNamespace(platform="tpu", coords=list(place), slice_index=part) for part, *place in places]
    return chips.reshape(mesh)


def test_a_name_is_read():
    found = topology("v5p:8x8x4")
    assert (found.chip.name, found.shape, found.devices, str(found)) == ("v5p", (8, 8, 4), 256, "v5p:8x8x4")
    assert topology("v5e:16x16", slices=2).devices == 512
    assert topology("h100:2x8").devices == 16


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5q:8x8x4", "Did you mean 'v5p'?"),
        ("h10:2x8", "Did you mean 'h100'?"),
        ("tpu", "Known are v4, v5e, v5p, v6e, a100, h100"),
        ("v5p", "has no shape"),
        ("v5p:8x8xfour", "has no shape"),
        ("v5p:16x16", "has 2 dimensions, v5p has 3. The nearest with as many chips: v5p:8x8x4"),
        ("v5e:8x8x4", "The nearest with as many chips: v5e:16x16"),
        ("v6e:32x32", "the largest slice of v6e has 256"),
    ],
)
def test_a_name_that_cannot_be_is_answered_with_what_can(name, message):
    with pytest.raises(UserError) as found:
        topology(name)
    assert message in str(found.value)


def test_slices_are_of_tpu():
    with pytest.raises(UserError, match="--slices is 2"):
        topology("h100:2x8", slices=2)


def test_peaks_are_those_that_are_published():
    """FLOP/s in bfloat16, GiB of HBM, GB/s of HBM, GB/s of one direction of a link: Google's and NVIDIA's tables."""
    told = {
        "v4": (275e12, 32, 1228, 50),
        "v5e": (197e12, 16, 819, 50),
        "v5p": (459e12, 95, 2765, 100),
        "v6e": (918e12, 32, 1640, 100),
        "a100": (312e12, 80, 2039, 300),
        "h100": (989e12, 80, 3350, 450),
    }
    found = {
        name: (chip.flops, chip.hbm_bytes / 2**30, chip.hbm_bandwidth / 1e9, chip.link_bandwidth / 1e9)
        for name, chip in CHIPS.items()
    }
    assert found == told


def test_the_bandwidth_of_an_axis_is_that_of_the_links_it_runs_along():
    v5p, v5e = topology("v5p:4x4x4"), topology("v5e:4x4")
    whole = grid((4, 4, 4), (1, 64, 1, 1))
    assert axis_bandwidth(v5p, whole, ("fsdp",)) == 3 * 2 * 100e9  # three rings, both ways
    parted = grid((4, 4, 4), (1, 16, 4, 1))
    assert axis_bandwidth(v5p, parted, ("tensor",)) == 2 * 100e9
    assert axis_bandwidth(v5p, parted, ("fsdp",)) == 4 * 100e9
    assert axis_bandwidth(v5p, parted, ("fsdp", "tensor")) == 6 * 100e9
    half = grid((4, 4, 4), (1, 32, 2, 1))
    assert axis_bandwidth(v5p, half, ("tensor",)) == 100e9  # two neighbours of a ring of four
    assert axis_bandwidth(v5e, grid((4, 4), (1, 16, 1, 1)), ("fsdp",)) == 2 * 50e9  # too small to close


def test_the_network_bounds_what_crosses_slices_or_hosts():
    two = grid((2, 2, 1), (2, 4, 1, 1), slices=2)
    wanted = dataclasses.replace(topology("v5p:2x2x1"), slices=2)
    assert axis_bandwidth(wanted, two, ("slices",)) == CHIPS["v5p"].network_bandwidth
    assert axis_bandwidth(wanted, two, ("fsdp",)) == 2 * 100e9
    four = grid((2, 2, 1), (4, 2, 1, 1), slices=2)
    assert axis_bandwidth(wanted, four, ("data",)) == 100e9  # what is written along an axis stays in the slice
    gpus = grid((2, 2), (1, 2, 2, 1))
    for chip in gpus.ravel():
        chip.process_index = chip.coords[0]
    assert axis_bandwidth(topology("h100:2x2"), gpus, ("tensor",)) == 450e9
    assert axis_bandwidth(topology("h100:2x2"), gpus, ("fsdp",)) == 50e9


@pytest.mark.parametrize(
    ("sizes", "slices", "inside"),
    [((4, 2, 1, 1), 2, (2, 2, 1, 1)), ((1, 4, 2, 1), 2, (1, 2, 2, 1)), ((2, 2, 1, 1), 1, (2, 2, 1, 1))],
)
def test_the_part_of_a_mesh_in_one_slice(sizes, slices, inside):
    assert inside_a_slice(grid((2, 2, 1), sizes, slices)) == dict(zip(AXES, inside, strict=True))


def test_every_gpu_of_a_group_brings_its_share_of_the_network():
    gpus = grid((2, 8), (1, 16, 1, 1))
    for chip in gpus.ravel():
        chip.process_index = chip.coords[0]
    assert axis_bandwidth(topology("a100:2x8"), gpus, ("fsdp",)) == 8 * 25e9
    fast = dataclasses.replace(CHIPS["a100"], network_bandwidth=100e9)
    assert axis_bandwidth(Topology(fast, (2, 8)), gpus, ("fsdp",)) == 300e9  # NVLink bounds it then


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_it_says_what_to_install():
    with pytest.raises(UserError, match=r"libtpu, which is not installed.*pip install 'jax\[tpu\]'"):
        open_devices(topology("v5e:2x2"))


@pytest.mark.skipif(
    any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)), reason="the plugin is installed"
)
def test_without_the_cuda_plugin_it_says_what_to_install():
    with pytest.raises(UserError, match=r"pip install 'jax\[cuda12\]'"):
        open_devices(topology("a100:2x8"))


@needs_libtpu
@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_there_is_one_device_a_chip(name):
    wanted = topology(name)
    devices = open_devices(wanted)
    assert len(devices) == wanted.devices == 4
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=2), devices)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 2, "context": 1}


@needs_libtpu
def test_slices_are_parted_by_data_or_else_by_fsdp():
    wanted = topology("v5e:2x2", slices=2)
    devices = open_devices(wanted)
    for config, inside in ((MeshConfig(data=2, fsdp=4), ("fsdp",)), (MeshConfig(data=1, fsdp=8), ("tensor",))):
        mesh = make_mesh(config, devices)
        assert axis_bandwidth(wanted, mesh.devices, ("data", "fsdp")) == 2 * 50e9
        assert axis_bandwidth(wanted, mesh.devices, inside) == (2 * 50e9 if inside == ("fsdp",) else 50e9)
        assert tuple(inside_a_slice(mesh.devices).values()) == (1, 4, 1, 1)
    with pytest.raises(UserError, match="2 slices cannot be shared by data 1 and fsdp 1"):
        make_mesh(MeshConfig(data=1, fsdp=1, tensor=8), devices)


@needs_libtpu
def test_declared_slices_lie_along_the_axis_that_was_named():
    wanted = topology("v5e:2x2", slices=2)
    devices = open_devices(wanted)
    for dcn, inside in ((DcnConfig(data=2), (1, 4, 1, 1)), (DcnConfig(fsdp=2), (2, 2, 1, 1))):
        mesh = make_mesh(MeshConfig(data=2, fsdp=4, dcn=dcn), devices)
        assert tuple(inside_a_slice(mesh.devices).values()) == inside


@needs_libtpu
def test_a_sum_over_slices_goes_through_the_network_once_for_each_chip():
    wanted = topology("v5e:2x2", slices=2)
    mesh = make_mesh(MeshConfig(data=4, fsdp=2), open_devices(wanted))
    given = jax.ShapeDtypeStruct((4, 256, 512), "float32", sharding=NamedSharding(mesh, PartitionSpec("data", "fsdp")))
    summed = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    compiled = jax.jit(lambda rows: rows.sum(0, keepdims=True), out_shardings=summed).lower(given).compile()
    uses = by_axes(collectives(parse(compiled.as_text() or ""), inside_a_slice(mesh.devices)))
    (between,) = uses[BETWEEN_SLICES,]
    # In the slice two chips sum 128 x 512 numbers; each hands its half to the network, half of two there and back.
    assert (between.kind, between.group, between.sent_bytes) == ("all-reduce", 2, 128 * 512 * 4 / 2)
    assert set(uses) == {("data",), (BETWEEN_SLICES,)}


@needs_libtpu
def test_a_product_that_is_spread_over_a_ring_is_counted_once():
    """XLA multiplies by a weight shard by shard as the shards come round, two of them a turn of the loop."""
    rows, width, wide = 8192, 3584, 18944
    mesh = make_mesh(MeshConfig(data=1, fsdp=8), open_devices(topology("v5e:2x4")))
    x = jax.ShapeDtypeStruct((8, rows, width), "bfloat16", sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    weight = jax.ShapeDtypeStruct((width, wide), "bfloat16", sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    multiply = jax.jit(jax.numpy.matmul, out_shardings=NamedSharding(mesh, PartitionSpec("fsdp")))
    found = costs(parse(multiply.lower(x, weight).compile().as_text() or ""), mesh)
    assert {use.kind for use in found.uses} == {"collective-permute"}
    assert found.flops == 2 * rows * width * wide
    shard = width * wide * 2 / 8  # eight pass in the loop, half of them each way round, and one goes ahead of it
    assert sum(use.sent_bytes for use in found.uses) == 9 * shard


def test_a_topology_is_a_value():
    assert topology("v5e:2x2") == Topology(CHIPS["v5e"], (2, 2))
