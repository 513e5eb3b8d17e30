"""`tracevision data`: export, build, show, and its messages."""

from pathlib import Path

import pytest
from PIL import Image

from data_loaders.sources.released_files import narrative_files
from data_loaders.sources.tfds import TfdsNarratives
from launch.cli import main
from tracevision_jax.errors import UserError


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "scenes"
    arguments = ["--to", str(folder), "--count", "5", "--held-out", "3", "--size", "48", "64"]
    assert main(["data", "export-synthetic", *arguments]) == 0
    return folder


def test_scenes_are_exported_built_and_read_back(exported, tmp_path, capsys):
    command = ["data", "build", "ln_coco", "--from", str(exported), "--to", str(tmp_path), "--workers", "2"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "train: 5 records, 1 files" in shown.out and "val: 3 records" in shown.out
    assert "records/s" in shown.err
    assert len(TfdsNarratives(tmp_path / "ln_coco", "val")) == 3
    assert main(command) == 0, "the same command again finds it done"


def test_only_the_splits_asked_for_are_built(exported, tmp_path, capsys):
    command = ["data", "build", "ln_coco", "--from", str(exported), "--to", str(tmp_path), "--splits", "val"]
    assert main(command) == 0
    assert "train" not in capsys.readouterr().out
    assert main([*command[:-1], "test"]) == 2
    assert "no test split of ln_coco" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["synthetic", "file", "folder", "built", "video"])
def test_a_record_of_any_source_is_drawn(exported, tmp_path, capsys, kind):
    if kind == "built":
        main(["data", "build", "ln_coco", "--from", str(exported), "--to", str(tmp_path)])
    source = {
        "synthetic": ["synthetic"],
        "video": ["synthetic", "--frames", "3"],
        "file": [str(exported / "coco_val_localized_narratives.jsonl")],
        "folder": [str(exported), "--split", "val"],
        "built": [str(tmp_path / "ln_coco"), "--split", "val"],
    }[kind]
    out = tmp_path / "shown.png"
    assert main(["data", "show", *source, "--index", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "trace points" in shown and "tasks: " in shown and f"drawn to {out}" in shown
    with Image.open(out) as picture:
        assert min(picture.size) > 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["build", "ln_cocoa", "--from", ".", "--to", "b"], "Did you mean 'ln_coco'"),
        (["build", "ln_coco", "--from", "absent", "--to", "b"], "no folder absent"),
        (["build", "ln_coco", "--from", ".", "--to", "gs://bucket/x"], "then copy the result to the bucket"),
        (["build", "ln_coco", "--from", ".", "--to", "b", "--shard-records", "0"], "at least 1"),
        (["show", "nothing-here"], "no source 'nothing-here'"),
        (["show", "synthetic", "--index", "-1"], "no record -1"),
        (["export-synthetic", "--to", "x", "--count", "0"], "nothing to export"),
        (["export-synthetic", "--to", "x", "--questions", "whatt"], "Did you mean 'what'"),
    ],
)
def test_mistakes_are_told_with_status_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", *arguments]) == 2
    assert message in capsys.readouterr().err


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


def test_released_files_are_found_by_name_with_their_splits(tmp_path):
    touch(
        tmp_path,
        "coco_val_localized_narratives.jsonl",
        "coco_val_localized_narratives.sidecar.jsonl",
        "ln/coco_train_localized_narratives-00000-of-00002.jsonl",
        "ln/coco_train_localized_narratives-00001-of-00002.jsonl",
        "ln/open_images_train_v6_localized_narratives-00000-of-00001.jsonl",
        "ln/deep/ade20k_validation_localized_narratives.jsonl",
        "ln/notes.jsonl",
    )
    coco = narrative_files(tmp_path, "coco")
    assert {split: len(files) for split, files in coco.items()} == {"val": 1, "train": 2}
    assert list(narrative_files(tmp_path, "open_images")) == ["train"]
    assert list(narrative_files(tmp_path, "ade20k")) == ["val"]
    with pytest.raises(UserError, match="no file named flickr30k_SPLIT"):
        narrative_files(tmp_path, "flickr30k")


def test_a_split_with_a_missing_part_is_refused(tmp_path):
    touch(tmp_path, *(f"coco_train_localized_narratives-0000{k}-of-00004.jsonl" for k in (0, 1, 3)))
    with pytest.raises(UserError, match="comes in 4 files, and these are missing: 00002"):
        narrative_files(tmp_path, "coco")


def test_a_split_that_is_there_twice_is_refused(tmp_path):
    touch(
        tmp_path,
        "coco_train_localized_narratives-00000-of-00001.jsonl",
        "coco_train_localized_narratives.jsonl",
    )
    with pytest.raises(UserError, match="there twice"):
        narrative_files(tmp_path, "coco")
