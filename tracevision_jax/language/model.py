"""The decoder-only language model of Qwen2.5-VL: pre-norm layers, grouped heads, multimodal rotary, gated
MLP.

Follows the Qwen2.5 and Qwen2-VL technical reports. Layers are one scanned module, so compile time does not
grow with depth and parameters carry a leading layer axis. Use: `hidden, cache = model(embeddings, positions,
segments, cache)`, then `model.logits(hidden)`; without a cache rows may hold several packed conversations,
told apart by segment ids.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tracevision_jax.language.cache import KVCache, write_rows
from tracevision_jax.language.config import LanguageConfig
from tracevision_jax.layers.basic import GatedMLP, RMSNorm, kernel_init, precision, projection, rematerialised, scanned
from tracevision_jax.layers.sharding import constrain, exchange_slices
from tracevision_jax.ops.attention import attention
from tracevision_jax.ops.cross_entropy import LogitParts
from tracevision_jax.ops.rotary import apply_rotary, axial_angles, multimodal_frequencies

NO_TOKEN = -1e30
"""Logit of a column of the head that is no token's."""


class SelfAttention(nn.Module):
    """Causal attention with grouped heads; a store of keys and values is appended to, and read."""

    config: LanguageConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        angles: Float[Array, "batch tokens half"],
        segments: Int[Array, "batch tokens"],
        store: tuple[Array, Array, Array] | None,
        layer: Int[Array, ""],
        fresh: bool,
    ) -> tuple[Float[Array, "batch tokens width"], tuple[Array, Array, Array] | None]:
        c = self.config
        options = precision(c)
        q = projection("q", (c.heads, c.head_dim), bias=c.qkv_bias, **options)(x)
        k = projection("k", (c.kv_heads, c.head_dim), bias=c.qkv_bias, **options)(x)
        v = projection("v", (c.kv_heads, c.head_dim), bias=c.qkv_bias, **options)(x)
        q = constrain(apply_rotary(q, angles), "batch", "tokens", "heads", None)
        k = constrain(apply_rotary(k, angles), "batch", "tokens", "kv_heads", None)
        v = constrain(v, "batch", "tokens", "kv_heads", None)
        # For a loss on attention (`ops/guided_attention.py`); nothing is kept unless "intermediates" is mutable.
        self.sow("intermediates", "first_queries", q[:, :, 0])
        self.sow("intermediates", "first_keys", k[:, :, 0])
        if store is not None:
            keys, values, lengths = store
            keys, values = write_rows(keys, layer, k, lengths), write_rows(values, layer, v, lengths)
            store = (keys, values, lengths)
        if store is None or fresh:
            mixed = attention(q, k, v, q_segments=segments, causal=True, cut="tokens")
        else:
            keys, values, lengths = store
            rows = lengths[:, None] + jnp.arange(x.shape[1])
            past = (array[layer].swapaxes(1, 2).astype(q.dtype) for array in (keys, values))
            mixed = attention(q, *past, causal=True, q_positions=rows, cut="tokens")
        mixed = constrain(mixed, "batch", "tokens", "heads", None)
        return projection("o", c.width, axis=(-2, -1), bias=False, **options)(mixed), store


class DecoderLayer(nn.Module):
    """One layer, as the body of a scan over layers."""

    config: LanguageConfig

    @nn.compact
    def __call__(self, carry: tuple, layer: Int[Array, ""], angles: Array, segments: Array, fresh: bool):
        c = self.config
        options = precision(c)
        x, store = carry
        normed = RMSNorm(c.norm_eps, name="attn_norm", **options)(x)
        mixed, store = SelfAttention(c, name="attn")(normed, angles, segments, store, layer, fresh)
        x = constrain(x + mixed, "batch", "tokens", "width")
        normed = RMSNorm(c.norm_eps, name="mlp_norm", **options)(x)
        x = x + GatedMLP(c.mlp_width, bias=False, axes=("batch", "tokens"), name="mlp", **options)(normed)
        return (constrain(x, "batch", "tokens", "width"), store), None


class Head(nn.Module):
    """The output projection, a bare kernel so that its unused columns can be left out."""

    config: LanguageConfig

    @nn.compact
    def __call__(self) -> Float[Array, "width vocab"]:
        c = self.config
        return self.param("kernel", kernel_init, (c.width, c.vocab_size), jnp.dtype(c.param_dtype))


class AddedTokens(nn.Module):
    """Embedding and head rows of the tokens that are ours, beside the released ones."""

    config: LanguageConfig

    @nn.compact
    def __call__(self) -> tuple[Float[Array, "added width"], Float[Array, "added width"]]:
        c = self.config
        shape, kind = (c.added_tokens, c.width), jnp.dtype(c.param_dtype)
        draw = nn.initializers.normal(c.width**-0.5)
        return self.param("embedding", draw, shape, kind), self.param("head", draw, shape, kind)


def _between(x: Float[Array, "*rows width"]) -> tuple[str | None, ...]:
    """Names of the axes between rows and the last one: tokens, where there is one."""
    return ("tokens",) if x.ndim == 3 else (None,) * (x.ndim - 2)


class LanguageModel(nn.Module):
    """Embedding, scanned layers, final norm, head."""

    config: LanguageConfig

    def setup(self) -> None:
        c = self.config
        options = precision(c)
        self.embed_base = nn.Embed(
            c.vocab_size,
            c.width,
            embedding_init=nn.initializers.normal(c.width**-0.5),
            name="embed",
            **options,
        )
        if c.added_tokens:
            self.added = AddedTokens(c)
        if not c.tied:
            self.head = Head(c)
        body = rematerialised(DecoderLayer, c.remat, static_arguments=(5,))
        self.layers = scanned(body, c.layers, (0, nn.broadcast, nn.broadcast, nn.broadcast))(c)
        self.final_norm = RMSNorm(c.norm_eps, **options)

    def embed(self, tokens: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens width"]:
        """Embeddings of tokens, base and added."""
        c = self.config
        # All rows on every device that reads a slice of the tables: cut, they would be exchanged more than once. They
        # are gathered before their tokens are cut: both at once is more than the compiler finds a way for.
        tokens = constrain(constrain(tokens, "copies", None), "copies", "tokens")
        if not c.added_tokens:
            return exchange_slices(self.embed_base(tokens), "tokens")
        base = self.embed_base(jnp.minimum(tokens, c.first_added - 1))
        table, _ = self.added()
        ours = jnp.take(table.astype(base.dtype), jnp.clip(tokens - c.first_added, 0, c.added_tokens - 1), axis=0)
        return exchange_slices(jnp.where((tokens >= c.first_added)[..., None], ours, base), "tokens")

    def __call__(
        self,
        embeddings: Float[Array, "batch tokens width"],
        positions: Int[Array, "batch tokens 3"],
        segments: Int[Array, "batch tokens"],
        cache: KVCache | None = None,
        fresh: bool = False,
    ) -> tuple[Float[Array, "batch tokens width"], KVCache | None]:
        """Run all layers; hidden states are after the final norm.

        Without a cache: attention is causal within each segment. With one: tokens are appended at each row's
        own length (`segments` 1 for real tokens, then 0 for right padding, which the next call overwrites)
        and see all earlier tokens of their row. `fresh` promises an empty cache, so that a prefill attends
        among its own tokens alone and kernels can serve it.
        """
        c = self.config
        angles = axial_angles(positions, multimodal_frequencies(c.head_dim, c.rope_theta, c.mrope_sections))
        store = None if cache is None else (cache.keys, cache.values, cache.lengths)
        x = constrain(embeddings.astype(jnp.dtype(c.dtype)), "batch", "tokens", "width")
        (x, store), _ = self.layers((x, store), jnp.arange(c.layers), angles, segments, fresh)
        hidden = self.final_norm(x)
        if store is None:
            return hidden, None
        keys, values, lengths = store
        return hidden, KVCache(keys, values, lengths + (segments != 0).sum(axis=1, dtype=lengths.dtype))

    def normed(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        """The final norm alone: what the head reads, were no layer between it and an embedding."""
        return self.final_norm(x.astype(jnp.dtype(self.config.dtype)))

    def logit_parts(self, hidden: Float[Array, "*rows width"]) -> LogitParts:
        """Logits in float32 of the base and of the added tokens, apart.

        The base's columns from `first_added` on are those of no token, and so low that no softmax sees them. Side by
        side the parts would be copied, and where the vocabulary is cut over devices, gathered.
        """
        c = self.config
        kind = jnp.dtype(c.dtype)
        kernel = self.embed_base.embedding.T if c.tied else self.head()
        hidden = hidden.astype(kind)
        between = _between(hidden)
        base = jnp.matmul(hidden, kernel.astype(kind), preferred_element_type=jnp.float32)
        base = constrain(base, "batch", *between, "vocab")
        if not c.added_tokens:
            return ((0, base),)
        base = jnp.where(jnp.arange(c.vocab_size) < c.first_added, base, NO_TOKEN)
        _, rows = self.added()
        ours = jnp.matmul(hidden, rows.T.astype(kind), preferred_element_type=jnp.float32)
        return (0, base), (c.first_added, constrain(ours, "batch", *between, None))

    def logits(self, hidden: Float[Array, "*rows width"]) -> Float[Array, "*rows output"]:
        """Logits in float32; columns from `first_added` on are the added tokens'."""
        (_, base), *added = self.logit_parts(hidden)
        if not added:
            return base
        ((first, ours),) = added
        logits = jnp.concatenate([base[..., :first], ours], axis=-1)
        return constrain(logits, "batch", *_between(logits), "vocab")

    def initialise(self, tokens: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens output"]:
        """Touch every parameter, for `init`: embed, run, logits."""
        positions = jnp.zeros((*tokens.shape, 3), jnp.int32)
        hidden, _ = self(self.embed(tokens), positions, jnp.ones_like(tokens))
        return self.logits(hidden)
