"""A program for `test_remesh.py`: one run on 8, then 4, then 2 x 4 devices, and one that was never moved.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.training.remesh FOLDER
"""

import json
import os
import signal
import sys
from pathlib import Path

import jax
import numpy as np

from data_loaders.pipeline import Pipeline
from tests.training.train_tiny import Counting, Records, collate, make_plan, make_recipe, make_row, seen
from tracevision_jax.parallel.mesh import MeshConfig
from tracevision_jax.training.loop import fit
from tracevision_jax.training.parameters import flatten
from tracevision_jax.weights.model_directory import load_model

EPOCHS, ROWS = 3, 8
MOVES = (({"fsdp": 8}, 8, 5), ({"fsdp": 4}, 4, 12), ({"data": 2, "fsdp": 4}, 8, None))
"""(mesh, devices, step at which the run is interrupted)."""


class Interrupted(Pipeline):
    """The pipeline, with Ctrl-C at a step."""

    at: int | None = None

    def batches(self, start=0):
        for item in super().batches(start):
            if item.step == self.at:
                os.kill(os.getpid(), signal.SIGINT)
            yield item


def train(directory: Path, mesh: dict[str, int], devices: int, at: int | None) -> int:
    """Train or continue; the step at which the run ended."""
    plan = make_plan(ROWS)
    pipeline = Interrupted(plan, [Records()], make_row, collate, plan.steps_in(EPOCHS))
    pipeline.at = at
    recipe = make_recipe(ROWS, mesh=MeshConfig(**mesh))
    return fit(Counting(), recipe, pipeline, directory, devices=jax.devices()[:devices]).step


def main(folder: str) -> None:
    """Print what became of both runs as JSON."""
    moved, still = Path(folder) / "moved", Path(folder) / "still"
    stops = [train(moved, *move) for move in MOVES]
    train(still, {"data": 1}, 1, None)
    ours, theirs = (flatten(load_model(run / "model")[1]) for run in (moved, still))
    errors = {path: float(np.linalg.norm(ours[path] - leaf) / np.linalg.norm(leaf)) for path, leaf in theirs.items()}
    print(json.dumps({"stops": stops, "seen": seen(moved), "seen_still": seen(still), "errors": errors}))


if __name__ == "__main__":
    main(sys.argv[1])
