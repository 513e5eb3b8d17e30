"""An engine without a model: answers follow from a function of the prompt's text."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np

from tests.inference import tiny
from tracevision_jax.inference.answers import Answer, Mask, MaskPlace, read_tokens
from tracevision_jax.records.encoded import Piece


class StubEngine:
    """Stands in for `inference.engine.Engine` where the sweep uses it."""

    buckets = ()

    def __init__(self, reply: Callable[[str, list[int]], list[int]] = lambda text, force: force):
        """`reply` gives the tokens of the answer from the prompt's text and the answer's forced beginning."""
        self.vocabulary, self.config = tiny.vocabulary(), SimpleNamespace(name="stub")
        self.reply = reply
        self.calls: list[int] = []
        self.texts: list[str] = []

    def generate(self, pieces: Sequence[Piece], *, max_new_tokens: Sequence[int], force, rows: int) -> list[Answer]:
        self.calls.append(len(pieces))
        asked = zip(pieces, force, max_new_tokens, strict=True)
        return [self._answer(piece, list(begin), budget) for piece, begin, budget in asked]

    def _answer(self, piece: Piece, force: list[int], budget: int) -> Answer:
        text = self.vocabulary.decode(piece.conversations[0].tokens.tolist())
        self.texts.append(text)
        tokens = self.reply(text, force)
        assert tokens[: len(force)] == force and len(tokens) < budget
        parts = tuple(
            Mask(np.full((len(piece.grid), 4, 4), 1.0)) if isinstance(part, MaskPlace) else part
            for part in read_tokens(tokens, self.vocabulary)
        )
        return Answer(tuple(tokens), parts, (-0.5,) * len(tokens), "end", self.vocabulary.decode(tokens))
