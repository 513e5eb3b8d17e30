"""The mask decoder of SAM and SAM 2 (Kirillov et al. 2023, App. A; Ravi et al. 2024, App. D.1).

It follows facebookresearch/{segment-anything,sam2}, `modeling/*mask_decoder.py`. One class serves both generations;
switches of the configuration add SAM 2's object score and features of high resolution. All masks always come out, the
single one first; which of them counts is chosen afterwards, for each prompt by itself:

    high = HighResolution(config).apply(high_params, stride4, stride8)          # once an image
    out = MaskDecoder(config).apply(params, image[:, None], prompts, high)
    several, their_ious = out.masks[:, :, 1:], out.ious[:, :, 1:]               # for an ambiguous prompt
    mask, iou, token = choose(out, several=wanted, config=config)               # one a prompt
    mask = without_absent(mask, out.object_logits)                              # in a video
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tracevision_jax.layers.basic import precision, projection
from tracevision_jax.layers.convolution import Doubling
from tracevision_jax.layers.sharding import constrain
from tracevision_jax.layers.vit import layer_norm
from tracevision_jax.segmentation.prompt_encoder import PromptEmbeddings, count_points
from tracevision_jax.segmentation.sam_config import MaskDecoderConfig
from tracevision_jax.segmentation.two_way import TwoWayTransformer

NO_OBJECT_LOGIT = -1024.0
"""Of every pixel of a frame from which the object is absent."""
CERTAIN_OBJECT_LOGIT = 10.0
"""The object's score where none is predicted."""
UPSCALED_NORM_EPS = 1e-6
LAST_NORM_EPS = 1e-5

HighResolutionMaps = tuple[
    Float[Array, "batch rows4 columns4 eighth"],
    Float[Array, "batch rows8 columns8 quarter"],
]
"""Features of strides 4 and 8, an eighth and a quarter as wide as the decoder."""


class DecodedMasks(NamedTuple):
    """All that the decoder says of each prompt; index 0 of `masks` is the single mask, the several follow."""

    masks: Float[Array, "batch prompts masks height width"]
    """Logits, float32."""
    ious: Float[Array, "batch prompts masks"]
    """Predicted IoU of each mask with the truth."""
    tokens: Float[Array, "batch prompts masks channels"]
    """The tokens that the masks were written from; object pointers are made of them."""
    object_logits: Float[Array, "batch prompts"]
    """Whether the object is there."""


class FeedForward(nn.Module):
    """An MLP with ReLU between its `depth` linear maps."""

    hidden: int
    out: int
    depth: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*rows width"]) -> Float[Array, "*rows out"]:
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.relu(projection("proj_in", self.hidden, **kinds)(x))
        for index in range(self.depth - 2):
            x = nn.relu(projection(f"layers_{index}", self.hidden, **kinds)(x))
        return projection("proj_out", self.out, **kinds)(x)


class HighResolution(nn.Module):
    """Narrows features of strides 4 and 8 to what the decoder adds; it depends on the image alone."""

    config: MaskDecoderConfig

    @nn.compact
    def __call__(
        self, stride4: Float[Array, "batch rows4 columns4 width"], stride8: Float[Array, "batch rows8 columns8 width"]
    ) -> HighResolutionMaps:
        c = self.config
        return (
            projection("conv_s0", c.width // 8, **precision(c))(stride4),
            projection("conv_s1", c.width // 4, **precision(c))(stride8),
        )


class MaskDecoder(nn.Module):
    """Masks of any number of prompts on any number of images."""

    config: MaskDecoderConfig

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "batch #prompts rows columns width"],
        prompts: PromptEmbeddings,
        high_resolution: HighResolutionMaps | None = None,
    ) -> DecodedMasks:
        """Decode.

        Args:
            image: image embeddings; one an image, or one a prompt where memory has made them differ.
            prompts: see `PromptEncoder`.
            high_resolution: see `HighResolution`; given exactly when the configuration says so.

        Raises:
            ValueError: features of high resolution are missing, or are not used.
        """
        c = self.config
        kinds = precision(c)
        if (high_resolution is not None) != c.high_resolution:
            raise ValueError(f"features of high resolution: given {not c.high_resolution}, used {c.high_resolution}")
        batch, count = prompts.tokens.shape[:2]
        rows, columns, width = image.shape[2:]
        own = self._own_tokens()
        tokens = jnp.concatenate([jnp.broadcast_to(own, (batch, count, *own.shape)), prompts.tokens], axis=2)
        visible = jnp.concatenate([jnp.ones((batch, count, len(own)), bool), prompts.visible], axis=2)
        cells = jnp.broadcast_to(image + prompts.dense, (batch, count, rows, columns, width))

        def flat(x: Array) -> Array:
            return x.reshape(batch * count, *x.shape[2:])

        cells = constrain(flat(cells).reshape(batch * count, rows * columns, width), "batch", None, None)
        transformer = TwoWayTransformer(
            c.width, c.heads, c.mlp_width, c.layers, c.norm_eps, LAST_NORM_EPS, name="transformer", **kinds
        )
        code = prompts.image_code.reshape(rows * columns, width)
        tokens, cells = transformer(flat(tokens), cells, code, flat(visible))
        tokens = tokens.reshape(batch, count, *tokens.shape[1:])
        upscaled = self._upscale(cells.reshape(batch * count, rows, columns, width), count, high_resolution)

        first = 1 if c.object_score else 0
        mask_tokens = tokens[:, :, first + 1 : first + 2 + c.several]
        # One MLP a mask, side by side: their parameters have a leading axis.
        hypernetworks = nn.vmap(
            FeedForward, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=2, out_axes=2
        )
        kernels = hypernetworks(c.width, c.width // 8, 3, name="output_hypernetworks_mlps", **kinds)(mask_tokens)
        masks = jnp.einsum("bphwc,bpmc->bpmhw", upscaled, kernels, preferred_element_type=jnp.float32)
        ious = FeedForward(c.iou_hidden, c.several + 1, c.iou_depth, name="iou_prediction_head", **kinds)(
            tokens[:, :, first]
        ).astype(jnp.float32)
        if c.object_score:
            score = FeedForward(c.width, 1, 3, name="pred_obj_score_head", **kinds)(tokens[:, :, 0])[..., 0]
        else:
            score = jnp.full((batch, count), CERTAIN_OBJECT_LOGIT)
        return DecodedMasks(
            masks, jax.nn.sigmoid(ious) if c.iou_sigmoid else ious, mask_tokens, score.astype(jnp.float32)
        )

    def _own_tokens(self) -> Float[Array, "tokens width"]:
        """The learned tokens, in the order in which the transformer sees them."""
        c = self.config
        names = [("obj_score_token", 1)] * c.object_score + [("iou_token", 1), ("mask_tokens", c.several + 1)]
        tables = [
            self.param(name, nn.initializers.normal(1.0), (rows, c.width), jnp.dtype(c.param_dtype))
            for name, rows in names
        ]
        return jnp.concatenate(tables).astype(jnp.dtype(c.dtype))

    def _upscale(
        self, x: Float[Array, "n rows columns width"], prompts: int, high_resolution: HighResolutionMaps | None
    ) -> Float[Array, "batch prompts rows4 columns4 eighth"]:
        """Four times the image embedding's resolution, features of the image added on the way."""
        c = self.config

        def add(x: Array, level: int) -> Array:
            by_prompt = x.reshape(-1, prompts, *x.shape[1:])
            if high_resolution is not None:
                by_prompt = by_prompt + high_resolution[level][:, None].astype(by_prompt.dtype)
            return by_prompt.reshape(x.shape)

        x = add(Doubling(c.width // 4, name="upscale_conv1", **precision(c))(x), 1)
        x = nn.gelu(layer_norm("upscale_layer_norm", UPSCALED_NORM_EPS, **precision(c))(x), approximate=False)
        x = nn.gelu(add(Doubling(c.width // 8, name="upscale_conv2", **precision(c))(x), 0), approximate=False)
        return x.reshape(-1, prompts, *x.shape[1:])


def stability(masks: Float[Array, "*batch height width"], delta: float) -> Float[Array, "*batch"]:
    """How much of a mask's area at threshold -delta is left at delta; 1 for an empty mask."""
    inner = (masks > delta).sum((-2, -1))
    outer = (masks > -delta).sum((-2, -1))
    return jnp.where(outer > 0, inner / jnp.maximum(outer, 1), 1.0)


def several_wanted(labels: Int[Array, "*batch points"], config: MaskDecoderConfig) -> Bool[Array, "*batch"]:
    """Whether a video's prompt is ambiguous enough to consider several masks, by its number of points."""
    points = count_points(labels)
    return (points >= config.min_points) & (points <= config.max_points)


def choose(
    out: DecodedMasks,
    several: Bool[Array, "batch prompts"] | Bool[Array, ""] | bool,
    config: MaskDecoderConfig,
    training: bool = False,
) -> tuple[
    Float[Array, "batch prompts height width"], Float[Array, "batch prompts"], Float[Array, "batch prompts channels"]
]:
    """Choose one mask a prompt.

    Where `several` is true it is the several masks' best by predicted IoU, with its token. Elsewhere it is the single
    mask with its token; with `dynamic_multimask`, outside training, an unstable single mask gives way to the best of
    the several, but the token stays the single one's.

    Returns:
        (mask logits, predicted IoU, token).
    """
    best = 1 + jnp.argmax(out.ious[:, :, 1:], axis=-1)
    several = jnp.broadcast_to(jnp.asarray(several), best.shape)
    token_from = jnp.where(several, best, 0)
    mask_from = token_from
    if config.dynamic_multimask and not training:
        stable = stability(out.masks[:, :, 0], config.stability_delta) >= config.stability_threshold
        mask_from = jnp.where(several | ~stable, best, 0)

    def pick(values: Array, index: Array) -> Array:
        return jnp.take_along_axis(values, index.reshape(*index.shape, *(1,) * (values.ndim - 2)), axis=2)[:, :, 0]

    return pick(out.masks, mask_from), pick(out.ious, mask_from), pick(out.tokens, token_from)


def without_absent(
    masks: Float[Array, "batch prompts *rest"], object_logits: Float[Array, "batch prompts"]
) -> Float[Array, "batch prompts *rest"]:
    """Masks of objects that are absent (a score of 0 or less) made empty, as a video's frames have them."""
    present = (object_logits > 0).reshape(*object_logits.shape, *(1,) * (masks.ndim - 2))
    return jnp.where(present, masks, NO_OBJECT_LOGIT)
