"""Run by test_arrays.py with 8 devices: read a checkpoint onto a mesh, compare, write it from the mesh."""

import json
import sys
from pathlib import Path

import jax
import numpy as np
import torch
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.torch import load_file

from tests.hosts.qwen25vl_reference import RELEASED_LAYOUT
from tests.weights.checkpoints import write_hugging_face
from tracevision_jax.weights import arrays, native, qwen25vl
from tracevision_jax.weights.conversion import to_native
from tracevision_jax.weights.engine import flatten
from tracevision_jax.weights.families import load_host


def main(folder: Path) -> None:
    """Print what holds."""
    arrays.SMALL_BYTES = 60_000  # the matrices go the way of large arrays
    native.MAX_BLOCK_BYTES = 2000
    write_hugging_face(folder / "in", RELEASED_LAYOUT, shard_size="10MB")
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def sharding_of(path: str, shape: tuple[int, ...]) -> NamedSharding:
        axes: list[str | None] = [None] * len(shape)
        for axis, name in ((-1, "fsdp"), (-2, "tensor"), (0, "tensor")):
            if axis >= -len(shape) and shape[axis] % mesh.shape[name] == 0 and name not in axes:
                axes[axis] = axes[axis] or name
        return NamedSharding(mesh, PartitionSpec(*axes))

    config, here = qwen25vl.load(folder / "in")
    _, spread = qwen25vl.load(folder / "in", sharding_of)
    here, leaves = flatten(here), flatten(spread)
    to_native(folder / "in", folder / "native", qwen25vl.FAMILY).run()
    _, ours = load_host(folder / "native", sharding_of)
    ours = flatten(ours)
    qwen25vl.save(folder / "out", spread, config)
    before, after = (load_file(folder / name / "model.safetensors") for name in ("in", "out"))
    report = {
        "layouts": all(
            leaf.sharding.is_equivalent_to(sharding_of(path, leaf.shape), leaf.ndim) for path, leaf in leaves.items()
        )
        and sum(not leaf.sharding.is_fully_replicated for leaf in leaves.values()) > 20,
        "values": all(np.array_equal(leaf, here[path]) for path, leaf in leaves.items()),
        "written": before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before),
        "native": all(
            np.array_equal(leaf, here[path]) and leaf.sharding == leaves[path].sharding for path, leaf in ours.items()
        ),
    }
    print(json.dumps(report))


main(Path(sys.argv[1]))
