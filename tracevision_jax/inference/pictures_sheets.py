"""Pictures put together: text blocks, captioned sheets, the simplification figure, video as sheet or
animation.

Made from what `pictures.py` draws, on white, as a report or a paper shows them.

    sheet([Panel(draw_trace(image, points), "a man throws a ball", "prediction"), ...],
    columns=2).save("sheet.png") simplification_figure(image, points, keypoints, caption, phrases,
    windows).save("simplification.png") save_animation(draw_trace_on_frames(frames, points, 2.0), "clip.gif",
    2.0)
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw

from tracevision_jax.errors import UserError
from tracevision_jax.inference.pictures import (
    TIME_COLOURS,
    Colour,
    Picture,
    draw_path,
    gradient,
    printable,
    shown,
    text_font,
    timed_line,
)
from tracevision_jax.trajectory.checks import check_trace
from tracevision_jax.trajectory.phrases import Phrase
from tracevision_jax.trajectory.simplify import phrase_of_points

INK: Colour = (28, 32, 38)
PALE_INK: Colour = (110, 116, 124)
PAPER: Colour = (255, 255, 255)

IMPORTANCE_COLOURS: tuple[Colour, ...] = (
    (128, 140, 154),
    (60, 150, 205),
    (226, 180, 20),
    (240, 120, 40),
    (212, 32, 60),
)
"""Colours of the importances 1 to 5."""

_GAP = 18


class Panel(NamedTuple):
    """A picture of a sheet with what is written above and below it."""

    picture: Picture
    caption: str = ""
    title: str = ""


class _Run(NamedTuple):
    """A stretch of text of one colour; marked ones stand on a wash of it."""

    text: str
    colour: Colour = INK
    marked: bool = False


# Text


def wrap(text: str, width_px: float, size_px: float) -> list[str]:
    """Lines of text no wider than `width_px`: broken between words, and inside those that are too long."""
    font = text_font(size_px)
    lines, line = [], ""
    for word in printable(text).split():
        candidate = f"{line} {word}".strip()
        if font.getlength(candidate) <= width_px:
            line = candidate
            continue
        if line:
            lines.append(line)
        while len(word) > 1 and font.getlength(word) > width_px:
            fits = _longest_fit(word, width_px, size_px)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    return [*lines, line] if line else lines


def text_block(text: str, width_px: int, size_px: float = 15.0, colour: Colour = INK) -> Image.Image:
    """Wrapped text on white, as high as it needs."""
    lines = wrap(text, float(width_px), size_px)
    step = round(1.35 * size_px)
    block = Image.new("RGB", (width_px, max(1, len(lines) * step)), PAPER)
    draw = ImageDraw.Draw(block)
    for row, line in enumerate(lines):
        draw.text((0, row * step + step / 2), line, font=text_font(size_px), fill=colour, anchor="lm")
    return block


def _longest_fit(word: str, width_px: float, size_px: float) -> int:
    """How many characters of a word fit, at least one."""
    font = text_font(size_px)
    low, high = 1, len(word)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(word[:middle]) <= width_px else (low, middle - 1)
    return low


def _marked_block(runs: Sequence[_Run], width_px: int, size_px: float) -> Image.Image:
    """Wrapped text of several colours."""
    font, step = text_font(size_px), round(1.6 * size_px)
    space = font.getlength(" ")
    places, x, row, parted = [], 0.0, 0, True
    for run in runs:
        parted |= run.text[:1].isspace()
        for word in printable(run.text).split():
            length = font.getlength(word)
            x += (space if parted else 3) if x else 0
            if x and x + length > width_px:
                x, row = 0.0, row + 1
            places.append((x, row, length, word, run))
            x, parted = x + length, True
        # Punctuation right after a marked stretch stays beside it.
        parted = run.text[-1:].isspace() or not run.text
    block = Image.new("RGB", (width_px, (row + 1) * step), PAPER)
    draw = ImageDraw.Draw(block)
    for index, (x, row, length, _, run) in enumerate(places):
        if run.marked:
            after = places[index + 1] if index + 1 < len(places) else None
            joined = after is not None and after[4] is run and after[1] == row
            wash = tuple(round(255 - 0.2 * (255 - channel)) for channel in run.colour)
            right = x + length + (space if joined else 2)
            draw.rectangle((x - 2, row * step + 1, right, (row + 1) * step - 3), fill=wash)
    for x, row, _, word, run in places:
        colour = tuple(round(0.75 * channel) for channel in run.colour) if run.marked else run.colour
        draw.text((x, row * step + step / 2 - 1), word, font=font, fill=colour, anchor="lm")
    return block


# Sheets


def sheet(panels: Sequence[Panel], columns: int = 3, panel_width_px: int = 400, title: str = "") -> Image.Image:
    """Panels side by side in rows on white, each with its title above and its caption, wrapped, below.

    Raises `UserError` for no panels or no columns.
    """
    if not panels or columns < 1:
        raise UserError(f"a sheet needs panels and columns; there are {len(panels)} panels in {columns} columns")
    columns = min(columns, len(panels))
    drawn = [_panel(panel, panel_width_px) for panel in panels]
    rows = [drawn[start : start + columns] for start in range(0, len(drawn), columns)]
    width = columns * panel_width_px + (columns - 1) * _GAP
    bands = [_side_by_side(row, width) for row in rows]
    if title:
        bands.insert(0, text_block(title, width, 21.0))
    return _framed(_stacked(bands, _GAP))


def _panel(panel: Panel, width_px: int) -> Image.Image:
    picture = _at_width(shown(panel.picture), width_px)
    parts = [picture]
    if panel.title:
        parts.insert(0, text_block(panel.title, width_px, 16.0))
    if panel.caption:
        parts.append(text_block(panel.caption, width_px, 14.0, PALE_INK))
    return _stacked(parts, 6)


def _at_width(picture: Image.Image, width_px: int) -> Image.Image:
    """The picture at a width; a tall one at a height of 1.3 times that, in the middle."""
    factor = min(width_px / picture.width, 1.3 * width_px / picture.height)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    if size[0] == width_px:
        return picture.resize(size, Image.Resampling.LANCZOS)
    canvas = Image.new("RGB", (width_px, size[1]), PAPER)
    canvas.paste(picture.resize(size, Image.Resampling.LANCZOS), ((width_px - size[0]) // 2, 0))
    return canvas


def _side_by_side(pictures: Sequence[Image.Image], width: int) -> Image.Image:
    band = Image.new("RGB", (width, max(picture.height for picture in pictures)), PAPER)
    x = 0
    for picture in pictures:
        band.paste(picture, (x, 0))
        x += picture.width + _GAP
    return band


def _stacked(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    width = max(picture.width for picture in pictures)
    height = sum(picture.height for picture in pictures) + gap * (len(pictures) - 1)
    stack = Image.new("RGB", (width, height), PAPER)
    y = 0
    for picture in pictures:
        stack.paste(picture, (0, y))
        y += picture.height + gap
    return stack


def _framed(picture: Image.Image) -> Image.Image:
    framed = Image.new("RGB", (picture.width + 2 * _GAP, picture.height + 2 * _GAP), PAPER)
    framed.paste(picture, (_GAP, _GAP))
    return framed


# Simplification, as in the paper's Fig. 3


def simplification_figure(
    image: Picture,
    points: Any,
    keypoints: Any,
    caption: str = "",
    phrases: Sequence[Phrase] = (),
    windows: Float[np.ndarray, "phrases 2"] | None = None,
    panel_width_px: int = 560,
) -> Image.Image:
    """A trace as recorded beside its keypoints, coloured by the importance of the phrase spoken over them.

    `windows` are the times of `phrases` (`phrases.phrase_windows`); what belongs to no phrase has importance
    1. The caption stands below with its phrases in the same colours.
    """
    points, keypoints = check_trace(points), check_trace(keypoints, "list of keypoints")
    importance = np.array([phrase.importance for phrase in phrases] + [1])
    windows = np.zeros((0, 2)) if windows is None else windows
    owner = phrase_of_points(keypoints[:, 2], windows[: len(phrases)])
    colours = [IMPORTANCE_COLOURS[level - 1] for level in importance[owner]]
    share = (points[:, 2] - points[0, 2]) / max(points[-1, 2] - points[0, 2], 1e-9)
    by_time = [(r, g, b) for r, g, b in gradient(TIME_COLOURS, share).tolist()]
    picture = _at_width(shown(image), panel_width_px)
    fewer = 100 * (1 - len(keypoints) / len(points))
    left = Panel(
        draw_path(picture, points[:, :2], by_time, dots=True, width=0.45),
        title=f"{len(points)} points as recorded",
    )
    right = Panel(
        draw_path(picture, keypoints[:, :2], colours, dots=True, width=0.9),
        title=f"{len(keypoints)} keypoints ({fewer:.0f} % fewer)",
    )
    width = 2 * panel_width_px + _GAP
    parts = [_side_by_side([_panel(left, panel_width_px), _panel(right, panel_width_px)], width)]
    legend = [_Run("importance of the phrase: ", PALE_INK)]
    legend += [_Run(f"{level} ", IMPORTANCE_COLOURS[level - 1], True) for level in range(1, 6)]
    parts.append(_marked_block(legend, width, 15.0))
    if caption:
        parts.append(_marked_block(_caption_runs(caption, phrases), width, 17.0))
    return _framed(_stacked(parts, 12))


def _caption_runs(caption: str, phrases: Sequence[Phrase]) -> list[_Run]:
    runs, place = [], 0
    for phrase in phrases:
        runs.append(_Run(caption[place : phrase.start_char], PALE_INK))
        runs.append(_Run(phrase.text, IMPORTANCE_COLOURS[phrase.importance - 1], True))
        place = phrase.end_char
    return [*runs, _Run(caption[place:], PALE_INK)]


# Video


def draw_trace_on_frames(
    frames: UInt8[np.ndarray, "frames height width 3"], points: Any, frames_per_second: float
) -> list[Image.Image]:
    """Each frame with what has been traced until its end, in the colours of the whole trace's time.

    The last frame shows the whole trace. Raises `UserError` for a rate that is not above 0.
    """
    if not frames_per_second > 0:
        raise UserError(f"the frames have the rate {frames_per_second} Hz; it must be above 0")
    times, places, colours = timed_line(check_trace(points))
    drawn = []
    for index, frame in enumerate(frames):
        last = index == len(frames) - 1
        until = len(times) if last else int(np.searchsorted(times, (index + 1) / frames_per_second))
        drawn.append(draw_path(frame, places[:until], colours[:until]) if until else shown(frame))
    return drawn


def contact_sheet(
    frames: Sequence[Picture], times_seconds: Sequence[float] = (), columns: int = 4, title: str = ""
) -> Image.Image:
    """Frames of a video in reading order, with their times where these are given."""
    if len(times_seconds) not in (0, len(frames)):
        raise UserError(f"{len(times_seconds)} times were given for {len(frames)} frames")
    labels = [f"{seconds:.2f} s" for seconds in times_seconds] or [""] * len(frames)
    panels = [Panel(frame, caption=label) for frame, label in zip(frames, labels, strict=True)]
    return sheet(panels, columns, panel_width_px=300, title=title)


def save_animation(frames: Sequence[Picture], path: str | Path, frames_per_second: float) -> None:
    """Write frames as an animated GIF that repeats for ever.

    Raises `UserError` for no frames, a rate that is not above 0, or a path that cannot be written.
    """
    if not len(frames) or not frames_per_second > 0:
        raise UserError(f"an animation needs frames and a rate; these are {len(frames)} at {frames_per_second} Hz")
    pictures = [shown(frame).quantize(256, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    duration_ms = max(20, round(1000 / frames_per_second))
    try:
        pictures[0].save(
            path, "GIF", save_all=True, append_images=pictures[1:], duration=duration_ms, loop=0, disposal=1
        )
    except OSError as error:
        raise UserError(f"the animation {path} cannot be written: {error}") from error
