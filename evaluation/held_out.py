"""Evaluators of the training loop on held-out records: the loss, and pictures of answers for TensorBoard.

HeldOutLoss(system, read_rows, collate, bucket, rows=8)(params, step)        # {"loss": ..., "text": ..., ...}
HeldOutPictures(config, vocabulary, read_prompts)(params, step)              # {"answer_0": (h, w, 3) uint8, ...}
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evaluation.on_mesh import on_mesh
from tracevision_jax.inference.engine import Engine
from tracevision_jax.inference.pictures_sheets import Panel, sheet
from tracevision_jax.inference.rendering import draw_answer
from tracevision_jax.layers.sharding import mesh_of
from tracevision_jax.records.batch import Batch, Bucket
from tracevision_jax.records.encoded import Piece
from tracevision_jax.records.sample import Conversation, Sample, TracePart
from tracevision_jax.records.vocabulary import Vocabulary
from tracevision_jax.systems.protocol import System
from tracevision_jax.systems.tracevision import TraceVisionConfig
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
        made = [on_mesh(self._sums, params, batch) for batch in self.batches]
        sums, weights = jax.tree.map(lambda *parts: jnp.asarray(sum(parts)), *made)
        values = {name: float(value) for name, value in part_values(sums, weights).items()}
        return {"loss": float(total_loss(self.system.coefficients, sums, weights))} | values


@dataclasses.dataclass
class HeldOutPictures:
    """What the model answers to a few held-out prompts, drawn, with the question and the answer as text."""

    config: TraceVisionConfig
    vocabulary: Vocabulary
    read_prompts: Callable[[], Iterable[tuple[Sample, Conversation, Piece]]]
    """Makes the prompts (pieces without their answer); called once, at the first evaluation."""
    max_new_tokens: int = 96
    _engine: Engine | None = dataclasses.field(default=None, init=False, repr=False)

    @cached_property
    def prompts(self) -> list[tuple[Sample, Conversation, Piece]]:
        """The prompts."""
        return list(self.read_prompts())

    def __call__(self, params: Any, step: int) -> dict[str, np.ndarray]:
        """{"answer_<number>": picture}."""
        del step
        if self._engine is None:
            self._engine = Engine(self.config, params, self.vocabulary, mesh=mesh_of(params))
        self._engine.params = params
        answers = self._engine.generate([piece for *_, piece in self.prompts], max_new_tokens=self.max_new_tokens)
        pictures = {}
        for number, ((sample, conversation, _), answer) in enumerate(zip(self.prompts, answers, strict=True)):
            parts = [part for turn in conversation.turns[:-1] for part in turn.parts]
            shown = [part.points for part in parts if isinstance(part, TracePart)]
            asked = " ".join(part if isinstance(part, str) else "..." for part in parts)
            panel = Panel(draw_answer(sample, answer, shown), f"{asked}\n{answer.text}")
            pictures[f"answer_{number}"] = np.asarray(sheet([panel], columns=1).convert("RGB"))
        return pictures
