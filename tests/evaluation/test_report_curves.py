"""Loss curves: what the journal wrote is what is drawn."""

import json
import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.report_curves import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Panel,
    curve_sheet,
    line_chart,
    nice_ticks,
    panels,
    read_stage,
    tick_text,
)
from tests.evaluation import fabricated_run as fabricated
from tracevision_jax.errors import UserError


def places(svg: str) -> list[list[tuple[float, float]]]:
    """Points of each line of a chart."""
    return [
        [tuple(map(float, point.split(","))) for point in line.split()]
        for line in re.findall(r'class="line" points="([^"]*)"', svg)
    ]


def test_a_stage_is_read_as_the_journal_wrote_it(tmp_path):
    fabricated.write_stages(tmp_path, steps=100)
    stage = read_stage(tmp_path / "stage1_5", "stage1_5")
    assert stage is not None
    assert stage.steps == 100 and stage.step_seconds == pytest.approx(50.0)
    assert [panel.title.split()[0] for panel in panels(stage)] == ["text", "mask", "mask", "tokens"]
    assert panels(stage)[0].steps == tuple(range(10, 101, 10))
    assert panels(stage)[0].values == tuple(line["parts"]["text"] for line in stage.train)


def test_parts_that_a_stage_does_not_learn_have_no_chart(tmp_path):
    fabricated.write_stages(tmp_path)
    stage = read_stage(tmp_path / "stage0", "stage0")
    assert stage is not None and len(panels(stage)) == 2


def test_evaluations_have_charts_of_their_own(tmp_path):
    fabricated.write_stages(tmp_path, steps=100)
    stage = read_stage(tmp_path / "stage2", "stage2")
    assert stage is not None
    last = panels(stage)[-1]
    assert (last.title, last.steps, last.marked) == ("held_out: P@0.5", (50, 100), True)
    assert line_chart(last).count('class="dot"') == 2


def test_a_stage_without_metrics_is_none(tmp_path):
    assert read_stage(tmp_path, "stage0") is None


@pytest.mark.parametrize("line", ["{", "[]", '{"kind": "train"}', '{"kind": "other", "step": 1}'])
def test_a_line_that_the_journal_does_not_write_is_refused_with_its_number(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(fabricated.metrics_lines()[0]) + f"\n{line}\n")
    with pytest.raises(UserError, match="line 2 is no line of a training journal"):
        read_stage(tmp_path, "stage0")


def test_a_chart_shows_its_values_at_their_places():
    svg = line_chart(Panel("text loss", (0, 50, 100), (4.0, 2.0, 0.0)))
    (line,) = places(svg)
    assert line == [
        (LEFT, TOP),
        ((LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2),
        (WIDTH - RIGHT, HEIGHT - BOTTOM),
    ]
    assert "<title>step 50: 2</title>" in svg and ">text loss</text>" in svg and ">step</text>" in svg


def test_values_that_are_not_finite_leave_a_gap():
    svg = line_chart(Panel("loss", (1, 2, 3, 4, 5), (1.0, 1.0, math.nan, 1.0, 1.0)))
    assert [len(line) for line in places(svg)] == [2, 2] and "nan" not in svg
    assert places(line_chart(Panel("loss", (1, 2), (math.inf, math.nan)))) == []


def test_titles_are_escaped():
    assert "<b>" not in line_chart(Panel("<b>loss</b>", (1,), (1.0,)))


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=30),
    st.integers(1, 10**6),
)
def test_any_values_give_a_whole_chart_inside_its_frame(values, every):
    steps = tuple(every * (index + 1) for index in range(len(values)))
    svg = line_chart(Panel("loss", steps, tuple(values)))
    ElementTree.fromstring(svg)
    for line in places(svg):
        for x, y in line:
            assert LEFT <= x <= WIDTH - RIGHT and TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1


@given(st.floats(1e-9, 1e12))
def test_ticks_are_few_round_and_reach_the_highest_value(highest):
    ticks = nice_ticks(highest)
    assert ticks[0] == 0 and ticks[-1] >= highest * (1 - 1e-6) and 2 <= len(ticks) <= 6
    assert ticks[1] == pytest.approx(ticks[-1] / (len(ticks) - 1))
    assert len({tick_text(tick) for tick in ticks}) == len(ticks)


def test_a_sheet_is_one_file_with_all_charts_apart(tmp_path):
    fabricated.write_stages(tmp_path, steps=100)
    stage = read_stage(tmp_path / "stage1_5", "stage1_5")
    assert stage is not None
    charts = panels(stage)
    sheet = ElementTree.fromstring(curve_sheet([("Stage <1>", charts), ("Stage 2", charts[:1])]))
    inner = sheet.findall("{http://www.w3.org/2000/svg}svg")
    corners = [(float(one.attrib["x"]), float(one.attrib["y"])) for one in inner]
    assert len(set(corners)) == len(charts) + 1
    width, height = map(float, sheet.attrib["viewBox"].split()[2:])
    assert all(x + WIDTH <= width and y + HEIGHT <= height for x, y in corners)
    assert "Stage <1>" in [text.text for text in sheet.iter("{http://www.w3.org/2000/svg}text")]


def test_lines_about_rejected_steps_are_no_points_of_a_curve(tmp_path):
    fabricated.write_stages(tmp_path, steps=20)
    path = tmp_path / "stage1" / "metrics.jsonl"
    before = read_stage(path.parent, "stage1")
    with path.open("a") as file:
        file.write(json.dumps({"kind": "rejected", "step": 21, "loss": "nan", "gradient_norm": "nan"}) + "\n")
        file.write(json.dumps({"kind": "goodput", "step": 21, "goodput": {"useful": 3.0}}) + "\n")
        file.write(json.dumps({"kind": "data", "step": 21, "trouble": "a worker died"}) + "\n")
        file.write(json.dumps({"kind": "went_back", "step": 21, "checkpoint": 8, "rejected": 2}) + "\n")
    assert read_stage(path.parent, "stage1") == before
