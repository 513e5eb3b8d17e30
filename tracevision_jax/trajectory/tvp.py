"""Trajectory-aware Visual Perception (TVP): TraceVision, Sec. 3.2.4, Eq. 3 and 4.

Visual tokens (after the host's merger, at the language model's width) and trajectory points refine each other in
alternating cross-attention. Each conversation has its own pass, since the pass changes the visual tokens. A
conversation without points gets its visual tokens back unchanged, exactly: attention over no keys is zero.

Decisions that the paper leaves open (docs/paper_notes.md): pre-norm; K and V of Eq. 4 are the enhanced visual
features; the FFN of Eq. 4 sees the unrefined trajectory features; positions enter queries and keys of both sides as
the same Fourier features; value and output projections of Eq. 4 start as the identity, so that a point starts out as
the mean of the visual features near it, in a space that the language model already reads.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tracevision_jax.errors import UserError
from tracevision_jax.layers.basic import RMSNorm, rematerialised
from tracevision_jax.layers.sharding import constrain, exchange_slices
from tracevision_jax.trajectory.fourier import bin_centres, line_features, plane_features

Direction = Literal["both", "trace_to_vision", "vision_to_trace", "none"]


@dataclasses.dataclass(frozen=True)
class TVPConfig:
    """Sizes of the module; `width` is the language model's."""

    width: int = 3584
    heads: int = 28
    mlp_width: int = 3584
    blocks: int = 2
    bins: int = 1000
    """Bins per coordinate (Sec. 3.2.3)."""
    max_traces: int = 8
    """Trajectories (A, B, ...) of one conversation that have an index embedding."""
    position_width: int = 64
    """Width of the Fourier features in queries and keys."""
    position_cycles: float = 8.0
    """Highest frequency of those features, in cycles per image side."""
    position_gain: float = 8.0
    """Attention logit between a point and a visual token at the same place, at the start."""
    direction: Direction = "both"
    """Ablation of Table 9b: which of Eq. 3 (trace to vision) and Eq. 4 (vision to trace) are on."""
    time_scale_seconds: float = 16.0
    """Longest period of the time embedding is twice this."""

    def __post_init__(self):
        if self.width % self.heads or self.width % 4 or self.position_width % 4:
            raise UserError(
                f"TVP of width {self.width} with {self.heads} heads and position features of width "
                f"{self.position_width}: the heads must divide the width, and 4 both widths"
            )


class CrossAttention(nn.Module):
    """Multi-head cross-attention whose queries and keys carry shared position features."""

    heads: int
    position_gain: float
    identity_values: bool
    axes: tuple[str | None, str | None]
    """Logical names of the axes of queries and keys: a mesh may cut visual tokens, and not the few points."""
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self,
        queries: Float[Array, "rows q width"],
        keys: Float[Array, "rows k width"],
        query_positions: Float[Array, "rows q p"],
        key_positions: Float[Array, "rows k p"],
        mask: Bool[Array, "rows q k"],
        bias: Float[Array, "rows heads q k"] | None = None,
    ) -> tuple[Float[Array, "rows q width"], Float[Array, "rows heads q k"]]:
        """Return (output, attention weights); a query without keys gets zeros."""
        width = queries.shape[-1]
        head_dim = width // self.heads
        kinds: dict[str, Any] = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}

        spread = nn.initializers.lecun_normal()

        def project(name: str, init: Any = spread) -> nn.DenseGeneral:
            return nn.DenseGeneral((self.heads, head_dim), name=name, kernel_init=init, **kinds)

        # |W p|^2 / sqrt(head_dim) = gain for the unit-norm features p of one place.
        gain_std = (self.position_gain / head_dim**0.5) ** 0.5
        place = project("place", nn.initializers.normal(gain_std))
        q = project("q")(queries) + place(query_positions)
        k = project("k")(keys) + place(key_positions)
        v = project("v", _identity if self.identity_values else spread)(keys)
        asking, asked = self.axes
        q = constrain(q, "batch", asking, "heads", None)
        k, v = (constrain(x, "batch", asked, "heads", None) for x in (k, v))
        logits = jnp.einsum("rqhd,rkhd->rhqk", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
        if bias is not None:
            logits = logits + bias
        weights = _masked_softmax(constrain(logits, "batch", "heads", asking, asked), mask[:, None])
        mixed = jnp.einsum("rhqk,rkhd->rqhd", weights.astype(v.dtype), v)
        mixed = constrain(mixed, "batch", asking, "heads", None)
        out_init: Any = _identity if self.identity_values else spread
        out = nn.DenseGeneral(width, axis=(-2, -1), name="o", kernel_init=out_init, **kinds)(mixed)
        return constrain(out, "batch", asking, None), weights


def _identity(key, shape, dtype=jnp.float32):
    """Identity between a width and its split into heads, whichever side is split."""
    del key
    return jnp.eye(shape[0], dtype=dtype).reshape(shape)


def _masked_softmax(logits, mask):
    """Softmax over the last axis in float32; zeros, also in gradients, where nothing is allowed."""
    top = jax.lax.stop_gradient(jnp.max(jnp.where(mask, logits, -1e30), -1, keepdims=True))
    weights = jnp.where(mask, jnp.exp(jnp.where(mask, logits - top, 0.0)), 0.0)
    total = weights.sum(-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


class TVPBlock(nn.Module):
    """One pair of Eq. 3 and Eq. 4."""

    config: TVPConfig
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(
        self,
        visual: Float[Array, "rows tokens width"],
        points: Float[Array, "rows points width"],
        visual_places: Float[Array, "rows tokens p"],
        point_places: Float[Array, "rows points p"],
        mask: Bool[Array, "rows tokens points"],
        time_bias: Float[Array, "rows heads tokens points"],
    ) -> tuple[Float[Array, "rows tokens width"], Float[Array, "rows points width"], dict[str, Array]]:
        """Return (enhanced visual features, refined trajectory features, attention maps of both)."""
        config = self.config
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(name):
            return RMSNorm(1e-6, name=name, **kinds)

        def cross(name, identity, axes):
            return CrossAttention(config.heads, config.position_gain, identity, axes, name=name, **kinds)

        maps = {}
        if config.direction in ("both", "trace_to_vision"):
            gamma = self.param("gamma", nn.initializers.zeros, (config.width,), self.param_dtype)
            enhancement, maps["trace_to_vision"] = cross("enhance", False, ("tokens", None))(
                norm("enhance_visual_norm")(visual),
                norm("enhance_trace_norm")(points),
                visual_places,
                point_places,
                mask,
                time_bias,
            )
            visual = visual + gamma.astype(self.dtype) * enhancement
        if config.direction in ("both", "vision_to_trace"):
            refinement, maps["vision_to_trace"] = cross("refine", True, (None, "tokens"))(
                norm("refine_trace_norm")(points),
                norm("refine_visual_norm")(visual),
                point_places,
                visual_places,
                mask.swapaxes(-1, -2),
                time_bias.swapaxes(-1, -2),
            )
            hidden = nn.Dense(config.mlp_width, name="ffn_in", **kinds)(norm("ffn_norm")(points))
            hidden = constrain(hidden, "batch", None, "mlp")
            points = points + refinement + nn.Dense(config.width, name="ffn_out", **kinds)(nn.gelu(hidden))
        return constrain(visual, "batch", "tokens", None), constrain(points, "batch", None, None), maps


class TVP(nn.Module):
    """The whole module: trajectory embedding, blocks, and the features to add to trajectory tokens."""

    config: TVPConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    """What the backward pass recomputes, see `layers.basic.REMAT_POLICIES`."""

    @nn.compact
    def __call__(
        self,
        visual: Float[Array, "rows frames units width"],
        visual_xy: Float[Array, "rows frames units 2"],
        visual_valid: Bool[Array, "rows frames units"],
        frame_windows: Float[Array, "rows frames 2"],
        points: Float[Array, "rows points 3"],
        point_trace: Int[Array, "rows points"],
    ) -> tuple[Float[Array, "rows frames units width"], Float[Array, "rows points width"], list[dict]]:
        """Fuse; rows are conversations.

        Args:
            visual: merged visual tokens.
            visual_xy: centres of the tokens, in [0, 1].
            visual_valid: False where a token is padding or belongs to another conversation's image.
            frame_windows: [start, end) of the time, in seconds, that each frame stands for (Sec. 3.1); infinite
                where open, as both ends are for a still image.
            points: (x, y, t) of the keypoints.
            point_trace: number of the trajectory from 1; 0 is padding.

        Returns:
            (visual features, unchanged where there is no point; features of the points, 0 for padding; one
            dictionary a block with the attention weights, (rows, heads, frames * units, points) for Eq. 3 and
            (rows, heads, points, frames * units) for Eq. 4).
        """
        config = self.config
        rows, frames, units, width = visual.shape
        flat = constrain(visual.reshape(rows, frames * units, width), "batch", "tokens", None)
        real = point_trace > 0
        traced = self._embed(points, point_trace)

        def places(xy):
            return plane_features(xy, config.position_width, config.position_cycles).astype(self.dtype)

        mask = visual_valid.reshape(rows, -1, 1) & real[:, None, :]
        # Frames are cut only once they are tokens; what little is known of them is had by all.
        bias = constrain(self._time_bias(frame_windows, points[..., 2]), "batch", "heads", None, None)
        bias = jnp.repeat(bias, units, axis=2)
        maps: list[dict] = []
        if config.direction == "none":
            return visual, jnp.zeros_like(traced), maps
        block = rematerialised(TVPBlock, self.remat, prevent_cse=True)
        for index in range(config.blocks):
            flat, traced, block_maps = block(config, self.dtype, self.param_dtype, name=f"block_{index}")(
                flat,
                traced,
                places(visual_xy).reshape(rows, frames * units, -1),
                places(points[..., :2]),
                mask,
                bias,
            )
            maps.append(block_maps)
        tokens = RMSNorm(1e-6, self.dtype, self.param_dtype, name="out_norm")(traced)
        scale = self.param("out_scale", nn.initializers.constant(0.02), (width,), self.param_dtype)
        tokens = jnp.where(real[..., None], tokens * scale.astype(self.dtype), 0)
        return flat.reshape(visual.shape), tokens, maps

    def _embed(self, points, point_trace):
        """Trajectory features: sum of x-bin, y-bin, time and trajectory-index embeddings."""
        config = self.config
        bins = jnp.clip(jnp.floor(points[..., :2] * config.bins), 0, config.bins - 1).astype(jnp.int32)
        bins = constrain(bins, "copies", None, None)

        def table(axis):
            def init(key, shape, dtype):
                half = line_features(bin_centres(shape[0]), shape[1] // 2, config.position_cycles * 2)
                place = jnp.zeros(shape).at[:, axis * (shape[1] // 2) : (axis + 1) * (shape[1] // 2)].set(half)
                return (place * (shape[1] / 2) ** 0.5).astype(dtype)

            return self.param(("x_bins", "y_bins")[axis], init, (config.bins, config.width), self.param_dtype)

        time = line_features(points[..., 2] / config.time_scale_seconds, config.width, 64.0)
        time_scale = self.param("time_scale", nn.initializers.constant(0.1), (config.width,), self.param_dtype)
        index = self.param(
            "trace_index", nn.initializers.normal(0.1), (config.max_traces, config.width), self.param_dtype
        )
        number = jnp.clip(point_trace - 1, 0, config.max_traces - 1)
        embedded = exchange_slices(table(0)[bins[..., 0]] + table(1)[bins[..., 1]], None)
        embedded = embedded + time * (config.width**0.5) * time_scale + index[number]
        return jnp.where((point_trace > 0)[..., None], embedded, 0).astype(self.dtype)

    def _time_bias(self, windows, times):
        """Learned penalty per head on pairs of a frame and a point outside the frame's time window."""
        strength = self.param("time_bias", nn.initializers.constant(2.0), (self.config.heads,), jnp.float32)
        outside = (times[:, None] < windows[..., :1]) | (times[:, None] >= windows[..., 1:])
        return -nn.softplus(strength)[None, :, None, None] * outside[:, None].astype(jnp.float32)


def frame_time_windows(
    times: Float[Array, "rows frames"], owner: Bool[Array, "rows frames"]
) -> Float[Array, "rows frames 2"]:
    """[start, end) of each owned frame: from its time to the next owned one's; open at both ends of the video.

    Several stills, which all have time 0, are no video: each is open at both ends.
    """
    later = (times[:, 1:] > times[:, :-1]) & owner[:, 1:] & owner[:, :-1]
    none = jnp.zeros_like(owner[:, :1])
    ends = jnp.where(jnp.concatenate([later, none], 1), jnp.roll(times, -1, 1), jnp.inf)
    starts = jnp.where(jnp.concatenate([none, later], 1), times, -jnp.inf)
    return jnp.stack([starts, ends], -1)
