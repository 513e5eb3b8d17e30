"""Choosing the next token from logits: greedy, temperature, top-k and top-p, each row with its own settings.

Every setting is an array, so changing one never recompiles. The order is that of `transformers`: forbidden
tokens out, then temperature, then top-k, then top-p (nucleus sampling, Holtzman et al. 2020) over what top-k
left. Both cuts are found by bisection on the bit pattern of the logits (32 passes over the vocabulary, exact)
instead of by sorting it; tokens that tie with the last one kept are kept too. Work that no row asks for is
skipped by `lax.cond`.

    settings = sampling_settings(rows=8, temperature=0.7, top_p=0.9, seed=1)
    tokens = sample_tokens(logits, allowed, settings, step)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int, UInt32

from tracevision_jax.errors import UserError

Array = jax.Array | np.ndarray
INT32 = np.iinfo(np.int32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingSettings:
    """How each row chooses its tokens."""

    temperature: Float[Array, "batch"]
    """0 takes the most likely token."""
    top_k: Int[Array, "batch"]
    """Only the k most likely tokens are left; 0 leaves all."""
    top_p: Float[Array, "batch"]
    """Only the most likely tokens that together reach this probability are left; 1 leaves all."""
    seeds: UInt32[Array, "batch"]
    """A row's draws depend on its own seed and the step alone, not on the other rows of its batch."""


@dataclass(frozen=True)
class Scale:
    """Tokens in a row that stand for neighbouring values, such as the bins of a coordinate."""

    first: int
    count: int
    reach: int
    """How many values on each side of it speak for a value."""


def sampling_settings(
    rows: int,
    temperature: float | Sequence[float] = 0.0,
    top_k: int | Sequence[int] = 0,
    top_p: float | Sequence[float] = 1.0,
    seed: int | Sequence[int] = 0,
) -> SamplingSettings:
    """Settings for a batch; a single value serves all rows, and a single seed gives row i the seed + i.

    Raises UserError where a value is outside its range.
    """
    seeds = np.asarray(seed, np.int64)
    settings = SamplingSettings(
        temperature=_per_row("temperature", temperature, np.float32, rows),
        top_k=_per_row("top_k", top_k, np.int32, rows),
        top_p=_per_row("top_p", top_p, np.float32, rows),
        seeds=_per_row("seed", (seeds + np.arange(rows) if seeds.ndim == 0 else seeds) % 2**32, np.uint32, rows),
    )
    if not (np.isfinite(settings.temperature).all() and (np.asarray(settings.temperature) >= 0).all()):
        raise UserError(f"temperature must be 0 (greedy) or a positive number, not {temperature}")
    if not (np.asarray(settings.top_k) >= 0).all():
        raise UserError(f"top_k must be 0 (no limit) or a positive count, not {top_k}")
    if not ((np.asarray(settings.top_p) > 0) & (np.asarray(settings.top_p) <= 1)).all():
        raise UserError(f"top_p must be above 0 and at most 1 (no limit), not {top_p}")
    return settings


def _per_row(name: str, value, dtype: type, rows: int) -> np.ndarray:
    array = np.asarray(value, dtype)
    if array.ndim > 1 or (array.ndim == 1 and array.shape[0] != rows):
        raise UserError(f"{name} needs one value, or one for each of the {rows} rows, not {array.size}")
    return np.ascontiguousarray(np.broadcast_to(array, (rows,)))


def sample_tokens(
    logits: Float[Array, "batch vocabulary"],
    allowed: Bool[Array, "batch vocabulary"],
    settings: SamplingSettings,
    step: Int[Array, ""] | int,
    scale: Scale | None = None,
) -> Int[Array, "batch"]:
    """Draw one token a row among the allowed ones (of which every row must have one).

    At temperature 0 a token of `scale` counts with its neighbours: see `pool_neighbours`.
    """
    # An allowed token stays above every forbidden one even where the model says -inf.
    logits = jnp.maximum(logits.astype(jnp.float32), jnp.finfo(jnp.float32).min)
    logits = jnp.where(allowed, logits, -jnp.inf)
    pooled = logits if scale is None else pool_neighbours(logits, scale)
    greedy = jnp.argmax(pooled, axis=-1).astype(jnp.int32)
    drawn = settings.temperature > 0

    def draw() -> jax.Array:
        kept = filter_logits(logits, settings)
        keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(settings.seeds)
        return jnp.where(drawn, jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32), greedy)

    return lax.cond(jnp.any(drawn), draw, lambda: greedy)


def pool_neighbours(logits: Float[Array, "batch vocabulary"], scale: Scale) -> Float[Array, "batch vocabulary"]:
    """Each value's logit becomes that of all values within `reach` of it together; other tokens keep theirs.

    The most likely of many narrow bins is a poor guess of a number: where a model is unsure, as of a place within an
    object, the largest single probability falls on an end of the scale, at which clipped values pile up. The middle
    of the window that holds most probability is right within `reach` most often (0-1 loss with a tolerance).
    """
    span = slice(scale.first, scale.first + scale.count)
    values = logits[:, span]
    top = jnp.maximum(jnp.max(values, axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    mass = lax.reduce_window(
        jnp.exp(values - top), 0.0, lax.add, (1, 2 * scale.reach + 1), (1, 1), ((0, 0), (scale.reach, scale.reach))
    )
    pooled = jnp.where(values > -jnp.inf, jnp.log(mass) + top, -jnp.inf)
    return jnp.asarray(logits).at[:, span].set(pooled)


def filter_logits(
    logits: Float[Array, "batch vocabulary"], settings: SamplingSettings
) -> Float[Array, "batch vocabulary"]:
    """Divide by the temperature and put -inf on what top-k and top-p remove (temperature 0 counts as 1)."""
    temperature = jnp.where(settings.temperature > 0, settings.temperature, 1.0)
    # Shifted to a maximum of 0 first: a tiny temperature must not overflow the best token.
    scaled = jnp.asarray(logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature[:, None]
    scaled = lax.cond(
        jnp.any(settings.top_k > 0), lambda: _keep_top_k(scaled, jnp.asarray(settings.top_k)), lambda: scaled
    )
    return lax.cond(
        jnp.any(settings.top_p < 1), lambda: _keep_top_p(scaled, jnp.asarray(settings.top_p)), lambda: scaled
    )


def _keep_top_k(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    order = _ordered_bits(logits)
    threshold = _largest_threshold(order, jnp.ones_like(order), jnp.minimum(top_k, logits.shape[-1]))
    return jnp.where((order >= threshold[:, None]) | (top_k[:, None] <= 0), logits, -jnp.inf)


def _keep_top_p(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    order = _ordered_bits(logits)
    weights = jnp.exp(logits)  # the maximum is 0, so the sum is between 1 and the vocabulary's size
    threshold = _largest_threshold(order, weights, top_p * jnp.sum(weights, axis=-1))
    return jnp.where((order >= threshold[:, None]) | (top_p[:, None] >= 1), logits, -jnp.inf)


def _ordered_bits(numbers: jax.Array) -> jax.Array:
    """Integers in the same order as the float32 numbers."""
    bits = lax.bitcast_convert_type(numbers, jnp.int32)
    return jnp.where(bits < 0, bits ^ INT32.max, bits)


def _largest_threshold(order: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """For each row the largest integer t at which the weights of `order >= t` still sum to the target.

    Never above the row's largest entry, so that the most likely token is kept, whatever rounding does.
    """
    highest = jnp.max(order, axis=-1)

    def halve(_, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # low satisfies the condition, high + 1 does not
        middle = (low | high) - ((low ^ high) >> 1)  # the mean, rounded up, without overflow
        total = jnp.sum(jnp.where(order >= middle[:, None], weights, 0), axis=-1)
        enough = total >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low, _ = lax.fori_loop(0, 32, halve, (jnp.full_like(highest, INT32.min), highest))
    return low
