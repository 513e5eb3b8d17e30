"""`tracevision evaluate`: tables and records on a real (tiny) model, resumption, and how it refuses."""

import json
import shlex

import pytest

from data_loaders.synthetic.config import SceneConfig
from launch import cli
from launch.evaluate import checkpoint_name
from tests.inference import tiny
from tracevision_jax.inference.loading import save
from tracevision_jax.systems.config_json import to_json

SCENES = SceneConfig(height=(16, 16), width=(16, 16), objects=(2, 2), named=(1, 1), brief=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a run that trained on scenes of 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("evaluate")
    sources = [{"source": "synthetic", "options": {"seed": 0, "count": 9, "config": to_json(SCENES)}}]
    recipe = {"data": {"sources": sources}}
    save(folder / "tiny_run" / "model", tiny.system(), tiny.params(), tiny.vocabulary(), recipe)
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run the command in that folder: (exit code, standard output, standard error)."""

    def run_command(line: str) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.delenv("TRACEVISION_DEBUG", raising=False)
        code = cli.main(["evaluate", *shlex.split(line)])
        return (code, *capsys.readouterr())

    return run_command


def test_benchmarks_give_records_and_tables_and_go_on_where_they_stopped(run, folder):
    line = "tiny_run --benchmark refer_box refer_segment --limit 3 --rows 4"
    code, out, err = run(line)
    assert code == 0 and "wrote records, results.md and results.json" in err
    results = folder / "runs/evaluation/tiny_run"
    assert (results / "results.md").read_text() == out
    assert "## refer_box" in out and "| P@0.5 |" in out and "| cIoU |" in out
    content = json.loads((results / "results.json").read_text())
    assert (content["checkpoint"], content["split"], content["limit"]) == ("tiny_run", "val", 3)
    assert set(content["results"]) == {"refer_box", "refer_segment"}
    records = [json.loads(line) for line in (results / "refer_box.jsonl").read_text().splitlines()][1:]
    assert len(records) == 3 and all(record["prediction"] is not None for record in records)
    values = content["results"]["refer_box"][0]["values"]
    assert values["mean IoU"] == pytest.approx(sum(record["iou"] for record in records) / 3)
    before = (results / "refer_box.jsonl").read_text()
    assert run(line)[:2] == (0, out) and (results / "refer_box.jsonl").read_text() == before
    # Other traces, other records: blind ones do not go into the same file.
    assert run("tiny_run --benchmark trace_segment --limit 1 --rows 4")[0] == 0
    code, _, err = run("tiny_run --benchmark trace_segment --limit 1 --rows 4 --blind-traces")
    assert code == 2 and "holds results of something else (task differ)" in err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("tiny_run --benchmark trace_predictoin", "Did you mean 'trace_prediction'?"),
        ("tiny_run --benchmark refer_box refcoco", "'refcoco' cannot be run yet"),
        ("tiny_run --benchmark ln_coco", "say where with --data FOLDER"),
        ("tiny_run --benchmark refer_box --split train", "no split 'train'"),
        ("tiny_run --benchmark refer_box --limit 0", "--limit is 0"),
        ("tiny_run --benchmark refer_box --rows 0", "--rows is 0"),
        ("tiny_run --benchmark", "--benchmark needs a name"),
        ("nowhere --benchmark refer_box", "the checkpoint nowhere is not there"),
    ],
)
def test_mistakes_are_one_message_and_exit_with_2(line, words, run):
    code, out, err = run(line)
    assert code == 2 and words in err and err.startswith("tracevision evaluate: ") and out == ""


def test_results_are_named_after_the_run(tmp_path):
    assert checkpoint_name(str(tmp_path / "stage2" / "model")) == "stage2"
    assert checkpoint_name(str(tmp_path / "qwen7b")) == "qwen7b"
