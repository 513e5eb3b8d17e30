"""Steps that would harm: a loss or gradient that is not finite, or a gradient far larger than usual, is rejected.

The judgement is made inside the jitted step on numbers that are the same on all hosts, so that all hosts judge alike; a
rejected step changes nothing but the step number. What is usual is part of the training state, so that a continued
run judges as one that was never stopped. After `patience` rejections in a row the loop goes back to a checkpoint from
before them, and on with the data after them.
"""

from dataclasses import dataclass
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

USUAL_DECAY = 0.98
"""Of the moving average of accepted gradient norms."""


@dataclass(frozen=True)
class StabilityConfig:
    """Which steps are rejected, and how long that is borne."""

    spike: float = 0.0
    """Reject a step whose gradient norm, before clipping, is over so many times the usual one; 0 rejects only what is
    not finite."""
    patience: int = 8
    """So many rejected steps in a row take the run back to a checkpoint from before them."""


DEFAULT = StabilityConfig()


@jax.tree_util.register_dataclass
@no_type_check  # jax also builds it of shapes and shardings
@dataclass(frozen=True)
class Health:
    """How training has been going."""

    usual_norm: Float[Array, ""]
    """Moving average of the gradient norms of accepted steps; 0 before the first."""
    rejected: Int[Array, ""]
    """Rejected steps in a row, up to now."""


def healthy() -> Health:
    """At the start of a run, and after going back."""
    return Health(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))


def judge(
    health: Health, loss: Float[Array, ""], norm: Float[Array, ""], config: StabilityConfig
) -> tuple[Bool[Array, ""], Health]:
    """Whether a step of this loss and gradient norm is accepted, and the health after it."""
    known = health.usual_norm > 0
    accepted = jnp.isfinite(loss) & jnp.isfinite(norm)
    if config.spike:
        accepted &= ~known | (norm <= config.spike * health.usual_norm)
    moved = jnp.where(known, USUAL_DECAY * health.usual_norm + (1 - USUAL_DECAY) * norm, norm)
    usual = jnp.where(accepted, moved.astype(jnp.float32), health.usual_norm)
    return accepted, Health(usual, jnp.where(accepted, 0, health.rejected + 1))


def choose(accepted: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The new tree where the step is accepted, else the old one; types stay those of the old."""
    return jax.tree.map(lambda n, o: jnp.where(accepted, n, o), new, old)
