"""Blocks between host and device arrays; sharded over a mesh and within bounded memory in own processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from tracevision_jax.weights import arrays
from tracevision_jax.weights.arrays import ArrayBuilder, ArrayLeaf, TransposedLeaf, first_device

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *arguments: str, devices: int = 1) -> dict:
    """Run a script in a process of its own and read the JSON that it prints last."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        # What is freed goes back to the system at once, so that resident memory is memory in use.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("limit", [0, 2**22], ids=["on_devices", "on_the_host"])
def test_an_array_is_filled_block_by_block(monkeypatch, rng, limit):
    monkeypatch.setattr(arrays, "SMALL_BYTES", limit)
    whole = rng.standard_normal((3, 4, 5)).astype(np.float32)
    builder = ArrayBuilder(whole.shape, np.dtype("bfloat16"), first_device("", ()))
    for start, shape in (((1, 0, 0), (2, 4, 5)), ((0, 0, 0), (1, 3, 5)), ((0, 3, 0), (1, 1, 5))):
        place = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        builder.write(start, whole[place])
    array = builder.finish()
    assert isinstance(array, jax.Array) and array.dtype == "bfloat16"
    np.testing.assert_array_equal(np.asarray(array), whole.astype(array.dtype))


@pytest.mark.parametrize("limit", [0, 2**22], ids=["on_devices", "on_the_host"])
def test_any_block_is_brought_back(monkeypatch, rng, limit):
    monkeypatch.setattr(arrays, "SMALL_BYTES", limit)
    whole = rng.standard_normal((3, 4)).astype(np.float32)
    for leaf in (ArrayLeaf(jax.numpy.asarray(whole)), ArrayLeaf(whole)):
        assert leaf.shape == (3, 4) and leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf.block((1, 2), (2, 1)), whole[1:3, 2:3])
        turned = TransposedLeaf(leaf)
        assert turned.shape == (4, 3)
        np.testing.assert_array_equal(turned.block((2, 1), (1, 2)), whole.T[2:3, 1:3])


def test_an_array_of_which_no_block_came_is_refused(monkeypatch):
    monkeypatch.setattr(arrays, "SMALL_BYTES", 0)
    with pytest.raises(ValueError, match="no block"):
        ArrayBuilder((2,), np.dtype("float32"), first_device("", ())).finish()


def test_a_checkpoint_is_read_onto_a_mesh_as_told_and_written_from_it(tmp_path):
    seen = run("sharded_loading.py", str(tmp_path), devices=8)
    assert seen == {"layouts": True, "values": True, "written": True, "native": True}


@pytest.mark.parametrize("form", ["hugging_face", "native"])
def test_loading_takes_little_more_host_memory_than_the_arrays(tmp_path, form):
    """Measured: the loading process's peak of resident memory, less what it had before and the arrays."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the peak of resident memory can be reset and read on Linux only (/proc/self/clear_refs)")
    seen = run("loading_memory.py", str(tmp_path), form)
    print(json.dumps(seen))
    assert seen["arrays"] > 8 * seen["largest"]
    assert seen["above"] <= 3 * seen["largest"], seen
