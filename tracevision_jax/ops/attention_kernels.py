"""Ready attention kernels behind `ops.attention`: splash attention for TPU, cuDNN for GPU.

Splash is jax's own Pallas kernel (`jax.experimental.pallas.ops.tpu.splash_attention`); Mosaic kernels are not
partitioned by XLA, so under a mesh it runs inside `shard_map`, rows and heads split. cuDNN is reached through
`jax.nn.dot_product_attention`, whose public form has no segment ids: packed rows go in as a mask.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from tracevision_jax.ops.attention_call import AttentionCall, visibility

TPU_LANES = 128
SPLASH_BLOCK_LIMIT = 512
CUDNN_HEAD_DIM_LIMIT = 128


@dataclass(frozen=True)
class Placement:
    """Where a call will run: the mesh (None for one device) and its axes that split rows and heads."""

    mesh: Mesh | None
    batch_axes: tuple[str, ...]
    head_axes: tuple[str, ...]
    platform: str

    def shards(self, axes: tuple[str, ...]) -> int:
        """Number of parts into which the given mesh axes split an array axis."""
        count = 1
        for axis in axes:
            count *= self.mesh.shape[axis] if self.mesh is not None else 1
        return count


def why_not_splash(call: AttentionCall, placement: Placement) -> str | None:
    """Reason why splash attention cannot serve the call, or None."""
    batch, length, heads, _ = call.q.shape
    if placement.platform != "tpu":
        return f"it is a TPU kernel, not for {placement.platform}"
    if call.bias is not None:
        return "it takes no bias"
    if not call.self_attention:
        return "it needs queries and keys on the same rows, without offsets or key lengths"
    if length % TPU_LANES:
        return f"length {length} is no multiple of {TPU_LANES}"
    if batch % placement.shards(placement.batch_axes):
        return f"{batch} rows do not divide over {placement.batch_axes}"
    if heads % placement.shards(placement.head_axes) or call.k.shape[2] % placement.shards(placement.head_axes):
        return f"{heads} and {call.k.shape[2]} heads do not divide over {placement.head_axes}"
    return None


def attend_splash(call: AttentionCall, placement: Placement) -> Float[Array, "batch queries heads head_dim"]:
    """Splash attention; the head is padded with zeros to whole lanes, which changes no product."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    batch, length, heads, head_dim = call.q.shape
    local_heads = heads // placement.shards(placement.head_axes)
    mask_of = splash_attention_mask.CausalMask if call.causal else splash_attention_mask.FullMask
    block = next(size for size in (SPLASH_BLOCK_LIMIT, 256, TPU_LANES) if length % size == 0)
    sides = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash_attention_kernel.BlockSizes(**dict.fromkeys((*sides, "block_q_dq", "block_kv_dq"), block))
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([mask_of((length, length))] * local_heads), block_sizes=sizes
    )
    segments = jnp.ones((batch, length), jnp.int32) if call.q_segments is None else call.q_segments

    def attend(q: Array, k: Array, v: Array, segments: Array) -> Array:
        def one_row(q: Array, k: Array, v: Array, ids: Array) -> Array:
            mixed = kernel(q, k, v, segment_ids=splash_attention_kernel.SegmentIds(q=ids, kv=ids))
            assert isinstance(mixed, jax.Array)  # without residuals, which are not asked for
            return mixed

        heads_first = (0, 2, 1, 3)
        mixed = jax.vmap(one_row)(
            q.transpose(heads_first), k.transpose(heads_first), v.transpose(heads_first), segments
        )
        return mixed.transpose(heads_first)

    if placement.mesh is not None:
        rows, split_heads = placement.batch_axes or None, placement.head_axes or None
        arrays = PartitionSpec(rows, None, split_heads, None)
        attend = jax.shard_map(
            attend,
            mesh=placement.mesh,
            in_specs=(arrays, arrays, arrays, PartitionSpec(rows, None)),
            out_specs=arrays,
            check_vma=False,
        )
    extra = -head_dim % TPU_LANES
    widen = ((0, 0), (0, 0), (0, 0), (0, extra))
    q, k, v = (jnp.pad(x, widen) for x in (call.q * call.scale, call.k, call.v))
    mixed = attend(q.astype(call.q.dtype), k, v, segments)[..., :head_dim]
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
    if call.q.shape[1] == 1 or call.q.shape[1] % 2 or call.k.shape[1] % 2:
        return "it needs even lengths, more than one query"
    return None


def attend_cudnn(call: AttentionCall, placement: Placement) -> Float[Array, "batch queries heads head_dim"]:
    """cuDNN attention; a purely causal call needs no mask, everything else that hides keys goes in as one."""
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
