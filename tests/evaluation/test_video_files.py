"""Masks of videos in files: every kind of PNG, folders in DAVIS layout, SA-V's JSON read and written."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from pycocotools import mask as coco

from evaluation.metrics import run_lengths, video
from evaluation.metrics.video_files import DavisMasklets, SavMasklets, decode, read_ids, write_masklets
from evaluation.metrics.video_scoring import Pair, score_pair
from tests.evaluation import video_reference as naive
from tracevision_jax.errors import UserError


def save_palette(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(ids, np.uint8))
    image.putpalette([(37 * value) % 256 for value in range(768)])
    image.save(path)
    return path


def save_grey(path, values, bits):
    """A grey PNG of so many bits a pixel, written chunk by chunk: Pillow writes 8 bits at least."""
    rows = []
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows.append(b"\0" + bytes(int(text[place : place + 8], 2) for place in range(0, len(text), 8)))
    header = struct.pack(">IIBBBBB", len(values[0]), len(values), bits, 0, 0, 0, 0)
    encoded = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(rows))), (b"IEND", b"")):
        encoded += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(encoded)
    return path


def save_sequence(folder, frames):
    for number, ids in enumerate(frames):
        save_palette(folder / f"{number:05}.png", ids)
    return DavisMasklets(folder)


def rle(mask):
    encoded = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode()}


@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_palette_indices_are_read_as_they_were_written(tmp_path_factory, ids):
    path = save_palette(tmp_path_factory.mktemp("masks") / "a.png", ids)
    assert (read_ids(path) == ids).all()


def test_a_palette_of_few_colours_is_stored_in_few_bits_and_read_alike(tmp_path):
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    image = Image.fromarray(ids)
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "a.png", bits=2)
    assert (tmp_path / "a.png").read_bytes()[24] == 2
    assert (read_ids(tmp_path / "a.png") == ids).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_values_are_read_as_they_are_stored(tmp_path, rng, bits):
    """Pillow shows 1 of 2 bits as 85 and 1 of 4 bits as 17."""
    values = rng.integers(0, 2**bits, (5, 7))
    assert (read_ids(save_grey(tmp_path / "a.png", values, bits)) == values).all()


def as_bytes(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8))
BROKEN = {
    "nothing": (b"", "is empty (zero bytes)"),
    "a text": (b"hello", "is not a PNG file"),
    "a JPEG": (as_bytes(NOISE, "JPEG"), "is not a PNG file"),
    "a signature": (as_bytes(NOISE)[:8], "is damaged or truncated"),
    "half a header": (as_bytes(NOISE)[:20], "is damaged or truncated"),
    "half a picture": (as_bytes(NOISE)[:2000], "is damaged or truncated"),
    "flipped bits": (as_bytes(NOISE)[:60] + b"\xff\x00\xff" + as_bytes(NOISE)[63:], "is damaged or truncated"),
    "colour": (as_bytes(NOISE.convert("RGB")), "is in colour, so its pixels are no object ids; save it as a palette"),
    "colour and transparency": (as_bytes(NOISE.convert("RGBA")), "is in colour"),
    "grey and transparency": (as_bytes(NOISE.convert("LA")), "is grey with transparency"),
    "16 bits": (as_bytes(Image.fromarray(np.full((4, 4), 300, np.uint16))), "is grey of 16 bits"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_holds_no_ids_is_refused_with_its_name_and_the_reason(tmp_path, kind):
    content, reason = BROKEN[kind]
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_ids(tmp_path / "a.png")
    assert str(tmp_path / "a.png") in str(refused.value) and reason in str(refused.value)


@given(st.integers(0, 10**6), st.binary(min_size=1, max_size=4))
def test_any_damage_to_a_file_is_refused_or_harmless(tmp_path_factory, place, damage):
    encoded = as_bytes(NOISE)
    place %= len(encoded)
    path = tmp_path_factory.mktemp("masks") / "a.png"
    path.write_bytes(encoded[:place] + damage + encoded[place + len(damage) :])
    try:
        assert read_ids(path).ndim == 2
    except UserError as error:
        assert str(path) in str(error)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"b\.png cannot be read: No such file"):
        read_ids(tmp_path / "b.png")


def test_frames_are_in_the_order_of_their_numbers_or_else_of_their_names(tmp_path):
    for folder, names in (("numbers", ["10", "9", "008", "1"]), ("names", ["b10", "b9", "a"])):
        for name in names:
            save_palette(tmp_path / folder / f"{name}.png", [[0]])
        (tmp_path / folder / "notes.txt").write_text("no frame")
        (tmp_path / folder / "._1.png").write_text("what a file manager leaves")
    assert DavisMasklets(tmp_path / "numbers").names == ["1", "008", "9", "10"]
    assert DavisMasklets(tmp_path / "names").names == ["a", "b10", "b9"]


def test_the_objects_of_a_folder_are_the_ids_up_to_the_highest_in_its_first_mask(tmp_path):
    masklets = save_sequence(tmp_path / "a", [[[0, 3, 1, 255]], [[4, 2, 0, 255]]])
    assert masklets.objects == [1, 2, 3] and masklets.void == {255}
    frame = masklets.read("00001")
    assert frame.size == (1, 4) and set(frame.masks) == {2, 4, 255}
    assert frame.mask(2).tolist() == [[False, True, False, False]] and not frame.mask(3).any()


def test_white_is_an_object_where_the_first_mask_holds_nothing_else(tmp_path):
    masklets = save_sequence(tmp_path / "a", [[[0, 255]], [[0, 1]]])
    assert masklets.objects == [255] and masklets.void == set()
    assert save_sequence(tmp_path / "b", [[[0, 0]], [[0, 1]]]).objects == []


@given(arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_run_lengths_decode_to_the_mask_that_was_encoded(mask):
    assert (decode(run_lengths.parse(rle(mask))) == mask).all()


def test_masklets_that_were_written_are_read_back(tmp_path, rng):
    masks = rng.random((6, 3, 8, 11)) < 0.4
    masks[:2, 1] = False
    path = tmp_path / "clip.json"
    write_masklets(path, "clip", [4, 0, 7], iter(masks), frames_per_s=24.0)
    masklets = SavMasklets(path)
    assert masklets.objects == [4, 0, 7] and masklets.names == list("012345")
    for number, frame in enumerate(masks):
        read = masklets.read(str(number))
        assert read.size == (8, 11)
        assert all((read.mask(identity) == mask).all() for identity, mask in zip((4, 0, 7), frame, strict=True))
    assert set(masklets.read("0").masks) == {4, 7}, "a mask without pixels is out of sight"
    content = json.loads(path.read_text())
    assert content["video_id"] == "clip" and content["masklet_num"] == 3 and content["video_duration"] == 0.25
    assert content["masklet_first_appeared_frame"] == [0, 2, 0]
    assert content["masklet_visibility_changes"] == [0, 0, 0], "coming into sight for the first time is no change"


def test_an_object_that_is_never_in_sight_and_a_video_without_objects_are_written(tmp_path):
    write_masklets(tmp_path / "a.json", "a", [0], np.zeros((2, 1, 3, 4), bool), 10.0, video_frame_count=8)
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["masklet_first_appeared_frame"] == [None] and content["masklet_size_abs"] == [0]
    assert content["masklet_visibility_changes"] == [0] and content["video_duration"] == 0.8
    write_masklets(tmp_path / "b.json", "b", [], np.zeros((2, 0, 3, 4), bool), 10.0)
    assert SavMasklets(tmp_path / "b.json").read("1") == ((3, 4), {})


@pytest.mark.parametrize(
    ("ids", "frames", "reason"),
    [
        ([0], [], "no frame"),
        ([1, 1], [np.zeros((2, 3, 4), bool)], "must differ"),
        ([0, 1], [np.zeros((1, 3, 4), bool)], r"frame 0 has masks of \(1, 3, 4\), but should of \(2, 3, 4\)"),
        ([0], [np.zeros((1, 3, 4), bool), np.zeros((1, 4, 3), bool)], "frame 1 has masks"),
    ],
)
def test_masks_that_make_no_video_are_not_written(tmp_path, ids, frames, reason):
    with pytest.raises(ValueError, match=reason):
        write_masklets(tmp_path / "a.json", "a", ids, frames, 24.0)
    assert not (tmp_path / "a.json").exists()


def test_a_folder_that_is_not_there_is_told_when_writing(tmp_path):
    with pytest.raises(UserError, match="cannot be written: No such file"):
        write_masklets(tmp_path / "none" / "a.json", "a", [0], np.zeros((1, 1, 3, 4), bool), 24.0)


EMPTY = {"size": [2, 3], "counts": [6]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"a": 1}, '"masklet" must be a list of frames'),
        ({"masklet": []}, '"masklet" must be a list of frames'),
        ({"masklet": [{}]}, '"masklet" must be a list of frames'),
        ({"masklet": [[EMPTY]], "masklet_id": ["a"]}, '"masklet_id" must be'),
        ({"masklet": [[EMPTY, EMPTY]], "masklet_id": [1, 1]}, "all different"),
        ({"masklet": [[EMPTY], []]}, "frame 1 holds 0 masks for 1 masklet id"),
        ({"masklet": [[None]], "masklet_id": [3]}, "frame 0, masklet 3: must be a COCO RLE"),
        ({"masklet": [[{"size": [2, 3], "counts": [5]}]]}, '"counts" covers 5 pixels'),
        ({"masklet": [[EMPTY], [{"size": [3, 2], "counts": [6]}]]}, "2 x 3 (frame 0) and 3 x 2 (frame 1)"),
        ({"masklet": [[], []]}, 'neither a mask nor a "video_height"'),
        ({"masklet": [[]], "video_height": "2", "video_width": 3}, 'neither a mask nor a "video_height"'),
    ],
)
def test_json_that_is_no_video_of_masklets_is_refused_with_file_and_place(tmp_path, content, reason):
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as refused:
        SavMasklets(tmp_path / "a.json")
    assert reason in str(refused.value) and "a.json is not in SA-V's layout" in str(refused.value)


@given(st.integers(0, 10**6))
def test_objects_score_as_in_naive_loops_over_frames_and_ids(tmp_path_factory, seed):
    """Three ids and void in the truth, one id more in the prediction; objects go, come back and are mixed up."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, 4, (6, 5, 7))
    true[rng.random(true.shape) < 0.1] = 255
    true[:, true[0] == 2] = 0  # absent from the first mask, though below its highest id
    true[rng.integers(1, 6), :] = 0
    true[0, 0, :3] = 1, 3, 255
    predicted = np.where(rng.random(true.shape) < 0.7, true, rng.integers(0, 5, true.shape))
    predicted[predicted == 255] = 0
    folder = tmp_path_factory.mktemp("masks")
    pair = Pair("a", save_sequence(folder / "true", true), save_sequence(folder / "predicted", predicted))
    result = score_pair(pair)
    shown = set(np.unique(true[:-1])) - {0, 255}
    assert set(result.objects) == shown
    for number, scores in result.objects.items():
        frames = [naive.frame_scores(p == number, t == number) for p, t in zip(predicted, true, strict=True)][1:-1]
        for found, values in zip(scores, zip(*frames, strict=True), strict=True):
            assert found == pytest.approx(naive.statistics(values), abs=1e-12)
    joined = score_pair(pair, binary=True).objects[1]
    frames = [naive.frame_scores(p > 0, (t > 0) & (t < 255)) for p, t in zip(predicted[1:-1], true[1:-1], strict=True)]
    assert joined.j == pytest.approx(naive.statistics([j for j, _ in frames]), abs=1e-12)


@given(st.permutations([1, 2, 3]))
def test_which_id_an_object_has_does_not_matter(tmp_path_factory, ids):
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(0, 4, (2, 5, 6, 8))
    renamed = np.array([0, *ids])
    folder = tmp_path_factory.mktemp("masks")
    results = [
        score_pair(Pair("a", save_sequence(folder / f"{k}t", t), save_sequence(folder / f"{k}p", p))).objects
        for k, (t, p) in enumerate(((true, predicted), (renamed[true], renamed[predicted])))
    ]
    assert all(results[0][number] == results[1][renamed[number]] for number in (1, 2, 3))


def test_real_masklets_are_written_with_the_figures_that_sa_v_gives(shared_data, tmp_path):
    """121 frames of 848 x 480; SA-V's own areas, buckets, first frames and changes are found again."""
    path = shared_data / "annotations" / "sav" / "sav_000001_manual.json"
    source, masklets = json.loads(path.read_text()), SavMasklets(path)
    frames = (np.stack([masklets.read(name).mask(number) for number in masklets.objects]) for name in masklets.names)
    write_masklets(tmp_path / "a.json", "sav_000001", masklets.objects, frames, 24.0, video_frame_count=483)
    written = json.loads((tmp_path / "a.json").read_text())
    assert written.pop("masklet_type") == ["auto"] * 5 and set(written) < set(source)
    for name, value in written.items():
        if name in ("masklet_size_rel", "masklet_size_abs"):
            assert value == pytest.approx(source[name], rel=1e-6)
        else:
            assert value == source[name], name


def test_real_masklets_against_themselves_a_frame_later(shared_data, tmp_path):
    path = shared_data / "annotations" / "sav" / "sav_000001_manual.json"
    content = json.loads(path.read_text())
    content["masklet"] = content["masklet"][:12]
    (tmp_path / "true.json").write_text(json.dumps(content))
    content["masklet"] = content["masklet"][:1] + content["masklet"][:-1]
    (tmp_path / "late.json").write_text(json.dumps(content))
    true, late = SavMasklets(tmp_path / "true.json"), SavMasklets(tmp_path / "late.json")
    perfect, behind = (score_pair(Pair("a", true, predicted)) for predicted in (true, late))
    assert set(perfect.objects) == {0, 1, 2, 4}, "masklet 3 appears in frame 113"
    assert all(scores.j.mean == scores.f.mean == 1 for scores in perfect.objects.values())
    masks = np.stack([true.read(name).mask(1) for name in true.names])
    assert behind.objects[1].j.mean == video.temporal_stability(masks[:-1]).mean_iou
    assert 0 < video.mean_scores(list(behind.objects.values())).j.mean < 1
