"""The image encoder of SAM 2 and 2.1 (Ravi et al. 2024, App. D.1): Hiera with a feature pyramid.

It follows facebookresearch/sam2, `modeling/backbones/{hieradet,image_encoder}.py`. Attention stays within windows, a
batch axis, but for a few global blocks. The first block of a stage keeps the windows of the stage before, and pools its
queries 2 x 2 by their maximum: its map and its windows shrink by half. Positions are a small grid stretched over the
map, plus one window's that tile it (Bolya et al. 2023, "absolute win"). Stages are uneven, so blocks are not scanned.

    encoder = Sam2ImageEncoder(HIERA_PRESETS["base_plus"])
    features = encoder.apply(params, pixels)         # (batch, 1024, 1024, 3)
    features.stride16                                # (batch, 64, 64, 256)
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from tracevision_jax.errors import UserError
from tracevision_jax.layers.basic import kernel_init, precision, projection, rematerialised
from tracevision_jax.layers.sharding import constrain
from tracevision_jax.layers.vit import GeluMLP, layer_norm
from tracevision_jax.layers.windows2d import from_windows, to_windows
from tracevision_jax.ops.attention import attention
from tracevision_jax.ops.interpolation import double_nearest, resize_maps
from tracevision_jax.ops.sine_position import sine_position
from tracevision_jax.vision.sam_config import HIERA_STRIDE, HieraBlockPlan, HieraConfig

EMBED_KERNEL, EMBED_PADDING = 7, 3
"""Of the convolution that makes the first tokens, pixels."""

START_GAIN = 0.2
"""Of the neck where it is drawn. No norm stands between the trunk's sums and what memory adds to the maps: at a gain of
1 a model that starts from nothing does not hear the masks that it remembers."""


class ImageFeatures(NamedTuple):
    """What heads and memory read of a picture; all maps have the pyramid's width."""

    stride4: Float[Array, "batch rows4 columns4 channels"]
    stride8: Float[Array, "batch rows8 columns8 channels"]
    stride16: Float[Array, "batch rows16 columns16 channels"]
    """The embedding that memory conditions, and that masks are decoded from."""
    position: Float[Array, "rows16 columns16 channels"]
    """Sine positions of the stride 16 map."""


def pool_max(x: Float[Array, "sets height width *channels"]) -> Float[Array, "sets half_height half_width *channels"]:
    """The largest of each 2 x 2 places, channel by channel."""
    # Slices, since a CPU reduces over axes of two far more slowly.
    rows = jnp.maximum(x[:, 0::2], x[:, 1::2])
    return jnp.maximum(rows[:, :, 0::2], rows[:, :, 1::2])


class HieraAttention(nn.Module):
    """Attention among all places of each map or window; pooled queries give a map of half the side."""

    config: HieraConfig
    plan: HieraBlockPlan

    @nn.compact
    def __call__(
        self, x: Float[Array, "sets height width channels"]
    ) -> Float[Array, "sets new_height new_width new_channels"]:
        c, plan = self.config, self.plan
        sets, height, width, _ = x.shape
        shape = (plan.heads, plan.out_width // plan.heads)
        qkv = projection("qkv", (3, *shape), **precision(c))(x.reshape(sets, height * width, plan.in_width))
        q, k, v = (constrain(qkv[:, :, part], "sets", None, "heads", None) for part in range(3))
        if plan.pools:
            q = pool_max(q.reshape(sets, height, width, *shape))
            height, width = q.shape[1:3]
            q = q.reshape(sets, height * width, *shape)
        mixed = constrain(attention(q, k, v, cut="sets"), "sets", None, "heads", None)
        mixed = projection("proj", plan.out_width, axis=(-2, -1), **precision(c))(mixed)
        return mixed.reshape(sets, height, width, plan.out_width)


class HieraBlock(nn.Module):
    """Pre-norm attention and MLP; at a stage's entry width and size change, the shortcut's as well."""

    config: HieraConfig
    plan: HieraBlockPlan

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch new_height new_width new_channels"]:
        c, plan = self.config, self.plan
        normed = layer_norm("layer_norm1", c.norm_eps, **precision(c))(x)
        if plan.pools:
            x = pool_max(projection("proj", plan.out_width, **precision(c))(normed))
        # Zeros that fill up windows come after the norm and are seen as keys, which is how the weights were trained.
        sets = to_windows(normed, plan.window) if plan.window else normed
        mixed = HieraAttention(c, plan, name="attn")(sets)
        x = x + (from_windows(mixed, *x.shape[:3]) if plan.window else mixed)
        normed = layer_norm("layer_norm2", c.norm_eps, **precision(c))(x)
        x = x + GeluMLP(c.mlp_ratio * plan.out_width, name="mlp", **precision(c))(normed)
        return constrain(x, "sets", None, None, None)


class Hiera(nn.Module):
    """Normalised pictures to the maps of the four stages, strides 4 to 32."""

    config: HieraConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "batch height width channels"]) -> tuple[Array, ...]:
        c = self.config
        embed = nn.Conv(
            c.width,
            (EMBED_KERNEL,) * 2,
            (HIERA_STRIDE,) * 2,
            EMBED_PADDING,
            kernel_init=kernel_init,
            name="patch_embed",
            **precision(c),
        )
        x = embed(pixels.astype(jnp.dtype(c.dtype)))
        x = constrain(x + self._positions(*x.shape[1:3]).astype(x.dtype), "sets", None, None, None)
        block, stages = rematerialised(HieraBlock, c.remat, prevent_cse=True), []
        for number, plan in enumerate(c.plan()):
            x = block(c, plan, name=f"blocks_{number}")(x)
            if plan.ends_stage:
                stages.append(x)
        return tuple(stages)

    def _positions(self, height: int, width: int) -> Float[Array, "{height} {width} channels"]:
        c, side = self.config, self.config.windows[0]
        init, dtype = nn.initializers.normal(0.02), jnp.dtype(c.param_dtype)
        background = self.param("pos_embed", init, (c.background, c.background, c.width), dtype)
        window = self.param("pos_embed_window", init, (side, side, c.width), dtype)
        return resize_maps(background, (height, width), "cubic") + jnp.tile(window, (height // side, width // side, 1))


class FpnNeck(nn.Module):
    """The maps of the stages at one width; the last stage only adds to the one before it, and is then dropped."""

    config: HieraConfig

    @nn.compact
    def __call__(self, stages: tuple[Array, ...]) -> tuple[Array, Array, Array]:
        c = self.config
        # The convolution with number 0 is that of the smallest map.
        lateral = [
            projection(f"convs_{len(stages) - 1 - stage}", c.fpn_width, gain=START_GAIN, **precision(c))(x)
            for stage, x in enumerate(stages)
        ]
        return lateral[0], lateral[1], lateral[2] + double_nearest(lateral[3])


class Sam2ImageEncoder(nn.Module):
    """Normalised pictures to what SAM 2's heads and memory read of them."""

    config: HieraConfig

    @nn.compact
    def __call__(self, pixels: Float[Array, "batch height width channels"]) -> ImageFeatures:
        """Encode; sides are multiples of `config.side_step`, 32 px in the released models.

        Raises:
            UserError: pictures of other sides or channels.
        """
        c = self.config
        _, height, width, channels = pixels.shape
        if channels != c.channels or height % c.side_step or width % c.side_step or not height * width:
            raise UserError(
                f"pictures of {height} x {width} px and {channels} channels: SAM 2's encoder takes {c.channels} "
                f"channels and sides that are multiples of {c.side_step} px"
            )
        maps = FpnNeck(c, name="neck")(Hiera(c, name="backbone")(pixels))
        position = sine_position(maps[2].shape[1], maps[2].shape[2], c.fpn_width)
        return ImageFeatures(*maps, position.astype(maps[2].dtype))
