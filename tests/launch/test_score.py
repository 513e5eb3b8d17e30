"""`tracevision score`: the numbers it prints, as tables and as JSON, and the files that it refuses."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as coco

from evaluation.metrics.captions import METRICS
from evaluation.metrics.files import check_caption, check_captions, check_trace
from evaluation.metrics.lbm import trace_lbm
from evaluation.metrics.run_lengths import parse
from launch import cli
from tests.conftest import ROOT

TRACES = (
    {"a": [[0.1, 0.1, 0.3, 0.3], [0.5, 0.5, 0.7, 0.7]], "b": [[0.25, 0.5]]},
    {
        "b": [[0.25, 0.5, 0.25, 0.5]],
        "a": [
            [0.1, 0.1, 0.3, 0.3],
            [0.2, 0.2, 0.4, 0.4],
            [0.5, 0.5, 0.7, 0.7],
            [0.6, 0.6, 0.8, 0.8],
            [0, 0, 0.2, 0.2],
        ],
    },
)
CAPTIONS = ({"a": "A dog runs.", "b": "two cats"}, {"a": ["a dog runs"], "b": ["two cats", "cats"]})
MASKS = (
    {"a": {"size": [2, 4], "counts": [0, 2, 6]}, "b": {"size": [3, 1], "counts": [3]}},
    {"a": {"size": [2, 4], "counts": [0, 4, 4]}, "b": {"size": [3, 1], "counts": [3]}},
)
EXAMPLES = {"lbm": TRACES, "captions": CAPTIONS, "masks": MASKS}


@pytest.fixture
def score(tmp_path, capsys):
    """Run `tracevision score` on two values or texts; returns the exit status, stdout and stderr."""

    def run(kind, predictions, references, *flags):
        paths = []
        for name, content in (("p.json", predictions), ("r.json", references)):
            text = content if isinstance(content, str | bytes) else json.dumps(content)
            (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
            paths.append(str(tmp_path / name))
        status = cli.main(["score", kind, "--predictions", paths[0], "--references", paths[1], *flags])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def no_java(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(("flags", "value"), [((), 0.05), (("--k", "0"), 0.05), (("--k", "1"), 0.0)])
def test_lbm_as_json_is_the_mean_and_each_id_alone(score, flags, value):
    status, out, err = score("lbm", *TRACES, *flags, "--json")
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert list(result) == ["lbm", "samples"] and set(result["samples"]) == {"a", "b"}
    assert result["samples"] == pytest.approx({"a": value, "b": 0}, abs=1e-12)
    assert result["lbm"] == pytest.approx(value / 2, abs=1e-12)


def test_lbm_for_several_k_is_an_object_a_k(score):
    _, out, _ = score("lbm", *TRACES, "--k", "0", "1", "--json")
    result = json.loads(out)
    assert list(result) == ["0", "1"]
    for window in (0, 1):
        assert list(result[str(window)]) == ["lbm", "samples"]
        assert result[str(window)]["samples"]["a"] == trace_lbm(TRACES[0]["a"], TRACES[1]["a"], window)


def test_lbm_as_a_table_says_what_was_compared_and_gives_both_means(score):
    status, out, _ = score("lbm", *TRACES, "--k", "0", "1")
    assert status == 0
    assert "0.0250" in out and "MITR" in out
    assert "Predicted boxes and points (boxes without area) against true boxes." in out


def test_an_untraced_reference_is_null_and_left_out_of_the_mean(score):
    predictions = {"a": [[0.1, 0.1]], "b": [[0.5, 0.5]], "c": [[0.5, 0.5]]}
    references = {"a": [[0.1, 0.1]], "b": [[0, 0, 1, 1, 1]], "c": []}
    _, out, _ = score("lbm", predictions, references, "--json")
    assert json.loads(out) == {"lbm": 0, "samples": {"a": 0, "b": None, "c": None}}
    status, _, err = score("lbm", {"b": [[0.5, 0.5]]}, {"b": [[0, 0, 1, 1, 1]]}, "--json")
    assert status == 2 and "no id has a box or point" in err


@pytest.mark.parametrize("k", [(), ("-1",), ("0", "-2")])
def test_a_k_without_meaning_is_refused(score, k):
    status, out, err = score("lbm", *TRACES, "--json", "--k", *k)
    assert (status, out) == (2, "") and "--k takes whole numbers from 0 on" in err


def test_captions_as_json_have_every_metric_and_the_reason_of_each_null(score, no_java):
    status, out, _ = score("captions", *CAPTIONS, "--tokenizer", "simple", "--json")
    result = json.loads(out)
    assert status == 0 and list(result)[: len(METRICS)] == list(METRICS)
    assert result["BLEU-1"] == pytest.approx(1) and result["CIDEr"] > 1
    assert result["tokenizer"] == "simple"
    assert {name for name in METRICS if result[name] is None} == {"METEOR", "SPICE"} == set(result["reasons"])


def test_captions_without_java_are_all_null_and_the_table_says_why(score, no_java):
    status, out, _ = score("captions", *CAPTIONS)
    flat = " ".join(out.split())
    assert status == 0 and "Captions, ptb tokens" in flat and flat.count("not computed") == len(METRICS) + 1
    assert "needs Java, and no program named java is on the PATH" in flat
    assert "ask for the tokenizer 'simple'" in flat


def test_a_table_of_captions_names_its_tokenizer(score, no_java):
    _, out, _ = score("captions", *CAPTIONS, "--tokenizer", "simple")
    assert "Captions, simple tokens" in out and "1.0000" in out


def test_masks_as_json_are_both_means_and_each_id(score):
    status, out, err = score("masks", *MASKS, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out) == {"gIoU": 0.75, "cIoU": 0.5, "samples": {"a": 0.5, "b": 1.0}}
    _, out, _ = score("masks", *MASKS, "--json", "--union-epsilon", "1e-5")
    assert json.loads(out)["samples"] == pytest.approx({"a": 2 / (4 + 1e-5), "b": 1}, abs=1e-12)
    _, out, _ = score("masks", *MASKS)
    assert "0.7500" in out and "0.5000" in out


def test_packed_masks_of_several_sizes_are_scored(score, rng):
    arrays = {str(side): rng.random((2, side, 30)) < 0.4 for side in (5, 40)}
    files = [{}, {}]
    for name, pair in arrays.items():
        for file, mask in zip(files, pair, strict=True):
            rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
            file[name] = {"size": rle["size"], "counts": rle["counts"].decode()}
    _, out, _ = score("masks", *files, "--json")
    expected = {name: (p & t).sum() / (p | t).sum() for name, (p, t) in arrays.items()}
    assert json.loads(out)["samples"] == pytest.approx(expected)


@pytest.mark.parametrize("kind", EXAMPLES)
@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("{", "is not JSON"),
        ('{"a": [0.1, }', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"a": ' + "9" * 5000 + "}", "is not JSON"),
        (b"\xff\xfe{}", "is not UTF-8"),
        ("[1]", "must hold a JSON object, id -> value, not a list"),
        ("3", "not a single value"),
        ("{}", "holds no entries"),
        ('{"a": 1, "b": 2, "a": 3}', 'repeats 1 id: "a"'),
    ],
)
def test_a_file_that_is_no_object_of_entries_is_refused(score, kind, text, reason):
    good = EXAMPLES[kind]
    for files, name in (((text, good[1]), "p.json"), ((good[0], text), "r.json")):
        status, out, err = score(kind, *files, "--json")
        assert (status, out) == (2, "")
        assert reason in err and name in err and "Traceback" not in err


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_missing_file_or_a_folder_is_refused(kind, tmp_path, capsys):
    (tmp_path / "p.json").write_text('{"a": 1}')
    for path, reason in ((tmp_path / "none.json", "does not exist"), (tmp_path, "cannot be read")):
        flags = ["--predictions", str(tmp_path / "p.json"), "--references", str(path)]
        assert cli.main(["score", kind, *flags]) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize("kind", EXAMPLES)
def test_ids_missing_on_either_side_are_listed(score, kind):
    predictions, references = (dict(side) for side in EXAMPLES[kind])
    predictions['c "quoted" \u4e2d'] = predictions.pop("a")
    status, out, err = score(kind, predictions, references, "--json")
    assert (status, out) == (2, "")
    assert 'p.json lacks 1 id of the references: "a"' in err
    assert 'r.json lacks 1 id of the predictions: "c \\"quoted\\" \u4e2d"' in err


def test_of_many_problems_the_first_are_shown_and_the_rest_counted(score):
    predictions = {str(number): [[2, 2]] for number in range(30)}
    references = {str(number): [[0.5, 0.5]] for number in range(100, 130)}
    _, _, err = score("lbm", predictions, references)
    assert "32 problems in the files" in err and "and 22 more" in err and "and 20 more" in err
    assert len(err.splitlines()) == 12


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "must be a list of boxes or points, not null"),
        ({"x": 1}, "not an object"),
        ("[[0, 0]]", "not a text"),
        ([0.1, 0.2], "row 0 (counted from 0) must be [x1, y1, x2, y2] or [x, y], not a number"),
        ([[0.1, 0.2, 0.3]], "has 3 numbers; a box has 4"),
        ([[]], "has 0 numbers"),
        ([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6]], "has 6 numbers"),
        ([[0.1, 0.2], [0.1, 0.2, 0.3, 0.4]], "row 1 (counted from 0) has 4 numbers, those before it 2"),
        ([[0.1, "0.2"]], "holds a text where a number belongs"),
        ([[0.1, True]], "holds true or false"),
        ([[0.1, None]], "holds null"),
        ([[0.1, float("nan")]], "holds nan, which is not a finite number"),
        ([[0.1, float("inf")]], "holds inf"),
        ([[0.1, 1.5]], "holds 1.5, outside [0, 1]: divide x by the picture's width"),
        ([[-0.01, 0.5]], "holds -0.01, outside [0, 1]"),
        ([[10, 20, 200, 180]], "holds 10, outside [0, 1]"),
        ([[10**400, 0]], "outside [0, 1]"),
        ([[0.5, 0.1, 0.4, 0.2]], "is reversed: x2 = 0.4 is less than x1 = 0.5"),
        ([[0.1, 0.5, 0.2, 0.4]], "is reversed: y2 = 0.4 is less than y1 = 0.5"),
    ],
)
def test_a_malformed_trace_is_refused_with_its_file_entry_and_reason(score, value, reason):
    good = {"b": [[0.5, 0.5]]}
    for files, name in ((({**good, "a": value}, {**good, "a": [[0.5, 0.5]]}), "p.json"),
                        (({**good, "a": [[0.5, 0.5]]}, {**good, "a": value}), "r.json")):  # fmt: skip
        status, out, err = score("lbm", *files, "--json")
        assert (status, out) == (2, "")
        assert f'{name}, entry "a":' in err and reason in err


def test_a_prediction_without_boxes_is_refused(score):
    status, _, err = score("lbm", {"a": []}, {"a": [[0.5, 0.5]]})
    assert status == 2 and 'p.json, entry "a": is empty' in err


@pytest.mark.parametrize(
    ("prediction", "reference", "reason"),
    [
        (3, ["x"], 'p.json, entry "a": must be a text, not a number'),
        (["x"], ["x"], 'p.json, entry "a": must be a text, not a list'),
        ("\ud800", ["x"], "half of a surrogate pair"),
        ("x", "x", 'r.json, entry "a": must be a list of texts, not a text'),
        ("x", [], 'r.json, entry "a": is an empty list'),
        ("x", ["y", None], "text 1 (counted from 0) must be a text, not null"),
        ("x", ["y", " \n"], "text 1 (counted from 0) is blank"),
        ("x", ["\udc00"], "text 0 (counted from 0) holds half of a surrogate pair"),
    ],
)
def test_a_malformed_caption_is_refused_with_its_file_entry_and_reason(score, prediction, reference, reason):
    status, out, err = score("captions", {"a": prediction}, {"a": reference}, "--json")
    assert (status, out) == (2, "")
    assert reason in err


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        ([0, 1], 'p.json, entry "a": must be a COCO RLE object'),
        ({"size": [2, 4], "counts": [7]}, 'p.json, entry "a": "counts" covers 7 pixels'),
        ({"size": [2, 4], "counts": "~~"}, 'p.json, entry "a": "counts" does not decode'),
        ({"size": [4, 2], "counts": [8]}, 'entry "a": sizes differ: prediction 4 x 2, reference 2 x 4'),
        ('{"a": {"size": [2, 4], "size": [4, 2], "counts": [8]}}', 'repeats 1 id: "size"'),
    ],
)
def test_a_malformed_mask_is_refused_with_its_file_entry_and_reason(score, mask, reason):
    predictions = mask if isinstance(mask, str) else {"a": mask}
    status, out, err = score("masks", predictions, {"a": MASKS[1]["a"]}, "--json")
    assert (status, out) == (2, "")
    assert reason in err


@pytest.mark.parametrize("flags", [("--union-epsilon", "-1"), ("--union-epsilon", "nan")])
def test_a_meaningless_epsilon_is_refused(score, flags):
    status, _, err = score("masks", *MASKS, *flags)
    assert status == 2 and "--union-epsilon must be 0 or a small positive number" in err


def test_a_meaningless_timeout_is_refused(score):
    status, _, err = score("captions", *CAPTIONS, "--java-timeout-s", "0")
    assert status == 2 and "--java-timeout-s must be above 0" in err


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(JSON_VALUES)
def test_any_json_value_is_scored_or_refused_with_a_reason(value):
    for check in (check_trace, check_caption, check_captions, parse):
        try:
            check(value)
        except ValueError as error:
            assert str(error)


@given(st.lists(st.lists(st.floats(0, 1) | st.integers(0, 1), min_size=2, max_size=2), max_size=6))
def test_any_points_within_the_picture_are_taken_as_they_are(points):
    assert check_trace(points).tolist() == points


def test_scoring_masks_and_traces_starts_without_jax(tmp_path):
    """Scores come in about the time that numpy takes to import: nothing heavier is pulled in."""
    for name, content in zip(("p", "r"), TRACES, strict=True):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    program = (
        "import sys; from launch.cli import main; status = main(sys.argv[1:]); "
        "heavy = {'jax', 'flax', 'transformers', 'torch', 'pycocoevalcap'} & sys.modules.keys(); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    files = ["--predictions", str(tmp_path / "p.json"), "--references", str(tmp_path / "r.json")]
    done = subprocess.run(
        [sys.executable, "-c", program, "score", "lbm", *files, "--json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["samples"]["b"] == 0
