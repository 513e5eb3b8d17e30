"""The loss on held-out records while training: an evaluator of the training loop.

    evaluator = HeldOutLoss(system, read_rows, collate, bucket, rows=8)
    evaluator(params, step)        # {"loss": ..., "text": ..., ...}
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import jax
import numpy as np

from tracevision_jax.records.batch import Batch, Bucket
from tracevision_jax.systems.protocol import System
from tracevision_jax.training.step import part_values, total_loss

Row = list[Any]


@dataclasses.dataclass
class HeldOutLoss:
    """Loss parts over held-out rows."""

    system: System
    read_rows: Callable[[], Iterable[Row]]
    """Makes the rows; called once, at the first evaluation."""
    collate: Callable[[list[Row], Bucket], Batch]
    bucket: Bucket
    rows: int
    """Rows of a batch."""

    @cached_property
    def batches(self) -> list[Batch]:
        """The rows in batches; those that do not fit the bucket are left out, empty ones fill the last batch."""
        fitting = [row for row in self.read_rows() if self._fits(row)]
        padded = fitting + [[]] * (-len(fitting) % self.rows)
        return [self.collate(padded[i : i + self.rows], self.bucket) for i in range(0, len(padded), self.rows)]

    def _fits(self, row: Row) -> bool:
        try:
            self.collate([row], self.bucket)
        except ValueError:
            return False
        return True

    @cached_property
    def _sums(self) -> Any:
        return jax.jit(lambda params, batch: self.system.loss(params, (), batch, jax.random.key(0))[:2])

    def __call__(self, params: Any, step: int) -> dict[str, float]:
        """{"loss" and every part: value} over all held-out rows."""
        del step
        if not self.batches:
            return {}
        made = [jax.device_get(self._sums(params, batch)) for batch in self.batches]
        sums = {name: np.sum([s[name] for s, _ in made]) for name in made[0][0]}
        weights = {name: np.sum([w[name] for _, w in made]) for name in made[0][1]}
        values = {name: float(value) for name, value in part_values(sums, weights).items()}
        return {"loss": float(total_loss(self.system.coefficients, sums, weights))} | values
