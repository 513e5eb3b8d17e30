"""A training program to be killed: the tiny system on the real pipeline, a moment for every step.

python -m tests.training.train_tiny FOLDER WORKERS [EPOCHS]

The system counts inside the jitted step how often it has seen each record, and the counts are saved with all else: so
they tell what the final parameters have learned from, whatever happened on the way.
"""

import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from data_loaders.pipeline import Pipeline
from data_loaders.plan import Lengths, Plan
from tests.training.tiny import BUCKET, TinySystem, empty_batch
from tracevision_jax.records.sample import BadRecord
from tracevision_jax.training.loop import fit
from tracevision_jax.training.optimizer import OptimizerConfig
from tracevision_jax.training.recipe import TrainRecipe
from tracevision_jax.training.retention import CheckpointConfig

RECORDS, BAD, EPOCHS = 50, (3, 30), 16


class Counting(TinySystem):
    """The tiny system; `seen` in its state has how often each record was learned from."""

    def init_state(self):
        return {"seen": jnp.zeros(RECORDS, jnp.int32)}

    def loss(self, params, state, batch, rng):
        sums, weights, _ = super().loss(params, {"seen": 0}, batch, rng)
        counts = jnp.zeros(RECORDS + 1, jnp.int32).at[batch.mask_slots.ravel()].add(1)
        return sums, weights, {"seen": state["seen"] + counts[1:]}


class Records:
    """(record number, random tokens); two of them are bad."""

    def __len__(self):
        return RECORDS

    def __getitem__(self, index):
        if index in BAD:
            raise BadRecord("torn", f"{index}.jpg")
        rng = np.random.default_rng(index)
        return index, rng.integers(1, 32, 3 + index % 4)


def make_row(samples):
    """Samples one after the other."""
    return samples


def collate(rows, bucket):
    """Pad to the bucket; slow enough to be killed in the middle. `mask_slots` has the records' numbers, from 1."""
    time.sleep(0.02)
    batch = empty_batch(bucket, len(rows))
    for row, samples in enumerate(rows):
        start = 0
        for number, (record, tokens) in enumerate(samples):
            batch.mask_slots[row, 0, number] = record + 1
            stop = start + len(tokens)
            batch.tokens[row, start:stop] = tokens
            batch.targets[row, start:stop] = np.roll(tokens, -1)
            batch.segments[row, start:stop] = number + 1
            batch.target_weights[row, start:stop] = 1
            start = stop
    return batch


def make_plan(rows: int = 4) -> Plan:
    """The epoch plan of all records."""
    resources = np.ones((RECORDS, 6), int)
    resources[:, 0] = [3 + index % 4 for index in range(RECORDS)]
    return Plan(0, [Lengths("tokens", resources)], [BUCKET], [rows])


def make_recipe(rows: int = 4, **changes) -> TrainRecipe:
    """A recipe that saves every ten steps."""
    arguments = {
        "name": "tiny",
        "stage": "all",
        "buckets": (BUCKET,),
        "rows": (rows,),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "checkpoint": CheckpointConfig(every=10, keep=2),
    }
    return TrainRecipe(**arguments | changes)


def saved_state(directory: str | Path) -> dict:
    """Everything in the newest checkpoint of a run, as numpy arrays."""
    tree = max((Path(directory) / "checkpoints").glob("step_*")).absolute() / "tree"
    with ocp.PyTreeCheckpointer() as checkpointer:
        leaves = checkpointer.metadata(tree).item_metadata.tree
        # As numpy arrays, since the devices that saved them need not be here.
        whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), leaves)
        return checkpointer.restore(tree, restore_args=whole)


def seen(directory: str | Path) -> list[int]:
    """How often the newest checkpoint's parameters have learned from each record."""
    return saved_state(directory)["state"]["system"]["seen"].tolist()


def expected(epochs: int = EPOCHS) -> list[int]:
    """Every usable record once an epoch."""
    return [0 if record in BAD else epochs for record in range(RECORDS)]


def main(directory: str, workers: int, epochs: int = EPOCHS) -> None:
    """Train, or continue."""
    plan = make_plan()
    pipeline = Pipeline(plan, [Records()], make_row, collate, plan.steps_in(epochs), workers=workers)
    fit(Counting(), make_recipe(), pipeline, directory)


if __name__ == "__main__":
    main(sys.argv[1], *(int(number) for number in sys.argv[2:]))
