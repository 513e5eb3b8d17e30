"""Bins, token ids and text of trajectories, and the escaping of users' text."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracevision_jax.errors import UserError
from tracevision_jax.trajectory.tokens import (
    BINS,
    FIRST_BIN_OFFSET,
    added_tokens,
    bins_to_ids,
    escape,
    format_digits,
    format_trajectory,
    from_bins,
    ids_to_bins,
    parse_all_digits,
    parse_digits,
    parse_pixels,
    to_bins,
    unescape,
)

bin_lists = st.lists(st.tuples(st.integers(0, 999), st.integers(0, 999)), max_size=12)


def test_bins_follow_the_formula_and_clip_outside_the_image():
    points = np.array([[0.0, 0.0004], [0.001, 0.9999], [1.0, -0.3], [1.7, 0.5]])
    assert to_bins(points).tolist() == [[0, 0], [1, 999], [999, 0], [999, 500]]


def test_bins_are_read_back_at_their_centres():
    assert from_bins(np.array([[0, 999]])).tolist() == [[0.0005, 0.9995]]


def test_a_point_that_is_not_finite_has_no_bin():
    with pytest.raises(UserError, match="point 1 "):
        to_bins(np.array([[0.5, 0.5], [np.nan, 0.5]]))


@given(bin_lists)
def test_bins_survive_every_round_trip(pairs):
    bins = np.array(pairs, np.int32).reshape(-1, 2)
    points = from_bins(bins)
    assert (to_bins(points) == bins).all()
    assert (parse_digits(format_trajectory(points)) == bins).all()
    assert (ids_to_bins(bins_to_ids(bins, 5000), 5000) == bins).all()


@given(st.floats(0, 1))
def test_a_coordinate_moves_by_at_most_half_a_bin(x):
    point = np.array([[x, x]])
    assert abs(from_bins(to_bins(point)) - point).max() <= 0.5 / BINS + 1e-12


def test_added_tokens_stand_in_the_order_that_their_offsets_say():
    tokens = added_tokens("bins")
    assert len(tokens) == len(set(tokens)) == 9 + BINS
    assert tokens[:4] == ["<traj>", "</traj>", "[SEG]", "[SEG_0]"]
    assert tokens[FIRST_BIN_OFFSET] == "<0>" and tokens[-1] == "<999>"
    assert added_tokens("digits") == tokens[:9]
    ids = bins_to_ids(np.array([[12, 345]]), 100)
    assert [tokens[i - 100] for i in ids] == ["<traj>", "<12>", "<345>", "</traj>"]


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([], "do not start"),
        ([1, 9, 1], "do not start"),
        ([0], "do not start"),
        ([0, 9, 10], "do not end"),
        ([0, 9, 1], "1 coordinates"),
        ([0, 9, 2, 1], "token 2 of the trajectory .id 2. is not a coordinate"),
        ([0, 9, 9 + BINS, 1], "not a coordinate"),
    ],
)
def test_token_ids_that_are_no_trajectory_are_refused(ids, reason):
    with pytest.raises(UserError, match=reason):
        ids_to_bins(np.array(ids, np.int32), 0)


def test_digits_are_written_as_the_paper_writes_them():
    points = from_bins(np.array([[12, 345], [7, 8]]))
    assert format_digits(points) == "(12,345), (7,8)"
    assert format_trajectory(points) == "<traj>(12,345), (7,8)</traj>"


def test_spaces_line_breaks_and_missing_commas_between_points_are_read():
    text = "The path is <traj>\n( 12 , 345 ),(7,8)\t(1,2) </traj>."
    assert parse_digits(text).tolist() == [[12, 345], [7, 8], [1, 2]]
    assert parse_digits("<traj></traj>").shape == (0, 2)


def test_several_trajectories_come_with_their_places():
    text = "A <traj>(1,2)</traj> and B <traj>(3,4)</traj>"
    found = parse_all_digits(text)
    assert [text[start:end] for (start, end), _ in found] == ["<traj>(1,2)</traj>", "<traj>(3,4)</traj>"]
    assert [bins.tolist() for _, bins in found] == [[[1, 2]], [[3, 4]]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has 0 trajectories"),
        ("<traj>(1,2)</traj><traj>(1,2)</traj>", "has 2 trajectories"),
        ("<traj>(1,2)", "character 0 is never closed"),
        ("(1,2)</traj>", "character 5 has no <traj>"),
        ("<traj><traj>(1,2)</traj>", "inside another"),
        ("<traj>(1,2,3)</traj>", "point 1 .* is not .x,y."),
        ("<traj>(1,2), 3,4</traj>", "point 2 .* '3,4'"),
        ("<traj>(1,2),</traj>", "ends with a comma"),
        ("<traj>(1,x)</traj>", "'x' of point 1 is not a whole number"),
        ("<traj>(1,)</traj>", "'' of point 1 is not a whole number"),
        ("<traj>(1.5,2)</traj>", "'1.5'"),
        ("<traj>(-1,2)</traj>", "'-1'"),
        ("<traj>(1,1000)</traj>", "1000 of point 1 is not from 0 to 999"),
        ("<traj>(\u0661,2)</traj>", "not a whole number"),
        ("<traj>(" + "9" * 5000 + ",2)</traj>", "not a whole number"),
    ],
)
def test_malformed_text_is_refused_with_what_is_wrong(text, reason):
    with pytest.raises(UserError, match=reason):
        parse_digits(text)


@pytest.mark.parametrize(
    "text",
    [
        "<Trajectory>(80,200), (100,180) </Trajectory>",
        "<Traj>[80,200]</Traj> <Traj>[100,180]</Traj>",
        "<traj>(80, 200)</traj>\n<traj>(100.0,180)</traj>",
        "so: <Trajectory>[80,200],[100,180]</Trajectory>, <b>",
    ],
)
def test_the_pixel_spellings_of_the_appendix_are_read(text):
    np.testing.assert_allclose(parse_pixels(text, (400, 200)), [[0.4, 0.5], [0.5, 0.45]])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a dog", "no <Trajectory> or <Traj>"),
        ("<Traj>[80,200]", "never closed"),
        ("<Traj>[80;200]</Traj>", "not .x,y."),
        ("<Traj>[a,200]</Traj>", "'a' .* is not a number"),
        ("<Traj>[nan,200]</Traj>", "'nan' .* is not a number"),
        ("<Traj>[801,20]</Traj>", "outside the image of 800 x 600"),
    ],
)
def test_malformed_pixel_text_is_refused(text, reason):
    with pytest.raises(UserError, match=reason):
        parse_pixels(text, (600, 800))


PIECES = r"<traj> </traj> [SEG] [SEG_3] <7> <999> <|im_end|> <| |> < > [ ] \ traj> SEG] 😀 साँप 狗 | a <\traj>"
pieces = st.sampled_from([*PIECES.split(), " ", "\u0338"])
TOKEN = re.compile(r"</?traj>|\[SEG(_\d+)?\]|<\d{1,3}>|<\|[^<>\[\]|\\]*\|>")


@given(st.one_of(st.lists(pieces, max_size=12).map("".join), st.text(max_size=40)))
def test_escaped_text_holds_no_token_and_comes_back_exactly(text):
    escaped = escape(text)
    assert not TOKEN.search(escaped)
    assert unescape(escaped) == text
    assert unescape(escape(escaped)) == escaped


def test_ordinary_text_is_not_changed_by_escaping():
    text = r"a < b > c, [see 3], <b>bold</b>, C:\traj, <1000>, [seg]"
    assert escape(text) == text


@given(st.text(alphabet="<>/traj()[],.0123456789 T-", max_size=60))
def test_any_text_is_a_trajectory_or_a_clear_error(text):
    for parse in (parse_digits, lambda t: parse_pixels(t, (10, 10))):
        try:
            result = parse("<traj>" + text + "</traj>")
        except UserError:
            continue
        assert result.shape[1] == 2
