"""`tracevision score jf`: its numbers on folders written by hand, at random and from a real video; what it refuses."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from evaluation.metrics.video_files import write_masklets
from launch import cli
from tests.conftest import ROOT
from tests.evaluation import video_reference as naive
from tests.evaluation.test_video_files import save_palette

KEYS = ["J", "F", "J&F", "J-recall", "J-decay", "F-recall", "F-decay"]


def save(folder, sequences):
    """Palette PNG files of {sequence: frames of ids}."""
    for name, frames in sequences.items():
        for number, ids in enumerate(frames):
            save_palette(folder / name / f"{number:05}.png", ids)
    return folder


@pytest.fixture
def score(tmp_path, capsys):
    """Run the command on folders `p` and `m`, after writing sequences to them; exit status, stdout and stderr."""

    def run(predictions=None, masks=None, *flags):
        save(tmp_path / "p", predictions or {})
        save(tmp_path / "m", masks or {})
        paths = ["--predictions", str(tmp_path / "p"), "--masks", str(tmp_path / "m")]
        capsys.readouterr()
        status = cli.main(["score", "jf", *paths, *flags])
        return status, *capsys.readouterr()

    return run


def expected_scores(predicted, true, ids):
    """The seven figures of each object, from loops."""
    rows = []
    for number in ids:
        frames = [naive.frame_scores(p == number, t == number) for p, t in zip(predicted, true, strict=True)][1:-1]
        j, f = (naive.statistics(values) for values in zip(*frames, strict=True))
        rows.append((j[0], f[0], (j[0] + f[0]) / 2, j[1], j[2], f[1], f[2]))
    return np.array(rows)


def two_sequences(rng):
    """One object for nine frames, three for six: predictions with a part redrawn."""
    true = {"bear": rng.integers(0, 2, (9, 6, 8)), "dogs": rng.integers(0, 4, (6, 7, 9))}
    predicted = {}
    for name, frames in true.items():
        other = rng.integers(0, frames.max() + 1, frames.shape)
        predicted[name] = np.where(
            rng.random(frames.shape) < np.linspace(0.9, 0.3, len(frames))[:, None, None], frames, other
        )
    return predicted, true


def test_json_is_the_mean_over_objects_and_the_same_a_sequence(score, rng):
    predicted, true = two_sequences(rng)
    status, out, err = score(predicted, true, "--json")
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert list(result) == [*KEYS, "sequences"] and list(result["sequences"]) == ["bear", "dogs"]
    rows = {name: expected_scores(predicted[name], true[name], range(1, true[name].max() + 1)) for name in true}
    for name, scores in result["sequences"].items():
        assert list(scores) == KEYS
        assert list(scores.values()) == pytest.approx(rows[name].mean(axis=0), abs=1e-12)
    overall = np.concatenate(list(rows.values())).mean(axis=0)
    assert [result[key] for key in KEYS] == pytest.approx(overall, abs=1e-12)
    assert result["J"] != pytest.approx(np.mean([row[:, 0].mean() for row in rows.values()]), abs=1e-3)


def test_binary_joins_all_ids(score, rng):
    predicted, true = two_sequences(rng)
    _, out, err = score(predicted, true, "--json", "--binary")
    joined = [{name: frames > 0 for name, frames in side.items()} for side in (predicted, true)]
    rows = [expected_scores(joined[0][name], joined[1][name], [True])[0] for name in true]
    assert [json.loads(out)[key] for key in KEYS] == pytest.approx(np.mean(rows, axis=0), abs=1e-12)
    assert err == ""


def test_masks_against_themselves_score_one(score, rng):
    _, true = two_sequences(rng)
    _, out, _ = score(true, true, "--json")
    perfect = dict(zip(KEYS, (1, 1, 1, 1, 0, 1, 0), strict=True))
    assert json.loads(out) == {**perfect, "sequences": {"bear": perfect, "dogs": perfect}}


def test_a_hand_example_with_a_lost_and_a_mistaken_object(score):
    """Object 1 found but in the last scored frame, object 2 never; both out of sight at the end count as found."""
    true = [[[1, 1, 0, 2]], [[1, 1, 0, 2]], [[1, 1, 0, 2]], [[1, 1, 0, 2]], [[0, 0, 0, 0]], [[0, 0, 0, 0]]]
    predicted = [[[0, 0, 0, 0]], [[1, 1, 0, 3]], [[1, 1, 0, 3]], [[1, 0, 0, 3]], [[0, 0, 0, 0]], [[2, 2, 2, 2]]]
    status, out, err = score({"a": predicted}, {"a": true}, "--json")
    result = json.loads(out)
    assert status == 0 and err == "a: predicted ids that are no objects, ignored: 3.\n"
    assert result["J"] == pytest.approx(((1 + 1 + 0.5 + 1) / 4 + (0 + 0 + 0 + 1) / 4) / 2)
    assert result["J-recall"] == pytest.approx((3 / 4 + 1 / 4) / 2), "one half is not above one half"


def test_an_id_that_the_masks_never_show_is_no_object_and_one_that_comes_late_below_the_highest_is(score):
    """First mask 1 and 4; 2 comes later and is never predicted; 3 never comes; 5 comes later, above the highest."""
    true = [[[1, 4, 0, 0]], [[1, 4, 0, 0]], [[1, 4, 2, 5]], [[1, 4, 0, 0]]]
    predicted = [[[1, 4, 0, 0]]] * 4
    _, out, err = score({"a": predicted}, {"a": true}, "--json")
    assert json.loads(out)["J"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert err == "a: true ids above those of the first mask, ignored: 5.\n"


def test_the_table_shows_each_sequence_and_each_of_several_objects(score, rng):
    predicted, true = two_sequences(rng)
    status, out, _ = score(predicted, true)
    assert status == 0
    for text in ("all objects", "bear", "dogs", "object 1", "object 3", "J&F", "Means over 4 objects of 2 sequences."):
        assert text in out
    assert f"{expected_scores(predicted['bear'], true['bear'], [1])[0, 0]:.4f}" in out


def test_grey_masks_of_black_and_white_score_without_and_with_binary(score, tmp_path, rng):
    for name, values in (("m", rng.random((5, 8, 9)) < 0.5), ("p", rng.random((5, 8, 9)) < 0.5)):
        (tmp_path / name / "a").mkdir(parents=True)
        for number, mask in enumerate(values):
            Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / name / "a" / f"{number}.png")
    results = [json.loads(score(None, None, "--json", *flags)[1]) for flags in ((), ("--binary",))]
    assert results[0] == results[1] and 0.1 < results[0]["J"] < 0.9


def test_white_predictions_join_with_the_ids_of_the_truth(score):
    true = np.ones((4, 3, 3), int)
    true[:, 0] = 2
    _, out, _ = score({"a": np.where(true, 255, 0)}, {"a": true}, "--binary", "--json")
    assert json.loads(out)["J"] == 1
    _, out, err = score(None, None, "--json")
    assert json.loads(out)["J"] == 0 and err == "a: predicted ids that are no objects, ignored: 255.\n"


def test_what_a_sequence_cannot_say_is_null_and_told(score):
    one = np.ones((4, 3, 3), int)
    masks = {"good": one, "one-frame": one[:1], "two-frames": one[:2], "nothing": 0 * one, "later": one.copy()}
    masks["later"][0] = 0
    predictions = {name: one for name in masks}
    status, out, err = score(predictions, masks, "--json")
    result = json.loads(out)
    assert status == 0 and result["J"] == 1 and result["sequences"]["good"]["F-decay"] == 0
    for name in ("one-frame", "two-frames", "nothing", "later"):
        assert result["sequences"][name] == dict.fromkeys(KEYS)
    assert "one-frame: 1 frame, of which the first and the last are not scored." in err
    assert "later: no object in the first true mask" in err
    _, out, _ = score()
    assert "two-frames: 2 frames" in out


def test_with_nothing_to_score_at_all_there_is_no_number(score):
    status, out, err = score({"a": np.ones((2, 3, 3), int)}, {"a": np.ones((2, 3, 3), int)}, "--json")
    assert (status, out) == (2, "") and "nothing to score" in err and "a: 2 frames" in err


def test_predictions_need_neither_the_first_nor_the_last_frame(score, tmp_path, rng):
    predicted, true = two_sequences(rng)
    _, out, _ = score(predicted, true, "--json")
    for name, frames in predicted.items():
        for number in (0, len(frames) - 1):
            (tmp_path / "p" / name / f"{number:05}.png").unlink()
    assert score(None, None, "--json") == (0, out, "")


def test_what_is_predicted_beyond_the_masks_is_ignored_and_told(score, rng):
    predicted, true = two_sequences(rng)
    _, out, _ = score(predicted, true, "--json")
    beyond = {"cats": np.ones((3, 2, 2), int), "bear": np.concatenate([predicted["bear"], predicted["bear"][:2]])}
    status, same, err = score(beyond, None, "--json")
    assert (status, same) == (0, out)
    assert err.splitlines() == [
        'Predictions without true masks, ignored: "cats".',
        "Predicted frames without a true mask, ignored: 2.",
    ]


def test_missing_sequences_and_frames_are_all_told_before_anything_is_scored(score, tmp_path, rng):
    predicted, true = two_sequences(rng)
    score(predicted, {**true, "cats": true["dogs"]})
    for number in (3, 4):
        (tmp_path / "p" / "bear" / f"{number:05}.png").unlink()
    status, out, err = score(None, None, "--json")
    assert (status, out) == (2, "") and "2 problems" in err
    assert f"{tmp_path / 'p' / 'bear' / '00003.png'} and 1 more of its frames must be scored" in err
    assert f"{tmp_path / 'p' / 'cats'} does not exist, but is needed" in err


@pytest.mark.parametrize(("side", "number"), [("p", 2), ("m", 3)])
def test_a_frame_of_another_size_is_refused(score, tmp_path, rng, side, number):
    predicted, true = two_sequences(rng)
    score(predicted, true)
    save_palette(tmp_path / side / "bear" / f"0000{number}.png", np.ones((12, 16)))
    status, out, err = score(None, None, "--json")
    assert (status, out) == (2, "")
    assert f"{tmp_path / side / 'bear'}/0000{number}.png is 12 x 16 pixels" in err and "is 6 x 8: masks are" in err


def test_a_frame_that_cannot_be_read_is_refused(score, tmp_path, rng):
    predicted, true = two_sequences(rng)
    score(predicted, true)
    path = tmp_path / "p" / "dogs" / "00002.png"
    for content, reason in ((path.read_bytes()[:50], "damaged or truncated"), (b"", "zero bytes"), (b"x", "not a PNG")):
        path.write_bytes(content)
        status, out, err = score(None, None, "--json")
        assert (status, out) == (2, "") and str(path) in err and reason in err and "Traceback" not in err
    Image.new("RGB", (9, 7)).save(path)
    assert "is in colour" in score(None, None)[2]


def test_folders_that_hold_no_sequences_are_refused(tmp_path, capsys):
    good = save(tmp_path / "good", {"a": np.ones((3, 2, 2))})
    for name in ("empty", "nested/480p/a", "bare/a"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    cases = {
        ("none", "good"): "the predictions folder",
        ("good", "none"): "does not exist",
        ("good", "file"): "is a file",
        ("good", "empty"): "holds no sequence; expected",
        ("good", "nested"): "480p holds no PNG file",
        ("good", "bare"): "a holds no PNG file",
        ("good", "good/a"): "holds PNG files itself",
        ("good/a", "good"): "holds PNG files itself",
        ("empty", "good"): "does not exist, but is needed",
    }
    assert good.is_dir()
    for (predictions, masks), reason in cases.items():
        flags = ["--predictions", str(tmp_path / predictions), "--masks", str(tmp_path / masks)]
        assert cli.main(["score", "jf", *flags]) == 2
        assert reason in capsys.readouterr().err


def test_json_files_in_sa_vs_layout_are_scored_alike(score, tmp_path, capsys, rng):
    """Masks without overlap, as ids in PNG files and as run lengths."""
    predicted, true = two_sequences(rng)
    true["dogs"][0, 0, :3] = 1, 2, 3
    _, expected, _ = score(predicted, true, "--json")
    for side, sequences in (("p", predicted), ("m", true)):
        (tmp_path / "json" / side).mkdir(parents=True)
        for name, frames in sequences.items():
            ids = list(range(1, true[name].max() + 1))
            masks = (np.stack([frame == number for number in ids]) for frame in frames)
            write_masklets(tmp_path / "json" / side / f"{name}.json", name, ids, masks, 24.0)
    flags = ["--predictions", str(tmp_path / "json" / "p"), "--masks", str(tmp_path / "json" / "m"), "--json"]
    assert cli.main(["score", "jf", *flags]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(expected)


def test_the_first_mask_of_a_real_video_copied_to_all_frames_loses_the_object(score, tmp_path, shared_data):
    """Horsejump-high in black and white: the floor under any tracker."""
    paths = sorted((shared_data / "video" / "horsejump-high" / "masks").glob("*.png"))
    for side, sources in (("m", paths), ("p", paths[:1] * len(paths))):
        (tmp_path / side / "horsejump-high").mkdir(parents=True)
        for path, source in zip(paths, sources, strict=True):
            (tmp_path / side / "horsejump-high" / path.name).write_bytes(source.read_bytes())
    status, out, err = score(None, None, "--binary", "--json")
    result = json.loads(out)
    print({key: round(result[key], 4) for key in KEYS})
    assert (status, err) == (0, "") and result == {
        **result["sequences"]["horsejump-high"],
        "sequences": result["sequences"],
    }
    masks = [np.asarray(Image.open(path)) > 0 for path in paths]
    overlaps = [(masks[0] & mask).sum() / (masks[0] | mask).sum() for mask in masks[1:-1]]
    assert result["J"] == pytest.approx(np.mean(overlaps), abs=1e-12)
    assert result["J"] < 0.3 and result["J-decay"] > 0.2


def test_scoring_starts_without_jax_and_shows_its_progress_on_stderr_alone(tmp_path, rng):
    predicted, true = two_sequences(rng)
    save(tmp_path / "p", predicted), save(tmp_path / "m", true)
    program = (
        "import sys; from launch.cli import main; status = main(sys.argv[1:]); "
        "heavy = {'jax', 'flax', 'transformers', 'torch'} & sys.modules.keys(); "
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    flags = ["--predictions", str(tmp_path / "p"), "--masks", str(tmp_path / "m"), "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, "-c", program, "score", "jf", *flags],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "Scoring frames" in done.stderr
    assert 0 < json.loads(done.stdout)["J"] < 1
