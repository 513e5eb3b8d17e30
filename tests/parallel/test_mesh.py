"""Shapes of meshes, and what they refuse."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from tracevision_jax.errors import UserError
from tracevision_jax.parallel.mesh import DcnConfig, MeshConfig, across_slices, check_rows, make_mesh, mesh_shape
from tracevision_jax.parallel.processes import share_of


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a mesh asks of a device."""

    id: int
    process_index: int
    slice_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5p"


def pod(slices: int, shape: tuple[int, int, int] = (4, 4, 2)) -> list[Chip]:
    """Chips of slices of a pod, hosts of 2 x 2 x 1, in the order of their numbers."""
    x, y, z = shape
    hosts = [(part, *host) for part in range(slices) for host in np.ndindex(z, y // 2, x // 2)]
    places = [
        (number, part, (2 * i + dx, 2 * j + dy, k))
        for number, (part, k, j, i) in enumerate(hosts)
        for dy, dx in np.ndindex(2, 2)
    ]
    return [Chip(number, host, part, coords) for number, (host, part, coords) in enumerate(places)]


def numbers(config: MeshConfig, devices: list[Chip], of: Callable[[Chip], int]) -> np.ndarray:
    """A number of every device of a mesh."""
    return np.vectorize(of, otypes=[int])(make_mesh(config, devices).devices)


@pytest.mark.parametrize(
    ("config", "devices", "shape"),
    [
        (MeshConfig(), 8, (8, 1, 1, 1)),
        (MeshConfig(fsdp=4), 8, (2, 4, 1, 1)),
        (MeshConfig(data=1, fsdp=-1, tensor=2), 8, (1, 4, 2, 1)),
        (MeshConfig(data=2, fsdp=2, tensor=1, context=2), 8, (2, 2, 1, 2)),
    ],
)
def test_one_axis_takes_the_devices_that_the_others_leave(config, devices, shape):
    assert mesh_shape(config, devices) == shape


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(fsdp=3), r"needs a multiple of 3 devices, and there are 8.*1, 2, 4, 8"),
        (MeshConfig(data=2, fsdp=2), r"needs 4 devices, and there are 8"),
        (MeshConfig(fsdp=-1), "at most one is -1"),
        (MeshConfig(tensor=0), "sizes are positive"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        mesh_shape(config, 8)


def test_axes_are_left_to_the_compiler():
    assert make_mesh(MeshConfig(), jax.devices()[:1]).axis_types == (AxisType.Auto,) * 4


def test_rows_that_the_devices_cannot_share_are_refused_with_the_nearest_number():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    check_rows(6, 3, mesh)
    with pytest.raises(UserError, match=r"7 rows .* must be a multiple of 2, such as 8"):
        check_rows(7, 2, mesh)


@pytest.mark.parametrize(
    ("slices", "config", "data", "fsdp"),
    [
        (2, MeshConfig(data=8, fsdp=8, dcn=DcnConfig(data=2)), 2, 1),
        (2, MeshConfig(data=8, fsdp=8, dcn=DcnConfig(fsdp=2)), 1, 2),
        (2, MeshConfig(data=8, fsdp=4, tensor=2), 2, 1),
        (2, MeshConfig(data=1, fsdp=16, tensor=2, context=2), 1, 2),
        (4, MeshConfig(data=8, fsdp=16, dcn=DcnConfig(data=2, fsdp=2)), 2, 2),
        (4, MeshConfig(data=8, fsdp=16, dcn=DcnConfig(fsdp=2)), 2, 2),
        (4, MeshConfig(data=2, fsdp=64), 2, 2),
        (4, MeshConfig(data=-1, fsdp=16), 4, 1),
        (1, MeshConfig(data=2, fsdp=8, tensor=2, dcn=DcnConfig(data=1, fsdp=1)), 1, 1),
    ],
)
def test_the_slice_changes_along_an_axis_exactly_where_it_is_declared_and_nowhere_else(slices, config, data, fsdp):
    found = numbers(config, pod(slices), lambda chip: chip.slice_index)
    rows, columns = found.shape[0] // data, found.shape[1] // fsdp
    expected = np.arange(slices).reshape(data, fsdp).repeat(rows, 0).repeat(columns, 1)
    np.testing.assert_array_equal(found, np.broadcast_to(expected[:, :, None, None], found.shape))
    assert len(np.unique(numbers(config, pod(slices), lambda chip: chip.id))) == slices * 32


@pytest.mark.parametrize("across", [DcnConfig(data=2), DcnConfig(fsdp=2)])
def test_neighbours_along_tensor_are_neighbours_on_the_links_of_a_slice(across):
    mesh = make_mesh(MeshConfig(data=2, fsdp=16, tensor=2, dcn=across), pod(2))
    for first, second in mesh.devices.reshape(-1, 2):
        steps = np.abs(np.subtract(first.coords, second.coords))
        assert first.slice_index == second.slice_index and sum(steps) == 1


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=4, fsdp=16),
        MeshConfig(data=2, fsdp=32, dcn=DcnConfig(fsdp=2)),
        MeshConfig(data=2, fsdp=8, tensor=4),
        MeshConfig(data=2, fsdp=4, tensor=4, context=2, dcn=DcnConfig(data=1)),
    ],
)
def test_processes_of_all_slices_share_the_rows_without_gap_or_overlap(config):
    found = numbers(config, pod(2), lambda chip: chip.process_index)
    lines = found.reshape(found.shape[0] * found.shape[1], -1)
    rows: dict[int, list[int]] = {}
    for process in np.unique(found):
        share, shares = share_of(found, int(process))
        mine = np.flatnonzero((lines == process).any(1)).tolist()
        assert rows.setdefault(share, mine) == mine and len(mine) * shares == len(lines)
    assert sorted(itertools.chain(*rows.values())) == list(range(len(lines)))


@pytest.mark.parametrize(
    ("config", "slices", "message"),
    [
        (MeshConfig(data=8, fsdp=4, dcn=DcnConfig(data=4)), 2, r"2 slices, data 8 .* fits: --mesh.dcn.data 2 --mesh"),
        (MeshConfig(data=8, fsdp=4, dcn=DcnConfig(data=2, fsdp=2)), 2, r"fits: --mesh.dcn.data 2 --mesh.dcn.fsdp 1"),
        (MeshConfig(data=2, fsdp=16, dcn=DcnConfig(data=4)), 4, r"fits: --mesh.dcn.data 2 --mesh.dcn.fsdp 2"),
        (MeshConfig(data=3, fsdp=4, dcn=DcnConfig(data=2)), 2, r"fits: --mesh.dcn.data 1 --mesh.dcn.fsdp 2"),
        (MeshConfig(data=8, fsdp=4, dcn=DcnConfig(data=2)), 1, r"does not fit 1 slice, .* fits: --mesh.dcn.data 1 "),
        (MeshConfig(data=8, fsdp=4, dcn=DcnConfig(data=0)), 2, r"fits: --mesh.dcn.data 1 --mesh.dcn.fsdp 2"),
        (MeshConfig(data=1, fsdp=1, tensor=8), 2, r"tensor and context stay .* --mesh.fsdp 2 --mesh.tensor 4"),
        (MeshConfig(data=1, fsdp=3, tensor=1), 2, r"by data 1 and fsdp 3; .* fits: none of so many devices"),
    ],
)  # fmt: skip
def test_slices_that_do_not_fit_are_refused_with_the_nearest_that_do(config, slices, message):
    with pytest.raises(UserError, match=message):
        across_slices(config, config.sizes, slices)


def test_hosts_of_gpus_are_the_outer_part_whatever_they_call_a_slice():
    gpus = [Chip(id, id // 8, id // 8, platform="gpu", device_kind="NVIDIA H100") for id in range(16)]
    mixed = [gpus[number] for number in np.random.default_rng(0).permutation(16)]
    for sizes in ((1, 2, 8, 1), (2, 4, 1, 2), (1, 1, 16, 1)):
        hosts = numbers(MeshConfig(*sizes), mixed, lambda gpu: gpu.process_index).reshape(2, 8)
        assert hosts.tolist() == [[0] * 8, [1] * 8]
