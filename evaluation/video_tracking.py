"""J and F of a model that tracks objects through held-out clips from their masks on the first frame.

    tracking = HeldOutTracking(system.follow, batches)
    tracking(params, step)          # {"J&F": ..., "J": ..., "F": ..., "J-decay": ..., "J&F without memory": ..., ...}

The semi-supervised protocol of `metrics/video.py`, all objects weighing alike. Beside the score stand two that show
what it is worth: of the same model whose memory is emptied at every frame, and of masks that stay what they are on the
first frame.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Bool

from evaluation.metrics import video
from evaluation.metrics.video_on_device import frame_counts
from evaluation.on_mesh import on_mesh
from tracevision_jax.records.clips import ClipBatch


class Follow(Protocol):
    """Tracks the objects of clips from their masks on the first frame; `forget` empties the memory at every frame."""

    def __call__(self, params: Any, batch: ClipBatch, forget: bool = False) -> Any:
        """Masks, (clips, objects, time, height, width)."""
        ...


@dataclass
class HeldOutTracking:
    """An evaluator of the training loop."""

    follow: Follow
    batches: Sequence[ClipBatch]
    """All of one shape, so that one program serves them."""

    @cached_property
    def _follow(self) -> Any:
        return jax.jit(self.follow, static_argnums=2)

    def __call__(self, params: Any, step: int) -> dict[str, float]:
        """Figures of all objects of all clips; none where there is no object."""
        del step
        if not any(batch.real.any() for batch in self.batches):
            return {}
        scores = track_scores(self._followed(params, forget=False), self.batches)
        forgetful = track_scores(self._followed(params, forget=True), self.batches)
        still = (np.repeat(batch.masks[:, :, :1], batch.masks.shape[2], axis=2) for batch in self.batches)
        named = scores.named()
        return {name: named[name] for name in ("J&F", "J", "F", "J-decay")} | {
            "J&F without memory": forgetful.named()["J&F"],
            "J&F of the first mask": track_scores(still, self.batches).named()["J&F"],
        }

    def _followed(self, params: Any, forget: bool) -> Iterable[Bool[np.ndarray, "B O T height width"]]:
        for batch in self.batches:
            yield on_mesh(self._follow, params, batch, forget)


def track_scores(
    predicted: Iterable[Bool[np.ndarray, "B O T height width"]], batches: Iterable[ClipBatch]
) -> video.Scores:
    """Mean scores over the objects of clips, the first and last frame of each left out.

    Raises:
        ValueError: no object, or a clip of fewer than three frames.
    """
    scores = []
    for masks, batch in zip(predicted, batches, strict=True):
        counts = jax.device_get(frame_counts(masks, batch.masks))
        j, f = video.j_and_f(counts)
        for clip, number in zip(*np.nonzero(batch.real.any(-1)), strict=True):
            frames = np.flatnonzero(batch.real[clip, number])[video.SEMI_SUPERVISED]
            scores.append(
                video.Scores(
                    video.statistics(np.asarray(j, np.float64)[clip, number, frames]),
                    video.statistics(np.asarray(f, np.float64)[clip, number, frames]),
                )
            )
    return video.mean_scores(scores)
