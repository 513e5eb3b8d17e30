"""Finds the narratives files of a dataset in a folder, by the names of the release, and tells their splits.

Names: `coco_train_localized_narratives-00000-of-00004.jsonl`, `coco_val_localized_narratives.jsonl`,
`open_images_train_v6_localized_narratives-00000-of-00010.jsonl`, `flickr30k_test_...`,
`ade20k_validation_...`.
"""

import re
from pathlib import Path

from data_loaders.sources.image_folders import DATASETS
from data_loaders.sources.sidecar import SUFFIX
from tracevision_jax.errors import UserError
from tracevision_jax.nearest import suggest

SPLIT_OF = {"train": "train", "val": "val", "validation": "val", "test": "test"}
NAME = re.compile(r"(?P<dataset>[a-z0-9_]+?)_(?P<split>train|validation|val|test)(_v6)?_localized_narratives.*\.jsonl")
PART = re.compile(r"-(\d{5})-of-(\d{5})\.jsonl$")
DEPTH = ("", "*/", "*/*/")
"""The folder itself, and two levels below it."""


def narrative_files(folder: Path, dataset: str) -> dict[str, list[Path]]:
    """Split (train, val, test) -> its files in order.

    Raises:
        UserError: no such dataset, folder or file, or one of several parts is missing.
    """
    if dataset not in DATASETS:
        known = ", ".join(f"ln_{name}" for name in DATASETS)
        raise UserError(f"no dataset 'ln_{dataset}'.{suggest(dataset, DATASETS)} Known: {known}")
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: give the one that holds the narratives of {dataset}, as downloaded")
    found: dict[str, list[Path]] = {}
    for file in sorted({file for level in DEPTH for file in folder.glob(f"{level}*.jsonl")}):
        match = NAME.fullmatch(file.name)
        if match and match["dataset"] == dataset and not file.name.endswith(SUFFIX):
            found.setdefault(SPLIT_OF[match["split"]], []).append(file)
    if not found:
        raise UserError(
            f"no file named {dataset}_SPLIT_localized_narratives*.jsonl in {folder} or two levels "
            "below: get them from https://google.github.io/localized-narratives"
        )
    for split, files in found.items():
        _check_parts(dataset, split, files)
    return found


def _check_parts(dataset: str, split: str, files: list[Path]) -> None:
    """See that all parts of a split that was released in several files are there: nobody would miss one."""
    parts = [(int(match[1]), int(match[2])) for file in files if (match := PART.search(file.name))]
    whole = {total for _, total in parts}
    for total in whole:
        missing = sorted(set(range(total)) - {part for part, of in parts if of == total})
        if missing:
            listed = ", ".join(f"{part:05d}" for part in missing)
            raise UserError(
                f"the {split} split of {dataset} comes in {total} files, and these are missing: {listed}. "
                "Download them, or rename the files that are there so that no name ends in -of-NNNNN"
            )
    if len(whole) > 1 or (parts and len(parts) < len(files)):
        names = ", ".join(file.name for file in files)
        raise UserError(f"the {split} split of {dataset} is there twice, in parts and whole: {names}")
