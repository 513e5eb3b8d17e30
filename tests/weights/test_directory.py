"""A directory appears whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.weights.checkpoints import files_below
from tracevision_jax.errors import UserError
from tracevision_jax.weights.directory import new_directory

ROOT = Path(__file__).resolve().parents[2]


def test_the_target_appears_at_the_end_with_everything(tmp_path):
    target = tmp_path / "deep" / "target"
    with new_directory(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not target.exists()
    assert files_below(tmp_path) == {"deep/target/sub/file": b"x"}
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, OSError])
def test_nothing_is_left_behind_by_an_error(tmp_path, error):
    with pytest.raises((error, UserError)), new_directory(tmp_path / "target") as folder:
        (folder / "file").write_text("x")
        raise error("stop")
    assert list(tmp_path.iterdir()) == []


def test_a_full_directory_is_kept_unless_it_may_be_replaced(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(UserError, match="--overwrite"), new_directory(target):
        raise AssertionError("must not be reached")
    with pytest.raises(RuntimeError), new_directory(target, overwrite=True) as folder:
        (folder / "config.json").write_text("half")
        raise RuntimeError
    assert files_below(tmp_path) == {"target/config.json": b"old"}
    with new_directory(target, overwrite=True) as folder:
        (folder / "tracevision.json").write_text("new")
    assert files_below(tmp_path) == {"target/tracevision.json": b"new"}


def test_what_is_no_checkpoint_is_never_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name, message in (("thesis", "no checkpoint"), ("file", "is a file")):
        with pytest.raises(UserError, match=message), new_directory(tmp_path / name, overwrite=True):
            raise AssertionError("must not be reached")


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "target").mkdir()
    with new_directory(tmp_path / "target") as folder:
        (folder / "file").write_text("x")
    assert files_below(tmp_path) == {"target/file": b"x"}


def test_a_target_that_was_filled_in_the_meantime_is_kept(tmp_path):
    with pytest.raises(UserError, match="not empty"), new_directory(tmp_path / "target") as folder:
        (folder / "file").write_text("ours")
        (tmp_path / "target").mkdir()
        (tmp_path / "target" / "file").write_text("theirs")
    assert files_below(tmp_path) == {"target/file": b"theirs"}


def test_a_killed_process_leaves_no_target_and_the_next_run_clears_up(tmp_path):
    script = (
        "import sys, time, pathlib\n"
        "from tracevision_jax.weights.directory import new_directory\n"
        "with new_directory(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x'); print('ready', flush=True); time.sleep(60)\n"
    )
    target = tmp_path / "target"
    command = [sys.executable, "-c", script, str(target)]
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        # While it lives its folder is not touched.
        with new_directory(tmp_path / "target", overwrite=True) as folder:
            (folder / "config.json").write_text("{}")
        assert len(list(tmp_path.glob(".target.partial-*"))) == 1
        process.send_signal(signal.SIGKILL)
    assert len(list(tmp_path.glob(".target.partial-*"))) == 1
    with new_directory(target, overwrite=True) as folder:
        (folder / "config.json").write_text("{}")
    assert files_below(tmp_path) == {"target/config.json": b"{}"}


def test_an_unwritable_place_is_said_plainly(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), new_directory(tmp_path / "file" / "target"):
        raise AssertionError("must not be reached")
