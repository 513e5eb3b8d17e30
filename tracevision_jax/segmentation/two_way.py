"""The two-way transformer of SAM's mask decoder (Kirillov et al. 2023, App. A): tokens and image attend to each other.

SAM, SAM 2 and TraceVision's pixel decoder use it with other sizes and norms. Norms come after each residual; codes
are added to queries and keys, never to values; the code of the tokens is the tokens as they came in. A token that
`visible` hides is attended by nobody, so that a padded list of prompts gives what the list without padding gives.
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Bool, Float

from tracevision_jax.layers.vit import layer_norm
from tracevision_jax.ops.attention import attention_to_visible


class DecoderAttention(nn.Module):
    """Multi-head attention with an inner width."""

    inner_width: int
    heads: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "n q w"],
        keys: Float[Array, "n k w"],
        values: Float[Array, "n k w"],
        visible: Bool[Array, "n k"] | None = None,
    ) -> Float[Array, "n q w"]:
        """Attend to the visible keys, all by default."""
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        head_dim = self.inner_width // self.heads

        def project(name, x):
            return nn.DenseGeneral((self.heads, head_dim), name=name, **kinds)(x)

        q, k, v = project("q", queries), project("k", keys), project("v", values)
        mixed = attention_to_visible(q, k, v, visible)
        return nn.DenseGeneral(queries.shape[-1], axis=(-2, -1), name="o", **kinds)(mixed)


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves and to the image, then the image attends to the tokens."""

    width: int
    heads: int
    mlp_width: int
    norm_eps: float
    first: bool
    """The first block's attention among tokens takes no code and replaces the tokens instead of adding to them."""
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, tokens, image, token_code, image_code, visible):
        """Return (tokens, image)."""
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(name, x):
            return layer_norm(name, self.norm_eps, **kinds)(x)

        def attend(name, inner, q, k, v, visible=None):
            return DecoderAttention(inner, self.heads, name=name, **kinds)(q, k, v, visible)

        if self.first:
            tokens = attend("self", self.width, tokens, tokens, tokens, visible)
        else:
            coded = tokens + token_code
            tokens = tokens + attend("self", self.width, coded, coded, tokens, visible)
        tokens = norm("norm_self", tokens)
        inner = self.width // 2
        tokens = tokens + attend("to_image", inner, tokens + token_code, image + image_code, image)
        tokens = norm("norm_to_image", tokens)
        hidden = nn.relu(nn.Dense(self.mlp_width, name="mlp_in", **kinds)(tokens))
        tokens = norm("norm_mlp", tokens + nn.Dense(self.width, name="mlp_out", **kinds)(hidden))
        image = image + attend("to_tokens", inner, image + image_code, tokens + token_code, tokens, visible)
        return tokens, norm("norm_to_tokens", image)


class TwoWayTransformer(nn.Module):
    """`layers` blocks and a last attention from the tokens to the image; between the two the width is halved."""

    width: int
    heads: int
    mlp_width: int
    layers: int
    norm_eps: float
    last_norm_eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "n t w"],
        image: Float[Array, "n cells w"],
        image_code: Float[Array, "#n cells w"] | Float[Array, "cells w"],
        visible: Bool[Array, "n t"] | None = None,
    ) -> tuple[Float[Array, "n t w"], Float[Array, "n cells w"]]:
        """Return (tokens, image); a hidden token's own result is finite and means nothing."""
        code = tokens
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        for index in range(self.layers):
            block = TwoWayBlock(
                self.width, self.heads, self.mlp_width, self.norm_eps, index == 0, name=f"block_{index}", **kinds
            )
            tokens, image = block(tokens, image, code, image_code, visible)
        last = DecoderAttention(self.width // 2, self.heads, name="last", **kinds)
        tokens = tokens + last(tokens + code, image + image_code, image)
        return layer_norm("norm_last", self.last_norm_eps, **kinds)(tokens), image
