"""Attention of many queries to many keys, some queries at a time, so that the matrix of scores is never whole.

It is for calls that no fused kernel serves, such as SAM 2's memory attention: 4,096 queries, 28,736 keys, one head of
256 channels. There the scores are 470 MB in float32; on a CPU, blocks of 256 queries take a tenth of the time. The
backward pass computes each block anew. Rows of a softmax know nothing of each other, so the result is the same.

Values may have another width than keys, since a projection of values can as well follow the attention:
weights (x W + b) = (weights x) W + b. Where W widens, as from 64 to 256 channels of a memory, that is less work.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tracevision_jax.ops.attention import attention_to_visible
from tracevision_jax.ops.attention_call import HIDDEN


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

    if k.shape[-1] == v.shape[-1]:
        attend = partial(attention_to_visible, k=k, v=v, visible=visible)
    else:
        # Turned once for all blocks: within the loop a CPU would do it for each.
        attend = partial(_attend, k=jnp.moveaxis(k, 1, -1), v=jnp.moveaxis(v, 1, 2), visible=visible)
    batch, queries, heads, head_dim = q.shape
    if queries <= block:
        return attend(q)
    count = -(-queries // block)
    padded = jnp.pad(q, ((0, 0), (0, count * block - queries), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(padded.reshape(batch, count, block, heads, head_dim), 1, 0)
    mixed = jax.lax.map(jax.checkpoint(attend, prevent_cse=False), blocks)
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, count * block, heads, v.shape[-1])[:, :queries]


def _attend(
    q: Float[Array, "batch block heads head_dim"],
    k: Float[Array, "batch heads head_dim keys"],
    v: Float[Array, "batch heads keys value_dim"],
    visible: Bool[Array, "batch keys"] | None,
) -> Float[Array, "batch block heads value_dim"]:
    """What `ops.attention` does not express: values of another width. Softmax in float32, its sum at last."""
    scores = jnp.einsum("bqhd,bhdk->bhqk", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    if visible is None:
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    else:
        seen = visible[:, None, None]
        scores = jnp.where(seen, scores, HIDDEN)
        weights = jnp.where(seen, jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True))), 0)
    total = weights.sum(-1, keepdims=True)
    mixed = jnp.einsum("bhqk,bhke->bhqe", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return jnp.moveaxis(mixed / jnp.where(total == 0, 1, total), 1, 2).astype(q.dtype)
