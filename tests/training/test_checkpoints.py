"""Checkpoints: complete before they count, hashed, the last k kept, damaged ones passed over."""

import contextlib
import errno
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tracevision_jax.errors import UserError
from tracevision_jax.training.checkpoints import SCORES, Checkpoints
from tracevision_jax.training.retention import CheckpointConfig
from tracevision_jax.weights import hashes

META = {"recipe": {"name": "x"}}


def tree_of(value):
    return {
        "params": {"kernel": jnp.full((64, 64), float(value)), "bias": jnp.full((3,), value, jnp.bfloat16)},
        "frozen": {},
        "system": (),
        "step": jnp.asarray(value, jnp.int32),
    }


SHAPES = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree_of(0))


@pytest.fixture
def opened(tmp_path):
    """Function that opens the folder's checkpoints and the lines they report."""
    everything = []

    def open_it(**config):
        lines = []
        everything.append(Checkpoints(tmp_path / "checkpoints", CheckpointConfig(**config), lines.append))
        return everything[-1], lines

    yield open_it
    for checkpoints in everything:
        checkpoints.close()


@pytest.fixture
def three(opened):
    checkpoints, _ = opened()
    for step in (10, 20, 30):
        checkpoints.save(step, tree_of(step), META | {"at": step})
    checkpoints.wait()
    return checkpoints


def test_what_is_saved_comes_back_with_its_meta(three):
    assert three.latest() == 30
    jax.tree.map(np.testing.assert_array_equal, three.restore(SHAPES, 30), tree_of(30))
    assert three.meta(20) == META | {"at": 20}


def test_saving_goes_on_while_the_step_overwrites_its_buffers(opened):
    checkpoints, _ = opened()
    increase = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = tree_of(0)
    for step in range(1, 4):
        tree = increase(tree)
        checkpoints.save(step, tree, META)
        for _ in range(20):
            tree = increase(tree)
    checkpoints.wait()
    for number, step in enumerate((1, 2, 3)):
        found = checkpoints.restore(SHAPES, step)["params"]["kernel"]
        np.testing.assert_array_equal(found, float(21 * number + 1))


def test_only_the_last_k_stay(opened):
    checkpoints, _ = opened(keep=2)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, tree_of(step), META)
    checkpoints.wait()
    assert checkpoints.steps() == [3, 4]


def test_one_flipped_byte_in_any_file_is_found_and_the_checkpoint_before_is_used(three, opened, tmp_path):
    newest, spare = three.path(30), tmp_path / "spare"
    shutil.copytree(newest, spare)
    files = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(files) > 5
    for file in files:
        if not newest.exists():
            shutil.copytree(spare, newest)
        content = bytearray((newest / file).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / file).write_bytes(content)
        checkpoints, lines = opened()
        assert checkpoints.latest() == 20, file
        # A flipped byte of the list itself accuses whichever file its line is about.
        accused = newest.name if file.name == hashes.FILE else file.name
        assert any(accused in line for line in lines), (file, lines)
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(SHAPES, 20), tree_of(20))


def test_a_missing_file_and_a_missing_hash_list_are_found(three, opened):
    next(path for path in three.path(30).rglob("*") if path.name == "manifest.ocdbt").unlink()
    (three.path(20) / hashes.FILE).unlink()
    checkpoints, lines = opened()
    assert checkpoints.latest() == 10
    text = "\n".join(lines)
    assert "manifest.ocdbt is missing" in text and "was not finished" in text


def test_a_damaged_checkpoint_is_kept_aside_and_its_step_can_be_saved_again(three, opened):
    (three.path(30) / hashes.FILE).unlink()
    checkpoints, _ = opened()
    assert checkpoints.latest() == 20
    assert (checkpoints.directory / "damaged_step_00000030").is_dir()
    checkpoints.save(30, tree_of(31), META)
    checkpoints.wait()
    assert int(checkpoints.restore(SHAPES, 30)["step"]) == 31


def test_leftovers_of_a_save_that_was_cut_short_are_removed(three, opened):
    leftover = three.directory / "step_00000040.orbax-checkpoint-tmp"
    leftover.mkdir()
    checkpoints, lines = opened()
    assert not leftover.exists() and checkpoints.latest() == 30
    assert any("not finished" in line for line in lines)


@contextlib.contextmanager
def small_files(limit):
    """Let the system refuse to write past so many bytes of a file, as it does when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_when_the_disk_is_full_the_save_ends_with_advice_and_those_before_stay_whole(opened):
    checkpoints, _ = opened(keep=1)
    tree = tree_of(1) | {"params": {"kernel": jax.random.normal(jax.random.key(0), (64, 64)), "bias": jnp.ones(3)}}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
    checkpoints.save(1, tree, META)
    checkpoints.wait()
    with small_files(4096), pytest.raises(UserError, match="step 2 could not be written") as refused:
        checkpoints.save(2, tree, META)  # 16 KiB that do not compress
        checkpoints.wait()
    message = str(refused.value)
    assert "File too large" in message and "newest is of step 1" in message and "checkpoint.keep" in message
    assert [path.name for path in checkpoints.directory.iterdir()] == ["step_00000001"], "what it wrote takes no room"
    assert checkpoints.latest() == 1
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(shapes, 1), tree)
    checkpoints.save(2, tree, META)  # there is room again
    checkpoints.wait()
    assert checkpoints.steps() == [2]


def test_a_failed_save_is_known_without_waiting_for_it(opened, monkeypatch):
    checkpoints, _ = opened(keep=1)
    checkpoints.save(1, tree_of(1), META)
    checkpoints.wait()

    def full_disk(directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hashes, "write_hashes", full_disk)
    checkpoints.save(2, tree_of(2), META)
    checkpoints._finisher.join()
    with pytest.raises(UserError, match="No space left"):
        checkpoints.check()
    checkpoints.check()  # said once
    monkeypatch.undo()
    assert checkpoints.latest() == 1


def test_a_defect_in_saving_is_not_called_a_full_disk(opened):
    checkpoints, _ = opened()
    checkpoints.save(1, tree_of(1), META)
    with pytest.raises(ValueError, match="already exists"):
        checkpoints.save(1, tree_of(1), META)


def test_the_best_and_every_nth_stay_with_the_last(opened):
    config = {"keep": 1, "keep_every": 4, "keep_best": 1, "metric": "held_out/loss"}
    checkpoints, _ = opened(**config)
    for step, score in ((2, 0.5), (3, 0.9), (4, float("nan")), (5, 0.7), (6, 0.8)):
        assert checkpoints.score(step, score) == (step == 2)
        checkpoints.save(step, tree_of(step), META)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 6]
    again, _ = opened(**config)  # scores outlive the process
    again.score(7, 0.1)
    again.save(7, tree_of(7), META)
    again.wait()
    assert again.steps() == [4, 7]


def test_scores_of_steps_that_are_taken_again_are_forgotten(opened):
    config = {"keep_best": 1, "metric": "held_out/loss"}
    checkpoints, _ = opened(**config)
    checkpoints.score(2, 0.5), checkpoints.score(4, 0.1)
    checkpoints.forget_scores_after(3)
    assert opened(**config)[0].score(4, 0.3), "better than that of step 2, and that of step 4 is gone"


def test_a_damaged_list_of_scores_is_reported_and_stops_nothing(opened):
    checkpoints, _ = opened(keep_best=1, metric="held_out/loss")
    checkpoints.score(2, 0.5)
    (checkpoints.directory / SCORES).write_text("{")
    again, lines = opened(keep_best=1, metric="held_out/loss")
    assert any("scores.json is damaged" in line for line in lines)
    assert again.score(4, 0.9)


def test_an_empty_folder_has_no_checkpoint(opened):
    assert opened()[0].latest() is None
