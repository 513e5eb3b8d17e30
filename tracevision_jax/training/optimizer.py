"""AdamW with warm-up, schedule, clipping by global norm and learning rates by path; through optax.

The papers name no optimizer; AdamW is what their hosts were tuned with. Every number is a field of
`OptimizerConfig`. Frozen parameters never reach this file: the training step splits them off before.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from tracevision_jax.errors import UserError
from tracevision_jax.training.parameters import flatten, unflatten

Schedule = Callable[[Any], jax.Array]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    learning_rate: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes from its peak to `final_share` of it after the warm-up."""
    warmup: float = 0.03
    """Share of all steps during which the learning rate rises linearly."""
    final_share: float = 0.0
    """Learning rate at the end as a share of the peak; "constant" ignores it."""
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled weight decay, on kernels and embeddings only."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    multipliers: tuple[tuple[str, float], ...] = ()
    """(regular expression searched in the path, factor of the learning rate); the first match counts."""


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> Schedule:
    """Learning rate as a function of the step number (from 0) of a run of `steps` steps.

    The first step already has a positive rate, and the last has nearly the final one.
    """
    warmup_steps = round(config.warmup * steps)
    decay_steps = max(steps - warmup_steps, 1)

    def learning_rate(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rise = jnp.minimum((step + 1) / max(warmup_steps, 1), 1.0)
        progress = jnp.clip((step - warmup_steps) / decay_steps, 0.0, 1.0)
        if config.schedule == "constant":
            share = jnp.ones_like(progress)
        elif config.schedule == "linear":
            share = 1 - (1 - config.final_share) * progress
        else:
            share = config.final_share + (1 - config.final_share) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return config.learning_rate * rise * share

    return learning_rate


def decays(path: str) -> bool:
    """Whether weight decay applies: to matrices, not to biases and norm scales."""
    return path.rsplit("/", 1)[-1] in ("kernel", "embedding", "head")


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Build the transformation of a run of `steps` steps."""
    parts = []
    if config.clip_norm > 0:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(optax.scale_by_adam(config.beta1, config.beta2, config.epsilon))
    if config.weight_decay > 0:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_decay_mask))
    if config.multipliers:
        parts.append(_scale_by_path(config.multipliers))
    parts.append(optax.scale_by_learning_rate(learning_rate_schedule(config, steps)))
    return optax.chain(*parts)


def _decay_mask(params: Any) -> Any:
    return unflatten({path: decays(path) for path in flatten(params)})


def _scale_by_path(multipliers: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    """Multiply each update by the factor of the first expression that its path matches."""
    patterns = [(re.compile(pattern), factor) for pattern, factor in multipliers]

    def factor_of(path: str) -> float:
        return next((factor for pattern, factor in patterns if pattern.search(path)), 1.0)

    def init(params: Any) -> optax.EmptyState:
        paths = flatten(params)
        idle = [pattern.pattern for pattern, _ in patterns if not any(map(pattern.search, paths))]
        if idle:
            raise UserError(
                f"Learning-rate multipliers match no trained parameter: {', '.join(idle)}. Trained are paths "
                f"such as {', '.join(sorted(paths)[:3])}."
            )
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        scaled = {path: update * factor_of(path) for path, update in flatten(updates).items()}
        return unflatten(scaled), state

    return optax.GradientTransformation(init, update)
