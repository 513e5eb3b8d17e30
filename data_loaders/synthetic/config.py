"""What synthetic scenes are made of: `SceneConfig`, and the names of colours, shapes, sizes, textures,
backgrounds.

Every choice of a scene is drawn from these ranges with a generator keyed by (seed, index), so a scene
depends on its seed, its index and its config alone. Two seeds give unrelated scenes: train on one, hold out
another.

How palettes vary: the eight colours are far apart in hue or lightness. Each object's colour is its named
colour made brighter or darker by a factor of up to 1 +- `palette_variation`, with each channel moved by up
to half of that. At the default it stays nearer to its own name than to any other; a test holds that.
Backgrounds have low saturation, so that none has the colour of an object.
"""

from dataclasses import dataclass

from tracevision_jax.errors import UserError
from tracevision_jax.nearest import suggest

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 44, 46),
    "orange": (240, 132, 32),
    "yellow": (246, 214, 58),
    "green": (52, 152, 74),
    "cyan": (72, 200, 214),
    "blue": (44, 82, 198),
    "purple": (128, 62, 172),
    "pink": (243, 148, 190),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "heart")
SIZES: dict[str, tuple[float, float]] = {"small": (0.18, 0.24), "large": (0.31, 0.4)}
"""Diameter of each named size, as a fraction of the image's shorter side."""
TEXTURES = ("plain", "striped", "dotted")
BACKGROUNDS = ("plain", "gradient", "noise", "horizon")
QUESTION_KINDS = (
    "what",
    "colour",
    "shape",
    "size",
    "texture",
    "place",
    "which_trace",
    "relation",
    "counting",
    "box",
    "segment",
    "trace_box",
    "trace_segment",
    "dialogue",
)


@dataclass(frozen=True)
class SceneConfig:
    """Ranges are (smallest, largest), both included."""

    height: tuple[int, int] = (128, 128)
    """Pixels."""
    width: tuple[int, int] = (128, 128)
    objects: tuple[int, int] = (4, 6)
    """How many objects a scene has; each is alone in its pair of colour and shape."""
    named: tuple[int, int] = (2, 4)
    """How many of them the narrative names; fewer more often."""
    colours: tuple[str, ...] = tuple(COLOURS)
    shapes: tuple[str, ...] = SHAPES
    textures: tuple[str, ...] = TEXTURES
    textured: float = 0.4
    """Chance that an object has a texture other than plain."""
    backgrounds: tuple[str, ...] = BACKGROUNDS
    overlap: float = 0.2
    """Largest part of an object that others may hide in the first frame."""
    palette_variation: float = 0.07
    frames: int = 1
    """1 makes stills; more makes videos, in which objects move and bounce off the borders."""
    frames_per_second: float = 2.0
    """Of videos."""
    narrative: bool = True
    """Whether scenes have a caption with times and a trace; without, they have a caption and regions only."""
    brief: bool = False
    """Short narratives: no openings, size words, second relations or fillers."""
    words_per_second: tuple[float, float] = (2.5, 4.0)
    """Speed of speech, pauses included."""
    points_per_second: float = 60.0
    two_strokes: float = 0.25
    """Chance that the pointer leaves the image once and comes back."""
    outside: float = 0.12
    """Chance that the pointer ends a little outside the image."""
    questions: tuple[str, ...] = ()
    """Kinds of questions to ask (`QUESTION_KINDS`), drawn evenly; empty asks none."""
    questions_per_scene: int = 0

    def __post_init__(self):
        """Check every field.

        Raises:
            UserError: a value is out of range or a name unknown.
        """
        for field, low in (("height", 16), ("width", 16), ("objects", 1), ("named", 1)):
            first, last = getattr(self, field)
            if not low <= first <= last:
                raise UserError(f"scene {field} is {first} to {last}: give a range (smallest, largest) from {low} up")
        known = {
            "colours": tuple(COLOURS),
            "shapes": SHAPES,
            "textures": TEXTURES,
            "backgrounds": BACKGROUNDS,
            "questions": QUESTION_KINDS,
        }
        for field, names in known.items():
            for name in getattr(self, field):
                if name not in names:
                    hint = suggest(name, names) or f" Known: {', '.join(names)}."
                    raise UserError(f"scene {field}: unknown name '{name}'.{hint}")
        if not (self.colours and self.shapes and self.textures and self.backgrounds):
            raise UserError("scene colours, shapes, textures and backgrounds need at least one name each")
        if len(self.colours) * len(self.shapes) < self.objects[1]:
            raise UserError(
                f"{self.objects[1]} objects need as many pairs of colour and shape, and there are "
                f"{len(self.colours)} x {len(self.shapes)}: give more colours or shapes, or fewer objects"
            )
        if self.frames < 1 or self.frames_per_second <= 0 or self.points_per_second <= 0:
            raise UserError("scene frames, frames_per_second and points_per_second must be positive")
        if self.questions_per_scene and not self.questions:
            raise UserError(f"questions_per_scene needs kinds of questions, of: {', '.join(QUESTION_KINDS)}")
