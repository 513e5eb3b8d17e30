"""Attention of many queries to many keys, some queries at a time, so that the matrix of scores is never whole.

It is for calls that no fused kernel serves, such as SAM 2's memory attention: 4,096 queries, 28,736 keys, one head of
256 channels. There the scores are 470 MB in float32; on a CPU, blocks of 256 queries take a tenth of the time. The
backward pass computes each block anew. Rows of a softmax know nothing of each other, so the result is the same.

Values may have another width than keys, since a projection of values can as well follow the attention:
weights (x W + b) = (weights x) W + b. Where W widens, as from 64 to 256 channels of a memory, that is less work.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tracevision_jax.ops.attention import attention_to_visible
from tracevision_jax.ops.attention_call import masked_softmax


def attention_in_blocks(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads value_dim"],
    visible: Bool[Array, "batch keys"] | None = None,
    block: int = 256,
) -> Float[Array, "batch queries heads value_dim"]:
    """Scaled dot-product attention, `block` queries at a time; keys that are not `visible` are hidden from all.

    Where no key is visible the result is 0. Blocks go through `ops.attention` when keys and values are as wide.
    """

    def attend(q: Array) -> Array:
        if k.shape[-1] != v.shape[-1]:
            return _attend(q, k, v, visible)
        return attention_to_visible(q, k, v, visible)

    batch, queries, heads, head_dim = q.shape
    if queries <= block:
        return attend(q)
    count = -(-queries // block)
    padded = jnp.pad(q, ((0, 0), (0, count * block - queries), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(batch, count, block, heads, head_dim), 1, 0)
    mixed = jax.lax.map(jax.checkpoint(attend, prevent_cse=False), blocks)
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, count * block, heads, v.shape[-1])[:, :queries]


def _attend(q: Array, k: Array, v: Array, visible: Array | None) -> Array:
    """What `ops.attention` does not express: values of another width. Softmax in float32."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    seen = jnp.ones((1, 1, 1, 1), bool) if visible is None else visible[:, None, None]
    weights = masked_softmax(scores, seen).astype(v.dtype)
    return jnp.einsum("bhqk,bkhe->bqhe", weights, v).astype(q.dtype)
