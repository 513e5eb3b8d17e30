"""Programs of tests in a process of their own, whose number of virtual devices is theirs to choose."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def printed_on(devices: int, module: str, *arguments: str, flags: str = "") -> Any:
    """The JSON line that `python -m module arguments` prints last, on so many CPU devices; `flags` are more for XLA."""
    wanted = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices} {flags}"
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": wanted, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])
