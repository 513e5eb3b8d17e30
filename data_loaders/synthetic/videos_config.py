"""What synthetic videos are made of: `VideoConfig`.

Lengths are fractions of the picture's shorter side, so that another size gives the same videos, larger. Every choice
is drawn from these ranges by (seed, index); colours, shapes, textures and backgrounds are those of scenes
(`config.py`).
"""

from dataclasses import dataclass

from data_loaders.synthetic.config import BACKGROUNDS, COLOURS, SHAPES
from tracevision_jax.errors import UserError


@dataclass(frozen=True)
class VideoConfig:
    """Ranges are (smallest, largest), both included."""

    height: int = 96
    """Pixels."""
    width: int = 96
    frames: int = 8
    objects: tuple[int, int] = (1, 2)
    """Objects of a colour and a shape of their own."""
    alike: tuple[int, int] = (1, 2)
    """Further objects, each of which looks like one of those: its colour, its shape or both are the same. They are
    tracked as well; what tells them apart is where they were."""
    twins: float = 0.4
    """Chance that an object that looks like another has both its colour and its shape."""
    posts: tuple[int, int] = (0, 1)
    """Bars across the picture that hide whatever passes behind them."""
    post_width: tuple[float, float] = (0.1, 0.2)
    diameter: tuple[float, float] = (0.28, 0.42)
    speed: tuple[float, float] = (0.02, 0.07)
    """Between two frames, on average over a stretch of a path."""
    leaving: float = 0.35
    """Chance that an object leaves the picture and comes back, where the video is long enough."""
    stretch: int = 4
    """Frames between two of the points that a path is led through."""
    textured: float = 0.3
    """Chance that an object has stripes or dots."""
    palette_variation: float = 0.07
    colours: tuple[str, ...] = tuple(COLOURS)
    shapes: tuple[str, ...] = SHAPES
    backgrounds: tuple[str, ...] = BACKGROUNDS
    frames_per_second: float = 8.0

    def __post_init__(self):
        """Check every field.

        Raises:
            UserError: lists all values that are out of range and names that are unknown.
        """
        faults = []
        if min(self.height, self.width) < 16 or self.frames < 1 or self.stretch < 1:
            faults.append("height and width must be at least 16, frames and stretch at least 1")
        for field, low in (
            ("objects", 1),
            ("alike", 0),
            ("posts", 0),
            ("post_width", 0),
            ("diameter", 0),
            ("speed", 0),
        ):
            first, last = getattr(self, field)
            if not low <= first <= last:
                faults.append(f"{field} is {first} to {last}: give a range (smallest, largest) from {low} up")
        if not 0.05 <= self.diameter[0] <= self.diameter[1] <= 1:
            faults.append(f"diameter is {self.diameter}: from 0.05 to 1")
        for field, names in (("colours", tuple(COLOURS)), ("shapes", SHAPES), ("backgrounds", BACKGROUNDS)):
            chosen = getattr(self, field)
            unknown = [name for name in chosen if name not in names]
            if unknown or not chosen:
                faults.append(f"{field} {', '.join(unknown) or 'is empty'}: known are {', '.join(names)}")
        if min(len(self.colours), len(self.shapes)) < self.objects[1] + (1 if self.alike[1] else 0):
            faults.append(
                f"{self.objects[1]} objects that differ in colour and shape, and others that share one of both, need "
                f"more colours and shapes than {len(self.colours)} and {len(self.shapes)}"
            )
        if faults:
            raise UserError("synthetic videos: " + "; ".join(faults))
