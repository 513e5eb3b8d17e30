"""Checkpoints: complete before they count, hashed, the last k kept, damaged ones passed over."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tracevision_jax.training.checkpoints import Checkpoints
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

    def open_it(keep=3):
        lines = []
        everything.append(Checkpoints(tmp_path / "checkpoints", keep, lines.append))
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


def test_a_failed_save_is_raised_and_removes_nothing_older(opened, monkeypatch):
    checkpoints, _ = opened(keep=1)
    checkpoints.save(1, tree_of(1), META)
    checkpoints.wait()

    def full_disk(directory):
        raise OSError("No space left on device")

    monkeypatch.setattr(hashes, "write_hashes", full_disk)
    checkpoints.save(2, tree_of(2), META)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.wait()
    monkeypatch.undo()
    assert checkpoints.latest() == 1


def test_an_empty_folder_has_no_checkpoint(opened):
    assert opened()[0].latest() is None
