"""The image encoder of SAM (Kirillov et al. 2023, App. A): a plain ViT with window attention and relative positions.

It follows facebookresearch/segment-anything, `image_encoder.py`. Most blocks attend within windows of 14 x 14 patches,
which are a batch axis; the last of each group attends over the whole map. In every block the scores get a term for
the row and one for the column between query and key (MViTv2, Li et al. 2022, Eq. 4). Blocks are nested scans: groups,
and the window blocks inside a group.

    encoder = SamVitEncoder(SAM_VIT_PRESETS["h"])
    embedding = encoder.apply(params, pixels)        # (batch, 1024, 1024, 3) -> (batch, 64, 64, 256)

Pictures of another size than the configuration's are taken too: positions are resized, the learned ones bicubically
and the relative ones of global blocks linearly, as the original does for the latter.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tracevision_jax.errors import UserError
from tracevision_jax.layers.basic import kernel_init, precision, projection, rematerialised, scanned
from tracevision_jax.layers.sharding import constrain
from tracevision_jax.layers.vit import GeluMLP, layer_norm
from tracevision_jax.layers.windows2d import from_windows, to_windows
from tracevision_jax.ops.attention import attention
from tracevision_jax.ops.interpolation import resize_maps, resize_rows
from tracevision_jax.vision.sam_config import SamVitConfig


def relative_rows(table: Float[Array, "distances channels"], size: int) -> Float[Array, "{size} {size} channels"]:
    """Return the entry for each query and key along one axis of `size` places.

    The table's rows run from distance 1 - side to side - 1 (query less key). One made for another side is stretched.
    """
    table = resize_rows(table, 2 * size - 1)
    places = jnp.arange(size)
    return table[places[:, None] - places[None, :] + size - 1]


def decomposed_bias(
    q: Float[Array, "sets height width heads channels"],
    rows: Float[Array, "height height channels"],
    columns: Float[Array, "width width channels"],
) -> Float[Array, "sets heads tokens tokens"]:
    """Relative positions as a term of the scores, in float32; `q` is not scaled."""
    sets, height, width, heads, _ = q.shape
    of_rows = jnp.einsum("shwnc,hkc->snhwk", q, rows, preferred_element_type=jnp.float32)
    of_columns = jnp.einsum("shwnc,wkc->snhwk", q, columns, preferred_element_type=jnp.float32)
    bias = of_rows[..., :, None] + of_columns[..., None, :]
    return bias.reshape(sets, heads, height * width, height * width)


class SamAttention(nn.Module):
    """Attention among all places of each map or window; `side` is that for which relative positions are learned."""

    config: SamVitConfig
    side: int

    @nn.compact
    def __call__(self, x: Float[Array, "sets height width channels"]) -> Float[Array, "sets height width channels"]:
        c = self.config
        sets, height, width, _ = x.shape
        qkv = projection("qkv", (3, c.heads, c.head_dim), **precision(c))(x.reshape(sets, height * width, c.width))
        q, k, v = (constrain(qkv[:, :, part], "sets", None, "heads", None) for part in range(3))
        table = (nn.initializers.zeros, (2 * self.side - 1, c.head_dim), jnp.dtype(c.param_dtype))
        bias = decomposed_bias(
            q.reshape(sets, height, width, c.heads, c.head_dim),
            relative_rows(self.param("rel_pos_h", *table).astype(q.dtype), height),
            relative_rows(self.param("rel_pos_w", *table).astype(q.dtype), width),
        )
        mixed = constrain(attention(q, k, v, bias=bias, cut="sets"), "sets", None, "heads", None)
        return projection("proj", c.width, axis=(-2, -1), **precision(c))(mixed).reshape(x.shape)


class SamBlock(nn.Module):
    """Pre-norm attention and MLP, as the body of a scan; `window` 0 is attention over the whole map."""

    config: SamVitConfig
    window: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> tuple[Array, None]:
        c = self.config
        # Zeros that fill up windows come after the norm and are seen as keys, which is how the weights were trained.
        normed = layer_norm("layer_norm1", c.norm_eps, **precision(c))(x)
        if self.window:
            mixed = SamAttention(c, self.window, name="attn")(to_windows(normed, self.window))
            x = x + from_windows(mixed, *x.shape[:3])
        else:
            x = x + SamAttention(c, c.grid, name="attn")(normed)
        normed = layer_norm("layer_norm2", c.norm_eps, **precision(c))(x)
        x = x + GeluMLP(c.mlp_ratio * c.width, name="mlp", **precision(c))(normed)
        return constrain(x, "sets", None, None, None), None


class SamGroup(nn.Module):
    """The window blocks of a group, then its block with global attention."""

    config: SamVitConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> tuple[Array, None]:
        c = self.config
        block = rematerialised(SamBlock, c.remat)
        x, _ = scanned(block, c.window_blocks, ())(c, c.window, name="window")(x)
        return block(c, 0, name="full")(x)


class SamNeck(nn.Module):
    """Two convolutions without bias, 1 x 1 and 3 x 3, each with a norm over channels."""

    config: SamVitConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width out"]:
        c = self.config
        x = projection("conv1", c.out_width, bias=False, **precision(c))(x)
        x = layer_norm("layer_norm1", c.norm_eps, **precision(c))(x)
        x = nn.Conv(c.out_width, (3, 3), use_bias=False, kernel_init=kernel_init, name="conv2", **precision(c))(x)
        return layer_norm("layer_norm2", c.norm_eps, **precision(c))(x)


class SamVitEncoder(nn.Module):
    """Normalised pictures to one embedding a patch."""

    config: SamVitConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "batch height width channels"]) -> Float[Array, "batch rows columns out"]:
        """Encode; sides are multiples of a patch.

        Raises:
            UserError: pictures of other sides or channels.
        """
        c = self.config
        _, height, width, channels = pixels.shape
        if channels != c.channels or height % c.patch or width % c.patch or not height * width:
            raise UserError(
                f"pictures of {height} x {width} px and {channels} channels: SAM's ViT takes {c.channels} channels and "
                f"sides that are multiples of {c.patch} px"
            )
        patch = (c.patch, c.patch)
        embed = nn.Conv(c.width, patch, patch, "VALID", kernel_init=kernel_init, name="patch_embed", **precision(c))
        x = embed(pixels.astype(jnp.dtype(c.dtype)))
        learned = self.param(
            "pos_embed", nn.initializers.normal(0.02), (c.grid, c.grid, c.width), jnp.dtype(c.param_dtype)
        )
        x = x + resize_maps(learned, (x.shape[1], x.shape[2]), "cubic").astype(x.dtype)
        x = constrain(x, "sets", None, None, None)
        x, _ = scanned(SamGroup, c.groups, ())(c, name="groups")(x)
        return SamNeck(c, name="neck")(x)
