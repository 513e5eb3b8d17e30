"""The command `tracevision` with a recipe that trains the tiny system of the training tests in seconds.

    python -m tests.launch.tiny_command train tiny --out FOLDER

Used by `test_processes.py`, as a program of its own and by `register`.
"""

import sys

if __name__ == "__main__":
    sys.modules["torch"] = None  # type: ignore[assignment]  # tensorboardX would import it, which takes seconds

import numpy as np

from configs import registry
from configs.registry import SystemEntry, TrainingData
from launch.cli import main
from tests.training.tiny import BUCKET, TinyConfig, TinySystem
from tests.training.train_tiny import Records, collate, make_row
from tracevision_jax.training.optimizer import OptimizerConfig
from tracevision_jax.training.recipe import DataConfig, SourceEntry, TrainRecipe
from tracevision_jax.training.retention import CheckpointConfig

STEPS = 16

if __name__ == "__main__":
    del sys.modules["torch"]


def data_of(recipe, system, opened):
    """Rows of random tokens; two records are bad."""
    resources = np.ones((len(opened[0]), 6), int)
    resources[:, 0] = [3 + index % 4 for index in range(len(opened[0]))]
    return TrainingData(opened, [resources], make_row, collate)


def register() -> None:
    """Add the recipe "tiny", and what it names."""
    registry.register_system("tiny", SystemEntry(build=lambda recipe: TinySystem(recipe.model), data=data_of))
    registry.register_source("numbers", lambda entry, data: Records())
    registry.register(
        TrainRecipe(
            name="tiny",
            system="tiny",
            model=TinyConfig(),
            stage="all",
            data=DataConfig(sources=(SourceEntry("numbers"),)),
            buckets=(BUCKET,),
            rows=(8,),
            steps=STEPS,
            optimizer=OptimizerConfig(learning_rate=1e-2),
            checkpoint=CheckpointConfig(every=4, keep=2),
        )
    )


if __name__ == "__main__":
    registry._loaded.append(True)  # the recipes of configs/ are not needed, and take seconds to import
    register()
    sys.exit(main())
