"""Which collectives a training step of TraceVision needs, why, and how many: any other one fails here by name.

The layout that they follow from: rows are cut over data and fsdp, weights over fsdp on the side of the residual
stream and over tensor on heads and MLP columns (`parallel/rules.py`).
"""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
MESH = {"fsdp": 4, "tensor": 2}
"""Along both axes that parameters are cut over."""
MESH_OF_TOKENS = {"fsdp": 2, "context": 2}
WIDTH = 32
"""Of the residual streams of `small_tracevision`: language model, tower and TVP."""
MERGED = 4 * WIDTH
"""Of the tower's units where they are merged."""
LOOKUPS = 2
"""Arrays that are looked up in cut tables: tokens' embeddings, and places of trajectory points."""


SUMS_OVER_TENSOR = 2 * 8 + 1 + 4 * 6 + 2 + 2 * 11
"""Two language layers: 2 forward (attention, MLP), 1 again for the backward pass, and 5 back to the residual stream
(q, k, v, gate, up: the CPU's compiler sums each). The head: 1 back. Four blocks of the tower: 2, 1, and 3 back (qkv,
gate, up). The merger: 1 and 1. Two TVP blocks: 3 forward, 1 again, and 7 back (q, k, v of both directions, FFN)."""


class Expected(NamedTuple):
    """A kind of collective that the layout needs."""

    why: str
    kind: str
    axes: tuple[str, ...]
    arrays: str
    """Pattern of its arrays."""
    origin: str
    """Pattern of where the program says it comes from."""


SCALAR = r"f32\[\]|s32\[\]"
EXPECTED = (
    Expected("sums of the loss, its weights and the gradient's norm", "all-reduce", ("fsdp",), SCALAR, ""),
    Expected("sums of the loss, its weights and the gradient's norm", "all-reduce", ("tensor",), SCALAR, ""),
    Expected("sums of the loss, its weights and the gradient's norm", "all-reduce", ("fsdp", "tensor"), SCALAR, ""),
    Expected("a weight's slices, where it multiplies", "all-gather", ("fsdp",), r"f32\[.+\]", r"/dot_general$"),
    Expected("which rows of a table to look up", "all-gather", ("fsdp",), r"(s32|pred)\[.+\]", r"embed"),
    Expected("which rows of a table to look up", "all-gather", ("fsdp",), r"f32\[16,4,2\]", r"tvp\._embed"),
    Expected("slices of looked-up rows for whole rows", "all-to-all", ("fsdp",), r"f32\[.+\]", r"embed/.*constraint$"),
    Expected("the gradient of a parameter over all rows", "all-reduce", ("fsdp",), r"f32\[.+\]", ""),
    Expected(
        "a sum over heads or MLP columns", "all-reduce", ("tensor",), rf"f32\[\d+,(\d+,)+({WIDTH}|{MERGED})\]", ""
    ),
    Expected("rows that lie in another slice of the vocabulary", "all-reduce", ("tensor",), r"f32\[8,48,8\]", ""),
    Expected("softmax over a cut vocabulary", "all-reduce", ("tensor",), r"f32\[2,48\]", r"logits|reduce|jvp\(\)"),
)


def compiled(mesh: dict[str, int]) -> dict:
    """What `collectives_on_mesh.py` prints in a process of virtual devices."""
    count = f"--xla_force_host_platform_device_count={math.prod(mesh.values())}"
    wanted = f"{count} --xla_backend_optimization_level=0"
    result = subprocess.run(
        [sys.executable, "-m", "tests.parallel.collectives_on_mesh", json.dumps(mesh)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {wanted}", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found() -> dict:
    """On `MESH`."""
    return compiled(MESH)


def why(use: dict, array: str) -> str | None:
    """The reason for a collective of an array; None when there is none."""
    for expected in EXPECTED:
        same = use["kind"] == expected.kind and tuple(use["axes"]) == expected.axes
        if same and re.fullmatch(expected.arrays, array) and re.search(expected.origin, use["origin"]):
            return expected.why
    return None


def layers_of(path: str, shape: list[int]) -> int:
    """How many layers a stacked parameter holds."""
    stacked = 2 if "/groups/window/" in path else 1 if "/layers/" in path or "/groups/" in path else 0
    return math.prod(shape[:stacked])


def counted(uses: list[dict]) -> tuple[Counter, list[str]]:
    """(how often each reason occurs, trip counts included; what has no reason)."""
    reasons, others = Counter(), []
    for use in uses:
        for array in use["arrays"][:1] if use["kind"] == "all-to-all" else use["arrays"]:
            reason = why(use, array)
            if reason is None:
                others.append(
                    f"{use['kind']} over {'+'.join(use['axes'])} of {array} x {use['times']}: {use['origin']}"
                )
            else:
                reasons[reason] += use["times"]
    return reasons, others


def test_a_step_has_the_collectives_that_its_layout_needs_and_no_other(found):
    reasons, others = counted(found["collectives"])
    assert others == []
    parameters = found["parameters"]
    arrays = {path: layers_of(path, shape) for path, (shape, _) in parameters.items()}
    weights = sum(
        arrays[path] for path, (_, spec) in parameters.items() if "fsdp" in spec and not re.search("embed|bins$", path)
    )
    # Forward and backward; the head, and the tower's first and last products, are not computed again.
    gathered = reasons["a weight's slices, where it multiplies"]
    assert weights <= gathered <= 2 * weights, (weights, gathered)
    # Each once, whole layers of a stack apart.
    assert reasons["the gradient of a parameter over all rows"] <= sum(arrays.values())
    assert reasons["slices of looked-up rows for whole rows"] == 2 * LOOKUPS  # there and, as gradients, back
    assert reasons["which rows of a table to look up"] == LOOKUPS
    assert 0 < reasons["a sum over heads or MLP columns"] <= SUMS_OVER_TENSOR


def test_chips_along_context_share_all_the_work():
    """Every product of the step is computed once by all chips together, so each of two along context does half."""
    found = compiled(MESH_OF_TOKENS)
    print(f"executed {found['executed']:.5e}, counted {found['counted']:.5e}")
    assert 1 <= found["executed"] / found["counted"] < 1.01
