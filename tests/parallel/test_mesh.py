"""Shapes of meshes, and what they refuse."""

import jax
import pytest
from jax.sharding import AxisType

from tracevision_jax.errors import UserError
from tracevision_jax.parallel.mesh import MeshConfig, check_rows, make_mesh, mesh_shape


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
