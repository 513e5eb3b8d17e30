"""Object pointers of SAM 2 (Ravi et al. 2024, App. D.1), and frames whose prompt is a mask.

It follows facebookresearch/sam2, `modeling/sam2_base.py`. A pointer is made of the token that wrote the mask. Where a
user gives the mask, it is the output itself; the decoder runs only for the pointer, with the mask, made smaller, as its
prompt and a single empty point, on features that no memory has conditioned:

    high, low, score = outputs_of_mask(mask)
    prompts = PromptEncoder(...)(empty_point, NOT_A_POINT, MaskDownsample(...)(mask))
    out = MaskDecoder(...)(features[:, None], prompts, high_resolution)
    _, _, token = choose(out, several=config.several_for_mask_pointer, ...)
    present = (out.object_logits > 0) & (score > 0)
    pointer = ObjectPointer(config).apply(params, token, present)
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from tracevision_jax.layers.basic import precision
from tracevision_jax.layers.convolution import Patches
from tracevision_jax.ops.interpolation import resize_masks
from tracevision_jax.segmentation.mask_decoder import FeedForward
from tracevision_jax.segmentation.sam_config import MemoryConfig

MASK_SCALE, MASK_BIAS = 20.0, -10.0
"""A binary mask as logits: -10 and 10."""
LOW_RESOLUTION = 4
"""Pixels of the picture along a pixel of the decoder's masks."""


class ObjectPointer(nn.Module):
    """A token of the mask decoder to the vector by which later frames know the object."""

    config: MemoryConfig

    @nn.compact
    def __call__(
        self, token: Float[Array, "*batch width"], present: Bool[Array, "*batch"]
    ) -> Float[Array, "*batch width"]:
        """Project; an object that is absent has one and the same learned pointer."""
        c = self.config
        kinds = precision(c)
        pointer = FeedForward(c.width, c.width, 3, name="object_pointer_proj", **kinds)(token)
        absent = self.param("no_object_pointer", nn.initializers.normal(0.02), (1, c.width), kinds["param_dtype"])
        return jnp.where(present[..., None], pointer, absent[0].astype(kinds["dtype"]))


class MaskDownsample(nn.Module):
    """A mask at the picture's size to the decoder's prompt, with a learned scale; binary in, logits out."""

    config: MemoryConfig

    @nn.compact
    def __call__(self, masks: Float[Array, "*batch height width"]) -> Float[Array, "*batch quarter_height quarter"]:
        c = self.config
        kinds = precision(c)
        return Patches(1, LOW_RESOLUTION, name="mask_downsample", **kinds)(masks[..., None])[..., 0]


def outputs_of_mask(
    masks: Float[Array, "*batch height width"],
) -> tuple[Float[Array, "*batch height width"], Float[Array, "*batch quarter_height quarter"], Float[Array, "*batch"]]:
    """What a frame returns whose prompt is a mask (in [0, 1], at the picture's size).

    Returns:
        (logits at the picture's size, logits at the decoder's, the object's score: 10, or -10 for an empty mask).
    """
    logits = masks * MASK_SCALE + MASK_BIAS
    size = (masks.shape[-2] // LOW_RESOLUTION, masks.shape[-1] // LOW_RESOLUTION)
    present = (masks > 0).any((-2, -1)).astype(logits.dtype)
    return logits, resize_masks(logits, size, antialias=True), present * MASK_SCALE + MASK_BIAS
