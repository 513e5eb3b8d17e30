"""Segment Anything as released: SAM, SAM 2 and SAM 2.1 as one module, for pictures and for single frames of videos.

Sources: facebookresearch/segment-anything, `sam.py` and `predictor.py`; facebookresearch/sam2, `modeling/sam2_base.py`
and `sam2_image_predictor.py`. Parameters are {"vision_encoder", "prompt_encoder", "mask_decoder"} and, for SAM 2,
"high_resolution", "memory_conditioning", "memory_encoder", "object_pointer", "mask_downsample"; one whose `memory` is
None, for pictures alone, has of the last four no more than `memory_conditioning/no_memory_embedding`. A picture is
encoded once, whatever is then asked about it:

    model = SegmentAnything(sam_preset("sam2.1_hiera_tiny"))
    params = init_params(model, jax.random.key(0))                        # or converted ones
    maps = model.apply({"params": params}, pixels, method="encode")       # vision.sam_preprocess makes the pixels
    found = model.apply({"params": params}, maps, prompts, several=True, method="predict")

A frame of a video is `condition` (read memory), `decode` (masks from prompts or none) or `take_mask` (the prompt is the
mask), and `remember` (what later frames will read). `sam2_video` puts them together over whole videos.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from tracevision_jax.errors import UserError
from tracevision_jax.hosts.sam_presets import SegmentAnythingConfig
from tracevision_jax.layers.basic import precision
from tracevision_jax.ops.interpolation import resize_masks
from tracevision_jax.ops.sine_position import sine_position
from tracevision_jax.segmentation.mask_decoder import (
    DecodedMasks,
    HighResolution,
    MaskDecoder,
    choose,
    several_wanted,
    without_absent,
)
from tracevision_jax.segmentation.memory_attention import MemoryConditioning
from tracevision_jax.segmentation.memory_bank import MemoryReading, empty, read
from tracevision_jax.segmentation.memory_encoder import MemoryEncoder
from tracevision_jax.segmentation.object_pointer import MaskDownsample, ObjectPointer, outputs_of_mask
from tracevision_jax.segmentation.prompt_encoder import ABSENT, NOT_A_POINT, PromptEmbeddings, PromptEncoder
from tracevision_jax.vision.hiera import ImageFeatures, Sam2ImageEncoder
from tracevision_jax.vision.sam_config import HieraConfig
from tracevision_jax.vision.sam_vit import SamVitEncoder


class Maps(NamedTuple):
    """All that is ever read of a picture again. The two finer maps are as the decoder adds them; SAM has none."""

    image: Float[Array, "batch rows columns width"]
    """Stride 16, as the image encoder gave it."""
    stride4: Float[Array, "batch rows4 columns4 eighth"] | None
    stride8: Float[Array, "batch rows8 columns8 quarter"] | None


class Prompts(NamedTuple):
    """Prompts of objects, see `segmentation.prompt_encoder`: labels say what points are; boxes are two points."""

    points_px: Float[Array, "batch objects points 2"]
    """(x, y) in pixels of the square picture."""
    labels: Int[Array, "batch objects points"]
    masks: Float[Array, "batch objects mask_size mask_size"] | None = None
    """Logits, as the decoder writes them."""
    has_mask: Bool[Array, "batch objects"] | None = None
    """Whose mask counts, all by default."""


class Prediction(NamedTuple):
    """Masks of objects on pictures; with `several` those of an ambiguous prompt, else one."""

    masks: Float[Array, "batch objects masks mask_size mask_size2"]
    """Logits."""
    ious: Float[Array, "batch objects masks"]
    """Predicted IoU of each with the truth."""
    object_logits: Float[Array, "batch objects"]
    """Whether the object is there, over 0; masks do not depend on it. Always 10 in SAM, which does not tell."""


class FrameMasks(NamedTuple):
    """Objects on one frame of each video."""

    masks: Float[Array, "videos objects mask_size mask_size2"]
    """Logits of the chosen mask, -1024 everywhere where the object is absent."""
    ious: Float[Array, "videos objects"]
    object_logits: Float[Array, "videos objects"]
    """The object is there where they are over 0."""
    pointers: Float[Array, "videos objects width"]
    """What later frames know the object by."""
    decoded: DecodedMasks
    """All masks that were offered, whether or not the object is there: training supervises them. For a mask prompt,
    those of the pass that only made the pointer."""


def no_prompts(batch: int, objects: int, slots: int = 1) -> Prompts:
    """What a video's frames without prompts get: an empty point; further slots hold nothing."""
    labels = jnp.full((batch, objects, slots), ABSENT, jnp.int32).at[:, :, 0].set(NOT_A_POINT)
    return Prompts(jnp.zeros((batch, objects, slots, 2)), labels)


def init_params(model: "SegmentAnything", rng: PRNGKeyArray) -> Any:
    """Draw all parameters of a model, those of all paths; nothing is computed but them."""
    side = model.config.image_size
    return jax.jit(model.init)(rng, jnp.zeros((1, side, side, 3)))["params"]


class WithoutMemory(nn.Module):
    """What is left of SAM 2's memory in a model for pictures alone: the vector for "no memory"."""

    width: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, image: Float[Array, "batch rows columns width"]) -> Float[Array, "batch 1 rows columns width"]:
        shape = (1, 1, self.width)
        absent = self.param("no_memory_embedding", nn.initializers.normal(0.02), shape, self.param_dtype)
        return (image.astype(self.dtype) + absent[0, 0].astype(self.dtype))[:, None]


class SegmentAnything(nn.Module):
    """The joined model of either generation."""

    config: SegmentAnythingConfig

    def setup(self) -> None:
        vision, heads = self.config.vision, self.config.heads
        hiera = isinstance(vision, HieraConfig)
        self.vision_encoder = Sam2ImageEncoder(vision) if hiera else SamVitEncoder(vision)
        self.prompt_encoder = PromptEncoder(heads.prompts)
        self.mask_decoder = MaskDecoder(heads.decoder)
        if heads.decoder.high_resolution:
            self.high_resolution = HighResolution(heads.decoder)
        if heads.memory is not None:
            self.memory_conditioning: Any = MemoryConditioning(heads.memory)
            self.memory_encoder = MemoryEncoder(heads.memory)
            self.object_pointer = ObjectPointer(heads.memory)
            self.mask_downsample = MaskDownsample(heads.memory)
        elif heads.decoder.high_resolution:
            self.memory_conditioning = WithoutMemory(heads.prompts.width, **precision(heads.prompts))

    def encode(self, pixels: Float[Array, "batch height width channels"]) -> Maps:
        """Encode normalised pictures, or frames, squares of the configured side.

        Raises:
            UserError: pictures of another size.
        """
        side = self.config.image_size
        if pixels.shape[1:3] != (side, side):
            raise UserError(
                f"pictures of {pixels.shape[1]} x {pixels.shape[2]} px: this model takes {side} x {side}; resize them "
                "(vision.sam_preprocess), or build the model with config.with_image_size"
            )
        features = self.vision_encoder(pixels)
        if not isinstance(features, ImageFeatures):
            return Maps(features, None, None)
        if not self.config.heads.decoder.high_resolution:
            return Maps(features.stride16, None, None)
        return Maps(features.stride16, *self.high_resolution(features.stride4, features.stride8))

    def predict(self, maps: Maps, prompts: Prompts, several: bool = True, training: bool = False) -> Prediction:
        """Segment objects of pictures.

        Args:
            maps: see `encode`.
            prompts: of any kind. Without any, SAM 2 in `transformers` has an empty point (`no_prompts`), the original
                predictors have ABSENT slots only.
            several: whether to return the several masks of an ambiguous prompt (one point), or one mask. The one is
                the single mask; with `dynamic_multimask`, where it is unstable, the best of the several.
            training: whether the single mask always stays.
        """
        out = self._decoded(maps, self.condition(maps), prompts)
        if several:
            return Prediction(out.masks[:, :, 1:], out.ious[:, :, 1:], out.object_logits)
        mask, iou, _ = choose(out, False, self.config.heads.decoder, training)
        return Prediction(mask[:, :, None], iou[:, :, None], out.object_logits)

    def condition(
        self,
        maps: Maps,
        reading: MemoryReading | None = None,
        use_memory: Bool[Array, "videos objects"] | Bool[Array, ""] | bool = True,
    ) -> Float[Array, "videos objects rows columns width"]:
        """The image embedding that masks are decoded from, of each object; of all in one where nothing is read.

        Args:
            maps: of pictures, or of one frame of each video.
            reading: see `memory_bank.read`, with a leading axis of videos; None for pictures, and for frames where no
                object has a memory.
            use_memory: for which objects; those prompted on a frame that was never tracked do without.
        """
        if self.config.heads.memory is None:
            if not self.config.heads.decoder.high_resolution:
                return maps.image[:, None]
            return self.memory_conditioning(maps.image)
        position = sine_position(*maps.image.shape[1:])
        return self.memory_conditioning(maps.image, position.astype(maps.image.dtype), reading, use_memory)

    def decode(
        self,
        maps: Maps,
        conditioned: Float[Array, "videos #objects rows columns width"],
        prompts: Prompts,
        training: bool = False,
    ) -> FrameMasks:
        """Masks of one frame of each video from points, boxes, earlier logits, or from no prompt (`no_prompts`).

        Prompts of few points are ambiguous: the best of several masks is chosen (`several_wanted`).

        Args:
            maps: of the frames.
            conditioned: see `condition`; clicks that correct one another share it.
            prompts: of objects.
            training: whether a single mask stays even if it is unstable.

        Raises:
            UserError: a model that knows pictures alone.
        """
        self.config.video_memory()
        decoder = self.config.heads.decoder
        out = self._decoded(maps, conditioned, prompts)
        masks, ious, token = choose(out, several_wanted(prompts.labels, decoder), decoder, training)
        pointers = self.object_pointer(token, out.object_logits > 0)
        return FrameMasks(without_absent(masks, out.object_logits), ious, out.object_logits, pointers, out)

    def track(
        self,
        maps: Maps,
        reading: MemoryReading | None,
        prompts: Prompts,
        use_memory: Bool[Array, "videos objects"] | Bool[Array, ""] | bool = True,
        training: bool = False,
    ) -> FrameMasks:
        """`condition`, then `decode`."""
        return self.decode(maps, self.condition(maps, reading, use_memory), prompts, training)

    def take_mask(self, maps: Maps, masks_binary: Float[Array, "videos objects side side"]) -> FrameMasks:
        """One frame of each video where the prompts are the masks themselves, in [0, 1], of the picture's size.

        Raises:
            UserError: a model that knows pictures alone.
        """
        memory = self.config.video_memory()
        conditioned = maps.image[:, None]  # without the vector for "no memory", as in the original
        batch, objects = masks_binary.shape[:2]
        small = self.mask_downsample(masks_binary)
        out = self._decoded(maps, conditioned, no_prompts(batch, objects)._replace(masks=small))
        _, _, token = choose(out, memory.several_for_mask_pointer, self.config.heads.decoder)
        _, masks, object_logits = outputs_of_mask(masks_binary)
        pointers = self.object_pointer(token, (out.object_logits > 0) & (object_logits > 0))
        return FrameMasks(masks, jnp.ones_like(object_logits), object_logits, pointers, out)

    def remember(
        self,
        maps: Maps,
        masks: Float[Array, "videos objects size size"],
        object_logits: Float[Array, "videos objects"],
        prompted: Bool[Array, "videos objects"],
    ) -> Float[Array, "videos objects rows columns memory_width"]:
        """Memories of one frame of each video.

        Args:
            maps: of the frames.
            masks: logits, of the decoder's or of the picture's size.
            object_logits: whether objects are there.
            prompted: whose mask comes from a user's prompt on this frame: it is made binary.

        Raises:
            UserError: a model that knows pictures alone.
        """
        self.config.video_memory()
        side = self.config.image_size
        large = resize_masks(masks, (side, side))
        return self.memory_encoder(maps.image, large, object_logits > 0, prompted)

    def _decoded(self, maps: Maps, conditioned: Array, prompts: Prompts) -> DecodedMasks:
        embedded: PromptEmbeddings = self.prompt_encoder(*prompts)
        high = None if maps.stride4 is None or maps.stride8 is None else (maps.stride4, maps.stride8)
        return self.mask_decoder(conditioned, embedded, high)

    def __call__(self, pixels: Float[Array, "batch height width channels"]) -> Prediction:
        """Segment the middle of pictures, given as a point and as a mask; every parameter has a part where it is drawn.

        To draw parameters, see `init_params`.
        """
        maps = self.encode(pixels)
        batch, mask = len(pixels), self.config.mask_size
        middle = jnp.full((batch, 1, 1, 2), self.config.image_size / 2)
        prompts = Prompts(middle, jnp.ones((batch, 1, 1), jnp.int32), jnp.zeros((batch, 1, mask, mask)))
        memory = self.config.heads.memory
        if self.is_initializing() and memory is not None:
            grid = self.config.grid
            reading = read(empty(memory, 1, grid, grid), 0, memory)
            reading = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape)), reading)
            frame = self.track(maps, reading, prompts)
            self.take_mask(maps, jnp.zeros((batch, 1, *pixels.shape[1:3])))
            self.remember(maps, frame.masks, frame.object_logits, jnp.ones((batch, 1), bool))
        return self.predict(maps, prompts)
