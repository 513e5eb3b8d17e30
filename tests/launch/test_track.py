"""`tracevision track`: what it writes, how it goes on after it was interrupted, and how it refuses."""

import json
import os
import shlex
import signal

import numpy as np
import pytest
from PIL import Image

from evaluation.metrics.video_files import DavisMasklets, SavMasklets
from launch import cli, track
from tests.inference import tracker_tiny as tiny
from tracevision_jax.inference.frames_video import VideoFrames
from tracevision_jax.inference.tracker import Tracker
from tracevision_jax.inference.tracker_files import TrackFolder, palette
from tracevision_jax.systems.config_json import to_json
from tracevision_jax.weights.model_directory import save_model

FRAMES = 9
BOXES = "--box 4 4 20 20 22 2 38 14"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, a video as pictures, and prompts."""
    folder = tmp_path_factory.mktemp("track")
    save_model(folder / "model", {"system": "sam2", "model": to_json(tiny.config())}, tiny.params())
    (folder / "clip").mkdir()
    for number, frame in enumerate(tiny.video(FRAMES)):
        Image.fromarray(frame).save(folder / "clip" / f"{number * 5:05d}.png")
    ids = np.zeros((tiny.HEIGHT, tiny.BREADTH), np.uint8)
    ids[tiny.disc()], ids[2:6, 30:36] = 1, 4
    Image.fromarray(ids).save(folder / "ids.png")
    Image.fromarray(np.where(ids == 1, 255, 0).astype(np.uint8)).save(folder / "binary.png")
    Image.fromarray(np.zeros_like(ids)).save(folder / "empty.png")
    prompts = [
        {"object": 3, "frame": 4, "points": [[10, 10, 1], [30, 3, 0]]},
        {"object": 5, "frame": 4, "mask": "binary.png"},
    ]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "text.json").write_text('[{"object": 1, "points": [[1, 1]]}, {"object": "a", "points": [[1, 1]]}]')
    return folder


@pytest.fixture(scope="module", autouse=True)
def _compiled_once():
    """The command loads its model each time; here all commands share the programs of one."""
    load = Tracker.load

    def loaded(directory, **settings):
        tracker = load(directory, **settings)
        shared = tiny.tracker()
        if (tracker.config, tracker.batch) == (shared.config, shared.batch):
            tracker.programs, tracker.buckets = shared.programs, shared.buckets
        return tracker

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracker, "load", loaded)
        yield


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run the command in that folder: (exit code, standard error)."""

    def run_command(line: str, video: str = "clip") -> tuple[int, str]:
        monkeypatch.chdir(folder)
        monkeypatch.delenv("TRACEVISION_DEBUG", raising=False)
        code = cli.main(["track", video, *shlex.split(line)])
        return code, capsys.readouterr().err

    return run_command


def content(folder) -> dict[str, bytes]:
    """All files but the state, and the overlay, whose encoder may leave its own marks."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "state.npz"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if "overlay" not in path.name}


@pytest.fixture(scope="module")
def whole(folder):
    """What an uninterrupted command writes."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        line = f"track clip --checkpoint model {BOXES} --frame 3 --reverse --overlay none --out whole"
        assert cli.main(shlex.split(line)) == 0
    finally:
        os.chdir(before)
    return folder / "whole"


def test_masks_boxes_and_run_lengths_of_all_frames_are_written(whole):
    masks = DavisMasklets(whole / "masks" / "clip")
    assert masks.names == [f"{number * 5:05d}" for number in range(FRAMES)]
    with Image.open(whole / "masks" / "clip" / "00000.png") as picture:
        assert picture.mode == "P" and picture.size == (tiny.BREADTH, tiny.HEIGHT)
        assert (picture.getpalette() or [])[:12] == [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] == list(palette()[:12])
    tracks = SavMasklets(whole / "tracks.json")
    assert len(tracks.names) == FRAMES and tracks.objects == [1, 2]
    lines = [json.loads(line) for line in (whole / "frames.jsonl").read_text().splitlines()]
    assert [line["frame"] for line in lines] == [3, 4, 5, 6, 7, 8, 2, 1, 0]
    for line in lines:
        shown = masks.read(f"{line['frame'] * 5:05d}")
        there = tracks.read(str(line["frame"]))
        for number in (1, 2):
            said = line["objects"][str(number)]
            assert 0 <= said["score"] <= 1
            assert (said["box"] is None) == (not there.mask(number).any())
            assert not (shown.mask(number) & ~there.mask(number)).any()


@pytest.mark.parametrize("frame", [5, 8, 1])
def test_killed_in_the_midst_the_same_command_goes_on_to_the_same_result(run, folder, whole, monkeypatch, frame):
    """Forwards and backwards; what was tracked since the state was saved last is tracked again."""
    line = f"--checkpoint model {BOXES} --frame 3 --reverse --overlay none --out killed{frame}"
    write = TrackFolder.write

    def killed(self, result, label):
        write(self, result, label)
        if result.frame == frame:
            raise KeyboardInterrupt

    monkeypatch.setattr(track, "SAVE_EVERY_S", 0.0)
    monkeypatch.setattr(TrackFolder, "write", killed)
    assert run(line)[0] == 130
    monkeypatch.setattr(TrackFolder, "write", write)
    assert 0 < len(content(folder / f"killed{frame}")) < len(content(whole))
    assert run(line)[0] == 0
    assert content(folder / f"killed{frame}") == content(whole)


def test_a_signal_saves_first_and_nothing_is_tracked_twice(run, folder, whole, monkeypatch):
    line = f"--checkpoint model {BOXES} --frame 3 --reverse --overlay none --out stopped"
    write, seen = TrackFolder.write, []

    def stopping(self, result, label):
        write(self, result, label)
        seen.append(result.frame)
        if result.frame == 5:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrackFolder, "write", stopping)
    code, err = run(line)
    assert code == 130 and "interrupted by SIGINT; the same command goes on from there" in err
    monkeypatch.setattr(TrackFolder, "write", lambda *given: seen.append(given[1].frame) or write(*given))
    assert run(line)[0] == 0
    assert seen == [3, 4, 5, 6, 7, 8, 2, 1, 0]
    assert content(folder / "stopped") == content(whole)
    assert run(line)[0] == 0 and len(seen) == FRAMES  # done: nothing is tracked again


def test_a_folder_with_something_else_in_it_is_not_touched(run, folder, whole):
    before = content(whole)
    code, err = run("--checkpoint model --box 4 4 20 20 --overlay none --out whole")
    assert code == 2 and "whole holds results of another video, model, prompt or setting" in err
    assert content(whole) == before


def test_an_overlay_is_a_video_or_an_animation(run, folder):
    common = "--checkpoint model --point 10 10 --not-point 30 3"
    assert run(f"{common} --overlay gif --out gif --name other")[0] == 0
    with Image.open(folder / "gif" / "overlay.gif") as picture:
        assert picture.n_frames == FRAMES and picture.size == (tiny.BREADTH, tiny.HEIGHT)  # pyright: ignore
    assert len(list((folder / "gif" / "masks" / "other").iterdir())) == FRAMES
    code, err = run(f"{common} --out mp4")
    assert code == 0 and "wrote masks/clip/, frames.jsonl, tracks.json, overlay.mp4 to mp4" in err
    assert "Tracking frames: 9 in" in err and "frames/s" in err
    assert VideoFrames(folder / "mp4" / "overlay.mp4").length == FRAMES


@pytest.mark.parametrize(
    ("prompt", "objects"),
    [
        ("--mask ids.png", [1, 4]),
        ("--mask binary.png", [1]),
        ("--prompts prompts.json", [3, 5]),
        ("--box 4 4 20 20 --point 10 10", [1]),
    ],
)
def test_every_kind_of_prompt_makes_its_objects(run, folder, prompt, objects):
    out = f"kind{sum(map(ord, prompt))}"
    code, err = run(f"--checkpoint model {prompt} --overlay none --out {out}")
    assert code == 0, err
    assert SavMasklets(folder / out / "tracks.json").objects == objects


def test_boxes_are_objects_and_all_clicks_together_one():
    said = track.check(
        cli.parse(
            track,
            shlex.split("a.mp4 --checkpoint m --out o --box 1 2 3 4 5 6 7 8 --point 9 9 7 7 --not-point 1 1"),
            "track",
        )
    )
    assert said == [
        {"object": 1, "frame": 0, "box": [1, 2, 3, 4]},
        {"object": 2, "frame": 0, "box": [5, 6, 7, 8]},
        {"object": 3, "frame": 0, "points": [[9, 9, 1], [7, 7, 1], [1, 1, 0]]},
    ]
    said = track.check(
        cli.parse(track, shlex.split("a.mp4 --checkpoint m --out o --box 1 2 3 4 --not-point 1 1"), "track")
    )
    assert said == [{"object": 1, "frame": 0, "box": [1, 2, 3, 4], "points": [[1, 1, 0]]}]


def test_a_real_video_with_the_mask_of_its_first_frame_runs_through(run, folder, shared_data):
    """A drawn model tracks nothing; what it writes can be scored."""
    video = shared_data / "video" / "horsejump-high"
    line = f"--checkpoint model --mask {video / 'masks' / '00000.png'} --overlay none --out horse --name horsejump-high"
    code, err = run(line, str(video / "video.mp4"))
    assert code == 0, err
    truth, found = DavisMasklets(video / "masks"), DavisMasklets(folder / "horse" / "masks" / "horsejump-high")
    assert len(found.names) == 50 and set(truth.names) <= set(found.names)
    first, expected = found.first.mask(1), truth.first.mask(truth.objects[0])
    assert first.shape == (480, 854) and (first & expected).any()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "say what to track"),
        ("--box 4 4 20 200", r"object 1, frame 0: the box (4, 4, 20, 200) reaches out of the frame of 40 x 24 px"),
        ("--point 50 3", "outside the frame"),
        ("--point 5 3 --frame 9", "there is no such frame; clip has frames 0 to 8"),
        ("--mask empty.png", "the mask empty.png is empty"),
        ("--mask nowhere.png", "nowhere.png cannot be read"),
        ("--mask ids.png --point 3 3", "--prompts"),
        ("--prompts prompts.json --point 3 3", "--prompts says everything"),
        ("--prompts ids.png", "not valid JSON"),
        ("--prompts text.json", 'prompt 1 must be an object with "object", a whole number'),
        ("--prompts nowhere.json", "cannot be read"),
        ("--point 3 3 --batch 0", "--batch is 0"),
        ("--point 3 3 --name a/b", "no name of a folder"),
        ("--point 3 3 --image-size 33", "must be a multiple of"),
    ],
)
def test_mistakes_are_told_with_what_to_do(run, line, message):
    code, err = run(f"--checkpoint model --out refused {line}")
    assert code == 2 and message in err


def test_videos_and_models_that_are_none_are_told(run, folder):
    assert run("--checkpoint nowhere --out refused2 --point 3 3") == (
        2,
        "tracevision track: the checkpoint nowhere is not there; give a directory, or a file of SAM 2's authors\n",
    )
    (folder / "none").mkdir(exist_ok=True)
    for video, message in (("none", "no frames"), ("ids.json", "no such file")):
        code, err = run("--checkpoint model --out refused3 --point 3 3", video)
        assert code == 2 and message in err
    (folder / "file").write_text("")
    code, err = run("--checkpoint model --out file --point 3 3")
    assert code == 2 and "is a file; give a folder" in err
