"""The loss on held-out records while training: an evaluator of the training loop.

    evaluator = HeldOutLoss(system, records, make_row, bucket, rows=8, samples=64)
    evaluator(params, step)        # {"loss": ..., "text": ..., ...}
"""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import jax
import numpy as np

from data_loaders.rows import ConversationRecords, RowMaker
from tracevision_jax.errors import UserError
from tracevision_jax.records.batch import Batch, Bucket
from tracevision_jax.records.collate import collate
from tracevision_jax.records.sample import BadRecord
from tracevision_jax.systems.protocol import System
from tracevision_jax.training.step import part_values, total_loss


@dataclasses.dataclass
class HeldOutLoss:
    """Loss parts over the first records of each held-out source."""

    system: System
    records: Sequence[ConversationRecords]
    make_row: RowMaker
    bucket: Bucket
    rows: int
    samples: int

    @cached_property
    def batches(self) -> list[Batch]:
        """The records, encoded once; those that cannot be used or do not fit the bucket are left out."""
        config = self.make_row.processor.config
        rows = []
        for records in self.records:
            for index in range(min(len(records), self.samples // len(self.records))):
                try:
                    row = self.make_row([records[index]])
                    collate([row], self.bucket, config)
                except (BadRecord, UserError, ValueError):
                    continue
                rows.append(row)
        padded = rows + [[]] * (-len(rows) % self.rows)
        return [collate(padded[i : i + self.rows], self.bucket, config) for i in range(0, len(padded), self.rows)]

    @cached_property
    def _sums(self) -> Any:
        return jax.jit(lambda params, batch: self.system.loss(params, (), batch, jax.random.key(0))[:2])

    def __call__(self, params: Any, step: int) -> dict[str, float]:
        """{"loss" and every part: value} over all held-out records."""
        del step
        if not self.batches:
            return {}
        made = [jax.device_get(self._sums(params, batch)) for batch in self.batches]
        sums = {name: np.sum([s[name] for s, _ in made]) for name in made[0][0]}
        weights = {name: np.sum([w[name] for _, w in made]) for name in made[0][1]}
        values = {name: float(value) for name, value in part_values(sums, weights).items()}
        return {"loss": float(total_loss(self.system.coefficients, sums, weights))} | values
