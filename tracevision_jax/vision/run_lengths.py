"""Binary masks as COCO's compressed run lengths, {"size": [height, width], "counts": text}, and back."""

from typing import Any

import numpy as np
from jaxtyping import Bool
from pycocotools import mask as coco


def encode_mask(mask: Bool[np.ndarray, "height width"]) -> dict[str, Any]:
    """A mask as JSON values."""
    encoded: dict[str, Any] = coco.encode(np.asfortranarray(mask, np.uint8))  # pyright: ignore[reportAssignmentType]
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}


def decode_mask(mask: dict[str, Any]) -> Bool[np.ndarray, "height width"]:
    """The mask that `encode_mask` wrote; what others wrote is checked by `evaluation.metrics.run_lengths` first."""
    return np.asarray(coco.decode(mask)) > 0  # pyright: ignore[reportArgumentType]
