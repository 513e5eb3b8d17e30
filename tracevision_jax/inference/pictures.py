"""Drawing on a picture: traces by time, masks, boxes, attention maps. With Pillow alone.

Every function takes a picture (array or Pillow image), gives a new RGB picture, and may be chained: the first
brings the picture to a size at which lines and text are readable, the others leave it there.
`pictures_sheets.py` puts such pictures together.

    draw_trace(overlay_masks(image, masks, ["the dog"]), points).save("dog.png")
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from tracevision_jax.errors import UserError
from tracevision_jax.trajectory.checks import check_trace
from tracevision_jax.vision.pictures import to_rgb

Colour = tuple[int, int, int]
Picture = np.ndarray | Image.Image

SHOWN_LONGEST_PX = (512, 1280)
"""The longer side of a drawn picture lies between these: smaller ones are enlarged, larger ones reduced."""

OBJECT_COLOURS: tuple[Colour, ...] = (
    (230, 57, 70),
    (29, 132, 201),
    (255, 183, 3),
    (46, 160, 67),
    (155, 81, 224),
    (251, 133, 0),
    (0, 180, 180),
    (233, 102, 172),
    (140, 110, 80),
    (120, 190, 30),
)
"""Colours of masks and boxes, told apart at a glance; after the last they start again."""

TIME_COLOURS: tuple[Colour, ...] = ((33, 80, 230), (120, 60, 205), (200, 40, 150), (235, 30, 50))
"""Stops of the colour of time, from the start (blue) to the end (red)."""

HEAT_COLOURS: tuple[Colour, ...] = (
    (30, 10, 80),
    (150, 25, 110),
    (230, 60, 50),
    (252, 160, 20),
    (252, 250, 150),
)
"""Stops of the colour of attention, from none to most."""

_MOST_SEGMENTS = 4000
"""A longer trace is drawn through so many of its points, evenly chosen."""


def shown(image: Picture) -> Image.Image:
    """The picture as RGB at the size in which it is drawn on."""
    picture = Image.fromarray(to_rgb(image))
    least, most = SHOWN_LONGEST_PX
    factor = np.clip(max(picture.size), least, most) / max(picture.size)
    if factor == 1:
        return picture
    width, height = (max(1, round(side * factor)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC if factor > 1 else Image.Resampling.LANCZOS)


@functools.lru_cache(maxsize=32)
def text_font(size_px: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Pillow's own font, the same on every machine."""
    return ImageFont.load_default(size_px)


def printable(text: str) -> str:
    """Text that can be drawn: one line, and no half of a surrogate pair, which no font encodes."""
    return " ".join(text.encode("utf-8", "replace").decode("utf-8").split())


def object_colour(index: int) -> Colour:
    """The colour of object number `index`, the same for its mask and its box."""
    return OBJECT_COLOURS[index % len(OBJECT_COLOURS)]


def gradient(stops: Sequence[Colour], share: Float[np.ndarray, "*shape"]) -> np.ndarray:
    """RGB (uint8, one more axis) of values in [0, 1] between the stops of a colour scale."""
    places = np.linspace(0, 1, len(stops))
    channels = [np.interp(share, places, [stop[channel] for stop in stops]) for channel in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


# Traces


def draw_trace(image: Picture, points: Any, bar: bool = True) -> Image.Image:
    """Draw a trace, coloured from its first moment (blue, a ring) to its last (red, a disc).

    `points` is what `check_trace` takes, (x, y, t) or (x, y); no point at all leaves the picture as it is.
    `bar` adds the scale of the colours in seconds, for traces that have times.
    """
    picture = shown(image)
    if len(points) == 0:
        return picture
    timed = np.shape(points)[-1] == 3
    points = check_trace(points)
    duration = points[-1, 2] - points[0, 2]
    _, places, colours = timed_line(points)
    picture = draw_path(picture, places, colours)
    return _time_bar(picture, float(duration)) if bar and timed and duration > 0 else picture


def timed_line(
    points: Float[np.ndarray, "points 3"],
) -> tuple[Float[np.ndarray, "places"], Float[np.ndarray, "places 2"], list[Colour]]:
    """A checked trace as times, places and colours of time, with places between its own where those lie far
    apart in time, so that the colour changes along long stretches too.
    """
    if len(points) > _MOST_SEGMENTS:
        points = points[np.linspace(0, len(points) - 1, _MOST_SEGMENTS).round().astype(int)]
    times = points[:, 2]
    if times[-1] == times[0]:
        times = np.linspace(0, 1, len(points))
    between = np.setdiff1d(np.linspace(times[0], times[-1], 100), times)
    inserted = np.column_stack([np.interp(between, times, points[:, axis]) for axis in (0, 1)])
    order = np.argsort(np.concatenate([times, between]), kind="stable")
    places = np.concatenate([points[:, :2], inserted])[order]
    times = np.concatenate([times, between])[order]
    share = (times - times[0]) / max(times[-1] - times[0], 1e-9)
    return times, places, [(r, g, b) for r, g, b in gradient(TIME_COLOURS, share).tolist()]


def draw_path(
    image: Picture,
    points: Float[np.ndarray, "points 2"],
    colours: Sequence[Colour],
    dots: bool = False,
    width: float = 1.0,
) -> Image.Image:
    """Draw a line through points, each stretch in the colour of its later end, over a light rim that parts it
    from any background; `dots` marks every point and not the two ends alone; `width` scales the line.
    """
    picture = shown(image)
    unit = (1.2 + max(picture.size) / 260) * width
    places = points * np.array(picture.size)

    def paint(draw: ImageDraw.ImageDraw, scale: float) -> None:
        scaled = [tuple(place) for place in (places * scale).tolist()]
        for colour, thick in ((None, unit * 1.9), (colours, unit)):
            half = thick * scale / 2
            for index, place in enumerate(scaled):
                fill = (255, 255, 255, 150) if colour is None else (*colour[index], 255)
                if index:
                    draw.line((scaled[index - 1], place), fill=fill, width=max(1, round(2 * half)))
                _disc(draw, place, half, fill)
        radius = 1.5 * unit * scale
        if dots:
            for place, colour in zip(scaled, colours, strict=True):
                _disc(draw, place, radius * 1.3, (255, 255, 255, 255))
                _disc(draw, place, radius, (*colour, 255))
        _disc(draw, scaled[-1], radius * 1.9, (255, 255, 255, 255))
        _disc(draw, scaled[-1], radius * 1.45, (*colours[-1], 255))
        _disc(draw, scaled[0], radius * 1.9, (255, 255, 255, 255))
        _disc(draw, scaled[0], radius * 1.45, (*colours[0], 255))
        _disc(draw, scaled[0], radius * 0.7, (255, 255, 255, 255))

    return _drawn_smoothly(picture, paint) if len(points) else picture


def _time_bar(picture: Image.Image, duration_seconds: float) -> Image.Image:
    """A scale of the colours of time in the lower left corner."""
    size = max(11.0, max(picture.size) / 48)
    font = text_font(size)
    label = f"{duration_seconds:.1f} s"
    length, thick, pad = 5.5 * size, 0.55 * size, 0.5 * size
    left_text, right_text = font.getlength("0"), font.getlength(label)
    width = 4 * pad + left_text + length + right_text
    if width > picture.width or 3 * size > picture.height:
        return picture
    height = size + 1.2 * pad
    x, y = pad, picture.height - height - pad

    def paint(draw: ImageDraw.ImageDraw, scale: float) -> None:
        box = [value * scale for value in (x, y, x + width, y + height)]
        draw.rounded_rectangle(box, radius=height * scale / 2, fill=(20, 22, 28, 185))
        start = x + 2 * pad * 0.75 + left_text
        steps = round(length * scale)
        colours = gradient(TIME_COLOURS, np.linspace(0, 1, steps)).tolist()
        top = (y + (height - thick) / 2) * scale
        for step, colour in enumerate(colours):
            place = start * scale + step
            draw.line((place, top, place, top + thick * scale), fill=(*colour, 255))

    picture = _drawn_smoothly(picture, paint)
    draw = ImageDraw.Draw(picture)
    middle = y + height / 2
    draw.text((x + pad, middle), "0", font=font, fill=(255, 255, 255), anchor="lm")
    draw.text((x + 2.2 * pad + left_text + length, middle), label, font=font, fill=(255, 255, 255), anchor="lm")
    return picture


# Masks and boxes


def overlay_masks(
    image: Picture, masks: Bool[np.ndarray, "masks height width"], labels: Sequence[str] = ()
) -> Image.Image:
    """Lay masks over a picture, each in its own colour with an outline, and name them where labels are given.

    Masks may have any size of their own. Raises `UserError` where labels and masks are not equally many.
    """
    picture = shown(image)
    _check_labels(labels, len(masks))
    for index, mask in enumerate(masks):
        picture = Image.alpha_composite(picture.convert("RGBA"), _mask_layer(mask, picture.size, object_colour(index)))
    picture = picture.convert("RGB")
    places = [_inner_place(np.asarray(_enlarged_mask(mask, picture.size))) for mask in masks[: len(labels)]]
    named = zip(labels, places, strict=True)
    return _write_labels(
        picture,
        [_Label(text, object_colour(i), p, True) for i, (text, p) in enumerate(named) if p is not None],
    )


def draw_boxes(image: Picture, boxes: Float[np.ndarray, "boxes 4"], labels: Sequence[str] = ()) -> Image.Image:
    """Draw boxes (x1, y1, x2, y2) in [0, 1], each in its own colour, named where labels are given.

    A box of NaN (an absent object) is left out. Raises `UserError` where labels and boxes are not equally
    many.
    """
    picture = shown(image)
    _check_labels(labels, len(boxes))
    corners = np.clip(boxes, 0, 1) * np.tile(picture.size, 2)
    there = [index for index in range(len(boxes)) if np.isfinite(boxes[index]).all()]
    width = max(picture.size) / 210

    def paint(draw: ImageDraw.ImageDraw, scale: float) -> None:
        for index in there:
            x1, y1, x2, y2 = corners[index] * scale
            box = [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]
            rim = round(width * scale * 0.35)
            draw.rectangle(
                [box[0] - rim, box[1] - rim, box[2] + rim, box[3] + rim],
                outline=(255, 255, 255, 170),
                width=max(1, round(width * scale) + 2 * rim),
            )
            draw.rectangle(box, outline=(*object_colour(index), 255), width=max(1, round(width * scale)))

    picture = _drawn_smoothly(picture, paint)
    places = [(float(corner[0]), float(corner[1])) for corner in corners]
    return _write_labels(picture, [_Label(labels[i], object_colour(i), places[i], False) for i in there if labels])


def _enlarged_mask(mask: np.ndarray, size: tuple[int, int], smooth_px: float = 0.0) -> Image.Image:
    """A mask as 0 and 255 at another (width, height), its edge smoothed between its own pixels."""
    if mask.size == 0:
        raise UserError(f"a mask of shape {mask.shape} is empty; masks are (height, width) of at least one pixel")
    grey = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)
    grey = grey.filter(ImageFilter.GaussianBlur(smooth_px)) if smooth_px else grey
    return Image.fromarray((np.asarray(grey) >= 128).astype(np.uint8) * 255)


def _mask_layer(mask: np.ndarray, size: tuple[int, int], colour: Colour) -> Image.Image:
    """A mask in its colour with an outline and a light rim around it, to be laid over a picture of `size`."""
    line = max(2, round(max(size) / 200))
    solid = _enlarged_mask(mask, (2 * size[0], 2 * size[1]), smooth_px=0.7 * line)
    area = np.asarray(solid) > 0
    # A box filter is 0 or 255 just where the whole box is, which is what wearing away or growing by it means.
    inside, near = (np.asarray(solid.filter(ImageFilter.BoxBlur(r))) for r in (line, (line + 1) // 2))
    edge, rim = area & (inside < 255), ~area & (near > 0)
    layer = np.zeros((*area.shape, 4), np.uint8)
    layer[area] = (*colour, 115)
    layer[edge] = (*colour, 255)
    layer[rim] = (255, 255, 255, 170)
    return Image.fromarray(layer).reduce(2)


def _inner_place(area: np.ndarray) -> tuple[float, float] | None:
    """The place of a mask that is nearest its centre of mass, as (x, y) in pixels."""
    rows, columns = np.nonzero(area)
    if not len(rows):
        return None
    nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
    return float(columns[nearest]), float(rows[nearest])


def _check_labels(labels: Sequence[str], count: int) -> None:
    if len(labels) not in (0, count):
        raise UserError(f"{len(labels)} labels were given for {count} objects")


class _Label(NamedTuple):
    """A name to write: centred on a place, or with its lower left corner there."""

    text: str
    colour: Colour
    place: tuple[float, float]
    centred: bool


def _write_labels(picture: Image.Image, labels: Sequence[_Label]) -> Image.Image:
    """Names on chips of colour, shortened and moved to lie inside the picture."""
    size = max(11.0, max(picture.size) / 46)
    font = text_font(size)
    chips = []
    for label in labels:
        text = printable(label.text)
        while len(text) > 4 and font.getlength(text) > picture.width - size:
            text = text.removesuffix("...")[:-1].rstrip() + "..."
        width, height = font.getlength(text) + 0.8 * size, 1.35 * size
        left, top = label.place[0] - label.centred * width / 2, label.place[1] - height / (1 + label.centred)
        left = float(np.clip(left, 0, max(0.0, picture.width - width)))
        top = float(np.clip(top, 0, max(0.0, picture.height - height)))
        chips.append((text, label.colour, (left, top, left + width, top + height)))

    def paint(draw: ImageDraw.ImageDraw, scale: float) -> None:
        for _, colour, box in chips:
            draw.rounded_rectangle([v * scale for v in box], radius=0.3 * size * scale, fill=(*colour, 225))

    picture = _drawn_smoothly(picture, paint)
    draw = ImageDraw.Draw(picture)
    for text, colour, (left, top, right, bottom) in chips:
        bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 160
        fill = (20, 20, 20) if bright else (255, 255, 255)
        draw.text(((left + right) / 2, (top + bottom) / 2), text, font=font, fill=fill, anchor="mm")
    return picture


# Attention


def overlay_attention(image: Picture, attention: Float[np.ndarray, "rows cols"]) -> Image.Image:
    """Lay an attention map over a picture: dark where there is none, glowing where it is strongest.

    The map is scaled from 0 to its own highest value. Raises `UserError` for a map that is empty or not
    finite.
    """
    picture = shown(image)
    strength = _resized_map(attention, picture.size)[..., None]
    dimmed = np.asarray(picture.convert("L").convert("RGB"), np.float32) * 0.3 + np.asarray(picture) * 0.35
    glow = gradient(HEAT_COLOURS, strength[..., 0]).astype(np.float32)
    share = 0.15 + 0.5 * strength
    return Image.fromarray(np.clip(dimmed * (1 - share) + glow * share, 0, 255).round().astype(np.uint8))


def attention_map(attention: Float[np.ndarray, "rows cols"], size: tuple[int, int]) -> Image.Image:
    """An attention map alone, at (height, width) pixels."""
    return Image.fromarray(gradient(HEAT_COLOURS, _resized_map(attention, (size[1], size[0]))))


def _resized_map(attention: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if attention.size == 0:
        raise UserError(f"an attention map of shape {attention.shape} is empty")
    if not np.isfinite(attention).all() or (attention < 0).any():
        raise UserError("an attention map must hold finite values from 0 on")
    highest = float(attention.max())
    grey = Image.fromarray((attention / highest if highest > 0 else attention).astype(np.float32))
    return np.clip(np.asarray(grey.resize(size, Image.Resampling.BICUBIC)), 0, 1)


# Smooth drawing


def _disc(draw: ImageDraw.ImageDraw, centre: tuple[float, ...], radius: float, fill: tuple[int, ...]) -> None:
    x, y = centre
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def _drawn_smoothly(picture: Image.Image, paint: Callable[[ImageDraw.ImageDraw, float], None]) -> Image.Image:
    """The picture with what `paint(draw, scale)` draws in coordinates of `scale` times the picture's.

    Drawing larger and reducing smooths lines, which Pillow draws in steps.
    """
    finer = 3 if max(picture.size) <= 768 else 2
    layer = Image.new("RGBA", (picture.width * finer, picture.height * finer), (0, 0, 0, 0))
    paint(ImageDraw.Draw(layer), float(finer))
    return Image.alpha_composite(picture.convert("RGBA"), layer.reduce(finer)).convert("RGB")
