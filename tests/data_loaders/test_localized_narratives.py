"""The reader of Localized Narratives: exported scenes come back whole, every damage has a clear reason."""

import io
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_loaders.sources.image_folders import find_image, image_size
from data_loaders.sources.localized_narratives import LocalizedNarratives
from data_loaders.sources.narrative_record import parse_narrative
from data_loaders.sources.offsets import find_lines, line_index
from data_loaders.sources.protocol import Source
from data_loaders.sources.sidecar import decode_masks, encode_masks, sidecar_path
from data_loaders.synthetic.config import QUESTION_KINDS, SceneConfig
from data_loaders.synthetic.export import export_narratives
from data_loaders.synthetic.scenes import SyntheticScenes
from tests.data_loaders.same import assert_same_sample
from tracevision_jax.errors import UserError
from tracevision_jax.records.sample import BadRecord
from tracevision_jax.trajectory.alignment import align_words

SCENES = SyntheticScenes(
    11, 8, SceneConfig(height=(60, 90), width=(60, 90), questions=QUESTION_KINDS, questions_per_scene=14)
)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder of exported scenes; tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("ln")
    export_narratives(SCENES, folder, "val")
    return folder


def reader(folder: Path, **changes) -> LocalizedNarratives:
    return LocalizedNarratives(folder / "coco_val_localized_narratives.jsonl", folder, **changes)


def record(**changes) -> dict:
    """A small valid record of the released format, with changes; None takes a field out."""
    value = {
        "dataset_id": "mscoco_val2017",
        "image_id": "137576",
        "annotator_id": 93,
        "caption": "In this image a dog below the sky.",
        "timed_caption": [
            {"utterance": "In this image", "start_time": 0.0, "end_time": 0.4},
            {"utterance": "a dog", "start_time": 0.4, "end_time": 0.8},
            {"utterance": "uh", "start_time": 1.0, "end_time": 1.2},
            {"utterance": "the sky", "start_time": 1.5, "end_time": 2.0},
        ],
        "traces": [
            [{"x": 0.1, "y": 0.2, "t": 0.0}, {"x": 0.12, "y": 0.22, "t": 0.25}],
            [{"x": 0.9, "y": -0.02, "t": 1.75}, {"x": 1.03, "y": 0.05, "t": 2.0}],
        ],
        "voice_recording": "coco_val/coco_val_93_137576.ogg",
    }
    value.update(changes)
    return {name: field for name, field in value.items() if field is not None}


def written(folder: Path, *values: dict | bytes, image: Image.Image | None = None) -> LocalizedNarratives:
    """A source of these records, with one image that all of them name."""
    lines = [value if isinstance(value, bytes) else json.dumps(value).encode() for value in values]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "val2017").mkdir(exist_ok=True)
    picture = image or Image.new("RGB", (64, 48), (200, 30, 30))
    picture.save(folder / "val2017" / "000000137576.jpg", format="PNG" if picture.mode != "RGB" else "JPEG")
    return LocalizedNarratives(folder / "a.jsonl", folder)


def test_exported_scenes_are_read_back_whole(exported):
    source = reader(exported)
    assert isinstance(source, Source) and len(source) == len(SCENES)
    for index in range(len(SCENES)):
        assert_same_sample(source[index], SCENES[index], but=("id", "source"))


def test_the_exported_file_has_the_released_fields_and_names(exported):
    lines = (exported / "coco_val_localized_narratives.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert set(first) == set(record())
    assert set(first["timed_caption"][0]) == {"utterance", "start_time", "end_time"}
    assert set(first["traces"][0][0]) == {"x", "y", "t"}
    assert (exported / "val2017" / "000000000001.png").is_file()


def test_an_export_as_jpeg_keeps_the_picture_nearly(tmp_path):
    small = SyntheticScenes(11, 1)
    export_narratives(small, tmp_path, "train", image_format="jpg")
    sample = LocalizedNarratives(tmp_path / "coco_train_localized_narratives.jsonl", tmp_path)[0]
    assert np.abs(sample.frames.astype(int) - small[0].frames).mean() < 3


def test_without_the_sidecar_only_what_the_release_holds_is_left(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    sidecar_path(folder / "coco_val_localized_narratives.jsonl").unlink()
    sample = reader(folder)[0]
    assert sample.regions == () and sample.questions == ()
    assert sample.tasks == {
        "plain_caption",
        "caption_from_trace",
        "trace_from_caption",
        "joint_caption_trace",
    }


def test_a_sidecar_of_another_export_is_refused(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    sidecar = sidecar_path(folder / "coco_val_localized_narratives.jsonl")
    lines = sidecar.read_bytes().splitlines(keepends=True)
    sidecar.write_bytes(b"".join(reversed(lines)))
    with pytest.raises(BadRecord, match="line is of image 8, not of 1") as caught:
        reader(folder)[0]
    assert caught.value.file.endswith("sidecar.jsonl:1")
    sidecar.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(UserError, match=r"7 records and .* has 8"):
        reader(folder)[0]


def test_sizes_agree_with_samples_without_decoding(exported, monkeypatch):
    source = reader(exported)
    samples = [source[k] for k in range(len(source))]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("a picture was decoded"))
    for index, sample in enumerate(samples):
        size = source.sizes(index)
        assert (size.height, size.width, size.frames) == (*sample.size, 1)
        assert size.trace_points == sum(len(stroke) for stroke in sample.strokes)
        assert (size.caption_characters, size.words) == (len(sample.caption), len(sample.words))
        assert (size.regions, size.questions, size.tasks) == (
            len(sample.regions),
            len(sample.questions),
            sample.tasks,
        )


def test_a_released_record_is_read_with_its_strokes_and_points_outside(tmp_path):
    sample = written(tmp_path, record())[0]
    assert sample.source == "ln_coco" and sample.size == (48, 64)
    assert [len(stroke) for stroke in sample.strokes] == [2, 2]
    np.testing.assert_array_equal(sample.strokes[1][0], [0.9, -0.02, 1.75])
    windows = {word.text: word.window for word in align_words(sample.caption, sample.words)}
    assert windows["dog"] == (0.4, 0.8) and windows["sky"] == (1.5, 2.0) and windows["below"] is None


def test_narratives_of_one_image_have_ids_of_their_own(tmp_path):
    source = written(tmp_path, record(), record(annotator_id=7), record())
    assert len({source[k].id for k in range(3)}) == 3


def test_several_files_follow_each_other_and_sidecars_are_no_records(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    shutil.copy(folder / "coco_val_localized_narratives.jsonl", folder / "coco_val_second.jsonl")
    source = LocalizedNarratives(str(folder / "coco_val_*.jsonl"), folder)
    assert len(source) == 16 and len(source.files) == 2
    assert source[8].caption == source[0].caption and source[8].id != source[0].id
    assert source[8].regions == () and source[7].regions


@pytest.mark.parametrize("traces", [[], [[]], None, [[{"x": 0.5, "y": 0.5, "t": 0.0}]]])
def test_missing_traces_leave_a_caption_only(tmp_path, traces):
    sample = written(tmp_path, record(traces=traces))[0]
    assert sample.tasks == {"plain_caption"}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"image_id": "1", ', "invalid JSON"),
        (b"\xff\xfe{}", "invalid JSON"),
        (b"[1, 2, 3]", "must be a JSON object, not a list"),
        (b"[" * 100_000, "invalid JSON"),
        (record(caption=None), "missing caption"),
        (record(caption=None, image_id=None), "missing image_id and caption"),
        (record(caption=["a"]), "caption must be text, not a list"),
        (b'{"image_id": "1", "caption": "\\ud83d"}', "half of a surrogate pair"),
        (record(image_id=True), "image_id must be text"),
        (record(image_id="../../etc/passwd"), "no image id"),
        (record(image_id="1"), "image 1 is missing: looked in"),
        (record(traces=[[{"x": float("nan"), "y": 0, "t": 0}]]), "stroke 1, point 1: a coordinate"),
        (record(traces=[[{"x": 1, "y": 0, "t": 0}, {"x": 0, "y": 0, "t": float("inf")}]]), "point 2: a"),
        (record(traces=[[{"x": 320, "y": 0.2, "t": 0}]]), "must be fractions of the image"),
        (record(traces=[[{"x": 0.1, "t": 0}]]), "must be a list of points with numbers x, y and t"),
        (record(traces=[[{"x": "left", "y": 0, "t": 0}]]), "must be a list of points with numbers"),
        (record(traces=[[[0.1, 0.2, 0.3]]]), "must be a list of points with numbers"),
        (record(traces={"x": 1}), "traces must be a list, not an object"),
        (record(timed_caption=[{"utterance": "a", "start_time": 0}]), "utterance 1 must have"),
        (record(timed_caption=[{"utterance": "a", "start_time": 2, "end_time": 1}]), "ends at 1.0 s, before"),
        (
            record(timed_caption=[{"utterance": "a", "start_time": float("nan"), "end_time": 1}]),
            "utterance 1 start_time is nan",
        ),
    ],
)  # fmt: skip
def test_a_bad_record_says_why_and_where(tmp_path, line, reason):
    source = written(tmp_path, record(), line)
    source[0]
    with pytest.raises(BadRecord) as caught:
        source[1]
    assert reason in caught.value.reason
    assert caught.value.file == f"{tmp_path / 'a.jsonl'}:2"


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"", "zero bytes"),
        (b"not an image at all", "no format that Pillow knows"),
        (encoded(Image.effect_noise((64, 64), 90), "JPEG")[:900], "damaged or truncated"),
    ],
)
def test_a_bad_image_says_why_and_where(tmp_path, contents, reason):
    source = written(tmp_path, record())
    file = tmp_path / "val2017" / "000000137576.jpg"
    file.write_bytes(contents)
    with pytest.raises(BadRecord) as caught:
        source[0]
    assert reason in caught.value.reason
    assert caught.value.file == str(file) and caught.value.record.startswith("137576/")


@given(
    mode=st.sampled_from(["L", "P", "RGBA", "LA", "I;16", "RGB", "1"]),
    size=st.sampled_from([(1, 1), (4000, 1), (1, 4000), (37, 5)]),
    seed=st.integers(0, 100),
)
def test_pictures_of_every_kind_and_shape_are_read(tmp_path_factory, mode, size, seed):
    """1 x 1, 1 x 4000, greyscale, palette, alpha, 16 bits: the sample has the size that the index says."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0]), np.uint8)
    wide = Image.fromarray(noise.astype(np.uint16) * 257)
    image = wide if mode == "I;16" else Image.fromarray(noise).convert(mode)
    source = written(tmp_path_factory.mktemp("kinds"), record(), image=image)
    sample = source[0]
    assert sample.frames.shape == (1, size[1], size[0], 3) and sample.frames.dtype == np.uint8
    assert (source.sizes(0).height, source.sizes(0).width) == sample.size
    if mode in ("L", "I;16", "RGBA", "LA"):
        np.testing.assert_allclose(sample.frames[0, ..., 0], noise, atol=1)


def test_sizes_of_turned_photographs_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    source = written(tmp_path, record())
    Image.new("RGB", (64, 48)).save(tmp_path / "val2017" / "000000137576.jpg", exif=exif)
    assert source[0].size == (64, 48) == (source.sizes(0).height, source.sizes(0).width)
    assert image_size(tmp_path / "val2017" / "000000137576.jpg") == (64, 48)


@pytest.mark.parametrize(
    ("dataset", "image_id", "split", "file"),
    [
        ("coco", "137576", "val", "val2017/000000137576.jpg"),
        ("coco", "9", "train", "images/train2017/000000000009.jpg"),
        ("coco", "9", "", "000000000009.png"),
        ("ade20k", "ADE_train_00000001", "train", "images/training/ADE_train_00000001.jpg"),
        ("ade20k", "ADE_val_00000001", "val", "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg"),
        ("flickr30k", "1000092795", "train", "flickr30k-images/1000092795.jpg"),
        ("flickr30k", "1000092795", "train", "1000092795.jpg"),
        ("open_images", "a1b2c3", "train", "train_a/a1b2c3.jpg"),
        ("open_images", "a1b2c3", "val", "validation/a1b2c3.jpg"),
        ("open_images", "a1b2c3", "test", "test/a1b2c3.jpg"),
    ],
)
def test_images_are_found_in_the_usual_folders(tmp_path, dataset, image_id, split, file):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"here")
    assert find_image(tmp_path, dataset, image_id, split) == tmp_path / file


def test_the_index_is_kept_and_made_anew_when_the_file_changes(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"a": 1}\n\n{"b": 2}\r\n\r\n{"c": 3}')
    index = line_index(file)
    assert [json.loads(index.read(k)) for k in range(3)] == [{"a": 1}, {"b": 2}, {"c": 3}]
    assert index.numbers.tolist() == [1, 3, 5]
    monkeypatch.setattr("data_loaders.sources.offsets.find_lines", lambda _: pytest.fail("read again"))
    assert line_index(file).starts.tolist() == index.starts.tolist()
    monkeypatch.undo()
    file.write_bytes(b'{"a": 1}\n{"longer": 2}\n')
    assert len(line_index(file)) == 2
    kept = tmp_path / ".a.jsonl.offsets.npz"
    kept.write_bytes(kept.read_bytes()[:50])
    assert len(line_index(file)) == 2, "a damaged index is made anew"


def test_an_index_goes_to_the_cache_where_the_folder_cannot_be_written(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"{}\n")
    line_index(file, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert not (tmp_path / ".a.jsonl.offsets.npz").exists()


@given(st.lists(st.text(alphabet="ab \u00e9\U0001f600", max_size=6)), st.integers(1, 40))
def test_lines_are_found_as_python_finds_them(tmp_path_factory, lines, chunk):
    file = tmp_path_factory.mktemp("lines") / "a.jsonl"
    text = "\n".join(f'["{line}"]' for line in lines).encode()
    file.write_bytes(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_loaders.sources.offsets.CHUNK", chunk)
        starts, numbers = find_lines(file)
    assert len(starts) == len(lines) and numbers.tolist() == list(range(1, len(lines) + 1))
    assert [text[start:].split(b"\n")[0] for start in starts] == (text.split(b"\n") if lines else [])


def test_a_source_goes_to_a_worker_process_without_its_indices(exported):
    source = reader(exported)
    source[0]
    packed = pickle.dumps(source)
    assert len(packed) < 2000
    assert_same_sample(pickle.loads(packed)[3], source[3])


def test_the_fingerprint_changes_with_the_files(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    before = reader(folder).fingerprint()
    assert reader(folder).fingerprint() == before
    with open(folder / "coco_val_localized_narratives.jsonl", "ab") as file:
        file.write(b"\n")
    assert reader(folder).fingerprint() != before


@given(
    st.integers(1, 3).flatmap(
        lambda frames: st.lists(st.booleans(), min_size=frames * 12, max_size=frames * 12).map(
            lambda bits: np.array(bits).reshape(frames, 4, 3)
        )
    )
)
def test_masks_survive_the_sidecar(masks):
    np.testing.assert_array_equal(decode_masks(json.loads(json.dumps(encode_masks(masks)))), masks)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(["dataset_id", "image_id", "annotator_id", "caption", "timed_caption", "traces"])


@given(FIELDS, JSON)
def test_any_value_in_any_field_is_read_or_refused(field, value):
    line = json.dumps({**record(), field: value}).encode()
    try:
        parsed = parse_narrative(line)
    except BadRecord as bad:
        assert bad.reason
    else:
        assert all(np.isfinite(stroke).all() for stroke in parsed.strokes)
        assert all(word.start <= word.end for word in parsed.words)


@given(st.lists(st.lists(st.tuples(st.floats(-1, 2), st.floats(-1, 2), st.floats(0, 1e4)), max_size=6), max_size=4))
def test_traces_are_read_exactly_however_they_lie(strokes):
    """Empty strokes, unordered and repeated times, points outside the image: as recorded."""
    traces = [[{"x": x, "y": y, "t": t} for x, y, t in stroke] for stroke in strokes]
    parsed = parse_narrative(json.dumps(record(traces=traces)).encode())
    kept = [stroke for stroke in strokes if stroke]
    assert len(parsed.strokes) == len(kept)
    for stroke, points in zip(parsed.strokes, kept, strict=True):
        np.testing.assert_array_equal(stroke, np.array(points))


def test_a_trace_of_a_hundred_thousand_points_is_read(tmp_path):
    points = [{"x": 0.5, "y": 0.5, "t": k / 60} for k in range(100_000)]
    assert written(tmp_path, record(traces=[points])).sizes(0).trace_points == 100_000


@pytest.mark.parametrize(
    "caption",
    ["", "\U0001f600 \u4f60\u597d \u05e9\u05dc\u05d5\u05dd", "<traj> </p> [SEG]", "x" * 50_000],
)
def test_any_text_is_a_caption(tmp_path, caption):
    sample = written(tmp_path, record(caption=caption))[0]
    assert sample.caption == caption and ("plain_caption" in sample.tasks) == bool(caption)


def test_mistakes_in_arguments_are_explained(exported, tmp_path):
    file = exported / "coco_val_localized_narratives.jsonl"
    with pytest.raises(UserError, match=r"no dataset 'cocoa'\. Did you mean 'coco'"):
        LocalizedNarratives(file, exported, dataset="cocoa")
    with pytest.raises(UserError, match="no folder of images"):
        LocalizedNarratives(file, exported / "absent")
    with pytest.raises(UserError, match=r"Did you mean 'coco_val_localized_narratives\.jsonl'"):
        LocalizedNarratives(exported / "coco_val_localised_narratives.jsonl", exported)
    with pytest.raises(UserError, match="no annotation files given"):
        LocalizedNarratives([], exported)
    (tmp_path / "a.jsonl").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(UserError, match="compressed with gzip"):
        len(LocalizedNarratives(tmp_path / "a.jsonl", tmp_path))


def test_an_index_past_the_end_is_refused(exported):
    for index in (8, -1):
        with pytest.raises(IndexError, match=f"record {index} of 8"):
            reader(exported)[index]


@pytest.mark.parametrize(
    ("scenes", "options", "message"),
    [
        (SyntheticScenes(0, 1, SceneConfig(frames=2)), {"split": "val"}, "still images"),
        (SyntheticScenes(0, 1), {"split": "dev"}, "no split 'dev'"),
        (SyntheticScenes(0, 1), {"split": "val", "image_format": "gif"}, "no image format 'gif'"),
    ],
)
def test_an_export_that_cannot_be_is_refused(tmp_path, scenes, options, message):
    with pytest.raises(UserError, match=message):
        export_narratives(scenes, tmp_path, **options)


def test_an_interrupted_export_leaves_no_narratives_file(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "data_loaders.synthetic.export.encode_sidecar", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        export_narratives(SyntheticScenes(0, 2), tmp_path, "val")
    assert not (tmp_path / "coco_val_localized_narratives.jsonl").exists()
