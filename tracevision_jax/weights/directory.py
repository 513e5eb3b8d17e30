"""A directory that appears whole or not at all: written beside its place, flushed to the disk, then renamed.

    with new_directory(Path("checkpoints/qwen7b"), overwrite=False) as folder:
        ...                                   # write into `folder`; any exception leaves nothing behind

Whatever ends the block early, Ctrl-C included, removes what was written. Only a killed process leaves its
hidden folder behind (`.NAME.partial-...`), never under the name itself; the next run clears it away.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tracevision_jax.errors import UserError

CHECKPOINT_FILES = ("tracevision.json", "config.json", "original.json")
"""A directory is replaced only if it holds one of these, so that no other work is ever deleted."""


@contextlib.contextmanager
def new_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a folder to write into; at the end it takes the name `target`.

    Raises:
        UserError: see `check_target`; or the disk is full or not writable.
    """
    target = target.resolve()
    check_target(target, overwrite)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(target)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write beside {target}: {error.strerror or error}") from error
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
        folder.chmod(0o777 & ~_umask())
        _flush(folder)
        _take_place(folder, target, overwrite)
    except OSError as error:
        raise UserError(f"writing {target} failed: {error.strerror or error}") from error
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def check_target(target: Path, overwrite: bool) -> None:
    """Refuse a target that holds something, unless it is a checkpoint and may be replaced.

    Raises:
        UserError: it is a file, or not empty.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; name a directory to write")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{target} is not empty; choose another directory, or say --overwrite to replace it")
    if not any((target / name).is_file() for name in CHECKPOINT_FILES):
        raise UserError(f"{target} holds no checkpoint, so it is not replaced even with --overwrite; empty it first")


def _take_place(folder: Path, target: Path, overwrite: bool) -> None:
    check_target(target, overwrite)  # it may have been filled in the meantime
    if target.exists() and any(target.iterdir()):
        old = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        target.rename(old)
        try:
            folder.rename(target)
        except OSError:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(target)
    _flush_one(target.parent)


def _clear_leftovers(target: Path) -> None:
    """Remove folders of killed runs; a living run holds a lock on its own."""
    for folder in target.parent.glob(f".{target.name}.partial-*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(lock)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _flush_one(path)


def _flush_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
