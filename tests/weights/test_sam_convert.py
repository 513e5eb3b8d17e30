"""`tracevision convert` with Segment Anything: every way there is, and equal to transformers at every stage."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.cli import main
from launch.convert import Args, run
from tests.weights.checkpoints import Malicious, assert_same_state, files_below
from tests.weights.sam_checkpoints import drawn, original_state, tiny, write_hugging_face, write_original
from tracevision_jax.errors import UserError
from tracevision_jax.hosts.sam_presets import SAM_PRESETS
from tracevision_jax.inference.tracker import Tracker
from tracevision_jax.systems.config_json import to_json
from tracevision_jax.weights import model_directory, sam
from tracevision_jax.weights.families import load_host

PICTURE_STAGES, VIDEO_STAGES = 12, 4


def command(*words: object) -> int:
    return main(["convert", *map(str, words)])


@pytest.mark.parametrize("release", ["sam", "sam2.1"])
def test_an_authors_file_goes_to_ours_to_transformers_and_back_unchanged(tmp_path, monkeypatch, release):
    monkeypatch.setitem(SAM_PRESETS, "tiny_for_this_test", tiny(release))
    state = write_original(tmp_path / "in.pt", release)
    assert command("--from", tmp_path / "in.pt", "--to", tmp_path / "ours") == 0
    assert command("--from", tmp_path / "ours", "--to", tmp_path / "there") == 0
    assert command("--from", tmp_path / "there", "--to", tmp_path / "again") == 0
    assert command("--from", tmp_path / "again", "--to", tmp_path / "out", "--layout", "original") == 0
    stored = torch.load(tmp_path / "out" / "tiny_for_this_test.pt", weights_only=True)
    assert_same_state(stored if release == "sam" else stored["model"], state)
    (tmp_path / "in.pt").rename(tmp_path / "there" / "in.pt")  # beside safetensors, which win
    assert command("--from", tmp_path / "there", "--to", tmp_path / "last") == 0
    jax.tree.map(np.testing.assert_array_equal, load_host(tmp_path / "last")[1], load_host(tmp_path / "ours")[1])


@pytest.mark.parametrize(
    ("release", "memory", "stages"),
    [
        ("sam", True, PICTURE_STAGES),
        ("sam2.1", True, PICTURE_STAGES + VIDEO_STAGES),
        ("sam2", True, PICTURE_STAGES + VIDEO_STAGES),
        ("sam2", False, PICTURE_STAGES),
    ],
    ids=["sam", "sam2.1", "sam2", "sam2 for pictures"],
)
def test_verification_finds_both_implementations_equal_at_every_stage(tmp_path, capsys, release, memory, stages):
    write_hugging_face(tmp_path / "in", release, memory)
    assert run(Args(tmp_path / "in", tmp_path / "ours", verify=True)) == 0
    shown = capsys.readouterr().out
    print(shown)
    assert shown.count("equal") == stages and "DIFFERS" not in shown
    for stage in ("preprocessing", "image embedding", "points and boxes: masks", "no prompt: scores"):
        assert stage in shown
    assert len(re.findall("video: ", shown)) == stages - PICTURE_STAGES


def test_an_authors_file_is_verified_by_way_of_an_export(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SAM_PRESETS, "tiny_for_this_test", tiny("sam"))
    write_original(tmp_path / "in.pt", "sam")
    before = set(files_below(tmp_path))
    assert run(Args(tmp_path / "in.pt", tmp_path / "ours", verify=True)) == 0
    assert capsys.readouterr().out.count("equal") == PICTURE_STAGES
    assert {name.split("/")[0] for name in set(files_below(tmp_path)) - before} == {"ours"}


def test_verification_of_other_weights_fails_and_says_where(tmp_path, capsys, monkeypatch):
    write_hugging_face(tmp_path / "in", "sam2.1")
    run(Args(tmp_path / "in", tmp_path / "ours"))
    file = tmp_path / "in" / "model.safetensors"
    state = load_file(file)
    state["memory_encoder.memory_fuser.layers.1.scale"] *= 1.01
    save_file(state, file)
    from rich.console import Console

    from launch.convert import compare

    assert compare(Console(), tmp_path / "in", tmp_path / "ours") == 1
    shown = capsys.readouterr().out
    assert re.search(r"video: memories.*DIFFERS", shown) and shown.count("equal") >= PICTURE_STAGES


def test_a_trained_sam_2_is_exported_in_both_layouts_and_tracks_from_each(tmp_path):
    config = tiny("sam2.1")
    params = sam.from_torch(drawn("sam2.1").state_dict(), config)
    content = {"system": "sam2", "model": to_json(config)}
    model_directory.save_model(tmp_path / "model", content, jax.tree.map(jnp.asarray, params))
    assert command("--from", tmp_path / "model", "--to", tmp_path / "there") == 0
    jax.tree.map(np.testing.assert_array_equal, load_host(tmp_path / "there")[1], params)
    assert command("--from", tmp_path / "model", "--to", tmp_path / "original", "--layout", "original") == 0
    stored = torch.load(tmp_path / "original" / "sam2_video.pt", weights_only=True)["model"]
    assert_same_state(stored, original_state(drawn("sam2.1").state_dict(), first=False))
    here, again = load_host(tmp_path / "original")
    assert here == config
    jax.tree.map(np.testing.assert_array_equal, again, params)
    for place in ("model", "there", "original", "original/sam2_video.pt"):
        tracker = Tracker.load(tmp_path / place, batch=2)
        assert tracker.config == config, place
        jax.tree.map(np.testing.assert_array_equal, tracker.programs.params, params)


def test_what_cannot_be_converted_is_refused_in_words_and_nothing_is_written(tmp_path, capsys):
    torch.save({"model": Malicious(tmp_path / "ran")}, tmp_path / "malicious.pt")
    write_hugging_face(tmp_path / "theirs", "sam2", memory=False)
    run(Args(tmp_path / "theirs", tmp_path / "pictures"))
    before = files_below(tmp_path)
    for words, message in (
        (("--from", tmp_path / "malicious.pt"), "would run code"),
        (("--from", tmp_path / "absent.pt"), "no directory and no file"),
        (("--from", tmp_path / "theirs", "--layout", "original"), "convert"),
        (("--from", tmp_path / "pictures", "--layout", "original"), "no other layout"),
    ):
        assert command(*words, "--to", tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert message in said and "Traceback" not in said
    assert files_below(tmp_path) == before
    with pytest.raises(UserError, match=r"no checkpoint|within each other"):
        run(Args(tmp_path / "malicious.pt", tmp_path, overwrite=True))
