"""Sizes of the Qwen2.5-VL vision tower, and those of the released models.

Source of the sizes: the vision_config of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class QwenVisionConfig:
    """A ViT of `groups` groups, each some window attention blocks, then one over the whole frame."""

    out_width: int
    """Width of the language model."""
    width: int = 1280
    heads: int = 16
    mlp_width: int = 3420
    groups: int = 4
    window_blocks: int = 7
    """Window blocks before the full block of each group; may be 0."""
    patch: int = 14
    """Side of a patch, pixels."""
    temporal_patch: int = 2
    """Video frames in a patch."""
    channels: int = 3
    merge: int = 2
    """Patches along one side of a merged unit."""
    window_units: int = 4
    """Merged units along one side of a window."""
    norm_eps: float = 1e-6
    rope_theta: float = 1e4
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    """What the backward pass recomputes, see `layers.basic.REMAT_POLICIES`."""

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 4:
            raise ValueError(f"width {self.width} over {self.heads} heads must give a multiple of 4 (2-D rotary)")

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.groups * (self.window_blocks + 1)

    @property
    def patch_dim(self) -> int:
        """Values of one patch, in the order (channel, time, row, column)."""
        return self.channels * self.temporal_patch * self.patch * self.patch

    @property
    def slots(self) -> int:
        """Patches of a whole window."""
        return (self.window_units * self.merge) ** 2

    @property
    def unit_pixels(self) -> int:
        """Side of a merged unit, the part of the picture behind one visual token, in pixels."""
        return self.patch * self.merge


VISION_PRESETS: dict[str, QwenVisionConfig] = {
    "3b": QwenVisionConfig(out_width=2048),
    "7b": QwenVisionConfig(out_width=3584),
    "32b": QwenVisionConfig(out_width=5120, mlp_width=3456),
    "72b": QwenVisionConfig(out_width=8192, mlp_width=3456),
}
