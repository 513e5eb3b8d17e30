"""The vision tower of Qwen2.5-VL (Qwen2.5-VL technical report, Sec. 2.1): window and full attention, 2-D
rotary.

Frames are a batch axis throughout (no attention crosses frames), and the mesh axis `context` holds some of
them; for window attention windows are one, too, so no mask over the full square is ever made. Blocks are
nested scans: groups, and the window blocks inside a group. Padding is recomputed from `grid`, see
`windows.py`. Use: `units, hidden = tower(patches, grid, after_groups=(2, 4))`.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tracevision_jax.layers.basic import GatedMLP, RMSNorm, precision, projection, rematerialised, scanned
from tracevision_jax.layers.sharding import constrain
from tracevision_jax.ops.attention import attention
from tracevision_jax.ops.rotary import apply_rotary, axial_angles, planar_frequencies
from tracevision_jax.vision.config import QwenVisionConfig
from tracevision_jax.vision.windows import slot_coordinates


class VisionAttention(nn.Module):
    """Attention among the tokens of one window or frame; segment 0 is padding."""

    config: QwenVisionConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "sets tokens width"],
        angles: Float[Array, "sets tokens half"],
        segments: Int[Array, "sets tokens"],
    ) -> Float[Array, "sets tokens width"]:
        c = self.config
        qkv = projection("qkv", (3, c.heads, c.head_dim), **precision(c))(x)
        qkv = constrain(qkv, "sets", None, None, "heads", None)
        q, k, v = apply_rotary(qkv[:, :, 0], angles), apply_rotary(qkv[:, :, 1], angles), qkv[:, :, 2]
        q = constrain(q, "sets", None, "heads", None)
        k = constrain(k, "sets", None, "heads", None)
        mixed = constrain(attention(q, k, v, q_segments=segments, cut="sets"), "sets", None, "heads", None)
        return projection("proj", c.width, axis=(-2, -1), **precision(c))(mixed)


class VisionBlock(nn.Module):
    """Pre-norm attention and gated MLP, as the body of a scan."""

    config: QwenVisionConfig

    @nn.compact
    def __call__(self, x: Array, angles: Array, segments: Array) -> tuple[Array, None]:
        c = self.config
        x = x + VisionAttention(c, name="attn")(RMSNorm(c.norm_eps, name="norm1", **precision(c))(x), angles, segments)
        normed = RMSNorm(c.norm_eps, name="norm2", **precision(c))(x)
        x = x + GatedMLP(c.mlp_width, bias=True, axes=("sets", None), name="mlp", **precision(c))(normed)
        return constrain(x, "sets", None, None), None


def _as_sets(sets: int, x: Array, angles: Array, segments: Array) -> tuple[Array, Array, Array]:
    """Reshape (frames, windows, slots, ...) to the sets of tokens that attend to each other."""
    tokens = segments.size // sets
    return (
        x.reshape(sets, tokens, x.shape[-1]),
        angles.reshape(sets, tokens, angles.shape[-1]),
        segments.reshape(sets, tokens),
    )


class VisionGroup(nn.Module):
    """The window blocks of a group, then its full block; its result is also the scan's output when asked."""

    config: QwenVisionConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "frames windows slots width"],
        angles: Float[Array, "frames windows slots half"],
        segments: Int[Array, "frames windows slots"],
        keep: bool,
    ) -> tuple[Array, Array | None]:
        c = self.config
        shape = x.shape
        block = rematerialised(VisionBlock, c.remat)
        if c.window_blocks:
            stack = scanned(block, c.window_blocks, (nn.broadcast, nn.broadcast))(c, name="window")
            x, _ = stack(*_as_sets(shape[0] * shape[1], x, angles, segments))
        x = constrain(x.reshape(shape), "sets", None, None, None)
        x, _ = block(c, name="full")(*_as_sets(shape[0], x, angles, segments))
        x = x.reshape(shape)
        return x, (x if keep else None)


class Merger(nn.Module):
    """Norm, then every `merge ** 2` consecutive slots become one unit of the language model's width."""

    config: QwenVisionConfig

    @nn.compact
    def __call__(self, x: Float[Array, "frames slots width"]) -> Float[Array, "frames units out"]:
        c = self.config
        x = RMSNorm(c.norm_eps, name="norm", **precision(c))(x)
        x = x.reshape(x.shape[0], -1, c.merge**2 * c.width)
        x = nn.gelu(projection("fc1", c.merge**2 * c.width, **precision(c))(x), approximate=False)
        x = projection("fc2", c.out_width, **precision(c))(constrain(x, "sets", None, "mlp"))
        return constrain(x, "sets", None, None)


class VisionTower(nn.Module):
    """Patches in window order to merged units, with hidden states of chosen depths for the pixel decoder."""

    config: QwenVisionConfig

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "batch frames windows slots patch_dim"],
        grid: Int[Array, "batch frames 2"],
        after_groups: tuple[int, ...] = (),
    ) -> tuple[Float[Array, "batch frames units out"], tuple[Float[Array, "batch frames places width"], ...]]:
        """Return (units, hidden): hidden[i] is the state after `after_groups[i]` groups (1..groups), in slot
        order.

        Units and hidden states at padding are finite and mean nothing. Raises ValueError for shapes or depths
        that do not fit the configuration.
        """
        c = self.config
        batch, frames, windows, slots, patch_dim = patches.shape
        if (slots, patch_dim) != (c.slots, c.patch_dim):
            raise ValueError(f"patches of {slots} slots x {patch_dim} values; the tower has {c.slots} x {c.patch_dim}")
        if any(not 1 <= group <= c.groups for group in after_groups):
            raise ValueError(f"after_groups {after_groups}: the tower has groups 1..{c.groups}")
        row, col, inside = slot_coordinates(
            grid.reshape(-1, 2), jnp.arange(windows), jnp.arange(slots), c.window_units, c.merge
        )
        angles = axial_angles(jnp.stack([row, col], axis=-1), planar_frequencies(c.head_dim, c.rope_theta))
        segments = inside.astype(jnp.int32)

        embed = projection("patch_embed", c.width, bias=False, **precision(c))
        patches = constrain(patches.reshape(-1, windows, slots, patch_dim), "sets", None, None, None)
        x = constrain(embed(patches.astype(jnp.dtype(c.dtype))), "sets", None, None, None)
        groups = scanned(VisionGroup, c.groups, (nn.broadcast,) * 3)(c, name="groups")
        x, kept = groups(x, angles, segments, bool(after_groups))
        units = Merger(c, name="merger")(x.reshape(batch * frames, windows * slots, c.width))
        # The language model wants all frames of a row on each device that holds the row, the pixel decoder does not.
        units = constrain(units, "batch", None, None).reshape(batch, frames, *units.shape[1:])
        hidden = (constrain(kept[group - 1], "sets", None, None, None) for group in after_groups)
        return units, tuple(state.reshape(batch, frames, windows * slots, c.width) for state in hidden)
