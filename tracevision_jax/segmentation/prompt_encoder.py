"""The prompt encoder of SAM and SAM 2 (Kirillov et al. 2023, Sec. 3): points, boxes and masks to what a decoder reads.

It follows facebookresearch/{segment-anything,sam2}, `modeling/*prompt_encoder.py`. Shapes are fixed: every prompt has
the same number of points, and a label says what each is. A box is two points; a slot that holds nothing is ABSENT, and
the decoder hides its token, so that padding changes nothing. With the points there may be a mask, and for each prompt a
flag whether it counts.

    points, labels = with_boxes(clicks, click_labels, boxes)      # pixels of the encoder's picture
    prompts = PromptEncoder(config).apply(params, points, labels, masks, has_mask)

No prompt at all: a single point labelled NOT_A_POINT is what a video's frames without prompts get in SAM 2; only ABSENT
ones leave the decoder without any prompt token, as the original image predictors do.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tracevision_jax.layers.basic import precision, projection
from tracevision_jax.layers.convolution import Patches
from tracevision_jax.layers.vit import layer_norm
from tracevision_jax.segmentation.sam_config import PromptEncoderConfig

NEGATIVE, POSITIVE, TOP_LEFT, BOTTOM_RIGHT = 0, 1, 2, 3
"""Labels of points; the last two are corners of a box."""
NOT_A_POINT = -1
"""Label of a point that says that there is none: a token of its own, whatever its place."""
ABSENT = -10
"""Label of a slot that holds nothing, not even a token."""


class PromptEmbeddings(NamedTuple):
    """What the mask decoder reads of prompts."""

    tokens: Float[Array, "batch prompts tokens width"]
    visible: Bool[Array, "batch prompts tokens"]
    """Which tokens there are."""
    dense: Float[Array, "#batch #prompts #rows #columns width"]
    """The mask prompt, or the code for none, to be added to the image embedding."""
    image_code: Float[Array, "rows columns width"]
    """Places of the image embedding, in the code of the points."""


def with_boxes(
    points_px: Float[Array, "*batch points 2"],
    labels: Int[Array, "*batch points"],
    boxes_px: Float[Array, "*batch 4"],
    has_box: Bool[Array, "*batch"] | None = None,
) -> tuple[Float[Array, "*batch more 2"], Int[Array, "*batch more"]]:
    """Put a box, (x1, y1, x2, y2), before the points of each prompt, as two labelled corners.

    `has_box` says for which prompts the box counts, all by default; the corners of the others are ABSENT.
    """
    corners = boxes_px.reshape(*boxes_px.shape[:-1], 2, 2)
    kinds = jnp.broadcast_to(jnp.array([TOP_LEFT, BOTTOM_RIGHT], labels.dtype), corners.shape[:-1])
    if has_box is not None:
        kinds = jnp.where(has_box[..., None], kinds, ABSENT)
    return jnp.concatenate([corners, points_px], axis=-2), jnp.concatenate([kinds, labels], axis=-1)


def count_points(labels: Int[Array, "*batch points"]) -> Int[Array, "*batch"]:
    """Points of each prompt, corners of boxes included."""
    return (labels >= 0).sum(-1)


class PositionCode(nn.Module):
    """Random Fourier features of places (Tancik et al. 2020), whose matrix is drawn once and never trained."""

    width: int
    param_dtype: Any

    @nn.compact
    def __call__(self, places: Float[Array, "*batch 2"]) -> Float[Array, "*batch width"]:
        """Code (x, y) in [0, 1], in float32."""
        shape = (2, self.width // 2)
        matrix = self.param("positional_embedding", nn.initializers.normal(1.0), shape, self.param_dtype)
        matrix = jax.lax.stop_gradient(matrix).astype(jnp.float32)
        # Angles reach tens of turns: less than full float32 would move points by pixels.
        angles = 2 * jnp.pi * jnp.matmul(2 * places - 1, matrix, precision=jax.lax.Precision.HIGHEST)
        return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class MaskEmbedding(nn.Module):
    """Mask logits to a map of the image embedding's size."""

    config: PromptEncoderConfig

    @nn.compact
    def __call__(self, masks: Float[Array, "*batch height width"]) -> Float[Array, "*batch rows columns channels"]:
        c = self.config
        kinds = precision(c)
        x = masks[..., None].astype(kinds["dtype"])
        for index, channels in enumerate((c.mask_channels // 4, c.mask_channels), start=1):
            x = Patches(channels, 2, name=f"conv{index}", **kinds)(x)
            x = nn.gelu(layer_norm(f"layer_norm{index}", c.norm_eps, **kinds)(x), approximate=False)
        return projection("conv3", c.width, **kinds)(x)


class PromptEncoder(nn.Module):
    """Prompts of any number of objects on any number of images."""

    config: PromptEncoderConfig

    @nn.compact
    def __call__(
        self,
        points_px: Float[Array, "batch prompts points 2"],
        labels: Int[Array, "batch prompts points"],
        masks: Float[Array, "batch prompts mask_size mask_size"] | None = None,
        has_mask: Bool[Array, "batch prompts"] | None = None,
    ) -> PromptEmbeddings:
        """Encode prompts.

        Args:
            points_px: (x, y) in pixels of the square picture that the image encoder saw.
            labels: what each point is, see the labels above.
            masks: logits at a quarter of the image embedding's stride; None where no prompt has one.
            has_mask: whose mask counts, all by default.

        Raises:
            ValueError: masks of another size.
        """
        c = self.config
        dtype, param_dtype = jnp.dtype(c.dtype), jnp.dtype(c.param_dtype)
        code = PositionCode(c.width, param_dtype, name="shared_embedding")

        def table(name: str, rows: int) -> Array:
            return self.param(name, nn.initializers.normal(1.0), (rows, c.width), param_dtype).astype(jnp.float32)

        point_embed, not_a_point = table("point_embed", 4), table("not_a_point_embed", 1)
        there = labels != ABSENT
        # Each prompt with points ends in a token "not a point", in SAM only if it has no box.
        ends = there.any(-1, keepdims=True)
        if not c.pad_with_boxes:
            ends = ends & ~(labels >= TOP_LEFT).any(-1, keepdims=True)
        labels = jnp.concatenate([labels, jnp.where(ends, NOT_A_POINT, ABSENT).astype(labels.dtype)], axis=-1)
        points_px = jnp.pad(points_px.astype(jnp.float32), ((0, 0), (0, 0), (0, 1), (0, 0)))
        kinds = point_embed[jnp.clip(labels, 0, 3)]
        # A pixel's place is its centre.
        tokens = jnp.where((labels >= 0)[..., None], code((points_px + 0.5) / c.image_size) + kinds, not_a_point)
        visible = jnp.concatenate([there, ends], axis=-1)

        dense = table("no_mask_embed", 1)[None, None, None].astype(dtype)
        if masks is not None:
            if masks.shape[-2:] != (c.mask_size, c.mask_size):
                raise ValueError(f"mask prompts of {masks.shape[-2:]}; the encoder takes {c.mask_size} x {c.mask_size}")
            embedded = MaskEmbedding(c, name="mask_embed")(masks)
            dense = embedded if has_mask is None else jnp.where(has_mask[..., None, None, None], embedded, dense)
        centres = (jnp.arange(c.grid, dtype=jnp.float32) + 0.5) / c.grid
        image_code = code(jnp.stack(jnp.meshgrid(centres, centres, indexing="xy"), axis=-1))
        return PromptEmbeddings(tokens.astype(dtype), visible, dense, image_code.astype(dtype))
