"""Which keypoints of a recorded trace a system is given: the methods of Sec. 3.2.3 and App. E, by name.

keypoints = simplify_trace(points, words, (height, width), Simplification("semantic"), phrases)
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from tracevision_jax.errors import UserError
from tracevision_jax.records.sample import TimedWord
from tracevision_jax.trajectory.phrases import PhraseProvider
from tracevision_jax.trajectory.simplify import BASE_EPSILON_PX, plain, simplify, to_count


@dataclasses.dataclass(frozen=True)
class Simplification:
    """How recorded traces become keypoints (Sec. 3.2.3, App. E)."""

    method: Literal["semantic", "plain", "uniform", "none"] = "semantic"
    epsilon_px: float = BASE_EPSILON_PX
    """Tolerance of a phrase of importance 5, or of the whole trace where it has no words or the method is plain."""
    keypoints: int = 0
    """Exactly so many keypoints instead of a tolerance; "uniform" needs this or `as_semantic`."""
    as_semantic: bool = False
    """As many keypoints of each trace as the semantic method leaves: methods at one compression (App. E.6)."""

    def __post_init__(self):
        if self.method == "uniform" and self.keypoints < 1 and not self.as_semantic:
            raise UserError("Simplification 'uniform' needs a number of keypoints.")


def simplify_trace(
    points: np.ndarray,
    words: Sequence[TimedWord],
    size: tuple[int, int],
    how: Simplification,
    phrases: PhraseProvider,
) -> np.ndarray:
    """Keypoints (m, 3) of checked points (n, 3); `size` is (height, width) in pixels."""
    caption = " ".join(word.text for word in words)
    if how.method == "none":
        return points
    if how.as_semantic and how.method != "semantic":
        semantic = dataclasses.replace(how, method="semantic", as_semantic=False)
        count = len(simplify_trace(points, words, size, semantic, phrases))
        return to_count(points, how.method, max(count, 2), size)
    if how.keypoints:
        spoken = how.method == "semantic" and words
        method = how.method if spoken or how.method != "semantic" else "plain"
        found = phrases.phrases(caption) if spoken else None
        return to_count(points, method, how.keypoints, size, words, caption, found)
    if how.method == "semantic" and words:
        return simplify(points, words, caption, size, phrases.phrases(caption), how.epsilon_px)
    return plain(points, size, how.epsilon_px)
