"""AdamW, Muon or Adafactor with warm-up, schedule, clipping by global norm and learning rates by path; through optax.

The papers name no optimizer; AdamW is what their hosts were tuned with. Muon (Jordan 2024; scaled to AdamW's update
size as in arXiv:2502.16982) orthogonalises the update of every matrix, which takes a model that starts from nothing
to the same loss in fewer steps. Two choices are for memory: moments in bfloat16 (`low_precision.py`) halve what AdamW
and Muon keep, Adafactor (`adafactor.py`) keeps nearly nothing. Every number is a field of `OptimizerConfig`. Frozen
parameters never reach this file: the training step splits them off before.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from tracevision_jax.errors import UserError
from tracevision_jax.training.adafactor import scale_by_factored_rms
from tracevision_jax.training.low_precision import kept_in_bfloat16
from tracevision_jax.training.matrices import matrix_axes
from tracevision_jax.training.parameters import flatten, unflatten

Schedule = Callable[[Any], jax.Array]

ADAM_UPDATE_SIZE = 0.2
"""Root mean square of AdamW's updates over its learning rate, measured in arXiv:2502.16982; Muon's are scaled to it."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning rate."""

    method: Literal["adamw", "muon", "adafactor"] = "adamw"
    """"muon" is for matrices; embeddings, convolutions, biases and norms keep AdamW. "adafactor" keeps least."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """How AdamW and Muon keep their moments between steps; Adafactor has none that are large."""
    learning_rate: float = 1e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes from its peak to `final_share` of it after the warm-up."""
    warmup: float = 0.03
    """Share of all steps during which the learning rate rises linearly."""
    final_share: float = 0.0
    """Learning rate at the end as a share of the peak; "constant" ignores it."""
    beta1: float = 0.9
    """Of AdamW; Adafactor has no first moment."""
    beta2: float = 0.999
    """Of AdamW; the largest that Adafactor's rises to."""
    epsilon: float = 1e-8
    """Of AdamW and Muon."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on kernels and embeddings only."""
    momentum: float = 0.95
    """Of Muon."""
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
    return path.rsplit("/", 1)[-1] in ("kernel", "embedding", "head", "lora_a", "lora_b")


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Build the transformation of a run of `steps` steps."""
    parts = []
    if config.clip_norm > 0:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    parts.append(_direction(config))
    if config.weight_decay > 0:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask=_decay_mask))
    parts.append(optax.scale_by_learning_rate(learning_rate_schedule(config, steps)))
    if config.multipliers:
        parts.append(_scale_by_path(config.multipliers))
    return optax.chain(*parts)


def faults(config: OptimizerConfig) -> list[str]:
    """What cannot be combined, as messages."""
    if config.method == "adafactor" and config.moments != "float32":
        return ["optimizer.moments is of adamw and muon; adafactor keeps no moments that bfloat16 would make smaller"]
    return []


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    """What the method makes of a gradient, before weight decay and learning rate."""
    if config.method == "adafactor":
        return scale_by_factored_rms(config.beta2)
    if config.method == "muon":
        direction = _muon(config)
    else:
        direction = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    return kept_in_bfloat16(direction) if config.moments == "bfloat16" else direction


def _muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon's directions for matrices, Adam's for the rest; decay and learning rate come after it for both."""
    return optax.contrib.muon(
        learning_rate=-1.0,  # optax steps downhill by it: the direction alone, as `scale_by_adam` gives it
        beta=config.momentum,
        eps=config.epsilon,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        muon_weight_dimension_numbers=lambda params: unflatten(
            {path: matrix_axes(path, getattr(leaf, "ndim", 0)) for path, leaf in flatten(params).items()}
        ),
        consistent_rms=ADAM_UPDATE_SIZE,
    )


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
