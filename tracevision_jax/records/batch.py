"""`Batch`: the fixed-shape arrays of one jitted step, and `Bucket`, the static sizes that they have.

Axes: rows B (sharded over data and fsdp), tokens T, frames F, windows W, slots S (patches of a window), conversations
C, trajectory points P, masks K. A row holds one or more packed conversations, told apart by segment ids; their
frames follow each other along F. Absent things are padding, and padding never changes a result.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, no_type_check

import jax
from jaxtyping import Bool, Float, Int

Array = Any
"""numpy's on the host, jax's in a step; also specs, shardings and donation flags, which jax puts in their place."""


@dataclass(frozen=True, order=True)
class Bucket:
    """Static sizes of a row; one program is compiled per bucket that a run uses."""

    tokens: int
    frames: int
    windows: int
    conversations: int
    points: int
    masks: int

    adds_up: ClassVar[tuple[str, ...]] = ("tokens", "frames", "conversations", "masks")
    """Of these the records in a row have the sum; the others are maxima."""

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens, {self.frames} frames of {self.windows} windows, "
            f"{self.conversations} conversations of {self.points} points, {self.masks} masks"
        )


@jax.tree_util.register_dataclass
@no_type_check  # what jax puts in place of arrays has no such shapes
@dataclass(frozen=True)
class Batch:
    """See the module's text for the axes; the padding value of each field stands in its line."""

    tokens: Int[Array, "B T"]
    """Token ids; padding 0."""
    segments: Int[Array, "B T"]
    """Conversation number from 1; 0 is padding."""
    positions: Int[Array, "B T 3"]
    """Multimodal rotary positions (time, height, width), restarting at 0 in each conversation; padding 0."""
    targets: Int[Array, "B T"]
    """The token that position t predicts (already shifted); padding 0."""
    target_weights: Float[Array, "B T"]
    """Loss weight of each target, 0 where nothing is to be learned."""
    sought: Float[Array, "B T 4"]
    """The place (x1, y1, x2, y2) that position t is to attend to, see `EncodedConversation.sought`; padding 0, a box
    without area."""
    visual_index: Int[Array, "B T"]
    """-1, or the place of this token's visual feature in the row's (conversations, frames, units) flattened."""
    point_index: Int[Array, "B T"]
    """-1, or the place of this token's trajectory point in the row's (conversations, points) flattened."""
    patches: Float[Array, "B F W S D"]
    """Normalised patches in window order (`vision/windows.py`); padding 0."""
    grid: Int[Array, "B F 2"]
    """Rows and columns of patches of each frame; (0, 0) where absent."""
    frame_times: Float[Array, "B F"]
    """Seconds from the start of the video; 0 for a still and for padding."""
    frame_owner: Bool[Array, "B C F"]
    """Which frames each conversation sees."""
    points: Float[Array, "B C P 3"]
    """Keypoints (x, y, t) that go into the TVP: x, y in [0, 1], t in seconds; padding 0."""
    point_trace: Int[Array, "B C P"]
    """Number of the trajectory (A, B, ...) from 1 that a point belongs to; 0 is padding."""
    masks: Float[Array, "B K M M"]
    """Target masks in [0, 1] on the decoder's square grid; padding 0."""
    mask_frame: Int[Array, "B K"]
    """The frame of the row that a mask lies on; padding 0."""
    mask_group: Int[Array, "B K"]
    """Number from 1 of the conversation and frame that masks compete in (the overlap of Eq. 14); 0 is padding."""
    mask_slots: Int[Array, "B K Q"]
    """Positions in the row of the six codebook slots of each mask; padding 0."""

    @property
    def filled(self) -> Bool[Array, "B T"]:
        """Tokens that are not padding."""
        return self.segments > 0


def rows_of(batch: Batch) -> int:
    """Number of rows of a batch."""
    return batch.tokens.shape[0]
