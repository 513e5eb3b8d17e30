"""Sizes and switches of what follows the image encoder in SAM, SAM 2 and SAM 2.1, with the released values.

Sources: facebookresearch/segment-anything, `build_sam.py`; facebookresearch/sam2, `sam2/configs/{sam2,sam2.1}/*.yaml`
and `build_sam.py`, whose post-processing overrides (dynamic multimask, binarised prompts) are on, as by default there.
All image encoders of a generation have the same heads. What every release has in common is no switch.

    heads = HEADS_PRESETS["sam2.1"]                # also "sam2", and "sam", which has no memory
    encoder, decoder = PromptEncoder(heads.prompts), MaskDecoder(heads.decoder)

`hugging_face(heads)` gives the behaviour of `transformers` where it departs from Meta's.
"""

from dataclasses import dataclass, replace

from tracevision_jax.errors import UserError


@dataclass(frozen=True)
class PromptEncoderConfig:
    """Points, boxes and masks to tokens and a map."""

    width: int = 256
    image_size: int = 1024
    """Side of the square picture that the image encoder sees, pixels."""
    stride: int = 16
    """Pixels of a cell of the image embedding; masks come with a quarter of it."""
    mask_channels: int = 16
    norm_eps: float = 1e-6
    pad_with_boxes: bool = True
    """Whether the token "not a point" also ends a prompt with a box (SAM 2); without a box it always does."""
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.image_size % self.stride or self.stride % 4:
            raise UserError(
                f"prompt encoder: pictures of {self.image_size} px must be a multiple of the stride, {self.stride}, "
                "and that one of 4"
            )
        # The first of the mask's two norms has a quarter of the channels; over a single one it would forget the mask.
        if self.width % 2 or self.mask_channels % 4 or self.mask_channels < 8:
            raise UserError(
                f"prompt encoder: the width, {self.width}, must be even and the mask channels, {self.mask_channels}, "
                "a multiple of 4 from 8 on"
            )

    @property
    def grid(self) -> int:
        """Cells along one side of the image embedding."""
        return self.image_size // self.stride

    @property
    def mask_size(self) -> int:
        """Side of masks that are prompts, and of those that the decoder writes."""
        return 4 * self.grid


@dataclass(frozen=True)
class MaskDecoderConfig:
    """Two-way transformer, upscaling, and the heads that read its tokens."""

    width: int = 256
    heads: int = 8
    mlp_width: int = 2048
    layers: int = 2
    several: int = 3
    """Masks offered for an ambiguous prompt, beside the single one."""
    iou_hidden: int = 256
    iou_depth: int = 3
    norm_eps: float = 1e-5
    """Of the blocks' norms; `transformers` gives SAM's, not SAM 2's, 1e-6."""
    object_score: bool = True
    """Whether a token says if the object is there at all."""
    high_resolution: bool = True
    """Whether features of strides 4 and 8 are added while upscaling."""
    iou_sigmoid: bool = True
    """Whether predicted IoUs are squeezed into (0, 1)."""
    dynamic_multimask: bool = True
    """Whether an unstable single mask gives way to the best of the several; not while training."""
    stability_delta: float = 0.05
    stability_threshold: float = 0.98
    min_points: int = 0
    max_points: int = 1
    """Several masks are considered for prompts of min_points..max_points points, a box being two, in a video."""
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.width % 8 or (self.width // 2) % self.heads:
            raise UserError(
                f"mask decoder of width {self.width}: it must be a multiple of 8, and {self.heads} heads must divide "
                "half of it"
            )


@dataclass(frozen=True)
class MemoryConfig:
    """What a video adds: memories of earlier frames, how they are read, and attention to them."""

    width: int = 256
    memory_width: int = 64
    frames: int = 7
    """Frames whose memories are read: a conditioning one and the `frames - 1` before the current one."""
    max_pointers: int = 16
    """Object pointers are read of the `max_pointers - 1` frames before the current one, and of conditioning frames."""
    max_conditioning: int | None = None
    """Conditioning frames that are read, the nearest in time, at least 2; None for all that are kept."""
    frame_stride: int = 1
    """Recent memories but the last are of every so many frames."""
    only_past_pointers: bool = True
    """Whether pointers of conditioning frames still to come are hidden; training shows them."""
    pointer_times: bool = True
    """Whether pointers carry their distance in time (SAM 2.1)."""
    signed_pointer_times: bool = True
    """Whether a conditioning frame still to come has a negative distance (SAM 2.1)."""
    occlusion_embedding: bool = True
    """Whether the memory of a frame without the object is marked (SAM 2.1)."""
    pointers_follow_selection: bool = True
    """Whether `max_conditioning` also limits pointers (Meta); `transformers` reads those of all that are kept."""
    several_for_mask_pointer: bool = False
    """Whether the pointer of a mask prompt is that of the best of several masks (`transformers`) or of the single."""
    exact_mask_memory: bool = False
    """Whether a mask prompt is remembered as it was given (`transformers`) or by way of the decoder's resolution."""
    sigmoid_scale: float = 20.0
    sigmoid_bias: float = -10.0
    """Masks enter the memory encoder as probability * scale + bias."""
    mask_stride: int = 16
    """Pixels of the mask for a cell of the memory; a power of 2."""
    fuser_layers: int = 2
    fuser_kernel: int = 7
    fuser_hidden: int = 1024
    layers: int = 4
    """Of memory attention."""
    mlp_width: int = 2048
    rope_theta: float = 1e4
    norm_eps: float = 1e-5
    store_dtype: str = "bfloat16"
    """Of the memories that are kept; both public codes round them in float32 runs as well."""
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    """What the backward pass of memory attention recomputes, see `layers.basic.REMAT_POLICIES`."""

    def __post_init__(self) -> None:
        if self.width % 4 or self.memory_width % 4:
            raise UserError(f"memory of widths {self.width} and {self.memory_width}: both must be multiples of 4")
        if self.width > self.memory_width and self.width % self.memory_width:
            raise UserError(f"pointers of width {self.width} do not split into tokens of {self.memory_width}")
        if self.max_conditioning is not None and self.max_conditioning < 2:
            raise UserError(
                f"max_conditioning {self.max_conditioning}: at least 2, one frame before and one after the current "
                "one; None for no limit"
            )
        if self.frames < 2 or self.frame_stride < 1 or self.max_pointers < 2:
            raise UserError(
                f"memory of {self.frames} frames, stride {self.frame_stride}, {self.max_pointers} pointers: at least "
                "2, 1 and 2"
            )
        if self.mask_stride < 2 or self.mask_stride & (self.mask_stride - 1):
            raise UserError(f"mask_stride {self.mask_stride}: a power of 2 from 2 on")

    @property
    def pointer_parts(self) -> int:
        """Tokens that a pointer becomes."""
        return max(self.width // self.memory_width, 1)


@dataclass(frozen=True)
class HeadsConfig:
    """All that follows the image encoder; `memory` is None for SAM, which knows images alone."""

    prompts: PromptEncoderConfig
    decoder: MaskDecoderConfig
    memory: MemoryConfig | None

    def with_precision(self, dtype: str, param_dtype: str) -> "HeadsConfig":
        """The same with all parts computing in `dtype`, parameters being `param_dtype`."""
        return HeadsConfig(
            replace(self.prompts, dtype=dtype, param_dtype=param_dtype),
            replace(self.decoder, dtype=dtype, param_dtype=param_dtype),
            None if self.memory is None else replace(self.memory, dtype=dtype, param_dtype=param_dtype),
        )


_SAM = HeadsConfig(
    PromptEncoderConfig(pad_with_boxes=False),
    MaskDecoderConfig(object_score=False, high_resolution=False, iou_sigmoid=False, dynamic_multimask=False),
    None,
)
_SAM21 = HeadsConfig(PromptEncoderConfig(), MaskDecoderConfig(), MemoryConfig())
_MEMORY_20 = MemoryConfig(pointer_times=False, signed_pointer_times=False, occlusion_embedding=False)

HEADS_PRESETS: dict[str, HeadsConfig] = {
    "sam": _SAM,
    "sam2": replace(_SAM21, memory=_MEMORY_20),
    "sam2.1": _SAM21,
}


def hugging_face(heads: HeadsConfig) -> HeadsConfig:
    """The same heads with the choices of `transformers` where they differ from Meta's."""
    if heads.memory is None:
        return replace(heads, decoder=replace(heads.decoder, norm_eps=1e-6))
    memory = replace(
        heads.memory, pointers_follow_selection=False, several_for_mask_pointer=True, exact_mask_memory=True
    )
    return replace(heads, memory=memory)
