"""Pictures, videos and traces as users hand them over."""

import json

import av
import numpy as np
import pytest
from PIL import Image

from tracevision_jax.errors import UserError
from tracevision_jax.inference.media import read_media, read_trace, read_video

POINTS = [[0.1, 0.2, 0.0], [0.3, 0.4, 0.5]]


def write_video(path, frames: int = 60, rate: int = 30, size=(32, 48)) -> None:
    """Frame number n is grey 4 n."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            grey = np.full((*size, 3), 4 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture
def pixels(rng) -> np.ndarray:
    return rng.integers(0, 256, (6, 9, 3), np.uint8)


def test_a_picture_may_be_a_file_its_bytes_an_image_or_an_array(pixels, tmp_path):
    file = tmp_path / "a.png"
    Image.fromarray(pixels).save(file)
    for source in (file, str(file), file.read_bytes(), Image.fromarray(pixels), pixels):
        sample = read_media(source)
        np.testing.assert_array_equal(sample.frames, pixels[None])
        assert sample.frames_per_second == 0 and sample.size == (6, 9)


def test_several_pictures_and_frames_keep_their_order(pixels):
    stack = np.stack([pixels, pixels[::-1], 255 - pixels])
    for source in (stack, list(stack), [Image.fromarray(frame) for frame in stack]):
        np.testing.assert_array_equal(read_media(source).frames, stack)
        assert read_media(source).frames_per_second == 0
        assert read_media(source, frames_per_second=12.5).frames_per_second == 12.5


def test_a_video_file_is_thinned_to_what_is_needed(tmp_path):
    file = tmp_path / "clip.mp4"
    write_video(file)
    sample = read_media(file)
    assert sample.frames.shape == (4, 32, 48, 3) and sample.frames_per_second == pytest.approx(2.0)
    np.testing.assert_allclose(sample.frames.mean(axis=(1, 2, 3)), [0, 60, 120, 180], atol=4)
    frames, rate = read_video(file, least_rate=7.0)
    assert (len(frames), rate) == (15, pytest.approx(7.5))
    frames, rate = read_video(file, least_rate=100.0)
    assert (len(frames), rate) == (60, pytest.approx(30))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder / "none.png", "no such file|No such file"),
        (lambda folder: folder / "none.mp4", "no such file"),
        (lambda folder: [], "no picture"),
        (lambda folder: [np.zeros((2, 3, 3), np.uint8), np.zeros((3, 2, 3), np.uint8)], "one size, not 2 x 3, 3 x 2"),
        (lambda folder: np.zeros((4, 5, 7), np.uint8), "must be uint8 of shape"),
        (lambda folder: np.zeros((0, 4, 4, 3), np.uint8), "no picture"),
    ],
)
def test_what_is_no_picture_is_refused(make, words, tmp_path):
    with pytest.raises(UserError, match=words):
        read_media(make(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not a video at all", b"\x00\x00\x00\x18ftypmp42" + bytes(64)])
def test_a_damaged_video_is_refused(content, tmp_path):
    file = tmp_path / "clip.mp4"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"clip\.mp4"):
        read_media(file)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_a_rate_must_be_positive(rate, pixels):
    with pytest.raises(UserError, match="frames_per_second"):
        read_media(pixels[None], frames_per_second=rate)


def test_a_trace_may_be_an_array_a_list_or_a_file(tmp_path):
    strokes = [[{"x": x, "y": y, "t": t}] for x, y, t in POINTS]
    contents = {
        "a.json": POINTS,
        "b.json": {"points": POINTS},
        "c.json": {"image_id": "1", "caption": "x", "traces": strokes},
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "d.jsonl").write_text(json.dumps(contents["c.json"]) + "\n")
    files = [tmp_path / name for name in (*contents, "d.jsonl")]
    for source in (np.array(POINTS), POINTS, contents["c.json"], *files, str(files[0])):
        np.testing.assert_allclose(read_trace(source), POINTS)
    assert read_trace([[0.1, 0.2], [0.3, 0.4]]).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", "", "not valid JSON"),
        ("a.json", "[[0.1", "not valid JSON"),
        ("a.json", "{}", "trace in .*a.json"),
        ("a.json", "[[0.1, 1e9]]", "far outside"),
        ("a.jsonl", '{"points": []}\n{"points": []}\n', "2 records"),
        ("a.json", '{"points": []}', "empty"),
    ],
)
def test_what_is_no_trace_is_refused(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words):
        read_trace(tmp_path / name)


def test_a_missing_trace_file_is_named():
    with pytest.raises(UserError, match=r"nowhere\.json cannot be read"):
        read_trace("nowhere.json")
