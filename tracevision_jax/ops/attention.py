"""The one door to attention: `attention(q, k, v, ...)` picks an implementation and runs it.

`IMPLEMENTATIONS` is ordered; each entry says why it cannot serve a call, or None, and the first that can is
taken (as axlearn does). The plain XLA reference is last and serves everything. The platform is that of the
mesh which `attention_mesh` sets, since `jax.default_backend()` says "cpu" while one compiles for another
machine. The choice is logged at debug level, with the reason why each earlier entry was passed over.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tracevision_jax.ops.attention_call import AttentionCall, attend_xla_in_blocks
from tracevision_jax.ops.attention_kernels import (
    attend_cudnn,
    attend_reference,
    attend_splash,
    why_not_cudnn,
    why_not_splash,
)
from tracevision_jax.ops.placement import Cut, Placement

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Implementation:
    """A way to compute attention; `why_not` gives the reason why it cannot serve a call, None when it can."""

    name: str
    why_not: Callable[[AttentionCall, Placement], str | None]
    run: Callable[[AttentionCall, Placement], Array]


MANY_QUERIES = 1024
"""From so many on the scores of a whole call no longer fit a CPU's caches."""


def why_not_blocks(call: AttentionCall, placement: Placement) -> str | None:
    """Reason why queries are better not taken block by block, or None."""
    if placement.platform != "cpu":
        return f"it suits caches of a CPU, not {placement.platform}"
    if placement.mesh is not None and placement.mesh.size > 1:
        return "queries may be cut over the mesh"
    if call.q.shape[1] < MANY_QUERIES:
        return f"{call.q.shape[1]} queries are few"
    return None


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("splash", why_not_splash, attend_splash),
    Implementation("cudnn", why_not_cudnn, attend_cudnn),
    Implementation("xla in blocks", why_not_blocks, lambda call, placement: attend_xla_in_blocks(call)),
    Implementation("xla", lambda call, placement: None, attend_reference),
)

_placement: ContextVar[Placement | None] = ContextVar("attention_placement", default=None)


@contextlib.contextmanager
def attention_mesh(
    mesh: jax.sharding.Mesh | None,
    batch_axes: tuple[str, ...] = (),
    head_axes: tuple[str, ...] = (),
    platform: str | None = None,
    token_axes: tuple[str, ...] = (),
    set_axes: tuple[str, ...] = (),
) -> Iterator[None]:
    """Say where attention traced inside will run: the mesh, and its axes that split rows, heads, queries and sets.

    `platform` overrides the platform of the mesh's devices.
    """
    of_mesh = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    token = _placement.set(Placement(mesh, batch_axes, head_axes, platform or of_mesh, token_axes, set_axes))
    try:
        yield
    finally:
        _placement.reset(token)


def choose(call: AttentionCall, placement: Placement) -> Implementation:
    """Return the first implementation that supports the call."""
    passed = []
    for implementation in IMPLEMENTATIONS:
        reason = implementation.why_not(call, placement)
        if reason is None:
            logger.debug("attention %s: %s (%s)", call.q.shape, implementation.name, "; ".join(passed))
            return implementation
        passed.append(f"not {implementation.name}: {reason}")
    raise AssertionError("the XLA reference serves every call")


def attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    *,
    bias: Float[Array, "#batch #heads #queries #keys"] | None = None,
    scale: float | None = None,
    q_segments: Int[Array, "batch queries"] | None = None,
    kv_segments: Int[Array, "batch keys"] | None = None,
    causal: bool = False,
    q_positions: Int[Array, "batch queries"] | None = None,
    kv_lengths: Int[Array, "batch"] | None = None,
    cut: Cut = "rows",
) -> Float[Array, "batch queries heads head_dim"]:
    """Scaled dot-product attention with grouped heads (`heads` a multiple of `kv_heads`).

    A key is seen when all hold: its segment equals the query's and is not 0 (0 is padding; `kv_segments`
    defaults to `q_segments` when the lengths agree); with `causal`, its row is at most the query's
    (`q_positions`, default the query's own row); its row is below `kv_lengths`. `bias` is added to the scaled
    scores. Queries that see no key give 0. `cut` says what a mesh may split, see `placement.py`. Raises
    ValueError for shapes that do not fit.
    """
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads cannot share {k.shape[2]} key heads")
    if kv_segments is None and q_segments is not None:
        if q.shape[1] != k.shape[1]:
            raise ValueError("kv_segments are needed when queries and keys differ in length")
        kv_segments = q_segments
    if q_segments is None and kv_segments is not None:
        raise ValueError("kv_segments without q_segments: give both, or kv_lengths")
    call = AttentionCall(
        q, k, v, scale if scale is not None else q.shape[-1] ** -0.5,
        bias, q_segments, kv_segments, causal, q_positions, kv_lengths,
    )  # fmt: skip
    placement = (_placement.get() or Placement(None, (), (), jax.default_backend())).of(cut, q.shape[0])
    return choose(call, placement).run(call, placement)


def attention_to_visible(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys kv_heads head_dim"],
    v: Float[Array, "batch keys kv_heads head_dim"],
    visible: Bool[Array, "batch keys"] | None,
) -> Float[Array, "batch queries heads head_dim"]:
    """`attention` of all queries to the `visible` keys, to all where it is None."""
    if visible is None:
        return attention(q, k, v)
    everyone = jnp.ones(q.shape[:2], jnp.int32)
    return attention(q, k, v, q_segments=everyone, kv_segments=visible.astype(jnp.int32))
