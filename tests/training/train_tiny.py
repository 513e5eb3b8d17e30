"""A training program for `test_kill.py`: the tiny system on the real pipeline, a moment for every step.

python -m tests.training.train_tiny FOLDER WORKERS
"""

import sys
import time

import numpy as np

from data_loaders.pipeline import Pipeline
from data_loaders.plan import Lengths, Plan
from tests.training.tiny import BUCKET, TinySystem, empty_batch
from tracevision_jax.records.sample import BadRecord
from tracevision_jax.training.loop import fit
from tracevision_jax.training.optimizer import OptimizerConfig
from tracevision_jax.training.recipe import CheckpointConfig, TrainRecipe

RECORDS, STEPS = 50, 200


class Records:
    """Rows of random tokens by record number; two of them are bad."""

    def __len__(self):
        return RECORDS

    def __getitem__(self, index):
        if index in (3, 30):
            raise BadRecord("torn", f"{index}.jpg")
        rng = np.random.default_rng(index)
        return rng.integers(1, 32, 3 + index % 4)


def make_row(samples):
    """Samples one after the other."""
    return samples


def collate(rows, bucket):
    """Pad to the bucket; slow enough to be killed in the middle."""
    time.sleep(0.02)
    batch = empty_batch(bucket, len(rows))
    for row, samples in enumerate(rows):
        start = 0
        for number, tokens in enumerate(samples):
            stop = start + len(tokens)
            batch.tokens[row, start:stop] = tokens
            batch.targets[row, start:stop] = np.roll(tokens, -1)
            batch.segments[row, start:stop] = number + 1
            batch.target_weights[row, start:stop] = 1
            start = stop
    return batch


def main(directory: str, workers: int) -> None:
    """Train, or continue."""
    resources = np.ones((RECORDS, 6), int)
    resources[:, 0] = [3 + index % 4 for index in range(RECORDS)]
    plan = Plan(0, [Lengths("tokens", resources)], [BUCKET], [4])
    recipe = TrainRecipe(
        name="tiny",
        stage="all",
        buckets=(BUCKET,),
        rows=(4,),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        checkpoint=CheckpointConfig(every=10, keep=2),
    )
    pipeline = Pipeline(plan, [Records()], make_row, collate, STEPS, workers=workers)
    fit(TinySystem(), recipe, pipeline, directory)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
