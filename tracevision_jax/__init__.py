"""TraceVision in JAX: language, human traces and pixels.

    import tracevision_jax as tv
    model = tv.load("checkpoints/tracevision-7b")
    model.describe("a.jpg", trace).text

The names below are imported when they are first asked for, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracevision_jax.errors import UserError
    from tracevision_jax.inference.answers import Answer
    from tracevision_jax.inference.engine import Engine, Sampling
    from tracevision_jax.inference.loading import load, save
    from tracevision_jax.inference.tracevision import TraceVisionInference

_HOMES = {
    "Answer": "tracevision_jax.inference.answers",
    "Engine": "tracevision_jax.inference.engine",
    "Sampling": "tracevision_jax.inference.engine",
    "TraceVisionInference": "tracevision_jax.inference.tracevision",
    "UserError": "tracevision_jax.errors",
    "load": "tracevision_jax.inference.loading",
    "save": "tracevision_jax.inference.loading",
}

__all__ = ["Answer", "Engine", "Sampling", "TraceVisionInference", "UserError", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
