"""Sizes of the image encoders of SAM and SAM 2, and those of the released models.

Sources: facebookresearch/segment-anything, `build_sam.py` (ViT-B, L, H); facebookresearch/sam2,
`sam2/configs/sam2.1/*.yaml` (Hiera tiny, small, base+, large; SAM 2 and 2.1 have the same encoders). Use:
`SamVitEncoder(SAM_VIT_PRESETS["h"])`, `Sam2ImageEncoder(HIERA_PRESETS["base_plus"])`.
"""

import math
from dataclasses import dataclass

from tracevision_jax.errors import UserError
from tracevision_jax.layers.basic import REMAT_POLICIES

STAGES = 4
HIERA_STRIDE = 4
"""Pixels between tokens of Hiera's first stage; each later stage doubles it."""


def _check_remat(remat: str) -> None:
    if remat not in REMAT_POLICIES:
        raise UserError(f"remat '{remat}' of an image encoder: known are {', '.join(REMAT_POLICIES)}")


@dataclass(frozen=True)
class SamVitConfig:
    """A plain ViT of `groups` groups, each some window attention blocks, then one over the whole map."""

    width: int = 1280
    heads: int = 16
    groups: int = 4
    window_blocks: int = 7
    """Window blocks before the block with global attention of each group, at least 1."""
    mlp_ratio: int = 4
    patch: int = 16
    """Side of a patch, pixels."""
    channels: int = 3
    image_size: int = 1024
    """Side of the pictures whose positions are parameters, pixels; others get them resized."""
    window: int = 14
    """Patches along one side of a window."""
    out_width: int = 256
    norm_eps: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    """What the backward pass recomputes, see `layers.basic.REMAT_POLICIES`."""

    def __post_init__(self) -> None:
        _check_remat(self.remat)
        if self.width % self.heads:
            raise UserError(f"SAM's ViT of width {self.width}: {self.heads} heads do not divide it")
        if self.image_size % self.patch:
            raise UserError(
                f"SAM's ViT for pictures of {self.image_size} px: not a multiple of its patch, {self.patch}"
            )
        if min(self.groups, self.window_blocks, self.window) < 1:
            raise UserError("SAM's ViT needs at least one group, one window block in each, and windows of one patch")

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.heads

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return self.groups * (self.window_blocks + 1)

    @property
    def grid(self) -> int:
        """Patches along one side of a picture of `image_size`."""
        return self.image_size // self.patch


@dataclass(frozen=True)
class HieraBlockPlan:
    """What one block of Hiera does."""

    in_width: int
    out_width: int
    heads: int
    window: int
    """Tokens along one side of a window of keys; 0 for attention over the whole map."""
    pools: bool
    """Whether queries, hence the map, shrink by 2 x 2; such a block also changes the width."""
    ends_stage: bool


@dataclass(frozen=True)
class HieraConfig:
    """Hiera of four stages, each of twice the width and heads of the one before, with a feature pyramid."""

    width: int = 96
    """Of the first stage."""
    heads: int = 1
    """Of the first stage."""
    blocks: tuple[int, int, int, int] = (1, 2, 7, 2)
    """Blocks of each stage."""
    windows: tuple[int, int, int, int] = (8, 4, 14, 7)
    """Tokens along one side of a window, each stage."""
    global_blocks: tuple[int, ...] = (5, 7, 9)
    """Numbers, over all stages, of the blocks that attend over the whole map."""
    background: int = 7
    """Side of the learned grid of positions that is stretched over the map."""
    mlp_ratio: int = 4
    channels: int = 3
    fpn_width: int = 256
    norm_eps: float = 1e-6
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    """What the backward pass recomputes, see `layers.basic.REMAT_POLICIES`."""

    def __post_init__(self) -> None:
        _check_remat(self.remat)
        if len(self.blocks) != STAGES or len(self.windows) != STAGES or min(*self.blocks, *self.windows) < 1:
            raise UserError(f"Hiera's blocks {self.blocks} and windows {self.windows}: {STAGES} positive numbers each")
        if self.width % self.heads:
            raise UserError(f"Hiera of width {self.width}: {self.heads} heads do not divide it")
        if any(window % 2 for window in self.windows[:-1]):
            raise UserError(f"Hiera's windows {self.windows}: the first three are pooled by 2, so they must be even")
        if any(not 0 <= number < sum(self.blocks) for number in self.global_blocks):
            raise UserError(f"Hiera's global blocks {self.global_blocks}: its blocks are 0..{sum(self.blocks) - 1}")
        if self.fpn_width % 4:
            raise UserError(f"Hiera's pyramid of width {self.fpn_width}: sine positions need a multiple of 4")

    @property
    def side_step(self) -> int:
        """Sides of pictures are multiples of this, in pixels: every stage and every window of positions is whole."""
        return HIERA_STRIDE * math.lcm(2 ** (STAGES - 1), self.windows[0])

    def stage_width(self, stage: int) -> int:
        """Channels of a stage, 0..3."""
        return self.width * 2**stage

    def plan(self) -> tuple[HieraBlockPlan, ...]:
        """All blocks in order. The first block of a stage still has the windows of the stage before."""
        plans = []
        for stage, count in enumerate(self.blocks):
            for place in range(count):
                enters = stage > 0 and place == 0
                window = self.windows[stage - 1 if enters else stage]
                plans.append(
                    HieraBlockPlan(
                        in_width=self.stage_width(stage - 1 if enters else stage),
                        out_width=self.stage_width(stage),
                        heads=self.heads * 2**stage,
                        window=0 if len(plans) in self.global_blocks else window,
                        pools=enters,
                        ends_stage=place == count - 1,
                    )
                )
        return tuple(plans)


SAM_VIT_PRESETS: dict[str, SamVitConfig] = {
    "b": SamVitConfig(width=768, heads=12, window_blocks=2),
    "l": SamVitConfig(width=1024, heads=16, window_blocks=5),
    "h": SamVitConfig(width=1280, heads=16, window_blocks=7),
}

HIERA_PRESETS: dict[str, HieraConfig] = {
    "tiny": HieraConfig(),
    "small": HieraConfig(blocks=(1, 2, 11, 2), global_blocks=(7, 10, 13)),
    "base_plus": HieraConfig(width=112, heads=2, blocks=(2, 3, 16, 3), global_blocks=(12, 16, 20), background=14),
    "large": HieraConfig(width=144, heads=2, blocks=(2, 6, 36, 4), windows=(8, 4, 16, 8), global_blocks=(23, 33, 43)),
}
