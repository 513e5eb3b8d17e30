"""One attention call and its reference implementation in plain XLA operations.

`AttentionCall` is what every implementation is asked about and given (see `attention.py`, the door that
callers use). The reference follows Vaswani et al. 2017, Eq. 1, with grouped heads (Ainslie et al. 2023):
queries are grouped by the key head that they share, so keys and values are never repeated. Softmax is in
float32.
"""

from dataclasses import dataclass, replace

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


@jax.custom_vjp
def masked_softmax(
    scores: Float[Array, "*rows keys"], visible: Bool[Array, "*#rows #keys"]
) -> Float[Array, "*rows keys"]:
    """Softmax over the visible keys, 0 elsewhere and in rows that see none; its gradients are finite everywhere.

    The backward pass is written out: it needs the weights alone, and neither the mask nor the scores again.
    """
    top = jnp.max(jnp.where(visible, scores, HIDDEN), axis=-1, keepdims=True)
    weights = jnp.where(visible, jnp.exp(scores - top), 0)
    total = weights.sum(axis=-1, keepdims=True)
    return weights * (1 / jnp.where(total == 0, 1, total))


def _masked_softmax_forward(scores: Array, visible: Array) -> tuple[Array, Array]:
    weights = masked_softmax(scores, visible)
    return weights, weights


def _masked_softmax_backward(weights: Array, gradient: Array) -> tuple[Array, None]:
    pulled = weights * gradient
    return pulled - weights * pulled.sum(axis=-1, keepdims=True), None


masked_softmax.defvjp(_masked_softmax_forward, _masked_softmax_backward)


def attend_xla(call: AttentionCall) -> Float[Array, "batch queries heads head_dim"]:
    """Reference attention; queries that see no key give 0, with finite gradients.

    Queries of all heads that share a key head are rows of one product, which is also what a CPU does fastest. Heads
    vary fastest among them, so that queries stay cut where a mesh cuts them.
    """
    return _attend_heads(call, call.k.transpose(0, 2, 1, 3), call.v.transpose(0, 2, 1, 3))


def _attend_heads(
    call: AttentionCall,
    k: Float[Array, "batch kv_heads keys head_dim"],
    v: Float[Array, "batch kv_heads keys head_dim"],
) -> Float[Array, "batch queries heads head_dim"]:
    """The reference, with the keys and values of a call heads first."""
    batch, queries, heads, head_dim = call.q.shape
    kv_heads, keys = k.shape[1:3]
    group = heads // kv_heads
    q = call.q.reshape(batch, queries, kv_heads, group, head_dim).transpose(0, 2, 1, 3, 4)
    q = q.reshape(batch, kv_heads, queries * group, head_dim)
    scores = jnp.einsum("bkqd,bksd->bkqs", q, k, preferred_element_type=jnp.float32) * call.scale
    if call.bias is not None:
        bias = jnp.broadcast_to(call.bias, (call.bias.shape[0], heads, queries, keys)).astype(jnp.float32)
        bias = bias.reshape(-1, kv_heads, group, queries, keys).swapaxes(2, 3)
        scores = scores + bias.reshape(-1, kv_heads, queries * group, keys)
    visible = visibility(call)
    visible = jnp.ones((1, 1, 1), bool) if visible is None else jnp.repeat(visible, group, axis=1)
    weights = masked_softmax(scores, visible[:, None]).astype(v.dtype)
    mixed = jnp.einsum("bkqs,bksd->bkqd", weights, v).reshape(batch, kv_heads, queries, group, head_dim)
    return mixed.transpose(0, 2, 1, 3, 4).reshape(batch, queries, heads, head_dim).astype(call.q.dtype)


def attend_xla_in_blocks(call: AttentionCall, block: int = 256) -> Float[Array, "batch queries heads head_dim"]:
    """The reference, `block` queries after the other: scores are never whole, and a CPU's caches hold those of a block.

    The backward pass computes each block anew.
    """
    batch, queries = call.q.shape[:2]
    count = -(-queries // block)
    positions = call.q_positions
    if call.causal and positions is None:
        positions = jnp.broadcast_to(jnp.arange(queries), (batch, queries))
    bias = call.bias
    cut_bias = bias is not None and bias.shape[2] > 1

    def blocks(x: Array, axis: int = 1) -> Array:
        x = jnp.pad(x, [(0, count * block - queries if each == axis else 0) for each in range(x.ndim)])
        return jnp.moveaxis(x.reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :]), axis, 0)

    cut = {
        "q": blocks(call.q),
        **({"q_positions": blocks(positions)} if positions is not None else {}),
        **({"q_segments": blocks(call.q_segments)} if call.q_segments is not None else {}),
        **({"bias": blocks(bias, 2)} if bias is not None and cut_bias else {}),
    }
    k, v = call.k.transpose(0, 2, 1, 3), call.v.transpose(0, 2, 1, 3)  # once, not for each block
    mixed = jax.lax.map(jax.checkpoint(lambda part: _attend_heads(replace(call, **part), k, v), prevent_cse=False), cut)
    return jnp.moveaxis(mixed, 0, 1).reshape(batch, count * block, *mixed.shape[3:])[:, :queries]
