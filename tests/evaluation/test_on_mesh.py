"""Evaluators on parameters that are cut over the devices of two processes say what they say on one device."""

import json
import os
import socket
import subprocess
import sys

import jax
import pytest

from tests.conftest import ROOT
from tests.evaluation.evaluate_on_mesh import evaluated
from tracevision_jax.parallel.mesh import MeshConfig, make_mesh


def started(number: int, address: str) -> subprocess.Popen:
    """`evaluate_on_mesh.py` as one of two processes of two virtual devices each."""
    shared = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PLATFORMS": "cpu"}
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    return subprocess.Popen(
        [sys.executable, "-m", "tests.evaluation.evaluate_on_mesh"],
        cwd=ROOT,
        env={**os.environ, **shared, "XLA_FLAGS": flags, "JAX_PROCESS_ID": str(number)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(process: subprocess.Popen) -> dict:
    out, error = process.communicate(timeout=600)
    assert process.returncode == 0, error[-4000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_two_processes_say_of_cut_parameters_what_one_device_says():
    alone = evaluated(make_mesh(MeshConfig(), jax.devices()[:1]))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [started(number, address) for number in range(2)]
    first, second = (told(process) for process in processes)
    assert first == second and first["processes"] == 2
    for name in ("loss", "tracking"):
        assert first[name].keys() == alone[name].keys()
        assert first[name] == pytest.approx(alone[name], rel=1e-4), name
    assert first["pictures"].keys() == alone["pictures"].keys() and len(alone["pictures"]) == 2
