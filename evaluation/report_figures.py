"""The report's figures that need more than answers: TVP attention (Fig. 6 and 11), simplification (Fig. 3), and a
photograph with a drawn trace.

    attention_section(model, samples, images)          # images: an `Images` folder
    simplification_section(sample, Simplification(), images)
    photograph_section(model, PORTRAIT, side_px=128, images=images)

`model` is `tv.load(...)`'s, or anything with its `describe` and `attention`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from PIL import Image
from scipy.interpolate import CubicSpline

from evaluation.report_page import Line, Section
from evaluation.report_pictures import Images
from tracevision_jax.inference.attention import BlockAttention
from tracevision_jax.inference.pictures import (
    TIME_COLOURS,
    Picture,
    draw_path,
    draw_trace,
    gradient,
    overlay_attention,
    shown,
)
from tracevision_jax.inference.pictures_sheets import Panel, sheet, simplification_figure
from tracevision_jax.records.sample import Sample
from tracevision_jax.records.simplification import Simplification, simplify_trace
from tracevision_jax.records.templates import full_trace
from tracevision_jax.trajectory.alignment import align_words
from tracevision_jax.trajectory.checks import check_trace
from tracevision_jax.trajectory.phrases import RubricPhrases, phrase_windows
from tracevision_jax.vision.pictures import read_image, to_rgb

MAP_PX, PHOTOGRAPH_PX = 260, 440
"""Width of a panel of attention maps, and of the photograph."""
ANSWER_TOKENS = 96


@runtime_checkable
class Model(Protocol):
    """What figures ask of a model."""

    def describe(self, image: Any, trace: Any, *, max_new_tokens: int) -> Any:
        """An answer with `text`."""
        ...

    def attention(self, image: Any, trace: Any) -> list[BlockAttention]:
        """The TVP's attention, block by block."""
        ...


# Attention


def attention_section(model: Model, samples: Sequence[Sample], images: Images) -> Section:
    """Image and trace, where the trace looks, and which moment of the trace each place takes up."""
    cards, missing = [], []
    for number, sample in enumerate(samples):
        trace = check_trace(full_trace(sample).points)
        panels = attention_panels(model.attention(sample.frames[0], trace), sample.frames[0], trace)
        if len(panels) == 1:
            missing.append(sample.id)
            continue
        picture = sheet(panels, 3, MAP_PX)
        said = Line("narrative spoken with the trace", sample.caption)
        alternative = "The picture with its trace, and the attention between the two in both directions"
        cards.append(images.card(f"attention_{number}", picture, alternative, said, panels=len(panels)))
    return Section(
        "attention",
        "TVP attention maps",
        "Attention of the last TVP block, averaged over its heads, on held-out scenes. Vision to trace (Eq. 4) is "
        "where the keypoints look, brighter where more of them do. Trace to vision (Eq. 3) is what each place of the "
        "picture takes from the trace: its colour is the moment (blue first, red last), its strength how far the "
        "place singles that moment out, against the place that does so most.",
        tuple(cards),
        "" if cards or not missing else "The model has no TVP, so there is no attention between trace and picture.",
    )


def attention_panels(blocks: Sequence[BlockAttention], image: Picture, trace: np.ndarray) -> list[Panel]:
    """The picture with its trace, then the last block's map for each direction that the model has."""
    panels = [Panel(draw_trace(image, trace), title="image and trace")]
    if not blocks:
        return panels
    last = blocks[-1]
    if last.vision_to_trace is not None:
        looks = last.vision_to_trace.mean(axis=(0, 1))[0]
        panels.append(Panel(overlay_attention(image, looks), title="vision to trace: where it looks"))
    if last.trace_to_vision is not None:
        taken = last.trace_to_vision.mean(axis=0)[:, 0]
        panels.append(Panel(moment_map(image, taken, last.points[:, 2]), title="trace to vision: which moment"))
    return panels


def moment_map(
    image: Picture, weights: Float[np.ndarray, "points rows columns"], times: Float[np.ndarray, "points"]
) -> Image.Image:
    """Lay over a picture, in the colours of time, the mean moment that each place attends to.

    The strength of the colour is 1 - entropy / log(points): 0 where a place attends to all points alike.
    """
    picture = shown(image)
    total = np.maximum(weights.sum(axis=0), 1e-12)
    shares = weights / total
    span = max(float(times[-1] - times[0]), 1e-9)
    moment = np.tensordot((times - times[0]) / span, shares, axes=1)
    entropy = -(shares * np.log(np.maximum(shares, 1e-12))).sum(axis=0)
    singled = np.clip(1 - entropy / np.log(len(times)), 0, 1) if len(times) > 1 else np.ones_like(moment)
    singled = singled / max(float(singled.max()), 1e-9)
    strength = _enlarged(singled, picture.size)[..., None]
    colour = gradient(TIME_COLOURS, np.clip(_enlarged(moment, picture.size), 0, 1)).astype(np.float32)
    grey = np.asarray(picture.convert("L").convert("RGB"), np.float32)
    dimmed = 0.25 * grey + 0.35 * np.asarray(picture, np.float32)
    return Image.fromarray(np.clip(dimmed + (colour - dimmed) * 0.75 * strength, 0, 255).round().astype(np.uint8))


def _enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    plane = Image.fromarray(np.ascontiguousarray(values, np.float32))
    return np.clip(np.asarray(plane.resize(size, Image.Resampling.BICUBIC)), 0, 1)


# Simplification


def simplification_section(sample: Sample, how: Simplification, images: Images) -> Section:
    """A trace as recorded beside its keypoints, coloured by the importance of what was said meanwhile."""
    trace = full_trace(sample)
    points = check_trace(trace.points)
    said = " ".join(word.text for word in trace.words)
    provider = RubricPhrases()
    phrases = provider.phrases(said)
    windows = phrase_windows(phrases, align_words(said, trace.words))
    keypoints = simplify_trace(points, trace.words, sample.size, how, provider)
    picture = simplification_figure(sample.frames[0], points, keypoints, said, phrases, windows)
    fewer = 100 * (1 - len(keypoints) / len(points))
    height, width = sample.size
    return Section(
        "simplification",
        "Trajectory simplification",
        f"Semantic-guided Douglas-Peucker (Sec. 3.2.3) on a scene of {width} x {height} pixels with a tolerance of "
        f"{how.epsilon_px:g} px for phrases of importance 5, five times that for importance 1: {len(points)} recorded "
        f"points become {len(keypoints)} keypoints, {fewer:.0f} % fewer. (The paper's Fig. 3: 410 become 37.)",
        (
            images.card(
                "simplification", picture, "A recorded trace, and its keypoints coloured by importance", panels=2
            ),
        ),
    )


# Photograph


@dataclass(frozen=True)
class Photograph:
    """A real picture and a trace drawn over it."""

    path: Path
    strokes: tuple[tuple[float, float, float], ...]
    """Places that the hand passes, (x, y, seconds); the trace is the smooth curve through them at 60 Hz."""
    credit: str

    @property
    def trace(self) -> Float[np.ndarray, "points 3"]:
        """The drawn trace."""
        knots = np.array(self.strokes)
        times = np.arange(knots[0, 2], knots[-1, 2], 1 / 60)
        return np.column_stack([CubicSpline(knots[:, 2], knots[:, :2])(times), times])


PORTRAIT = Photograph(
    Path(__file__).with_name("portrait.jpg"),
    (
        (0.10, 0.14, 0.0),
        (0.16, 0.22, 0.3),
        (0.11, 0.30, 0.6),
        (0.17, 0.35, 0.8),
        (0.30, 0.20, 1.2),
        (0.42, 0.13, 1.5),
        (0.50, 0.09, 1.8),
        (0.58, 0.13, 2.0),
        (0.50, 0.16, 2.2),
        (0.42, 0.30, 2.6),
        (0.48, 0.33, 2.8),
        (0.58, 0.31, 3.1),
        (0.52, 0.39, 3.4),
        (0.50, 0.48, 3.7),
        (0.50, 0.58, 4.0),
        (0.50, 0.70, 4.3),
        (0.36, 0.80, 4.7),
        (0.22, 0.83, 5.0),
        (0.40, 0.88, 5.4),
        (0.62, 0.86, 5.7),
        (0.72, 0.84, 5.9),
        (0.82, 0.85, 6.1),
        (0.78, 0.87, 6.3),
        (0.68, 0.86, 6.6),
    ),
    "Grace Hopper, by James S. Davis, United States Navy, public domain",
)
"""Embedded; a hand goes over stars of the flag, badge of the cap, glasses, chin, tie, name plate, ribbons."""


def photograph_section(model: Model, photograph: Photograph, side_px: int, images: Images) -> Section:
    """What the model makes of a real picture, reduced to a longer side of `side_px`, as large as it was trained on."""
    image, trace = read_image(photograph.path), photograph.trace
    factor = min(1.0, side_px / max(image.shape[:2]))
    height, width = (max(1, round(side * factor)) for side in image.shape[:2])
    small = to_rgb(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
    blocks = model.attention(small, trace)
    panels = attention_panels(blocks, image, trace)
    keypoints = blocks[0].points if blocks else trace
    panels.insert(
        1, Panel(_keypoints_drawn(image, keypoints), title=f"{len(trace)} points, {len(keypoints)} keypoints")
    )
    answer = model.describe(small, trace, max_new_tokens=ANSWER_TOKENS)
    card = images.card(
        "photograph",
        sheet(panels, 2, PHOTOGRAPH_PX),
        "A photograph with a drawn trace, its keypoints, and attention maps",
        Line("the model says", answer.text or "(nothing)"),
        Line("photograph", f"{photograph.path.name}, {photograph.credit}"),
        panels=2,
    )
    note = (
        f"A trace drawn by hand over a photograph, which the model sees at {width} x {height} pixels. The model of "
        "this demo has never seen anything but synthetic scenes of coloured shapes, so its words are about those: "
        "what can be judged here is where it looks, not what it names."
    )
    return Section("photograph", "A real photograph", note, (card,))


def _keypoints_drawn(image: Picture, points: Float[np.ndarray, "points 3"]) -> Image.Image:
    """Keypoints as dots on their line, in the colours of time."""
    share = (points[:, 2] - points[0, 2]) / max(float(points[-1, 2] - points[0, 2]), 1e-9)
    colours = [(r, g, b) for r, g, b in gradient(TIME_COLOURS, share).tolist()]
    return draw_path(image, points[:, :2], colours, dots=True, width=0.7)
