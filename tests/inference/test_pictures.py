"""Drawn pictures: what must be seen in them, and that no input makes them fail or lie."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tracevision_jax.errors import UserError
from tracevision_jax.inference.pictures import (
    OBJECT_COLOURS,
    SHOWN_LONGEST_PX,
    TIME_COLOURS,
    attention_map,
    draw_boxes,
    draw_trace,
    gradient,
    object_colour,
    overlay_attention,
    overlay_masks,
    printable,
    shown,
    text_font,
)
from tracevision_jax.inference.pictures_sheets import (
    IMPORTANCE_COLOURS,
    Panel,
    contact_sheet,
    draw_trace_on_frames,
    save_animation,
    sheet,
    simplification_figure,
    text_block,
    wrap,
)
from tracevision_jax.trajectory.phrases import Phrase

GREY = np.full((512, 512, 3), 128, np.uint8)
LINE = np.array([[0.1, 0.5, 0.0], [0.5, 0.5, 1.0], [0.9, 0.5, 2.0]])


def colour_at(picture: Image.Image, x: float, y: float) -> np.ndarray:
    """The colour at a place in [0, 1]."""
    return np.array(picture.getpixel((int(x * picture.width), int(y * picture.height))), float)


def near(colour: np.ndarray, other, tolerance: float = 40) -> bool:
    return bool(np.abs(colour - np.array(other)).max() <= tolerance)


# Size


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (64, 64), (480, 640), (2000, 3000)])
def test_pictures_of_any_size_are_shown_at_a_readable_one(shape):
    picture = draw_trace(np.zeros((*shape, 3), np.uint8), LINE)
    assert SHOWN_LONGEST_PX[0] <= max(picture.size) <= SHOWN_LONGEST_PX[1]
    assert min(picture.size) >= 1
    assert shown(picture).size == picture.size
    ratio = shape[1] / shape[0]
    assert picture.width / picture.height == pytest.approx(ratio, rel=0.01) or min(picture.size) == 1


def test_the_callers_picture_is_not_changed():
    image = GREY.copy()
    draw_boxes(overlay_masks(draw_trace(image, LINE), np.ones((1, 4, 4), bool)), np.array([[0.1, 0.1, 0.9, 0.9]]))
    assert (image == GREY).all()


# Traces


def test_a_trace_runs_from_blue_to_red_through_its_points():
    picture = draw_trace(GREY, LINE)
    assert near(colour_at(picture, 0.13, 0.5), TIME_COLOURS[0])
    assert near(colour_at(picture, 0.87, 0.5), TIME_COLOURS[-1])
    middle = gradient(TIME_COLOURS, np.array([0.5]))[0]
    assert near(colour_at(picture, 0.49, 0.5), middle)
    assert (colour_at(picture, 0.5, 0.3) == 128).all()


def test_colour_follows_time_and_not_the_number_of_the_point():
    slow_start = LINE.copy()
    slow_start[1, 2] = 1.9
    picture = draw_trace(GREY, slow_start)
    assert near(colour_at(picture, 0.49, 0.5), gradient(TIME_COLOURS, np.array([0.95]))[0])


def test_the_scale_of_time_is_drawn_only_for_traces_with_times():
    corner = np.s_[470:, :150]
    for points, bar, scaled in ((LINE, True, True), (LINE, False, False), (LINE[:, :2], True, False)):
        drawn = np.asarray(draw_trace(GREY, points, bar))[corner]
        assert (drawn != 128).any() == scaled


def test_a_trace_without_points_leaves_the_picture_as_it_is():
    assert (np.asarray(draw_trace(GREY, np.zeros((0, 3)))) == GREY).all()


def test_one_point_and_points_outside_the_picture_are_drawn():
    assert near(colour_at(draw_trace(GREY, [[0.5, 0.5]]), 0.5, 0.5), (255, 255, 255), 30)
    assert (np.asarray(draw_trace(GREY, [[-0.5, 0.5], [1.5, 0.5]])) != 128).any()


def test_a_trace_that_is_none_is_refused():
    with pytest.raises(UserError, match="not finite"):
        draw_trace(GREY, [[0.5, np.nan, 0.0]])


def test_a_hundred_thousand_points_are_drawn():
    t = np.linspace(0, 1, 100_000)
    drawn = np.asarray(draw_trace(GREY, np.column_stack([t, np.full_like(t, 0.5), t]), bar=False))
    assert (drawn[256] != 128).any(axis=1).mean() > 0.95


# Masks and boxes


def test_masks_are_tinted_outlined_and_told_apart():
    masks = np.zeros((2, 64, 64), bool)
    masks[0, 10:30, 10:30] = masks[1, 40:60, 40:60] = True
    picture = overlay_masks(GREY, masks)
    inside = colour_at(picture, 0.3, 0.3)
    assert near(inside, 0.55 * 128 + 0.45 * np.array(OBJECT_COLOURS[0]), 5)
    assert near(colour_at(picture, 0.8, 0.8), 0.55 * 128 + 0.45 * np.array(OBJECT_COLOURS[1]), 5)
    assert (colour_at(picture, 0.8, 0.2) == 128).all()
    row = np.asarray(picture)[int(0.3 * 512)].astype(float)
    assert any(near(pixel, OBJECT_COLOURS[0], 25) for pixel in row[70:95])


def test_a_mask_covers_its_own_area_at_any_size():
    mask = np.zeros((1, 30, 50), bool)
    mask[0, 6:24, 10:40] = True
    drawn = np.asarray(overlay_masks(GREY, mask))
    share = (drawn != 128).any(axis=2).mean()
    assert share == pytest.approx(mask.mean(), abs=0.03)


def test_masks_that_fill_the_picture_or_are_empty_are_drawn():
    everything, nothing = np.ones((1, 8, 8), bool), np.zeros((1, 8, 8), bool)
    assert (np.asarray(overlay_masks(GREY, everything, ["all"])) != 128).any(axis=2).all()
    assert (np.asarray(overlay_masks(GREY, nothing, ["none"])) == 128).all()
    assert (np.asarray(overlay_masks(GREY, np.zeros((0, 8, 8), bool))) == 128).all()
    with pytest.raises(UserError, match="empty"):
        overlay_masks(GREY, np.zeros((1, 0, 8), bool))


def test_boxes_are_drawn_where_they_are_and_absent_ones_are_left_out():
    boxes = np.array([[0.25, 0.25, 0.75, 0.75], [np.nan] * 4, [0.9, 0.1, 0.8, 0.05]])
    picture = draw_boxes(GREY, boxes)
    for x, y in ((0.2525, 0.5), (0.7475, 0.5), (0.5, 0.2525), (0.5, 0.7475)):
        assert near(colour_at(picture, x, y), OBJECT_COLOURS[0], 40), (x, y)
    assert (colour_at(picture, 0.5, 0.5) == 128).all()
    assert near(colour_at(picture, 0.85, 0.0525), OBJECT_COLOURS[2], 40)  # reversed corners


def test_labels_stand_inside_the_picture_in_their_objects_colour():
    boxes = np.array([[0.0, 0.0, 0.1, 0.1], [0.95, 0.95, 1.0, 1.0]])
    picture = draw_boxes(GREY, boxes, ["first", "the second thing with a very long name " * 5])
    drawn = np.asarray(picture).astype(int)
    for corner, colour in ((drawn[:20, :60], OBJECT_COLOURS[0]), (drawn[-40:, -200:], OBJECT_COLOURS[1])):
        assert (np.abs(corner - np.array(colour)).max(axis=2) < 40).sum() > 100


def test_labels_must_be_as_many_as_objects():
    with pytest.raises(UserError, match="1 labels were given for 2 objects"):
        draw_boxes(GREY, np.zeros((2, 4)), ["one"])
    with pytest.raises(UserError, match="2 labels were given for 1 objects"):
        overlay_masks(GREY, np.ones((1, 4, 4), bool), ["one", "two"])


def test_colours_start_again_after_the_last():
    assert object_colour(len(OBJECT_COLOURS)) == object_colour(0)
    assert len(set(OBJECT_COLOURS)) == len(OBJECT_COLOURS)


# Attention


def test_attention_glows_where_it_is_strongest():
    attention = np.zeros((8, 8))
    attention[1, 6] = 0.02  # the scale is the map's own
    for picture in (overlay_attention(GREY, attention), attention_map(attention, (512, 512))):
        brightness = np.asarray(picture).astype(float).sum(axis=2)
        row, column = np.unravel_index(brightness.argmax(), brightness.shape)
        assert 0.125 <= row / 512 <= 0.25 and 0.75 <= column / 512 <= 0.875
    assert attention_map(attention, (30, 70)).size == (70, 30)


@pytest.mark.parametrize("attention", [np.zeros((0, 3)), np.array([[np.nan]]), np.array([[-1.0]])])
def test_a_map_that_is_none_is_refused(attention):
    with pytest.raises(UserError, match="attention map"):
        overlay_attention(GREY, attention)


def test_a_map_of_zeros_is_all_dark():
    assert len(np.unique(np.asarray(attention_map(np.zeros((2, 2)), (4, 4))).reshape(-1, 3), axis=0)) == 1


# Text


@given(st.text(max_size=60), st.integers(20, 400))
def test_any_text_is_wrapped_without_losing_a_character(text, width):
    lines = wrap(text, float(width), 14.0)
    assert "".join("".join(lines).split()) == "".join(printable(text).split())
    font = text_font(14.0)
    assert all(font.getlength(line) <= width or len(line) == 1 for line in lines)
    block = text_block(text, width)
    assert block.width == width
    assert (np.asarray(block) != 255).any() <= bool(printable(text))


def test_written_words_can_be_seen():
    assert (np.asarray(text_block("a man throws a ball", 300)) < 100).any()
    assert printable("half a pair \ud800 and\na line") == "half a pair ? and a line"


# Sheets


def test_a_sheet_shows_every_panel_side_by_side():
    red, blue = np.zeros((20, 30, 3), np.uint8), np.zeros((30, 20, 3), np.uint8)
    red[...], blue[...] = (200, 0, 0), (0, 0, 200)
    drawn = np.asarray(sheet([Panel(red, "red", "one"), Panel(blue, "blue"), Panel(red)], 2, 100, "title"))
    red_columns = np.flatnonzero((drawn == (200, 0, 0)).all(axis=2).any(axis=0))
    blue_columns = np.flatnonzero((drawn == (0, 0, 200)).all(axis=2).any(axis=0))
    assert red_columns.min() < red_columns.max() < blue_columns.min()
    red_rows = np.flatnonzero((drawn == (200, 0, 0)).all(axis=2).any(axis=1))
    assert (np.diff(red_rows) > 1).any()  # the third panel stands in a row of its own


def test_a_sheet_of_nothing_is_refused():
    with pytest.raises(UserError, match="0 panels"):
        sheet([])
    with pytest.raises(UserError, match="0 columns"):
        sheet([Panel(GREY)], columns=0)


def test_the_simplification_figure_shows_both_sides_in_the_colours_of_importance():
    caption = "a dog, the red ball"
    phrases = [Phrase("a dog", 0, 5, 3), Phrase("the red ball", 7, 19, 5)]
    t = np.linspace(0, 4, 80)
    points = np.column_stack([0.1 + 0.2 * t, 0.5 + 0.1 * np.sin(6 * t), t])
    windows = np.array([[0.0, 1.9], [2.0, 4.0]])
    figure = np.asarray(simplification_figure(GREY, points, points[::8], caption, phrases, windows)).astype(int)
    picture_rows = figure[60:600]
    left, right = picture_rows[:, : figure.shape[1] // 2], picture_rows[:, figure.shape[1] // 2 :]

    def seen(part, colour):
        return (np.abs(part - np.array(colour)).max(axis=2) < 12).sum() > 30

    assert seen(left, TIME_COLOURS[0]) and seen(left, TIME_COLOURS[-1])
    for importance in (3, 5):
        assert seen(right, IMPORTANCE_COLOURS[importance - 1])
        assert not seen(left, IMPORTANCE_COLOURS[2])
    for importance in (1, 2, 4):
        assert not seen(right, IMPORTANCE_COLOURS[importance - 1])


def test_the_simplification_figure_needs_no_caption():
    assert simplification_figure(GREY, LINE, LINE[[0, 2]]).width > 1000


# Video


def test_the_trace_grows_with_the_frames_and_is_whole_in_the_last():
    frames = np.full((4, 64, 64, 3), 128, np.uint8)
    drawn = draw_trace_on_frames(frames, LINE, 2.0)
    touched = [(np.asarray(picture) != 128).any(axis=2).sum() for picture in drawn]
    assert touched == sorted(touched) and touched[0] < touched[-1]
    assert (np.asarray(drawn[-1]) == np.asarray(draw_trace(frames[0], LINE, bar=False))).all()
    with pytest.raises(UserError, match="rate 0"):
        draw_trace_on_frames(frames, LINE, 0.0)
    late = LINE + np.array([0, 0, 1.0])
    assert (np.asarray(draw_trace_on_frames(frames, late, 2.0)[0]) == 128).all()


def test_an_animation_holds_every_frame_for_its_time(tmp_path):
    frames = [np.full((20, 30, 3), value, np.uint8) for value in (0, 120, 250)]
    save_animation(frames, tmp_path / "clip.gif", 4.0)
    with Image.open(tmp_path / "clip.gif") as animation:
        assert animation.n_frames == 3 and animation.info["duration"] == 250 and animation.info["loop"] == 0
        animation.seek(1)
        assert abs(np.asarray(animation.convert("RGB")).astype(int) - 120).max() <= 4


def test_an_animation_that_cannot_be_made_is_refused(tmp_path):
    with pytest.raises(UserError, match="needs frames"):
        save_animation([], tmp_path / "a.gif", 4.0)
    with pytest.raises(UserError, match="needs frames and a rate"):
        save_animation([GREY], tmp_path / "a.gif", 0.0)
    with pytest.raises(UserError, match="cannot be written"):
        save_animation([GREY], tmp_path / "none" / "a.gif", 4.0)


def test_a_contact_sheet_holds_all_frames_and_their_times():
    picture = contact_sheet([GREY] * 5, [i * 0.5 for i in range(5)], columns=3, title="clip")
    assert picture.width > 900
    with pytest.raises(UserError, match="1 times were given for 2 frames"):
        contact_sheet([GREY] * 2, [0.0])
