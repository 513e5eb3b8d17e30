"""Sharding rules: every parameter has one, and what does not divide is refused."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.parallel.small_tracevision import small_system
from tests.training.tiny import TinySystem
from tracevision_jax.errors import UserError
from tracevision_jax.hosts.qwen25vl import preset
from tracevision_jax.parallel.mesh import MeshConfig, make_mesh
from tracevision_jax.parallel.rules import PARAMETERS, partition_specs, rule_of, shard_params, spec_of
from tracevision_jax.systems.tracevision import TraceVision, tracevision_config
from tracevision_jax.training.parameters import count, flatten

SIZES = {"data": 1, "fsdp": 2, "tensor": 2, "context": 1}


def shapes_of(system):
    return jax.eval_shape(system.init, jax.random.key(0))


def test_every_parameter_of_tracevision_has_a_rule_and_the_large_ones_are_cut():
    shapes = flatten(shapes_of(small_system()))
    specs = {path: spec_of(path, leaf.shape, PARAMETERS) for path, leaf in shapes.items()}
    assert [path for path, spec in specs.items() if spec is None] == []
    whole = [
        path
        for path, spec in specs.items()
        if path.endswith(("kernel", "embedding", "head")) and not any(spec) and "decoder/" not in path
    ]
    assert whole == []


@pytest.mark.parametrize(
    ("size", "fsdp", "tensor"), [("3b", 16, 2), ("7b", 16, 1), ("7b", 64, 4), ("32b", 256, 1), ("72b", 64, 4)]
)
def test_every_released_size_fits_the_meshes_that_it_is_trained_on(size, fsdp, tensor):
    shapes = shapes_of(TraceVision(tracevision_config(preset(size), 151_665)))
    specs = flatten(partition_specs(shapes, {"data": 1, "fsdp": fsdp, "tensor": tensor, "context": 1}, PARAMETERS))
    slices = {"fsdp": fsdp, "tensor": tensor}
    held = sum(
        leaf.size / math.prod(slices[axis] for axis in specs[path] if axis) for path, leaf in flatten(shapes).items()
    )
    # Beyond an equal share a device holds the decoder (at most 12.5 M, 14.5 M at 72B's width) and the norms.
    assert held - count(shapes) / (fsdp * tensor) < 18e6


def test_leading_axes_of_scans_stay_whole():
    path = "host/vision/groups/window/attn/qkv/kernel"
    assert spec_of(path, (4, 7, 64, 3, 4, 16), PARAMETERS) == P(None, None, "fsdp", None, "tensor", None)
    assert spec_of("host/vision/groups/full/norm1/scale", (4, 64), PARAMETERS) == P(None, None)


def test_a_block_needs_one_sum_over_tensor_for_attention_and_one_for_the_mlp():
    layers = "language/layers"
    kernel = {
        name: spec_of(f"{layers}/{name}/kernel", shape, PARAMETERS)
        for name, shape in {
            "attn/q": (2, 64, 4, 16),
            "attn/o": (2, 4, 16, 64),
            "mlp/up": (2, 64, 128),
            "mlp/down": (2, 128, 64),
        }.items()
    }
    assert kernel["attn/q"][2] == kernel["attn/o"][1] == "tensor"  # heads out, the same heads in
    assert kernel["mlp/up"][2] == kernel["mlp/down"][1] == "tensor"
    assert kernel["attn/q"][1] == kernel["attn/o"][3] == "fsdp"  # the residual stream's side


def test_adapters_lie_as_their_kernel_does_wherever_its_rule_comes_from():
    layer = "host/language/layers/attn/o"
    assert rule_of(f"{layer}/lora_a", PARAMETERS) == P("tensor", None, None)
    assert rule_of(f"{layer}/lora_b", PARAMETERS) == P(None, "fsdp")
    whole = ((f"^{layer}/kernel$", P("tensor", None, None)), *PARAMETERS)
    assert rule_of(f"{layer}/lora_a", whole) == P("tensor", None, None)
    assert rule_of(f"{layer}/lora_b", whole) == P(None, None)
    assert rule_of("nothing/lora_a", PARAMETERS) is None


def test_parameters_without_a_rule_are_all_named():
    tree = {"a": {"kernel": np.ones((2, 2))}, "b": {"kernel": np.ones((2, 2))}}
    with pytest.raises(UserError, match=r"(?s)a/kernel .*no rule.*b/kernel .*no rule"):
        partition_specs(tree, SIZES, PARAMETERS)


def test_a_dimension_that_its_axis_does_not_divide_is_refused_with_the_nearest_that_does():
    tree = {"language": {"layers": {"attn": {"k": {"kernel": np.ones((2, 64, 6, 8))}}}}}
    with pytest.raises(UserError, match=r"6 cannot be cut into 4 equal slices \(tensor\); .* fits is 2"):
        partition_specs(tree, {**SIZES, "tensor": 4}, PARAMETERS)


def test_a_rule_with_more_axes_than_the_array_is_refused():
    with pytest.raises(UserError, match="has 2 axes"):
        spec_of("language/embed/embedding", (4,), PARAMETERS)


def test_sharding_keeps_every_value():
    params = TinySystem().init(jax.random.key(0))
    placed = shard_params(params, make_mesh(MeshConfig(), jax.devices()[:1]), PARAMETERS)
    jax.tree.map(np.testing.assert_array_equal, placed, params)
