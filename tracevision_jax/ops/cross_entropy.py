"""Cross-entropy over a large vocabulary without all logits at one time: tokens go in chunks, logits are recomputed.

Use: `loss_sum, correct_sum = token_cross_entropy(hidden, targets, weights, logits_of, chunk)`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

LogitParts = tuple[tuple[int, Array], ...]
"""(first token, its logits and those of the tokens after it) of parts of a vocabulary, in order; where parts overlap
the later one counts, and the earlier one's columns must be low enough to vanish in a softmax."""


def token_cross_entropy(
    hidden: Float[Array, "B T width"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    logits_of: Callable[[Array], LogitParts],
    chunk: int = 0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Weighted sums over tokens of -log p(target), and of whether the target is the most likely token.

    Args:
        hidden: hidden states.
        targets: token ids.
        weights: weight of each token; 0 leaves it out.
        logits_of: (..., width) -> parts of (..., vocabulary) in float32.
        chunk: tokens of a row whose logits exist together, made again in the backward pass; 0 for all.
    """

    def sums(hidden, targets, weights):
        parts = logits_of(hidden)
        ends = [*(first for first, _ in parts[1:]), None]
        tops = [jax.lax.stop_gradient(logits.max(-1)) for _, logits in parts]
        top = functools.reduce(jnp.maximum, tops)
        total = sum(jnp.exp(logits - top[..., None]).sum(-1) for _, logits in parts)
        picked = sum(_at(logits, targets, first, end) for (first, logits), end in zip(parts, ends, strict=True))
        loss = jnp.log(total) + top - picked
        return (loss * weights).sum(), ((picked >= top) * weights).sum()

    tokens = hidden.shape[1]
    if not chunk or tokens <= chunk:
        return sums(hidden, targets, weights)
    padding = -tokens % chunk

    def fold(x):
        # A chunk is every n-th token of a row: where a mesh cuts rows, each device has its share of every chunk.
        x = jnp.pad(x, ((0, 0), (0, padding), *((0, 0),) * (x.ndim - 2)))
        return jnp.moveaxis(x.reshape(x.shape[0], chunk, -1, *x.shape[2:]), 2, 0)

    losses, correct = jax.lax.map(lambda x: jax.checkpoint(sums)(*x), (fold(hidden), fold(targets), fold(weights)))
    return losses.sum(), correct.sum()


def _at(logits: Array, targets: Array, first: int, end: int | None) -> Array:
    """The logit of each target that is one of a part's tokens, else 0.

    A masked sum, not a lookup: it is part of the pass that sums the exponentials, its gradient is no scatter, and where
    the vocabulary is cut over devices each sums what it has.
    """
    ids = first + jnp.arange(logits.shape[-1])
    here = ids == targets[..., None]
    return jnp.where(here if end is None else here & (ids < end), logits, 0).sum(-1)


def learned_first(
    most: int, hidden: Float[Array, "B T width"], targets: Int[Array, "B T"], weights: Float[Array, "B T"]
) -> tuple[Float[Array, "B most width"], Int[Array, "B most"], Float[Array, "B most"]]:
    """Keep `most` tokens of each row, those with a weight first: logits of the others would be made for nothing.

    The caller sees to it that no row has more than `most` tokens with a weight.
    """
    if most >= hidden.shape[1]:
        return hidden, targets, weights
    order = jnp.argsort(weights == 0, axis=1, stable=True)[:, :most]
    kept = jnp.take_along_axis(hidden, order[..., None], axis=1)
    return kept, jnp.take_along_axis(targets, order, 1), jnp.take_along_axis(weights, order, 1)
