"""The light pixel decoder: TraceVision, Sec. 3.2.5 and App. F, after PixelLM's two-scale design.

Six codebook tokens a target (2 scales x 3 tokens) whose hidden states E_seg the language model writes, and two depths
of the visual encoder, become one mask a target. The deep features are decoded first on a coarse grid by a two-way
transformer of 2 layers; the shallower ones refine at twice the resolution, where the coarse mask modulates them. At
the paper's size: grid 32, masks 256 x 256, at most 12.5 M parameters.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tracevision_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PixelDecoderConfig:
    """Sizes; `visual_width` and `text_width` are the host's."""

    visual_width: int = 1280
    text_width: int = 3584
    width: int = 256
    heads: int = 8
    mlp_width: int = 2048
    layers: int = 2
    token_hidden: int = 512
    """Hidden width of the projection of E_seg."""
    tokens_per_scale: int = 3
    grid: int = 32
    """Side of the coarse grid; the fine grid has twice this."""
    fine_upsamplings: int = 2
    """Doublings after the fine grid: masks have side 2 * grid * 2 ** fine_upsamplings."""

    def __post_init__(self):
        least = 4 * 2 ** max(self.fine_upsamplings - 1, 0)
        if (self.width // 2) % self.heads or self.width % least:
            raise UserError(
                f"pixel decoder of width {self.width}: {self.heads} heads must divide half of it, and {least} all of it"
            )

    @property
    def mask_size(self) -> int:
        """Side of the predicted masks."""
        return 2 * self.grid * 2**self.fine_upsamplings


SCALES = 2


class DecoderAttention(nn.Module):
    """Multi-head attention with an inner width, as SAM's two-way transformer uses it."""

    inner_width: int
    heads: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, queries: Float[Array, "n q w"], keys: Float[Array, "n k w"], values: Float[Array, "n k w"]):
        """Attend; no masking is needed, all masks have the same grid."""
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        head_dim = self.inner_width // self.heads

        def project(name, x):
            return nn.DenseGeneral((self.heads, head_dim), name=name, **kinds)(x)

        q, k, v = project("q", queries), project("k", keys), project("v", values)
        logits = jnp.einsum("nqhd,nkhd->nhqk", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
        mixed = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(logits).astype(v.dtype), v)
        return nn.DenseGeneral(queries.shape[-1], axis=(-2, -1), name="o", **kinds)(mixed)


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves and to the image, then the image attends to the tokens."""

    config: PixelDecoderConfig
    first: bool
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, tokens, image, token_code, image_code):
        """Return (tokens, image); codes are added to queries and keys, never to values."""
        config = self.config
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(name, x):
            return nn.LayerNorm(1e-6, name=name, **kinds)(x)

        def attend(name, inner, q, k, v):
            return DecoderAttention(inner, config.heads, name=name, **kinds)(q, k, v)

        if self.first:
            tokens = attend("self", config.width, tokens, tokens, tokens)
        else:
            coded = tokens + token_code
            tokens = tokens + attend("self", config.width, coded, coded, tokens)
        tokens = norm("norm_self", tokens)
        tokens = tokens + attend("to_image", config.width // 2, tokens + token_code, image + image_code, image)
        tokens = norm("norm_to_image", tokens)
        hidden = nn.relu(nn.Dense(config.mlp_width, name="mlp_in", **kinds)(tokens))
        tokens = norm("norm_mlp", tokens + nn.Dense(config.width, name="mlp_out", **kinds)(hidden))
        image = image + attend("to_tokens", config.width // 2, image + image_code, tokens + token_code, tokens)
        return tokens, norm("norm_to_tokens", image)


class TwoWayTransformer(nn.Module):
    """`layers` blocks and a last attention from the tokens to the image."""

    config: PixelDecoderConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, tokens, image, image_code):
        """Return (tokens (n, t, w), image (n, cells, w))."""
        code = tokens
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for index in range(self.config.layers):
            tokens, image = TwoWayBlock(self.config, index == 0, name=f"block_{index}", **kinds)(
                tokens, image, code, image_code
            )
        width = self.config.width // 2
        last = DecoderAttention(width, self.config.heads, name="last", **kinds)
        tokens = tokens + last(tokens + code, image + image_code, image)
        return nn.LayerNorm(1e-6, name="norm_last", **kinds)(tokens), image


class PixelDecoder(nn.Module):
    """Masks from the features of two depths and the codebook's hidden states."""

    config: PixelDecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        deep: Float[Array, "rows frames grid grid visual"],
        shallow: Float[Array, "rows frames fine fine visual"],
        seg: Float[Array, "rows masks slots text"],
        frame: Int[Array, "rows masks"],
    ) -> Float[Array, "rows masks size size"]:
        """Decode one mask a target.

        Args:
            deep: visual features of the deeper level on the coarse grid, stretched over the whole image.
            shallow: features of the shallower level on the fine grid (twice the side).
            seg: E_seg, the hidden states of the codebook slots; the first three feed the coarse scale.
            frame: on which frame of its row each target is.

        Returns:
            mask logits, float32.
        """
        config = self.config
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rows, masks = frame.shape
        hidden = nn.relu(nn.Dense(config.token_hidden, name="token_in", **kinds)(seg.astype(self.dtype)))
        tokens = nn.Dense(config.width, name="token_out", **kinds)(hidden)
        tokens = tokens.reshape(rows * masks, SCALES, config.tokens_per_scale, config.width)
        level_code = self.param("level_code", nn.initializers.normal(0.02), (SCALES, config.width), self.param_dtype)
        tokens = tokens + level_code.astype(self.dtype)[:, None]

        coarse = self._scale(0, self._neck(0, deep, frame), tokens[:, 0], None, upsamplings=1)
        fine = self._scale(1, self._neck(1, shallow, frame), tokens[:, 1], coarse, upsamplings=config.fine_upsamplings)
        size = config.mask_size
        weights = self.param("fusion", nn.initializers.constant(1 / SCALES), (SCALES,), jnp.float32)
        upsampled = jax.image.resize(coarse, (coarse.shape[0], size, size), "bilinear")
        return (weights[0] * upsampled + weights[1] * fine).reshape(rows, masks, size, size)

    def _neck(self, level, features, frame):
        """Features at the decoder's width, made once a frame and then given to each of its masks."""
        config = self.config
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rows, frames, side = features.shape[:3]
        image = nn.Dense(config.width, use_bias=False, name=f"neck_in_{level}", **kinds)(features.astype(self.dtype))
        image = nn.LayerNorm(1e-6, name=f"neck_norm_{level}", **kinds)(image)
        image = image.reshape(rows * frames, side, side, -1)
        image = nn.Conv(config.width, (3, 3), use_bias=False, name=f"neck_out_{level}", **kinds)(image)
        image = nn.LayerNorm(1e-6, name=f"neck_out_norm_{level}", **kinds)(image)
        image = image.reshape(rows, frames, side, side, -1)
        chosen = jnp.take_along_axis(image, frame[:, :, None, None, None], axis=1)
        return chosen.reshape(frame.size, side, side, -1)

    def _scale(self, level, image, tokens, coarse, upsamplings):
        """One scale: modulation by the coarse mask, two-way transformer, mask head; float32 logits."""
        config = self.config
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        side = image.shape[1]
        if coarse is not None:
            image = image * (1 + jax.nn.sigmoid(coarse)[..., None]).astype(self.dtype)
        code = _grid_code(side, config.width).astype(self.dtype)
        transformer = TwoWayTransformer(config, name=f"two_way_{level}", **kinds)
        tokens, cells = transformer(tokens, image.reshape(image.shape[0], side * side, -1), code)
        image = cells.reshape(image.shape)
        width = config.width
        for step in range(upsamplings):
            width = width // 4 if step == 0 else width // 2
            image = Doubling(width, name=f"upsample_{level}_{step}", **kinds)(image)
            image = nn.gelu(nn.LayerNorm(1e-6, name=f"upsample_norm_{level}_{step}", **kinds)(image))
        query = tokens.mean(1)
        for index, out in enumerate((config.width, config.width, width)):
            query = nn.Dense(out, name=f"mask_mlp_{level}_{index}", **kinds)(query)
            query = nn.relu(query) if index < 2 else query
        return jnp.einsum("nhwc,nc->nhw", image, query, preferred_element_type=jnp.float32) * width**-0.5


class Doubling(nn.Module):
    """Transposed convolution of kernel 2 and stride 2: each cell becomes 2 x 2 by one matrix product."""

    features: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 features"]:
        n, h, w, c = x.shape
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=2, batch_axis=(0, 1))
        kernel = self.param("kernel", init, (2, 2, c, self.features), self.param_dtype).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype).astype(self.dtype)
        doubled = jnp.einsum("nhwc,ijco->nhiwjo", x, kernel) + bias
        return doubled.reshape(n, 2 * h, 2 * w, self.features)


def _grid_code(side: int, width: int) -> Float[Array, "cells width"]:
    """Sinusoidal code of the cell centres of a square grid."""
    centres = (jnp.arange(side) + 0.5) / side
    angles = 2 * jnp.pi * centres[:, None] * jnp.geomspace(0.5, 16.0, width // 4)
    line = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
    rows, cols = jnp.meshgrid(jnp.arange(side), jnp.arange(side), indexing="ij")
    return jnp.concatenate([line[rows], line[cols]], -1).reshape(side * side, width)


def count_parameters(config: PixelDecoderConfig) -> int:
    """Number of parameters of the decoder, from shapes alone."""
    decoder = PixelDecoder(config)
    shapes = jax.eval_shape(
        decoder.init,
        jax.random.key(0),
        jnp.zeros((1, 1, config.grid, config.grid, config.visual_width)),
        jnp.zeros((1, 1, 2 * config.grid, 2 * config.grid, config.visual_width)),
        jnp.zeros((1, 1, SCALES * config.tokens_per_scale, config.text_width)),
        jnp.zeros((1, 1), jnp.int32),
    )
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))
