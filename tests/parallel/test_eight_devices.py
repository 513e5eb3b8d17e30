"""Eight virtual devices give the loss and the gradient of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-5


def losses(system: str, meshes: list[dict[str, int]]) -> dict:
    """Run `mesh_step.py` in a process of eight virtual devices."""
    # Compiling is nearly all of the time, and optimising the machine code half of that.
    wanted = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {wanted}"
    result = subprocess.run(
        [sys.executable, "-m", "tests.parallel.mesh_step", system, json.dumps(meshes)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("system", "meshes"),
    [
        ("tiny", [{"data": 8}, {"fsdp": 4, "tensor": 2, "accumulation": 2}]),
        pytest.param("tracevision", [{"data": 2, "fsdp": 2, "tensor": 2}], marks=pytest.mark.slow),
    ],
)
def test_eight_devices_give_the_loss_and_gradient_of_one(system, meshes):
    found = losses(system, meshes)
    assert len(found["meshes"]) == len(meshes)
    for mesh, outcome in found["meshes"].items():
        assert abs(outcome["loss"] - found["loss"]) <= TOLERANCE * abs(found["loss"]), (mesh, outcome)
        assert outcome["gradient"] <= TOLERANCE, (mesh, outcome)
        cut = json.loads(mesh).get("fsdp", 1) > 1
        assert (outcome["share"] < 0.75) == cut, (mesh, outcome)
