"""PyTorch files written as a stream: each tensor goes to a file of its own, which `torch.save` maps instead of reading.

    write_torch_file(folder / "sam2.1_hiera_tiny.pt", plans, key="model")

Reading them is in `sources.py`.
"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tracevision_jax.errors import UserError
from tracevision_jax.weights.copying import contiguous
from tracevision_jax.weights.safetensors_io import Progress, TensorPlan


def write_torch_file(
    path: Path, plans: Sequence[TensorPlan], key: str | None = None, progress: Progress | None = None
) -> None:
    """Write a dictionary of tensors, or `{key: dictionary}`, that `torch.load(weights_only=True)` reads.

    Raises:
        UserError: torch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"writing {path.name} needs torch, which is not installed: pip install 'tracevision-jax[torch]'"
        ) from error
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tensors-") as folder:
        state = {}
        for number, plan in enumerate(plans):
            place = Path(folder) / str(number)
            with place.open("wb") as file:
                for piece in plan.pieces():
                    file.write(contiguous(piece, plan.dtype).reshape(-1).view(np.uint8).data)
                    if progress:
                        progress(plan.name, piece.nbytes)
            kind = getattr(torch, str(plan.dtype))
            mapped = torch.from_file(str(place), shared=False, size=math.prod(plan.shape), dtype=kind)
            state[plan.name] = mapped.reshape(plan.shape)
        torch.save(state if key is None else {key: state}, path)
