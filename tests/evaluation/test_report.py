"""The report of a fabricated run: every section is there, numbers are those put in, what is missing is said."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluation.report import ASKED, LIMITS, STAGES, Report, write_report
from evaluation.report_examples import Evaluated
from evaluation.report_figures import PORTRAIT, Photograph
from evaluation.report_targets import page_table, targets, verdict
from evaluation.sweep import Outcome
from evaluation.task import Table
from tests.evaluation import fabricated_run as fabricated
from tracevision_jax.records.sample import BadRecord

VOID = {"meta", "img", "br", "hr", "link", "input"}
SCENES = fabricated.scenes(3)


class Reader(HTMLParser):
    """Reads a page: its texts, ids, links, pictures; fails on tags that are not closed in order."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.pictures: list[str] = []
        self.tags: Counter[str] = Counter()
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert len(values) == len(attrs)
        self.tags[tag] += 1
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if "href" in values else []
        self.pictures += [values["src"]] if "src" in values else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def read(report: Report) -> Reader:
    return Reader(report.page.read_text(encoding="ascii"))


def write(run: Path, **changes) -> Report:
    """The report of a run with all tasks, one example each."""
    settings = {"samples": 3, "seconds": {"stage0": 61.0, "evaluation": 30}, "examples": 1, **changes}
    evaluated = settings.pop("evaluated", None)
    if evaluated is None:
        evaluated = [fabricated.evaluated(task, SCENES) for task in fabricated.TASKS]
    return write_report(run, evaluated, SCENES, settings.pop("model", fabricated.RoteModel()), **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Report:
    """A report with nothing missing but Java."""
    run = tmp_path_factory.mktemp("run")
    fabricated.write_stages(run)
    Image.fromarray(np.full((90, 160, 3), 120, np.uint8)).save(run / "photo.png")
    return write(run, photograph=Photograph(run / "photo.png", PORTRAIT.strokes, "drawn for this test"))


def tables(**numbers: float | None) -> dict[str, list[Table]]:
    """Tables of all tasks with numbers at which every target is just reached, but for those given."""
    values = {
        "right": 0.9,
        "shuffled": 0.35,
        "to_true": 1.5,
        "to_shuffled": 0.6,
        "phrases": 0.75,
        "traces": 0.9,
        "boxes": 0.8,
        "parse": 1.0,
    } | numbers
    lbm = {
        "LBM k=0": 0.06,
        "LBM k=0, true trajectory": 0.04,
        "LBM k=0, captions shuffled": 0.1,
        "LBM k=0, share of the true one's": values["to_true"],
        "LBM k=0, share of shuffled": values["to_shuffled"],
        "trajectories that parse": values["parse"],
    }
    named = {"colour and shape right": values["right"], "colour and shape right, traces shuffled": values["shuffled"]}
    return {
        "traced_object": [Table("objects", named)],
        "trace_prediction": [Table("traces", lbm)],
        "refer_segment": [Table("masks", {"cIoU": values["phrases"]})],
        "trace_segment": [Table("masks", {"cIoU": values["traces"]})],
        "refer_box": [Table("boxes", {"P@0.5": values["boxes"]})],
    }


# The page


def test_every_section_is_on_the_page_and_every_link_leads_somewhere(whole):
    page = read(whole)
    wanted = {
        "targets",
        "curves",
        "metrics",
        "examples",
        "attention",
        "simplification",
        "photograph",
        "times",
        "limits",
    }
    wanted |= {f"examples-{task.name}" for task in fabricated.TASKS} | {f"examples-{task}" for task in ASKED}
    assert wanted <= set(page.ids) and len(set(page.ids)) == len(page.ids)
    local = [link for link in page.links if link.startswith("#")]
    assert len(local) == 9 and {link[1:] for link in local} <= set(page.ids)
    assert page.tags["h1"] == 1 and page.tags["html"] == page.tags["head"] == page.tags["body"] == 1


def test_the_page_needs_no_network_and_no_script(whole):
    page, text = read(whole), whole.page.read_text(encoding="ascii")
    assert page.tags["script"] == page.tags["link"] == page.tags["iframe"] == 0
    assert not re.search(r"https?:|//|@import|url\(", text.replace("</", "<"))
    for path in page.pictures + [link for link in page.links if not link.startswith("#")]:
        assert (whole.page.parent / path).is_file()


def test_pictures_are_as_large_as_the_page_says(whole):
    shown = re.findall(r'src="([^"]+)"[^>]* width="(\d+)" height="(\d+)"', whole.page.read_text())
    assert len(shown) == len(read(whole).pictures) > 10
    for path, width, height in shown:
        with Image.open(whole.page.parent / path) as picture:
            assert picture.size == (int(width), int(height))


def test_every_stage_has_its_curves(whole):
    page = read(whole)
    for title in STAGES.values():
        assert title in page.text
    # Two parts of the first two stages, four of the others, one evaluation.
    assert page.tags["svg"] == 2 + 2 + 4 + 5


def test_the_report_says_what_was_asked_what_is_true_and_what_was_answered(whole):
    text = read(whole).text
    for task in fabricated.TASKS[:2]:
        (record, *_) = [
            record for record in fabricated.evaluated(task, SCENES).outcome.records if not record["control"]
        ]
        assert record["prediction"] in text
    assert SCENES[0].caption in text and "with another trace A pink heart." in text


def test_what_the_demo_cannot_show_is_said(whole):
    text = read(whole).text
    assert all(limit in text for limit in LIMITS)


def test_the_second_report_replaces_the_first(tmp_path):
    fabricated.write_stages(tmp_path)
    first = write(tmp_path)
    stale = first.page.parent / "images" / "stale.jpg"
    stale.write_bytes(b"")
    second = write(tmp_path, evaluated=[], model=fabricated.RoteModel("Another answer."))
    assert "Another answer." in read(second).text and not stale.exists()
    assert len(list(stale.parent.iterdir())) == len(read(second).pictures)


# Numbers


def test_metrics_are_strict_json_with_the_numbers_of_the_run(whole):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((whole.page.parent / "metrics.json").read_text(), parse_constant=refuse)
    assert content == whole.metrics
    assert set(content) >= {"targets", "benchmarks", "seconds", "samples", "versions"}
    assert content["samples"] == 3 and {"python", "jax", "numpy"} <= set(content["versions"])
    # The wall clock where it was given; else the time of the steps.
    assert content["seconds"] == {"stage0": 61.0, "stage1": 50.0, "stage1_5": 50.0, "stage2": 50.0, "evaluation": 30.0}
    expected = {task.name: fabricated.evaluated(task, SCENES).outcome.tables for task in fabricated.TASKS}
    found = {name: [table["values"] for table in tables] for name, tables in content["benchmarks"].items()}
    assert found == {name: [table.values for table in tables] for name, tables in expected.items()}


def test_numbers_of_all_tables_stand_on_the_page(whole):
    text = read(whole).text
    for task in fabricated.TASKS:
        for table in fabricated.evaluated(task, SCENES).outcome.tables:
            assert table.title in text
            assert all(f"{value:.3f}" in text for value in table.values.values() if value is not None)


def test_numbers_just_at_the_limits_reach_every_target():
    assert all(target.reached for target in targets(tables()))
    assert verdict(targets(tables())) == ("7 of 7 targets reached.",)


@pytest.mark.parametrize(
    ("name", "number", "value"),
    [
        ("traced_object", "right", 0.899),
        ("traced_object_shuffled", "shuffled", 0.351),
        ("lbm_to_true", "to_true", 1.501),
        ("lbm_to_shuffled", "to_shuffled", 0.601),
        ("mask_ciou", "phrases", 0.749),
        ("mask_ciou", "traces", 0.749),
        ("box_p_at_0.5", "boxes", 0.799),
        ("trajectories_parse", "parse", 0.999),
    ],
)
def test_a_number_on_the_wrong_side_misses_its_target_and_no_other(name, number, value):
    missed = [target for target in targets(tables(**{number: value})) if not target.reached]
    assert [target.name for target in missed] == [name]
    assert missed[0].as_json() == {"value": value, "target": missed[0].limit, "reached": False}
    assert missed[0].row().state == "not reached" and missed[0].row().measured == f"{value:.3f}"
    assert missed[0].label in verdict(targets(tables(**{number: value})))[1]


@pytest.mark.parametrize(
    "missing", ["traced_object", "trace_prediction", "refer_segment", "trace_segment", "refer_box"]
)
def test_a_target_that_was_not_measured_is_not_reached(missing):
    measured = {name: value for name, value in tables().items() if name != missing}
    unmeasured = [target for target in targets(measured) if target.value is None]
    assert unmeasured and all(target.row().state == "not measured" for target in unmeasured)
    assert all(target.as_json()["reached"] is False and target.value is None for target in unmeasured)
    assert verdict(targets(measured))[-1].startswith("Not measured")


def test_controls_stand_beside_what_they_control():
    rows = {target.name: target.row() for target in targets(tables(shuffled=0.123))}
    assert rows["traced_object"].control.startswith("0.123")
    assert "0.060 predicted, 0.040 the true" in rows["lbm_to_true"].control
    assert "0.100 with the captions" in rows["lbm_to_shuffled"].control


def test_missed_targets_are_told_among_the_limits(tmp_path):
    found = tables(right=0.512)
    evaluated = [
        Evaluated(task.name, task, Outcome(found[task.name], [])) for task in fabricated.TASKS if task.name in found
    ]
    report = write(tmp_path, evaluated=evaluated, asked=())
    text = read(report).text
    assert report.metrics["targets"]["traced_object"] == {"value": 0.512, "target": 0.9, "reached": False}
    assert "6 of 7 targets reached. Not reached: colour and shape of the traced object." in text
    assert "Colour and shape of the traced object: 0.512, where at least 0.9 is the target." in text


def test_a_table_has_a_column_for_each_kind_of_control():
    table = page_table(tables()["trace_prediction"][0])
    assert table.columns[:3] == ("metric", "value", "true trajectory")
    assert table.rows[0][:3] == ("LBM k=0", "0.060", "0.040")
    assert table.rows[1] == ("trajectories that parse", "1.000", "", "", "", "")


# What is missing


def test_metrics_without_java_are_null_with_their_reason(whole):
    text = read(whole).text
    assert "BLEU-1, CIDEr, SPICE: null, because there is no Java on this machine." in text
    (captions,) = whole.metrics["benchmarks"]["trace_captioning"]
    assert captions["values"]["CIDEr"] is None and captions["reasons"]["CIDEr"] == "there is no Java on this machine"


def test_a_run_with_nothing_in_it_says_what_is_missing(tmp_path):
    report = write(tmp_path, evaluated=[], asked=("dialogue",), asked_about=fabricated.scenes(0))
    text = read(report).text
    assert text.count("This run has no metrics of this stage.") == len(STAGES)
    assert "0 of 7 targets reached." in text and "not measured" in text
    assert "The held-out scenes hold no question of this kind" in text
    assert "A real photograph" in text and "portrait.jpg" in text, "which is embedded"
    assert all(target["value"] is None for target in report.metrics["targets"].values())


def test_a_scene_that_cannot_be_read_is_left_out(tmp_path):
    class Damaged:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 0:
                raise BadRecord("truncated picture")
            return SCENES[index]

        def fingerprint(self):
            return ""

    task = fabricated.TASKS[0]
    made = fabricated.evaluated(task, SCENES)
    report = write_report(tmp_path, [made], Damaged(), fabricated.RoteModel(), asked=("trace_qa",), examples=1)
    assert SCENES[1].caption in read(report).text
    assert len(list((report.page.parent / "images").glob("attention_*"))) == 2


def test_a_model_without_tvp_has_no_maps_and_the_page_says_so(tmp_path):
    report = write(tmp_path, evaluated=[], asked=(), model=fabricated.RoteModel(tvp=False))
    assert "The model has no TVP" in read(report).text
    assert not list((report.page.parent / "images").glob("attention_*"))


# Texts that are not harmless


def test_what_the_model_writes_is_escaped(tmp_path):
    nasty = "<script>alert('&amp;')</script> \u00e9 \U0001f600 \ud800"
    task = fabricated.TASKS[0]
    made = fabricated.evaluated(task, SCENES)
    records = [{**record, "prediction": nasty} for record in made.outcome.records]
    found = [Table("<i>title</i>", {"<b>": 0.5, "none": None}, {"none": "<u>why</u>"})]
    evaluated = [Evaluated(task.name, task, Outcome(found, records))]
    report = write(tmp_path, evaluated=evaluated, asked=(), model=fabricated.RoteModel(nasty))
    page = read(report)
    assert page.tags["script"] == page.tags["u"] == 0 and "<script>alert('&amp;')</script>" in page.text
    assert "<u>why</u>" in page.text and "<i>title</i>" in page.text and "\U0001f600" in page.text
