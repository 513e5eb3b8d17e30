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
from tracevision_jax.layers.convolution import Doubling
from tracevision_jax.layers.sharding import constrain
from tracevision_jax.segmentation.two_way import TwoWayTransformer


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
NORM_EPS = 1e-6


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
        # Masks are sets before their first product: turned into sets behind it, its gradient would be gathered whole.
        seg = constrain(seg.reshape(rows * masks, *seg.shape[2:]).astype(self.dtype), "sets", None, None)
        hidden = nn.relu(nn.Dense(config.token_hidden, name="token_in", **kinds)(seg))
        tokens = nn.Dense(config.width, name="token_out", **kinds)(hidden)
        tokens = tokens.reshape(rows * masks, SCALES, config.tokens_per_scale, config.width)
        level_code = self.param("level_code", nn.initializers.normal(0.02), (SCALES, config.width), self.param_dtype)
        tokens = constrain(tokens + level_code.astype(self.dtype)[:, None], "sets", None, None, None)

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
        image = nn.LayerNorm(NORM_EPS, name=f"neck_norm_{level}", **kinds)(image)
        image = image.reshape(rows * frames, side, side, -1)
        image = nn.Conv(config.width, (3, 3), use_bias=False, name=f"neck_out_{level}", **kinds)(
            constrain(image, "sets", None, None, None)
        )
        image = nn.LayerNorm(NORM_EPS, name=f"neck_out_norm_{level}", **kinds)(image)
        image = constrain(image, "batch", None, None, None).reshape(rows, frames, side, side, -1)
        chosen = jnp.take_along_axis(image, frame[:, :, None, None, None], axis=1)
        return constrain(chosen.reshape(frame.size, side, side, -1), "sets", None, None, None)

    def _scale(self, level, image, tokens, coarse, upsamplings):
        """One scale: modulation by the coarse mask, two-way transformer, mask head; float32 logits."""
        config = self.config
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        side = image.shape[1]
        if coarse is not None:
            image = image * (1 + jax.nn.sigmoid(coarse)[..., None]).astype(self.dtype)
        code = _grid_code(side, config.width).astype(self.dtype)
        transformer = TwoWayTransformer(
            config.width, config.heads, config.mlp_width, config.layers, NORM_EPS, NORM_EPS,
            name=f"two_way_{level}", **kinds,
        )  # fmt: skip
        tokens, cells = transformer(tokens, image.reshape(image.shape[0], side * side, -1), code)
        image = constrain(cells.reshape(image.shape), "sets", None, None, None)
        width = config.width
        for step in range(upsamplings):
            width = width // 4 if step == 0 else width // 2
            image = Doubling(width, name=f"upsample_{level}_{step}", **kinds)(image)
            image = nn.gelu(nn.LayerNorm(NORM_EPS, name=f"upsample_norm_{level}_{step}", **kinds)(image))
        query = tokens.mean(1)
        for index, out in enumerate((config.width, config.width, width)):
            query = nn.Dense(out, name=f"mask_mlp_{level}_{index}", **kinds)(query)
            query = nn.relu(query) if index < 2 else query
        return jnp.einsum("nhwc,nc->nhw", image, query, preferred_element_type=jnp.float32) * width**-0.5


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
