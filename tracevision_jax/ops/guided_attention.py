"""Supervised attention: a head is taught to look at the visual tokens that show what is being answered.

Supervising attention with known alignments is due to Mi, Wang and Ittycheriah (arXiv:1608.00112). Here a token that is
about a place, such as a coordinate of a box, shall put its attention on the visual tokens that this place covers. A
model that starts from nothing needs it to find an object by its name within few steps.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def sought_tokens(
    sought: Float[Array, "rows seekers 4"], shown: Float[Array, "rows tokens 4"]
) -> Bool[Array, "rows seekers tokens"]:
    """Which tokens (last axis) show what each token seeks: those that its place covers at least half as much as any.

    Args:
        sought: the place (x1, y1, x2, y2) that a token is about; one without area is about none.
        shown: the part of the picture that a token shows; one without area shows none.
    """
    sought, shown = sought[:, :, None], shown[:, None]
    sides = jnp.minimum(sought[..., 2:], shown[..., 2:]) - jnp.maximum(sought[..., :2], shown[..., :2])
    covered = jnp.prod(jnp.maximum(sides, 0.0), axis=-1)
    return (covered > 0) & (covered >= 0.5 * covered.max(axis=-1, keepdims=True))


def guided_attention_loss(
    queries: Float[Array, "rows tokens head_dim"],
    keys: Float[Array, "rows tokens head_dim"],
    segments: Int[Array, "rows tokens"],
    wanted: Bool[Array, "rows tokens tokens"],
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum over guided tokens of -log(share of their causal attention on what they want), and the count of these tokens.

    Guided is a token that sees some of what it wants. Queries and keys are one head's, rotated; `segments` are the
    rows' conversations, 0 for padding. The square of the tokens is materialised.
    """
    tokens = queries.shape[1]
    causal = jnp.arange(tokens)[:, None] >= jnp.arange(tokens)
    visible = causal & (segments[:, :, None] == segments[:, None]) & (segments[:, :, None] > 0)
    wanted = visible & wanted
    guided = wanted.any(axis=-1)
    logits = jnp.einsum("nqd,nkd->nqk", queries, keys, preferred_element_type=jnp.float32) * queries.shape[-1] ** -0.5
    lowest = jnp.finfo(jnp.float32).min
    everywhere = jax.nn.logsumexp(jnp.where(visible, logits, lowest), axis=-1)
    there = jax.nn.logsumexp(jnp.where(wanted, logits, lowest), axis=-1)
    return jnp.where(guided, everywhere - there, 0.0).sum(), guided.sum(dtype=jnp.float32)
