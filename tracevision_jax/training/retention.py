"""Which checkpoints stay: the last few, the best by a number of the evaluation, and every n-th for good.

    config = CheckpointConfig(every=500, keep=3, keep_every=10_000, keep_best=2, metric="held_out/loss")
    kept([500, 1000, 1500], {500: 2.1, 1000: 1.7}, config)      # steps

`training/checkpoints.py` applies it after each save.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from tracevision_jax.errors import UserError


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    every: int = 500
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = 3
    """How many of the latest stay."""
    keep_every: int = 0
    """Those of steps that it divides stay for good; 0: none does."""
    keep_best: int = 0
    """So many with the best `metric` stay as well; an evaluation that makes a step one of them saves it."""
    metric: str = ""
    """What is best: EVALUATOR/NUMBER, as the evaluation's line shows them, such as held_out/loss."""
    best: Literal["min", "max"] = "min"
    """Whether the least or the greatest `metric` is best."""


def faults(config: CheckpointConfig, evaluation_every: int) -> list[str]:
    """What is wrong with a configuration, a phrase for each fault."""
    found = []
    if config.keep < 1 or min(config.every, config.keep_every, config.keep_best) < 0:
        found.append("checkpoint.keep must be at least 1, and every, keep_every, keep_best not negative")
    elif config.keep_every and (not config.every or config.keep_every % config.every):
        found.append(
            f"checkpoint.keep_every is {config.keep_every}, must be a multiple of checkpoint.every ({config.every})"
        )
    if bool(config.keep_best) != bool(config.metric):
        found.append("checkpoint.keep_best and checkpoint.metric need each other")
    elif config.keep_best and not evaluation_every:
        found.append("checkpoint.keep_best needs evaluation.every")
    return found


def score_of(config: CheckpointConfig, evaluations: Mapping[str, Mapping[str, float]]) -> float:
    """The value of `config.metric` in {evaluator: {number: value}}; UserError when it is not there."""
    evaluator, _, number = config.metric.partition("/")
    try:
        return evaluations[evaluator][number]
    except KeyError:
        known = ", ".join(f"{name}/{key}" for name, values in evaluations.items() for key in values)
        raise UserError(
            f"checkpoint.metric is '{config.metric}', and the evaluation gave {known or 'no number'}."
        ) from None


def best_steps(scores: Mapping[int, float], config: CheckpointConfig) -> list[int]:
    """Steps of the best scores, best first; of equal ones the earlier. A score that is not finite is none."""
    sign = 1 if config.best == "min" else -1
    ranked = sorted((sign * score, step) for step, score in scores.items() if math.isfinite(score))
    return [step for _, step in ranked[: config.keep_best]]


def kept(steps: Collection[int], scores: Mapping[int, float], config: CheckpointConfig) -> set[int]:
    """Which of the checkpoints of these steps stay, given the scores of some."""
    last = sorted(steps)[-config.keep :]
    best = best_steps({step: scores[step] for step in steps if step in scores}, config)
    good = [step for step in steps if config.keep_every and step % config.keep_every == 0]
    return {*last, *best, *good}
