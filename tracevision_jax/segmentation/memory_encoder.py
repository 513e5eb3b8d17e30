"""The memory encoder of SAM 2 (Ravi et al. 2024, App. D.1): a frame's features and a mask become a memory of it.

It follows facebookresearch/sam2, `modeling/memory_encoder.py` and `sam2_base.py`. The mask comes at the picture's size;
features are the image encoder's own, not those that memory has conditioned, and are projected once for all objects.

    mask = resize_masks(logits, (image_size, image_size))
    memory = MemoryEncoder(config).apply(params, features, mask, present=object_logits > 0, prompted=prompted)
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tracevision_jax.layers.basic import precision, projection
from tracevision_jax.layers.convolution import Depthwise, Halving
from tracevision_jax.layers.vit import layer_norm
from tracevision_jax.segmentation.sam_config import MemoryConfig

NORM_EPS = 1e-6
MASK_GAIN = 3.0
"""Of the masks added to features, where it is drawn: what tells objects apart starts as loud as the picture."""
LAYER_SCALE = 1e-6
"""Of the fuser's blocks when they start."""


def mask_signal(
    logits: Float[Array, "batch objects height width"], prompted: Bool[Array, "batch objects"], config: MemoryConfig
) -> Float[Array, "batch objects height width"]:
    """What the memory encoder sees of masks: scaled probabilities, all or nothing where a user prompted the frame."""
    binary = (logits > 0).astype(logits.dtype)
    probability = jnp.where(prompted[:, :, None, None], binary, jax.nn.sigmoid(logits))
    return probability * config.sigmoid_scale + config.sigmoid_bias


class MaskDownsampler(nn.Module):
    """A mask to a map of the features' size and width; every halving has four times the channels of the last."""

    config: MemoryConfig

    @nn.compact
    def __call__(self, masks: Float[Array, "n height width"]) -> Float[Array, "n rows columns channels"]:
        c = self.config
        x = masks[..., None]
        for index in range(round(math.log2(c.mask_stride))):
            x = Halving(4 ** (index + 1), name=f"layers_{index}_conv", **precision(c))(x)
            x = nn.gelu(layer_norm(f"layers_{index}_layer_norm", NORM_EPS, **precision(c))(x), approximate=False)
        return projection("final_conv", c.width, gain=MASK_GAIN, **precision(c))(x)


class FuserBlock(nn.Module):
    """A ConvNeXt block (Liu et al. 2022) with a learned scale of its residual."""

    config: MemoryConfig

    @nn.compact
    def __call__(self, x: Float[Array, "n rows columns channels"]) -> Float[Array, "n rows columns channels"]:
        c = self.config
        inner = Depthwise(c.fuser_kernel, name="depthwise_conv", **precision(c))(x)
        inner = layer_norm("layer_norm", NORM_EPS, **precision(c))(inner)
        inner = nn.gelu(projection("pointwise_conv1", c.fuser_hidden, **precision(c))(inner), approximate=False)
        inner = projection("pointwise_conv2", c.width, **precision(c))(inner)
        scale = self.param("scale", nn.initializers.constant(LAYER_SCALE), (c.width,), jnp.dtype(c.param_dtype))
        return x + inner * scale.astype(inner.dtype)


class MemoryEncoder(nn.Module):
    """Memories of any number of objects on any number of frames."""

    config: MemoryConfig

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "batch rows columns width"],
        masks: Float[Array, "batch objects height width2"],
        present: Bool[Array, "batch objects"],
        prompted: Bool[Array, "batch objects"],
    ) -> Float[Array, "batch objects rows columns memory_width"]:
        """Encode.

        Args:
            features: of stride 16, as the image encoder gave them.
            masks: logits of the objects, `mask_stride` times as large as the features.
            present: whether the object is on the frame; SAM 2.1 marks the memory of one that is not.
            prompted: whether the mask comes from a user's prompt on this frame.

        Raises:
            ValueError: masks of another size.
        """
        c = self.config
        batch, rows, columns, width = features.shape
        objects, height, across = masks.shape[1:]
        if (height, across) != (rows * c.mask_stride, columns * c.mask_stride):
            raise ValueError(f"masks of {height} x {across} for features of {rows} x {columns}, stride {c.mask_stride}")
        signal = mask_signal(masks.astype(jnp.float32), prompted, c).reshape(batch * objects, height, across)
        downsampled = MaskDownsampler(c, name="mask_downsampler")(signal)
        projected = projection("feature_projection", c.width, **precision(c))(features)
        x = projected[:, None] + downsampled.reshape(batch, objects, rows, columns, width)
        x = x.reshape(batch * objects, rows, columns, width)
        for index in range(c.fuser_layers):
            x = FuserBlock(c, name=f"memory_fuser_layers_{index}")(x)
        x = projection("projection", c.memory_width, **precision(c))(x)
        memory = x.reshape(batch, objects, rows, columns, c.memory_width)
        if c.occlusion_embedding:
            name, shape = "occlusion_spatial_embedding_parameter", (1, c.memory_width)
            absent = self.param(name, nn.initializers.normal(0.02), shape, jnp.dtype(c.param_dtype))
            memory = jnp.where(present[:, :, None, None, None], memory, memory + absent[0].astype(memory.dtype))
        return memory
