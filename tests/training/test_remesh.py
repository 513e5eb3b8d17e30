"""A run moves to other meshes and numbers of devices: same data, each record once an epoch, same parameters."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.training.remesh import EPOCHS, ROWS
from tests.training.train_tiny import expected, make_plan

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_goes_on_from_8_devices_to_4_to_2_by_4_and_sees_every_record_once_an_epoch(tmp_path):
    wanted = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    result = subprocess.run(
        [sys.executable, "-m", "tests.training.remesh", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {wanted}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    found = json.loads(result.stdout.splitlines()[-1])
    first, second, last = found["stops"]
    assert 0 < first < second < last == make_plan(ROWS).steps_in(EPOCHS)
    assert found["seen"] == found["seen_still"] == expected(EPOCHS)
    assert max(found["errors"].values()) < 1e-5, found["errors"]
