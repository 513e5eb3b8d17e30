"""Memory attention of SAM 2 (Ravi et al. 2024, Sec. 4 and App. D.1): a frame's features learn of earlier frames.

It follows facebookresearch/sam2, `modeling/memory_attention.py`, `sam/transformer.py` and `sam2_base.py`. Keys that
are padding are hidden, so that a bank of fixed shape gives what its entries alone would give. Rotary positions turn
neighbouring channels (2j, 2j + 1) in the original; here a head's channels are in the order of `ops.rotary`, first all
even ones, then all odd ones, which the table of weights sees to: products of queries and keys are the same.

    reading = jax.vmap(lambda bank, time: read(bank, time, config))(banks, times)      # over videos
    conditioned = MemoryConditioning(config).apply(params, features, position, reading, use_memory)
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from tracevision_jax.layers.basic import precision, projection, rematerialised, scanned
from tracevision_jax.layers.sharding import constrain
from tracevision_jax.layers.vit import layer_norm
from tracevision_jax.ops.attention_blocks import attention_in_blocks
from tracevision_jax.ops.rotary import apply_rotary, axial_angles, planar_frequencies
from tracevision_jax.ops.sine_position import TEMPERATURE, sine_position
from tracevision_jax.segmentation.memory_bank import MemoryReading
from tracevision_jax.segmentation.sam_config import MemoryConfig

POSITION_WEIGHT = 0.1
"""Of the sine positions that are added to the features."""
NEAR = 2.5
"""See `RotaryAttention.near`: a model that starts from nothing looks at memories where it is itself."""


class MemoryTokens(NamedTuple):
    """What a frame attends to: cells of one memory after another, then pointers."""

    tokens: Float[Array, "objects keys memory_width"]
    positions: Float[Array, "objects keys memory_width"]
    """Added to keys, not to values."""
    visible: Bool[Array, "objects keys"]


def line_sines(places: Float[Array, "*batch"], channels: int) -> Float[Array, "*batch channels"]:
    """Codes of numbers: all sines, then all cosines; each frequency stands twice in a row (sam2_utils.py)."""
    half = channels // 2
    wavelength = (TEMPERATURE ** (2 * (np.arange(half) // 2) / half)).astype(np.float32)
    angles = places[..., None] / wavelength
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class RotaryAttention(nn.Module):
    """Attention of one head whose queries are the cells of a map; keys are cells of maps of that size, then others."""

    config: MemoryConfig
    unplaced: int = 0
    """Keys at the end that have no place in a map: object pointers."""
    near: float = 0.0
    """Biases of queries and keys where they are drawn. Rotary positions turn a constant into a preference for keys of
    the same place, the stronger the larger it is."""

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "n cells width"],
        keys: Float[Array, "n keys key_width"],
        values: Float[Array, "n keys key_width"],
        angles: Float[Array, "cells half"],
        visible: Bool[Array, "n keys"] | None = None,
    ) -> Float[Array, "n cells width"]:
        c = self.config
        q = projection("q_proj", (1, c.width), bias_start=self.near, **precision(c))(queries)
        k = projection("k_proj", (1, c.width), bias_start=self.near, **precision(c))(keys)
        placed = keys.shape[1] - self.unplaced
        maps = k[:, :placed].reshape(len(k), -1, len(angles), 1, c.width)
        turned = apply_rotary(maps, angles[None, None]).reshape(len(k), placed, 1, c.width)
        k = jnp.concatenate([turned, k[:, placed:]], axis=1)
        mixed = attention_in_blocks(apply_rotary(q, angles[None]), k, values[:, :, None], visible)
        # Values are projected after they are mixed: those of a memory are a quarter as wide before.
        mixed = projection("v_proj", (1, c.width), **precision(c))(mixed[:, :, 0])
        return projection("o_proj", c.width, axis=(-2, -1), **precision(c))(mixed)


class MemoryAttentionLayer(nn.Module):
    """Self-attention, attention to memory, MLP, each after a norm; the body of a scan."""

    config: MemoryConfig
    pointer_tokens: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "n cells width"],
        angles: Float[Array, "cells half"],
        keys: Float[Array, "n keys memory_width"],
        values: Float[Array, "n keys memory_width"],
        visible: Bool[Array, "n keys"],
    ) -> tuple[Float[Array, "n cells width"], None]:
        c = self.config

        def norm(index: int, x: Array) -> Array:
            return layer_norm(f"layer_norm{index}", c.norm_eps, **precision(c))(x)

        normed = norm(1, x)
        x = x + RotaryAttention(c, name="self_attn")(normed, normed, normed, angles)
        cross = RotaryAttention(c, self.pointer_tokens, NEAR, name="cross_attn_image")
        x = x + cross(norm(2, x), keys, values, angles, visible)
        hidden = nn.relu(projection("linear1", c.mlp_width, **precision(c))(norm(3, x)))
        x = x + projection("linear2", c.width, **precision(c))(constrain(hidden, "batch", None, "mlp"))
        return constrain(x, "batch", None, None), None


class MemoryAttention(nn.Module):
    """A stack of layers; parameters have a leading axis of layers."""

    config: MemoryConfig

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "n rows columns width"],
        position: Float[Array, "rows columns width"],
        memory: MemoryTokens,
        pointer_tokens: int,
    ) -> Float[Array, "n rows columns width"]:
        """Condition features on memory; where an object sees no key at all the result is finite and means nothing.

        Args:
            features: of the current frame, stride 16.
            position: their sine positions.
            memory: tokens of maps of the features' size, then `pointer_tokens` of pointers.
            pointer_tokens: how many tokens at the end have no place.
        """
        c = self.config
        n, rows, columns, width = features.shape
        dtype = jnp.dtype(c.dtype)
        row, column = jnp.mgrid[:rows, :columns].reshape(2, -1)
        angles = axial_angles(jnp.stack([column, row], axis=-1), planar_frequencies(width, c.rope_theta))
        x = (features + POSITION_WEIGHT * position).astype(dtype).reshape(n, rows * columns, width)
        values = memory.tokens.astype(dtype)
        keys = values + memory.positions.astype(dtype)
        layer = rematerialised(MemoryAttentionLayer, c.remat)
        stack = scanned(layer, c.layers, (nn.broadcast,) * 4)(c, pointer_tokens, name="layers")
        x, _ = stack(x, angles, keys, values, memory.visible)
        return layer_norm("layer_norm", c.norm_eps, **precision(c))(x).reshape(features.shape)


class MemoryEmbedding(nn.Module):
    """What was read of a bank as tokens with positions in space and time."""

    config: MemoryConfig

    @nn.compact
    def __call__(self, reading: MemoryReading) -> MemoryTokens:
        """Cells of all memories in a row, then every pointer cut into tokens of the memory's width."""
        c = self.config
        dtype, param_dtype = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype)
        objects, frames, rows, columns, width = reading.memories.shape
        cells = rows * columns
        name, shape = "memory_temporal_positional_encoding", (c.frames, width)
        times = self.param(name, nn.initializers.normal(0.02), shape, param_dtype).astype(dtype)
        # Row t - 1 is for t steps back, the last one for conditioning frames.
        when = times[(reading.memory_steps - 1) % c.frames][:, :, None]
        where = sine_position(rows, columns, width).reshape(cells, width).astype(dtype)

        parts, pointers = c.pointer_parts, reading.pointers.shape[1]
        if c.pointer_times:
            code = line_sines(reading.pointer_distances, c.width).astype(dtype)
            name = "temporal_positional_encoding_projection_layer"
            distances = projection(name, width, dtype=dtype, param_dtype=param_dtype)(code)
        else:
            distances = jnp.zeros((objects, pointers, width), dtype)
        return MemoryTokens(
            jnp.concatenate(
                [
                    reading.memories.astype(dtype).reshape(objects, frames * cells, width),
                    reading.pointers.astype(dtype).reshape(objects, pointers * parts, width),
                ],
                axis=1,
            ),
            jnp.concatenate(
                [(when + where).reshape(objects, frames * cells, width), jnp.repeat(distances, parts, axis=1)], axis=1
            ),
            jnp.concatenate(
                [jnp.repeat(reading.memory_visible, cells, axis=1), jnp.repeat(reading.pointer_visible, parts, axis=1)],
                axis=1,
            ),
        )


class MemoryConditioning(nn.Module):
    """From features of frames and what was read of their videos' banks to the features that masks are decoded from."""

    config: MemoryConfig

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "videos rows columns width"],
        position: Float[Array, "rows columns width"],
        reading: MemoryReading | None = None,
        use_memory: Bool[Array, "videos objects"] | Bool[Array, ""] | bool = True,
    ) -> Float[Array, "videos objects rows columns width"]:
        """Condition.

        Args:
            features: of one frame of each video, stride 16.
            position: their sine positions.
            reading: see `memory_bank.read`, all arrays with a leading axis of videos; None where there is no memory at
                all, as for an image, which has one object then.
            use_memory: for which objects; the others, on frames where they are prompted for the first time, and those
                with nothing to read get a learned vector for "no memory" instead.
        """
        c = self.config
        dtype, param_dtype = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype)
        tables = {
            name: self.param(name, nn.initializers.normal(0.02), (1, 1, c.width), param_dtype)
            # The second is in every released file, and read by nobody.
            for name in ("no_memory_embedding", "no_memory_positional_encoding")
        }
        features = features.astype(dtype)[:, None]
        alone = features + tables["no_memory_embedding"][0, 0].astype(dtype)
        if reading is None:
            return alone
        videos, objects = reading.memory_visible.shape[:2]
        flat = jax.tree.map(lambda x: x.reshape(videos * objects, *x.shape[2:]), reading)
        memory = MemoryEmbedding(c, name="memory_embedding")(flat)
        each = jnp.broadcast_to(features, (videos, objects, *features.shape[2:]))
        tokens = reading.pointers.shape[2] * c.pointer_parts
        attended = MemoryAttention(c, name="memory_attention")(
            each.reshape(videos * objects, *features.shape[2:]), position, memory, tokens
        ).reshape(each.shape)
        remembers = reading.any_memory & use_memory
        return jnp.where(remembers[..., None, None, None], attended, alone)
