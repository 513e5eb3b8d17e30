"""Attention under a mesh, behind `ops.attention`: splash attention for TPU, cuDNN for GPU, and the reference.

Splash is jax's own Pallas kernel (`jax.experimental.pallas.ops.tpu.splash_attention`); Mosaic kernels are not
partitioned by XLA, so under a mesh it runs inside `shard_map`: rows, heads and queries split, keys whole. cuDNN is
reached through `jax.nn.dot_product_attention`, whose public form has no segment ids: packed rows go in as a mask.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from tracevision_jax.ops.attention_call import AttentionCall, attend_xla, visibility
from tracevision_jax.ops.placement import Placement, dividing

TPU_LANES = 128
SPLASH_BLOCK_LIMIT = 512
CUDNN_HEAD_DIM_LIMIT = 128


def _why_not_split(call: AttentionCall, placement: Placement) -> str | None:
    """Reason why `shard_map` cannot part the call's rows and heads, or None."""
    batch, _, heads, _ = call.q.shape
    if batch % placement.shards(placement.batch_axes):
        return f"{batch} rows do not divide over {placement.batch_axes}"
    if heads % placement.shards(placement.head_axes) or call.k.shape[2] % placement.shards(placement.head_axes):
        return f"{heads} and {call.k.shape[2]} heads do not divide over {placement.head_axes}"
    return None


def why_not_splash(call: AttentionCall, placement: Placement) -> str | None:
    """Reason why splash attention cannot serve the call, or None."""
    length = call.q.shape[1]
    if placement.platform != "tpu":
        return f"it is a TPU kernel, not for {placement.platform}"
    if call.bias is not None:
        return "it takes no bias"
    if not call.self_attention:
        return "it needs queries and keys on the same rows, without offsets or key lengths"
    if length % (TPU_LANES * placement.token_shards):
        cut = f" x {placement.token_shards} over {placement.token_axes}" if placement.token_shards > 1 else ""
        return f"length {length} is no multiple of {TPU_LANES}{cut}"
    return _why_not_split(call, placement)


def attend_splash(call: AttentionCall, placement: Placement) -> Float[Array, "batch queries heads head_dim"]:
    """Splash attention; the head is padded with zeros to whole lanes, which changes no product.

    Where queries are cut, each shard runs the kernel on its own queries and all keys, and shard_map's transpose sums
    the gradients of keys and values. Slices are contiguous, so under a causal mask the last shard has the most to see:
    of n shards it computes 2 - 1/n times the mean, and the others wait. Giving each an early and a late slice would
    even it out, at the price of moving queries and results, of many heads, twice a layer.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    batch, length, heads, head_dim = call.q.shape
    local_heads, local_queries = heads // placement.shards(placement.head_axes), length // placement.token_shards
    # Shards differ in what they see only where it is causal; a full mask that is cut trips over a defect of jax's.
    if call.causal:
        mask, mask_axes = splash_attention_mask.CausalMask((length, length)), placement.token_axes
    else:
        mask, mask_axes = splash_attention_mask.FullMask((local_queries, length)), ()
    block = next(size for size in (SPLASH_BLOCK_LIMIT, 256, TPU_LANES) if local_queries % size == 0)
    sides = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash_attention_kernel.BlockSizes(**dict.fromkeys((*sides, "block_q_dq", "block_kv_dq"), block))
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * local_heads),
        block_sizes=sizes,
        head_shards=1,  # all heads have one mask
        q_seq_shards=placement.shards(mask_axes),
    )
    segments = jnp.ones((batch, length), jnp.int32) if call.q_segments is None else call.q_segments

    def attend(kernel: Any, q: Array, k: Array, v: Array, q_segments: Array, kv_segments: Array) -> Array:
        def one_row(q: Array, k: Array, v: Array, q_ids: Array, kv_ids: Array) -> Array:
            mixed = kernel(q, k, v, segment_ids=splash_attention_kernel.SegmentIds(q=q_ids, kv=kv_ids))
            assert isinstance(mixed, jax.Array)  # without residuals, which are not asked for
            return mixed

        heads_first = (0, 2, 1, 3)
        q, k, v = (x.transpose(heads_first) for x in (q, k, v))
        return jax.vmap(one_row)(q, k, v, q_segments, kv_segments).transpose(heads_first)

    if placement.mesh is not None:
        queries, keys = placement.specs()
        blocks = NamedSharding(placement.mesh, PartitionSpec(None, mask_axes or None))
        attend = jax.shard_map(
            attend,
            mesh=placement.mesh,
            in_specs=(
                kernel.manual_sharding_spec(blocks),
                queries, keys, keys, PartitionSpec(*queries[:2]), PartitionSpec(*keys[:2]),
            ),
            out_specs=queries,
            check_vma=False,
        )  # fmt: skip
    extra = -head_dim % TPU_LANES
    widen = ((0, 0), (0, 0), (0, 0), (0, extra))
    q, k, v = (jnp.pad(x, widen) for x in (call.q * call.scale, call.k, call.v))
    mixed = attend(kernel, q.astype(call.q.dtype), k, v, segments, segments)[..., :head_dim]
    # Padding attends to padding inside the kernel; here, as everywhere, it gives 0.
    return jnp.where((segments != 0)[:, :, None, None], mixed, 0).astype(call.q.dtype)


def why_not_cudnn(call: AttentionCall, placement: Placement) -> str | None:
    """Reason why cuDNN's fused attention cannot serve the call, or None."""
    head_dim = call.q.shape[-1]
    if placement.platform not in ("gpu", "cuda"):
        return f"it is a kernel for NVIDIA GPUs, not for {placement.platform}"
    if call.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in 16 bits, not in {call.q.dtype}"
    if head_dim > CUDNN_HEAD_DIM_LIMIT or head_dim % 8:
        return f"head size {head_dim} is over {CUDNN_HEAD_DIM_LIMIT} or no multiple of 8"
    if placement.token_shards > 1:
        if call.bias is not None or not call.self_attention:
            return "queries are cut, and have a bias, offsets or other keys than their own row's"
        if reason := _why_not_split(call, placement):
            return reason
    if call.q.shape[1] == 1 or call.q.shape[1] % (2 * placement.token_shards) or call.k.shape[1] % 2:
        return "it needs even lengths, more than one query"
    return None


def attend_cudnn(call: AttentionCall, placement: Placement) -> Float[Array, "batch queries heads head_dim"]:
    """cuDNN attention; a purely causal call needs no mask, everything else that hides keys goes in as one.

    XLA splits its rows and heads, and refuses to split its queries. Where they are cut, each shard calls it on its own
    queries and all keys, and what is causal goes in as a mask too, whose blocks above the diagonal it does not leave
    out: n shards each do 1 / n of the full square.
    """
    if placement.token_shards == 1:
        return _call_cudnn(call)
    local_queries = call.q.shape[1] // placement.token_shards
    segments = jnp.ones(call.q.shape[:2], jnp.int32) if call.q_segments is None else call.q_segments

    def attend(q: Array, k: Array, v: Array, q_segments: Array, kv_segments: Array) -> Array:
        rows = jax.lax.axis_index(placement.token_axes) * local_queries + jnp.arange(local_queries)
        changes: dict[str, Any] = {"q_segments": q_segments, "kv_segments": kv_segments, "q_positions": rows[None]}
        return _call_cudnn(dataclasses.replace(call, q=q, k=k, v=v, **changes))

    queries, keys = placement.specs()
    return jax.shard_map(
        attend,
        mesh=placement.mesh,
        in_specs=(queries, keys, keys, PartitionSpec(*queries[:2]), PartitionSpec(*keys[:2])),
        out_specs=queries,
        check_vma=False,
    )(call.q, call.k, call.v, segments, segments)


def _call_cudnn(call: AttentionCall) -> Array:
    plain_causal = call.causal and call.self_attention and call.q_segments is None
    visible = None if plain_causal else visibility(call)
    mixed = jax.nn.dot_product_attention(
        call.q, call.k, call.v,
        bias=None if call.bias is None else call.bias.astype(call.q.dtype),
        mask=None if visible is None else visible[:, None],
        scale=call.scale, is_causal=plain_causal, implementation="cudnn",
    )  # fmt: skip
    if visible is None:
        return mixed
    return jnp.where(visible.any(-1)[:, :, None, None], mixed, 0)


def attend_reference(call: AttentionCall, placement: Placement) -> Float[Array, "batch queries heads head_dim"]:
    """The XLA reference; queries that are cut meet whole keys, else the compiler may as well gather the queries."""
    if placement.mesh is None or placement.token_shards == 1 or call.q.shape[1] % placement.token_shards:
        return attend_xla(call)
    rows = dividing(placement.mesh, placement.batch_axes, call.q.shape[0]) or None
    heads = dividing(placement.mesh, placement.head_axes, call.k.shape[2]) or None
    whole = NamedSharding(placement.mesh, PartitionSpec(rows, None, heads, None))
    k, v = (jax.lax.with_sharding_constraint(x, whole) for x in (call.k, call.v))
    return attend_xla(dataclasses.replace(call, k=k, v=v))
