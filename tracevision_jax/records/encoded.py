"""What the processor makes of a sample: its frames, its conversations and both together, as arrays outside any row."""

import dataclasses

import numpy as np

from tracevision_jax.language.mrope import VisualSpan


@dataclasses.dataclass
class EncodedConversation:
    """One conversation as arrays of its own, not yet placed in a row."""

    task: str
    tokens: np.ndarray
    learn: np.ndarray
    """Weight of each token where it is to be predicted, 0 where it is given."""
    visual: np.ndarray
    """(tokens, 2): frame and unit of each visual token; -1 elsewhere."""
    point: np.ndarray
    """Index of each token's keypoint, or -1."""
    positions: np.ndarray
    """(tokens, 3)."""
    points: np.ndarray
    """(points, 3) keypoints for the TVP."""
    point_trace: np.ndarray
    mask_frame: list[int] = dataclasses.field(default_factory=list)
    mask_target: list[np.ndarray] = dataclasses.field(default_factory=list)
    mask_slots: list[np.ndarray] = dataclasses.field(default_factory=list)
    extra_targets: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """(targets, 2) of tokens that are followed by none to learn: place among the tokens, and a word's first token, for
    visual tokens that are named (`UnitNamesPart`) and for slots of a mask (`slot_words`)."""
    sought: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 4), np.float32))
    """(tokens, 4) boxes: the place that the token after each is about, 0 where there is none. In answers a coordinate
    is about its box or point, a slot itself about its mask, and all else about the trace that was asked about."""
    next_position: int = 0
    """Rotary position of the token after the last."""


@dataclasses.dataclass
class Piece:
    """One sample with its conversations, ready to be placed in a row."""

    conversations: list[EncodedConversation]
    patches: np.ndarray
    """(frames, windows, slots, patch_dim)."""
    grid: np.ndarray
    """(frames, 2)."""
    frame_times: np.ndarray
    """(frames,) seconds."""

    @property
    def resources(self) -> tuple[int, int, int, int, int, int]:
        """What the piece takes of a `Bucket`, in the order of its fields."""
        return (
            sum(len(c.tokens) for c in self.conversations),
            len(self.grid),
            self.patches.shape[1],
            len(self.conversations),
            max((len(c.points) for c in self.conversations), default=0),
            sum(len(c.mask_slots) for c in self.conversations),
        )


@dataclasses.dataclass(frozen=True)
class Frames:
    """A sample's pictures as the vision tower takes them."""

    values: np.ndarray
    """Patches (frames, windows, slots, patch_dim)."""
    grid: np.ndarray
    """(frames, 2) rows and columns of patches."""
    times: np.ndarray
    """(frames,) seconds."""
    spans: list[VisualSpan]
    """The stills or the video in the order of the prompt."""
    sources: np.ndarray
    """Which of the sample's frames each stands for (the first of a temporal patch)."""
