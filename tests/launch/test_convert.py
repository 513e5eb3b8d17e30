"""`tracevision convert`: both ways, everything wrong at once, nothing half written, equal to transformers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from launch.cli import main
from launch.convert import Args, compare, run
from tests.weights.checkpoints import assert_same_state, files_below, write_hugging_face
from tests.weights.test_models import trained  # noqa: F401 (a fixture)
from tracevision_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def test_a_checkpoint_goes_to_ours_and_back_unchanged(tmp_path, capsys):
    model = write_hugging_face(tmp_path / "in", dtype="bfloat16")
    assert main(["convert", "--from", str(tmp_path / "in"), "--to", str(tmp_path / "ours")]) == 0
    assert "45 tensors" in capsys.readouterr().err
    assert main(["convert", "--from", str(tmp_path / "ours"), "--to", str(tmp_path / "out")]) == 0
    assert "93 tensors" in capsys.readouterr().err
    again = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert_same_state(again.state_dict(), model.state_dict())


def test_a_dtype_is_written_and_an_old_checkpoint_replaced_only_when_told(tmp_path):
    write_hugging_face(tmp_path / "in")
    run(Args(tmp_path / "in", tmp_path / "ours", dtype="bfloat16"))
    before = files_below(tmp_path / "ours")
    with pytest.raises(UserError, match="--overwrite"):
        run(Args(tmp_path / "in", tmp_path / "ours"))
    assert files_below(tmp_path / "ours") == before
    run(Args(tmp_path / "in", tmp_path / "ours", overwrite=True))
    sizes = {name: len(content) for name, content in files_below(tmp_path / "ours").items()}
    assert sizes["tracevision.safetensors"] > 1.8 * len(before["tracevision.safetensors"])


def test_verification_finds_both_implementations_equal_at_every_stage(tmp_path, capsys):
    write_hugging_face(tmp_path / "in")
    assert run(Args(tmp_path / "in", tmp_path / "ours", verify=True)) == 0
    shown = capsys.readouterr().out
    for stage in ("preprocessing", "vision tower", "merged visual tokens", "hidden states", "logits"):
        assert stage in shown
    assert shown.count("equal") == 5 and "DIFFERS" not in shown


def test_a_trained_host_is_exported_and_equal_with_its_added_tokens(trained, tmp_path, capsys):  # noqa: F811
    folder, _, _ = trained
    assert run(Args(folder / "model", tmp_path / "out", verify=True)) == 0
    assert capsys.readouterr().out.count("equal") == 5


def test_verification_of_other_weights_fails_and_says_where(tmp_path, capsys):
    write_hugging_face(tmp_path / "in")
    write_hugging_face(tmp_path / "other", shard_size="10MB")
    state = load_file(tmp_path / "other" / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"] *= 1.01
    save_file(state, tmp_path / "other" / "model.safetensors")
    run(Args(tmp_path / "in", tmp_path / "ours"))
    assert compare(Console(), tmp_path / "other", tmp_path / "ours") == 1
    shown = capsys.readouterr().out
    assert shown.count("equal") == 3 and shown.count("DIFFERS") == 2


def test_verification_without_torch_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    write_hugging_face(tmp_path / "in")
    before = files_below(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"tracevision-jax\[torch\]"):
        run(Args(tmp_path / "in", tmp_path / "ours", verify=True))
    assert files_below(tmp_path) == before


def test_every_fault_is_listed_and_nothing_written(tmp_path, capsys):
    write_hugging_face(tmp_path / "in", shard_size="10MB")
    file = tmp_path / "in" / "model.safetensors"
    state = load_file(file)
    del state["model.norm.weight"]
    state["visual.extra"] = torch.zeros(2)
    state["lm_head.weight"] = torch.zeros(3, 4)
    save_file(state, file)
    before = files_below(tmp_path)
    assert main(["convert", "--from", str(tmp_path / "in"), "--to", str(tmp_path / "ours")]) == 2
    said = capsys.readouterr().err
    for fault in ("model.norm.weight", "visual.extra", "lm_head.weight: [3, 4], expected [300, 64]"):
        assert fault in said
    assert "Traceback" not in said and files_below(tmp_path) == before


def test_a_truncated_shard_is_found_before_anything_is_written(tmp_path):
    write_hugging_face(tmp_path / "in")
    shards = sorted((tmp_path / "in").glob("*.safetensors"))
    assert len(shards) > 2
    for shard in shards[1:]:
        shard.write_bytes(shard.read_bytes()[:-7])
    before = files_below(tmp_path)
    with pytest.raises(UserError) as caught:
        run(Args(tmp_path / "in", tmp_path / "ours"))
    assert all(shard.name in str(caught.value) for shard in shards[1:])
    assert files_below(tmp_path) == before


def test_what_is_no_checkpoint_is_refused_with_the_reason(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "config.json").write_text(json.dumps({"model_type": "llava"}))
    write_hugging_face(tmp_path / "bare")
    for shard in (tmp_path / "bare").glob("*.safetensors*"):
        shard.unlink()
    for source, message in (
        ("absent", "no directory"),
        ("empty", r"tracevision\.json"),
        ("llava", "llava"),
        ("bare", "no weights"),
    ):
        with pytest.raises(UserError, match=message):
            run(Args(tmp_path / source, tmp_path / "out"))
    with pytest.raises(UserError, match="within each other"):
        run(Args(tmp_path / "bare", tmp_path / "bare" / "below"))
    with pytest.raises(UserError, match="must be positive"):
        run(Args(tmp_path / "bare", tmp_path / "out", max_shard_gb=0.0))
    assert not (tmp_path / "out").exists()


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
from tracevision_jax.weights import safetensors_io
plain = safetensors_io.contiguous
safetensors_io.contiguous = lambda array: (time.sleep(1), plain(array))[1]
from launch.cli import main
sys.exit(main(["convert", "--from", sys.argv[1], "--to", sys.argv[2]]))
"""


@pytest.mark.parametrize(
    ("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=["term", "int", "kill"]
)
def test_a_run_that_is_ended_midway_leaves_no_half_written_checkpoint(tmp_path, sent, code):
    write_hugging_face(tmp_path / "in")
    before = files_below(tmp_path)
    command = [sys.executable, "-c", SLOW, str(tmp_path / "in"), str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        while not list(tmp_path.glob(".out.partial-*/tracevision.safetensors")):
            assert process.poll() is None, "it ended before it wrote anything"
            time.sleep(0.05)
        process.send_signal(sent)
        assert process.wait() == code
    assert not (tmp_path / "out").exists()
    if sent != signal.SIGKILL:
        assert files_below(tmp_path) == before
    run(Args(tmp_path / "in", tmp_path / "out"))
    assert not list(tmp_path.glob(".out.partial-*"))
    assert {name for name in files_below(tmp_path) if not name.startswith("in/")} > {
        "out/tracevision.json",
        "out/tracevision.safetensors",
    }
