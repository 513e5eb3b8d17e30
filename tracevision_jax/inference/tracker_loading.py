"""From a directory to a model that tracks: what training exports, or a released SAM 2 in any layout that we read.

config, params = load_tracking_model("checkpoints/sam2.1_tiny", dtype="bfloat16", image_size=512)
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from tracevision_jax.errors import UserError
from tracevision_jax.hosts.sam_presets import SegmentAnythingConfig
from tracevision_jax.inference.loading import PRECISIONS
from tracevision_jax.systems.config_json import from_json
from tracevision_jax.weights import families, model_directory

SYSTEM = "sam2"
"""What the config.json of a trained model says."""


def load_tracking_model(
    place: str | Path, dtype: str | None = None, image_size: int | None = None
) -> tuple[SegmentAnythingConfig, Any]:
    """Read (configuration, parameters).

    Args:
        place: a model directory or the folder of a run that exported one, or a SAM 2 converted, of Hugging Face, or of
            its authors (a `.pt` file, or a directory that holds it).
        dtype: of parameters and arithmetic; as stored by default.
        image_size: side of the model's pictures, pixels; that of the checkpoint by default.

    Raises:
        UserError: nothing there that can be read, or another kind of model than a SAM 2 with its memory.
    """
    if dtype is not None and dtype not in PRECISIONS:
        raise UserError(f"dtype is '{dtype}', must be one of {', '.join(PRECISIONS)}")
    path = Path(place)
    if not path.exists():
        raise UserError(f"the checkpoint {place} is not there; give a directory, or a file of SAM 2's authors")
    if not (path / "config.json").is_file() and model_directory.is_model(path / "model"):
        path = path / "model"
    if model_directory.is_model(path):
        config, params = _read_trained(path, dtype)
    else:
        config, params = families.load_host(path, dtype=dtype)
    if not isinstance(config, SegmentAnythingConfig) or config.heads.memory is None:
        raise UserError(f"{place} holds no model that tracks; take a SAM 2 or 2.1 with its memory")
    return config if image_size is None else config.with_image_size(image_size), params


def _read_trained(directory: Path, dtype: str | None) -> tuple[SegmentAnythingConfig, Any]:
    content = model_directory.read_config(directory)
    if content.get("system") != SYSTEM:
        raise UserError(f"{directory} holds a model of the system '{content.get('system')}', tracking takes '{SYSTEM}'")
    config = from_json(SegmentAnythingConfig, content.get("model"), f"'model' in {directory / 'config.json'}")
    _, params = model_directory.load_model(directory)
    if dtype is not None:
        config = config.with_precision(dtype, dtype)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)
    return config, params
