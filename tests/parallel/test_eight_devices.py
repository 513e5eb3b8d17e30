"""Eight virtual devices give the loss and gradient of one: here on every pair of axes, by `make meshes` on all meshes.

The optimizer of the step is plain momentum, so that what it holds after one step is the gradient.
"""

import itertools
import json
import math
import os

import pytest

from tests.on_devices import printed_on
from tracevision_jax.parallel.mesh import AXES

TOLERANCE = 1e-5
EVERY_MESH = [
    dict(zip(AXES, sizes, strict=True))
    for sizes in itertools.product((1, 2, 4, 8), repeat=len(AXES))
    if math.prod(sizes) == 8
]
EVERY_PAIR = [
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 2, "tensor": 2, "context": 2},
    {"data": 4, "context": 2},
]
LONG = os.environ.get("TRACEVISION_TEST_MESHES") == "all"
"""As `make meshes` asks for."""


def losses(system: str, meshes: list[dict[str, int]]) -> dict:
    """Run `mesh_step.py` in a process of eight virtual devices."""
    # Compiling is nearly all of the time, and optimising the machine code half of that.
    quick = "--xla_backend_optimization_level=0"
    return printed_on(8, "tests.parallel.mesh_step", system, json.dumps(meshes), flags=quick)


def test_the_meshes_cover_every_pair_of_axes():
    pairs = {pair for mesh in EVERY_PAIR for pair in itertools.combinations(mesh, 2)}
    assert pairs == set(itertools.combinations(AXES, 2))


@pytest.mark.parametrize(
    ("system", "meshes"),
    [
        ("tiny", [{"data": 8}, {"fsdp": 4, "tensor": 2, "accumulation": 2}]),
        pytest.param("tracevision", EVERY_MESH if LONG else EVERY_PAIR, marks=pytest.mark.slow),
        pytest.param("adapters", EVERY_MESH if LONG else EVERY_PAIR[:1], marks=pytest.mark.slow),
        pytest.param("sam2", EVERY_MESH if LONG else EVERY_PAIR, marks=pytest.mark.slow),
    ],
)
def test_eight_devices_give_the_loss_and_gradient_of_one(system, meshes):
    found = losses(system, meshes)
    assert len(found["meshes"]) == len(meshes)
    for name, outcome in found["meshes"].items():
        mesh = {"fsdp": 1, "tensor": 1, **json.loads(name)}
        print(system, name, outcome)
        if mesh["tensor"] > 2:  # more slices than the least number of heads
            assert "cannot be cut" in outcome["refused"], (name, outcome)
            continue
        assert abs(outcome["loss"] - found["loss"]) <= TOLERANCE * abs(found["loss"]), (name, outcome)
        assert outcome["gradient"] <= TOLERANCE, (name, outcome)
        cut = mesh["fsdp"] * mesh["tensor"] > 1
        assert (outcome["share"] < 1) == cut, (name, outcome)
        most = 0.9 if system == "sam2" else 0.75  # of SAM 2 only the image encoder's blocks are cut
        assert outcome["share"] < most or mesh["fsdp"] == 1, (name, outcome)
