"""What a whole Segment Anything model is made of, and the released ones.

Sources: facebookresearch/segment-anything, `build_sam.py`; facebookresearch/sam2, `sam2/configs/{sam2,sam2.1}/*.yaml`.

    config = sam_preset("sam2.1_hiera_tiny")               # also "sam2_hiera_large", "sam_vit_h", ...
    config = config.with_precision("bfloat16").with_image_size(512)
"""

from dataclasses import dataclass, replace

from tracevision_jax.errors import UserError
from tracevision_jax.nearest import suggest
from tracevision_jax.segmentation.sam_config import HEADS_PRESETS, HeadsConfig, MemoryConfig
from tracevision_jax.vision.sam_config import HIERA_PRESETS, SAM_VIT_PRESETS, HieraConfig, SamVitConfig

HIERA_MAP_STRIDE = 16
"""Pixels of a cell of the smallest map that Hiera's pyramid keeps."""


@dataclass(frozen=True)
class SegmentAnythingConfig:
    """An image encoder and the heads that read its maps; pictures are squares of `heads.prompts.image_size`."""

    vision: SamVitConfig | HieraConfig
    heads: HeadsConfig

    def __post_init__(self) -> None:
        vision, prompts, decoder, memory = self.vision, self.heads.prompts, self.heads.decoder, self.heads.memory
        hiera = isinstance(vision, HieraConfig)
        widths = {
            "the image encoder": vision.fpn_width if hiera else vision.out_width,
            "the prompt encoder": prompts.width,
            "the mask decoder": decoder.width,
        }
        if memory is not None:
            widths["the memory"] = memory.width
        if len(set(widths.values())) > 1:
            listed = ", ".join(f"{name} has {width}" for name, width in widths.items())
            raise UserError(f"Segment Anything: all parts must have the same width, but {listed}")
        stride = HIERA_MAP_STRIDE if hiera else vision.patch
        if prompts.stride != stride:
            raise UserError(
                f"Segment Anything: the image encoder's cells are {stride} px, the prompt encoder's {prompts.stride}: "
                f"set heads.prompts.stride to {stride}"
            )
        if memory is not None and memory.mask_stride != stride:
            raise UserError(
                f"Segment Anything: the image encoder's cells are {stride} px, those of memories {memory.mask_stride}: "
                f"set heads.memory.mask_stride to {stride}"
            )
        step = vision.side_step if hiera else vision.patch
        if prompts.image_size % step:
            raise UserError(
                f"Segment Anything for pictures of {prompts.image_size} px: its image encoder needs a multiple of "
                f"{step} px"
            )
        if decoder.high_resolution and not hiera:
            raise UserError(
                "Segment Anything: a plain ViT gives no maps of strides 4 and 8: set heads.decoder.high_resolution to "
                "false, or take Hiera"
            )

    @property
    def image_size(self) -> int:
        """Side of the square pictures that are encoded, pixels."""
        return self.heads.prompts.image_size

    @property
    def grid(self) -> int:
        """Cells along one side of the image embedding."""
        return self.heads.prompts.grid

    @property
    def mask_size(self) -> int:
        """Side of the masks that the decoder writes, and of those that are prompts of images."""
        return self.heads.prompts.mask_size

    def video_memory(self) -> MemoryConfig:
        """What a video needs. Raises UserError for a model without it."""
        if self.heads.memory is None:
            raise UserError("this Segment Anything model knows pictures alone: for videos take SAM 2 or 2.1")
        return self.heads.memory

    def with_precision(
        self, dtype: str, param_dtype: str | None = None, remat: str | None = None
    ) -> "SegmentAnythingConfig":
        """The same model computing in `dtype`; parameters and remat policy change only when given."""
        changes = {"dtype": dtype}
        if param_dtype is not None:
            changes["param_dtype"] = param_dtype
        for_remat = {} if remat is None else {"remat": remat}
        heads, memory = self.heads, self.heads.memory
        return SegmentAnythingConfig(
            replace(self.vision, **changes, **for_remat),
            HeadsConfig(
                replace(heads.prompts, **changes),
                replace(heads.decoder, **changes),
                None if memory is None else replace(memory, **changes, **for_remat),
            ),
        )

    def with_image_size(self, side: int) -> "SegmentAnythingConfig":
        """The same parameters for pictures of another side, pixels; learned positions are resized.

        Raises:
            UserError: a side that the image encoder cannot take.
        """
        prompts = replace(self.heads.prompts, image_size=side)
        return SegmentAnythingConfig(self.vision, replace(self.heads, prompts=prompts))


SAM_PRESETS: dict[str, SegmentAnythingConfig] = {
    **{f"sam_vit_{size}": SegmentAnythingConfig(vit, HEADS_PRESETS["sam"]) for size, vit in SAM_VIT_PRESETS.items()},
    **{
        f"{release}_hiera_{size}": SegmentAnythingConfig(hiera, HEADS_PRESETS[release])
        for release in ("sam2", "sam2.1")
        for size, hiera in HIERA_PRESETS.items()
    },
}


def sam_preset(name: str) -> SegmentAnythingConfig:
    """A released model by name. Raises UserError for another name."""
    if name not in SAM_PRESETS:
        raise UserError(
            f"no Segment Anything model '{name}'; known are {', '.join(SAM_PRESETS)}." + suggest(name, SAM_PRESETS)
        )
    return SAM_PRESETS[name]
