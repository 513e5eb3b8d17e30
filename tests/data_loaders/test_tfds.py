"""TFDS datasets of Localized Narratives: the samples of the released files, however often interrupted."""

import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from data_loaders.sources.lengths import LengthIndex
from data_loaders.sources.localized_narratives import LocalizedNarratives, NarrativeParts
from data_loaders.sources.narrative_record import NarrativeRecord
from data_loaders.sources.protocol import RecordSize, Source
from data_loaders.sources.tfds import TfdsNarratives
from data_loaders.synthetic.config import QUESTION_KINDS, SceneConfig
from data_loaders.synthetic.export import export_narratives
from data_loaders.synthetic.scenes import SyntheticScenes
from data_loaders.tfds_builders import build
from data_loaders.tfds_builders.build import BuiltSplit, Target, build_split
from data_loaders.tfds_builders.narratives import (
    VERSION,
    NarrativeInput,
    from_example,
    narrative_features,
    to_example,
)
from tests.data_loaders.same import assert_same_sample
from tracevision_jax.errors import UserError
from tracevision_jax.records.sample import TimedWord

COUNT = 11
SCENES = SyntheticScenes(
    7, COUNT, SceneConfig(height=(48, 64), width=(48, 64), questions=QUESTION_KINDS, questions_per_scene=6)
)
FILE = "coco_val_localized_narratives.jsonl"


@pytest.fixture(scope="module")
def released(tmp_path_factory) -> Path:
    """A folder of released files; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("released")
    export_narratives(SCENES, folder, "val")
    return folder


def built(source: LocalizedNarratives, root: Path, split: str = "val", per_shard: int = 4) -> BuiltSplit:
    target = Target(root / "ln_coco" / VERSION, "ln_coco")
    quiet = Console(file=io.StringIO())
    return build_split(NarrativeInput(source), narrative_features(), target, split, 2, per_shard, quiet)


@pytest.fixture(scope="module")
def dataset(released, tmp_path_factory) -> Path:
    """A built dataset's folder."""
    root = tmp_path_factory.mktemp("tfds")
    assert built(LocalizedNarratives(released / FILE, released), root).records == COUNT
    return root / "ln_coco"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_built_dataset_gives_the_samples_of_the_released_files(released, dataset):
    source, twin = LocalizedNarratives(released / FILE, released), TfdsNarratives(dataset, "val")
    assert isinstance(twin, Source) and len(twin) == len(source) and twin.name == source.name
    for index in range(COUNT):
        assert_same_sample(twin[index], source[index])
        assert twin.sizes(index) == source.sizes(index)


def test_tfds_reads_it_by_name_and_without_our_code(dataset):
    script = (
        "import sys, tensorflow_datasets as tfds\n"
        "records = tfds.data_source(sys.argv[1], data_dir=sys.argv[2], split='val')\n"
        "assert len(records) == 11 and records[10]['image'].ndim == 3\n"
        "assert records[2]['trace'].shape[1] == 3 and 'tensorflow' not in sys.modules\n"
        "print(records[2]['caption'].decode())\n"
    )
    command = [sys.executable, "-c", script, "ln_coco", str(dataset.parent)]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=dataset)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.strip() == SCENES[2].caption


def test_records_are_cut_evenly_into_shards_in_order(dataset):
    state = json.loads((dataset / VERSION / "build.json").read_text())
    assert state["splits"]["val"]["finished"]["shard_lengths"] == [4, 3, 4]
    assert not [name for name in contents(dataset) if name.endswith(".part") or name.startswith(".ln_coco")]


class Interrupted(Exception):
    """Stands for a process that dies."""


@pytest.mark.parametrize("after", [0, 3, 4, 5, 9])
def test_an_interrupted_build_continues_to_the_same_files(released, dataset, tmp_path, monkeypatch, after):
    source = LocalizedNarratives(released / FILE, released)
    encoded, seen = NarrativeInput.encoded, []

    def stop_after(self, index):
        if index >= after:
            raise Interrupted
        return encoded(self, index)

    monkeypatch.setattr(NarrativeInput, "encoded", stop_after)
    with pytest.raises(Interrupted):
        built(source, tmp_path)
    with pytest.raises(UserError, match="is not finished: run the same"):
        TfdsNarratives(tmp_path / "ln_coco", "val")

    def watch(self, index):
        seen.append(index)
        return encoded(self, index)

    monkeypatch.setattr(NarrativeInput, "encoded", watch)
    built(source, tmp_path)
    first = 0 if after < 4 else 4 if after < 7 else 7
    assert sorted(seen) == list(range(first, COUNT)), "finished shards are not made again"
    assert contents(tmp_path / "ln_coco") == contents(dataset)


@pytest.mark.parametrize("place", ["replace", "_join", "_write_metadata", "_remove_parts"])
def test_a_build_that_dies_while_finishing_is_finished_by_the_next(released, dataset, tmp_path, monkeypatch, place):
    source = LocalizedNarratives(released / FILE, released)

    def die(*_):
        raise Interrupted

    with monkeypatch.context() as patch:
        if place == "replace":
            # Of the first shard: its parts of the indices are there, its records still under another name.
            replace = build.os.replace
            patch.setattr(build.os, "replace", lambda a, b: die() if "array_record" in str(b) else replace(a, b))
        else:
            patch.setattr(build, place, die)
        with pytest.raises(Interrupted):
            built(source, tmp_path)
    built(source, tmp_path)
    assert contents(tmp_path / "ln_coco") == contents(dataset)


def test_a_killed_process_leaves_what_the_next_one_continues(released, dataset, tmp_path):
    script = (
        "import os, sys; from pathlib import Path\n"
        "from data_loaders.sources.localized_narratives import LocalizedNarratives\n"
        "from data_loaders.tfds_builders.build import Target, build_split\n"
        "from data_loaders.tfds_builders.narratives import *\n"
        "folder, root = Path(sys.argv[1]), Path(sys.argv[2])\n"
        "encoded = NarrativeInput.encoded\n"
        "NarrativeInput.encoded = lambda s, k: os.kill(os.getpid(), 9) if k == 9 else encoded(s, k)\n"
        f"source = NarrativeInput(LocalizedNarratives(folder / '{FILE}', folder))\n"
        "target = Target(root / 'ln_coco' / VERSION, 'ln_coco')\n"
        "build_split(source, narrative_features(), target, 'val', 1, 4)\n"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", script, str(released), str(tmp_path)]
    assert subprocess.run(command, capture_output=True, cwd=root).returncode == -9
    assert list((tmp_path / "ln_coco" / VERSION).glob(".*.part")), "the killed process was writing a shard"
    built(LocalizedNarratives(released / FILE, released), tmp_path)
    assert contents(tmp_path / "ln_coco") == contents(dataset)


def test_building_again_does_nothing(dataset, released, tmp_path, monkeypatch):
    shutil.copytree(dataset, tmp_path / "ln_coco")
    monkeypatch.setattr(NarrativeInput, "encoded", lambda *_: pytest.fail("a record was read again"))
    assert built(LocalizedNarratives(released / FILE, released), tmp_path).records == COUNT
    assert contents(tmp_path / "ln_coco") == contents(dataset)


def test_another_split_is_added_to_a_built_dataset(released, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "ln_coco")
    export_narratives(SyntheticScenes(8, 3), tmp_path / "more", "train")
    more = LocalizedNarratives(tmp_path / "more" / "coco_train_localized_narratives.jsonl", tmp_path / "more")
    built(more, tmp_path, "train")
    train, val = (TfdsNarratives(tmp_path / "ln_coco", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (3, COUNT)
    assert_same_sample(train[2], more[2])
    assert train.fingerprint() != val.fingerprint()


def test_a_build_from_other_files_is_refused(released, dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "ln_coco")
    shutil.copytree(released, tmp_path / "changed")
    lines = (tmp_path / "changed" / FILE).read_bytes().splitlines(keepends=True)
    (tmp_path / "changed" / FILE).write_bytes(b"".join(lines[:-1]))
    (tmp_path / "changed" / "coco_val_localized_narratives.sidecar.jsonl").unlink()
    with pytest.raises(UserError, match="from other files"):
        built(LocalizedNarratives(tmp_path / "changed" / FILE, tmp_path / "changed"), tmp_path)
    with pytest.raises(UserError, match="from other files"):
        built(LocalizedNarratives(released / FILE, released), tmp_path, per_shard=6)


def test_bad_records_are_left_out_and_listed(released, tmp_path):
    folder = shutil.copytree(released, tmp_path / "released")
    (folder / "val2017" / "000000000002.png").unlink()
    picture = folder / "val2017" / "000000000005.png"
    picture.write_bytes(picture.read_bytes()[:200])
    for number in (8, 9, 10, 11):
        (folder / "val2017" / f"{number:012d}.png").write_bytes(b"")
    source = LocalizedNarratives(folder / FILE, folder)
    outcome = built(source, tmp_path)
    assert (outcome.records, outcome.bad) == (5, 6)
    twin = TfdsNarratives(tmp_path / "ln_coco", "val")
    for index, original in enumerate((0, 2, 3, 5, 6)):
        assert_same_sample(twin[index], source[original])
        assert twin.sizes(index) == source.sizes(original)
    listed = (tmp_path / "ln_coco" / VERSION / "ln_coco-val.bad_records.jsonl").read_text().splitlines()
    bad = [json.loads(line) for line in listed]
    assert [entry["number"] for entry in bad] == [1, 4, 7, 8, 9, 10]
    assert "missing" in bad[0]["reason"] and bad[0]["file"] == f"{folder / FILE}:2"
    assert "damaged or truncated" in bad[1]["reason"] and bad[1]["file"] == str(picture)


def test_a_wrong_folder_of_images_stops_the_build_early(released, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    source = LocalizedNarratives(released / FILE, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no record of the val split can be used; the first one: image 1 is"):
        built(source, tmp_path / "a")
    monkeypatch.setattr(build, "TELLING", 3)
    with pytest.raises(UserError, match="3 records in a row are bad; the first one: image 1 is missing"):
        built(source, tmp_path / "b")
    assert not list((tmp_path / "b").rglob("*.array_record-*"))


def test_a_source_goes_to_a_worker_process_without_open_files(dataset):
    source = TfdsNarratives(dataset, "val")
    source[0]
    packed = pickle.dumps(source)
    assert len(packed) < 1000
    assert_same_sample(pickle.loads(packed)[5], source[5])


def test_mistakes_in_arguments_are_explained(dataset, tmp_path):
    with pytest.raises(UserError, match="no split 'vall'"):
        TfdsNarratives(dataset, "vall")
    with pytest.raises(UserError, match="holds the datasets ln_coco: name one"):
        TfdsNarratives(dataset.parent, "val")
    with pytest.raises(UserError, match="no dataset in"):
        TfdsNarratives(tmp_path / "absent", "val")
    with pytest.raises(UserError, match="is no dataset of version"):
        TfdsNarratives(tmp_path, "val")
    for index in (-1, COUNT):
        with pytest.raises(IndexError, match=f"record {index} of {COUNT}"):
            TfdsNarratives(dataset, "val")[index]


def test_a_damaged_length_index_is_refused(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "ln_coco")
    file = tmp_path / "ln_coco" / VERSION / "ln_coco-val.lengths.npz"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="build the dataset again"):
        TfdsNarratives(tmp_path / "ln_coco", "val").sizes(0)


SIZES = st.builds(
    RecordSize,
    height=st.integers(1, 4000),
    width=st.integers(1, 4000),
    words=st.integers(0, 99),
    trace_points=st.integers(0, 10**6),
    tasks=st.frozensets(st.sampled_from(["plain_caption", "trace_qa", "dialogue"])),
)


@given(st.lists(SIZES, max_size=9), st.integers(0, 9))
def test_a_length_index_gives_back_what_was_put_in(tmp_path_factory, sizes, cut):
    file = tmp_path_factory.mktemp("lengths") / "a.npz"
    LengthIndex.joined([LengthIndex.of(sizes[:cut]), LengthIndex.of(sizes[cut:])]).save(file)
    index = LengthIndex.load(file)
    assert [index[k] for k in range(len(index))] == sizes
    with pytest.raises(IndexError):
        index[len(sizes)]


NUMBERS = st.floats(-1, 2, allow_nan=False)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(
    caption=TEXT,
    words=st.lists(st.tuples(TEXT, NUMBERS, NUMBERS), max_size=4),
    strokes=st.lists(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=5), max_size=3),
    image=st.binary(min_size=1, max_size=50),
)
def test_any_record_survives_the_encoding_bit_for_bit(caption, words, strokes, image):
    import tensorflow_datasets as tfds

    record = NarrativeRecord(
        dataset_id="mscoco_val2017",
        image_id="17",
        annotator_id=3,
        caption=caption,
        words=tuple(TimedWord(*word) for word in words),
        strokes=tuple(np.array(stroke, np.float64) for stroke in strokes),
    )
    parts = NarrativeParts("17/3/file:1", record, None, (), (), b"")
    features = narrative_features()
    serializer = tfds.core.ExampleSerializer(features.get_serialized_info())
    line = serializer.serialize_example(features.encode_example(to_example(parts, image)))
    read = features.deserialize_example_np(line, decoders={"image": tfds.decode.SkipDecoding()})
    twin, same_image = from_example(read)
    assert same_image == image and twin.id == parts.id
    assert (twin.record.caption, twin.record.words) == (record.caption, record.words)
    assert len(twin.record.strokes) == len(record.strokes)
    for one, other in zip(twin.record.strokes, record.strokes, strict=True):
        np.testing.assert_array_equal(one, other)
