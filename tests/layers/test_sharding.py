"""Logical axis names of activations and their layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from tracevision_jax.layers.sharding import activation_sharding, constrain, layout, leading_axes_merge, may_merge

RULES = {"batch": ("data", "fsdp"), "heads": "tensor", "kv_heads": "tensor", "width": None, "mlp": "tensor"}
MESH = AbstractMesh((2, 2, 4), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def test_without_a_context_constrain_returns_its_argument():
    x = jnp.ones((2, 3))
    assert constrain(x, "batch", "width") is x


def test_an_axis_is_split_only_where_the_mesh_divides_it():
    assert layout((8, 5, 8, 16), ("batch", "tokens", "heads", None), MESH, RULES) == PartitionSpec(
        ("data", "fsdp"), None, ("tensor",), None
    )
    assert layout((6, 2), ("batch", "kv_heads"), MESH, RULES) == PartitionSpec(("data",), None)


def test_a_mesh_axis_is_used_once_in_an_array():
    assert layout((8, 8), ("heads", "mlp"), MESH, RULES) == PartitionSpec(("tensor",), None)


def test_constrain_pins_the_layout_inside_jit():
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with activation_sharding(mesh, RULES):
        traced = jax.jit(lambda x: constrain(x, "batch", "mlp") + 1).trace(jnp.ones((4, 8)))
    assert "sharding_constraint" in str(traced.jaxpr)
    np.testing.assert_array_equal(traced.lower().compile()(jnp.ones((4, 8))), 2)


def test_leading_axes_merge_unless_one_after_the_first_is_split():
    assert leading_axes_merge()
    by_tokens, by_rows = (dict(RULES, tokens=axis) for axis in ("fsdp", "data"))
    mesh = AbstractMesh((1, 2, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    assert not may_merge(mesh, by_tokens)
    assert may_merge(mesh, by_rows)
    assert not may_merge(MESH, by_rows)  # heads are split


def test_names_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="known are batch"):
        constrain(jnp.ones((2, 3)), "batch", "channels")
    with pytest.raises(ValueError, match="for an array of shape"):
        constrain(jnp.ones((2, 3)), "batch")
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    with (
        pytest.raises(ValueError, match="no logical axes: rows"),
        activation_sharding(mesh, {"rows": "data"}),
    ):
        pass
