"""One attention call and its reference implementation in plain XLA operations.

`AttentionCall` is what every implementation is asked about and given (see `attention.py`, the door that
callers use). The reference follows Vaswani et al. 2017, Eq. 1, with grouped heads (Ainslie et al. 2023):
queries are grouped by the key head that they share, so keys and values are never repeated. Softmax is in
float32.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of `attention`; `scale` is always set."""

    q: Float[Array, "batch queries heads head_dim"]
    k: Float[Array, "batch keys kv_heads head_dim"]
    v: Float[Array, "batch keys kv_heads head_dim"]
    scale: float
    bias: Float[Array, "#batch #heads #queries #keys"] | None = None
    q_segments: Int[Array, "batch queries"] | None = None
    kv_segments: Int[Array, "batch keys"] | None = None
    causal: bool = False
    q_positions: Int[Array, "batch queries"] | None = None
    kv_lengths: Int[Array, "batch"] | None = None

    @property
    def self_attention(self) -> bool:
        """Whether queries and keys are the same rows, as far as shapes and masks tell."""
        return (
            self.q.shape[1] == self.k.shape[1]
            and self.q_segments is self.kv_segments
            and self.q_positions is None
            and self.kv_lengths is None
        )


def visibility(call: AttentionCall) -> Bool[Array, "#batch #queries keys"] | None:
    """Which keys each query sees; None when every query sees all of them."""
    keys = jnp.arange(call.k.shape[1])
    conditions = []
    if call.causal:
        rows = jnp.arange(call.q.shape[1])[None] if call.q_positions is None else call.q_positions
        conditions.append(keys[None, None, :] <= rows[:, :, None])
    if call.kv_lengths is not None:
        conditions.append(keys[None, None, :] < call.kv_lengths[:, None, None])
    if call.q_segments is not None and call.kv_segments is not None:
        same = call.q_segments[:, :, None] == call.kv_segments[:, None, :]
        conditions.append(same & (call.kv_segments != 0)[:, None, :])
    if not conditions:
        return None
    visible = conditions[0]
    for condition in conditions[1:]:
        visible = visible & condition
    return visible


def attend_xla(call: AttentionCall) -> Float[Array, "batch queries heads head_dim"]:
    """Reference attention; queries that see no key give 0, with finite gradients."""
    batch, queries, heads, head_dim = call.q.shape
    kv_heads = call.k.shape[2]
    group = heads // kv_heads
    grouped = call.q.reshape(batch, queries, kv_heads, group, head_dim)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", grouped, call.k, preferred_element_type=jnp.float32)
    scores = scores * call.scale
    if call.bias is not None:
        bias = jnp.asarray(call.bias, jnp.float32)
        bias_heads = bias.shape[1]
        split = (kv_heads, group) if bias_heads == heads else (1, 1)
        scores = scores + bias.reshape(bias.shape[0], *split, *bias.shape[2:])
    visible = visibility(call)
    if visible is not None:
        scores = jnp.where(visible[:, None, None], scores, HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(call.v.dtype)
    mixed = jnp.einsum("bkgqs,bskd->bqkgd", weights, call.v)
    if visible is not None:
        # The softmax of a row of equal numbers is uniform and finite; its result is discarded here.
        mixed = jnp.where(visible.any(-1)[:, :, None, None, None], mixed, 0)
    return mixed.reshape(batch, queries, heads, head_dim).astype(call.q.dtype)
