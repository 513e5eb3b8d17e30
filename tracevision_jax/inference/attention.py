"""TVP attention as maps over the picture (Fig. 6 and 11): from window order to rows and columns of visual tokens.

for block in model.attention(image, trace):
    overlay_attention(image, block.over_image[0])       # what the trace as a whole attends to
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from tracevision_jax.records.encoded import Piece
from tracevision_jax.vision.preprocess import VisionInputConfig
from tracevision_jax.vision.windows import raster_units


@dataclass(frozen=True)
class BlockAttention:
    """Attention weights of one TVP block; a direction that the model lacks (an ablation) is None."""

    trace_to_vision: Float[np.ndarray, "heads points frames rows columns"] | None
    """Eq. 3: how much of each visual token's update comes from each point; sums to 1 over points."""
    vision_to_trace: Float[np.ndarray, "heads points frames rows columns"] | None
    """Eq. 4: where each point looks; sums to 1 over frames, rows and columns."""
    points: Float[np.ndarray, "points 3"]
    """The keypoints (x, y, t)."""

    @property
    def over_image(self) -> Float[np.ndarray, "frames rows columns"]:
        """Where the points look, averaged over points and heads; of Eq. 3's weights where there is no Eq. 4.

        All 0 for a model without a TVP.
        """
        weights = self.vision_to_trace if self.vision_to_trace is not None else self.trace_to_vision
        return np.zeros((1, 1, 1)) if weights is None else weights.mean(axis=(0, 1))


def block_attention(
    maps: Sequence[Mapping[str, np.ndarray]], piece: Piece, bucket_units: int, config: VisionInputConfig
) -> list[BlockAttention]:
    """The maps of each block for one prompt, padding cut off.

    Args:
        maps: the TVP's, of a batch whose first row is the prompt.
        piece: the prompt.
        bucket_units: visual tokens of a frame in the batch, padding included.
        config: geometry of windows.
    """
    (points,) = (conversation.points for conversation in piece.conversations)
    rows, columns = (piece.grid[0] // config.merge).tolist()
    row, column = np.divmod(np.arange(rows * columns), columns)
    in_frame = raster_units(row, column, int(piece.grid[0, 1]), config.window_units, config.merge)
    frames = len(piece.grid)
    index = (np.arange(frames)[:, None] * bucket_units + in_frame).reshape(-1)
    shape = (len(points), frames, rows, columns)
    blocks = []
    for block in maps:
        towards = block.get("trace_to_vision")
        away = block.get("vision_to_trace")
        blocks.append(
            BlockAttention(
                None
                if towards is None
                else np.moveaxis(towards[0, :, index, : len(points)], 0, -1).reshape(-1, *shape),
                None if away is None else away[0, :, : len(points)][..., index].reshape(-1, *shape),
                points,
            )
        )
    return blocks
