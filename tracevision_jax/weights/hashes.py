"""Hashes of the files of a checkpoint: written when it is complete, checked before it is read.

Orbax restores a file with a flipped byte without a word; these hashes find it, and a checkpoint without them
was never finished.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FILE = "sha256.json"


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_hashes(directory: Path) -> None:
    """Hash every file below `directory` into its `sha256.json`, which appears whole or not at all."""
    files = _files(directory)
    with ThreadPoolExecutor() as pool:
        digests = pool.map(lambda name: sha256(directory / name), files)
        content = json.dumps(dict(zip(files, digests, strict=True)), indent=0)
    write_whole(directory / FILE, content)


def faults(directory: Path) -> list[str]:
    """What is wrong with a directory since `write_hashes`: a line for each bad file, none if it is whole."""
    manifest = directory / FILE
    if not manifest.is_file():
        return [f"{manifest} is missing: the checkpoint was not finished"]
    try:
        expected: dict[str, str] = json.loads(manifest.read_text())
    except ValueError:
        return [f"{manifest} is not readable JSON"]

    def fault(name: str) -> str | None:
        path = directory / name
        if not path.is_file():
            return f"{path} is missing"
        return None if sha256(path) == expected[name] else f"{path} has changed since it was written"

    with ThreadPoolExecutor() as pool:
        return [line for line in pool.map(fault, expected) if line]


def write_whole(path: Path, content: str) -> None:
    """Write a text file so that a crash leaves the old one or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _files(directory: Path) -> list[str]:
    return sorted(
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file() and path.name != FILE
    )
