"""`tracevision predict`: every task from the command line, what it writes, and how it refuses."""

import json
import shlex

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from launch import cli, predict
from tests.inference import tiny
from tests.inference.test_media import write_video
from tracevision_jax.inference.loading import save

TRACE = {"points": [[0.1, 0.2, 0.0], [0.4, 0.5, 0.3], [0.9, 0.8, 0.6]]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, pictures, a video and traces."""
    folder = tmp_path_factory.mktemp("predict")
    save(folder / "model", tiny.system(), tiny.params(), tiny.vocabulary())
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(pixels[:12]).save(folder / "flat.png")
    write_video(folder / "clip.mp4", frames=30, rate=10, size=(16, 16))
    (folder / "a.json").write_text(json.dumps(TRACE))
    (folder / "broken.json").write_text("[[0.1,")
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run the command in that folder: (exit code, standard output, standard error)."""

    def run_command(line: str) -> tuple[int, str, str]:
        monkeypatch.chdir(folder)
        monkeypatch.delenv("TRACEVISION_DEBUG", raising=False)
        code = cli.main(["predict", *shlex.split(line)])
        return (code, *capsys.readouterr())

    return run_command


def test_describing_a_trace_writes_text_json_and_pictures(run, folder):
    line = "model --image a.png --trace a.json --max-new-tokens 16 --out out/one --attention"
    code, out, err = run(line)
    assert code == 0 and "wrote answer.txt, answer.json, picture.png, attention.png to out/one" in err
    content = json.loads((folder / "out/one/answer.json").read_text())
    assert content["text"].split() == out.splitlines()[0].split() or content["text"] in out
    assert (folder / "out/one/answer.txt").read_text().startswith(content["text"])
    for name in ("picture.png", "attention.png"):
        with Image.open(folder / "out/one" / name) as picture:
            assert min(picture.size) >= 300
    assert run(line)[1] == out


def test_a_caption_becomes_a_trajectory_on_standard_output(run, folder):
    code, out, _ = run('model --image a.png --caption "a star" --max-new-tokens 16 --out out/two')
    content = json.loads((folder / "out/two/answer.json").read_text())
    (points,) = content["trajectories"]
    assert code == 0 and f"trajectory of {len(points)} points: ({points[0][0]:.3f}, {points[0][1]:.3f})" in out


def test_a_phrase_becomes_a_box(run):
    code, out, _ = run('model --image a.png --locate "the star" --max-new-tokens 16')
    assert code == 0 and out.splitlines()[-1].startswith(("box of object 1: 0.", "(the answer was cut off"))


def test_masks_are_written_as_run_lengths(run, folder, monkeypatch):
    """A drawn model gives no mask of its own accord: the answer is begun for it."""
    from tracevision_jax.inference.tracevision import TraceVisionInference

    ask = TraceVisionInference.ask

    def begun(self, sample, asked, *, force=(), **settings):
        words = self.engine.vocabulary
        return ask(self, sample, asked, force=[words.seg, *words.slots], **settings)

    monkeypatch.setattr(TraceVisionInference, "ask", begun)
    code, out, _ = run("model --image a.png --segment the star --max-new-tokens 16 --out out/three")
    assert code == 0 and "mask of object 1:" in out
    line = json.loads((folder / "out/three/answer.json").read_text())["grounded"][0]
    assert coco.decode(line["mask"][0]).shape == (16, 16)


def test_a_question_about_a_video_speaks_of_traces_by_letter(run):
    code, _, _ = run('model --video clip.mp4 --trace a.json --ask "What is {A}?" --max-new-tokens 16')
    assert code == 0


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("model --image a.png", "give one with --trace FILE"),
        ("model --trace a.json", "give --image or --video, one of the two"),
        ("model --image a.png --video clip.mp4 --trace a.json", "one of the two"),
        ('model --image a.png --caption x --locate "y"', "--caption and --locate are different tasks"),
        ("model --image a.png --segment", "--segment needs the name"),
        ("model --image a.png --trace a.json --caption x", "--caption takes no trace here"),
        ("model --image a.png --caption x --attention", "give both --trace and --out"),
        ("model --image a.png --trace a.json --out a.png", "--out a.png is a file"),
        ("model --image a.png --trace a.json --max-new-tokens 0", "--max-new-tokens is 0"),
        ("nowhere --image a.png --trace a.json", "the checkpoint nowhere is not there"),
        ("model --image nowhere.png --trace a.json", "nowhere.png cannot be read"),
        ("model --image a.png flat.png --ask x", "one size, not 16 x 12, 16 x 16"),
        ("model --image a.png --trace broken.json", "broken.json is not valid JSON"),
        ("model --image a.png --trace nowhere.json", "nowhere.json cannot be read"),
        ("model --image a.png --ask 'What is {A}?'", "speaks of trace {A}, which is not given"),
        ("model --video broken.json --ask x", "the video broken.json holds no pictures"),
        ("model --image a.png --ask x --temperature -1", "temperature must be 0"),
        ("model --image a.png --ask x --dtype half", "dtype is 'half'"),
    ],
)
def test_mistakes_are_one_message_and_exit_with_2(line, words, run):
    code, out, err = run(line)
    assert code == 2 and err.startswith("tracevision predict: ") and "Traceback" not in err
    assert words in err and out == ""


def test_the_help_names_every_task(capsys):
    with pytest.raises(SystemExit):
        cli.main(["predict", "--help"])
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--trace", "--caption", "--segment", "--locate", "--ask", "--attention"))
    assert predict.Args.__doc__ is not None and predict.Args.__doc__.count("tracevision predict") >= 6
