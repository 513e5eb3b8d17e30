"""Frames from arrays, folders, files and streams, and what makes them ahead."""

import gc
import threading
import time

import av
import numpy as np
import pytest
from PIL import Image

from tests.inference.test_media import write_video
from tracevision_jax.errors import UserError
from tracevision_jax.inference.frames import ArrayFrames, Prefetch, StreamFrames, open_frames
from tracevision_jax.inference.frames_video import VideoFrames
from tracevision_jax.inference.tracker_feed import Feed

COUNT = 30


def write_frames(path, codec: str, frames: int = COUNT, **options: str) -> None:
    """Frame number n is grey 8 n, with keyframes in between."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.gop_size = 8
        for number in range(frames):
            grey = np.full((32, 48, 3), 8 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 6, 9, 3), np.uint8)


def test_every_kind_of_source_gives_the_same_frames(pictures, tmp_path):
    for number in (0, 2, 1, 4, 3):
        Image.fromarray(pictures[number]).save(tmp_path / f"{number + 8}.png")  # 8, 9, 10, 11, 12: by number, not name
    (tmp_path / "notes.txt").write_text("no picture")
    sources = [pictures, list(pictures), [Image.fromarray(p) for p in pictures], tmp_path, str(tmp_path)]
    for source in map(open_frames, sources):
        assert source.length == 5 and source.again
        np.testing.assert_array_equal(list(source.frames()), pictures)
        np.testing.assert_array_equal(list(source.frames(3)), pictures[3:])
    stream = open_frames(picture for picture in pictures)
    assert stream.length is None and not stream.again
    np.testing.assert_array_equal(list(stream.frames()), pictures)
    assert open_frames(stream) is stream
    assert open_frames(tmp_path).label(2) == "10" and stream.label(2) == "00002"


@pytest.mark.parametrize("file", ["a.mp4", "a.mkv", "a.avi", "a.webm"])
def test_a_video_file_can_be_read_from_any_frame(tmp_path, file):
    codec = "libvpx" if file.endswith("webm") else "mpeg4"  # VP8 hides packets, so its packets are not counted
    write_frames(tmp_path / file, codec)
    source = VideoFrames(tmp_path / file)
    assert (source.length, source.frames_per_s) == (COUNT, 10)
    whole = list(source.frames())
    np.testing.assert_allclose([frame.mean() for frame in whole], 8 * np.arange(COUNT), atol=4)
    for start in (1, 7, 8, 9, 23, COUNT - 1):
        np.testing.assert_array_equal(next(source.frames(start)), whole[start])
    assert len(list(source.frames(25))) == 5


def test_a_video_that_was_cut_short_or_is_none_is_refused(tmp_path):
    file, cut = tmp_path / "a.mp4", tmp_path / "cut.mp4"
    write_frames(file, "mpeg4", movflags="+faststart")
    data = file.read_bytes()
    for share, message in (
        (0.6, r"cut short: its header says 30 frames, \d+ are there"),
        (0.02, "damaged or of|holds no pictures"),
    ):
        cut.write_bytes(data[: int(share * len(data))])
        with pytest.raises(UserError, match=message):
            VideoFrames(cut)
    write_frames(tmp_path / "a.mkv", "mpeg4")
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut short: its header says 3\.0 s"):
        VideoFrames(tmp_path / "cut.mkv")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match="damaged or of an unknown kind"):
        open_frames(tmp_path / "text.mp4")
    with pytest.raises(UserError, match="no such file"):
        open_frames(tmp_path / "nowhere.mp4")


def test_a_video_damaged_in_the_middle_gives_its_frames_up_to_there(tmp_path):
    file = tmp_path / "a.ts"
    write_frames(file, "libx264" if "libx264" in av.codecs_available else "mpeg4")
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 1500] = bytes(1500)
    file.write_bytes(bytes(data))
    seen = []
    with pytest.raises(UserError, match="damaged"):
        for frame in open_frames(file).frames():
            seen.append(frame)
    assert len(seen) < COUNT


@pytest.mark.parametrize(
    ("video", "message"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), "no frames"),
        ([], "no frames"),
        (np.zeros((4, 4, 3), np.uint8), "uint8 of shape"),
        (np.zeros((2, 4, 4, 3), np.float32), "uint8 of shape"),
        (7, "cannot be a int"),
    ],
)
def test_what_is_no_video_is_refused(video, message):
    with pytest.raises(UserError, match=message):
        open_frames(video)


def test_a_folder_without_pictures_and_a_stream_of_something_else_are_refused(tmp_path):
    with pytest.raises(UserError, match="no frames: no picture"):
        open_frames(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), np.uint8)).save(tmp_path / "1.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "1.jpg")
    with pytest.raises(UserError, match="endings alone"):
        open_frames(tmp_path)
    with pytest.raises(UserError, match="gave a str"):
        next(StreamFrames(iter(["a.png"])).frames())
    (tmp_path / "1.jpg").unlink()
    (tmp_path / "2.png").write_bytes((tmp_path / "1.png").read_bytes()[:200])
    source = open_frames(tmp_path)
    with pytest.raises(UserError, match=r"2.png is damaged or truncated"):
        list(source.frames())


# Ahead, in a thread


def thread_of(ahead: Prefetch | None) -> threading.Thread:
    assert ahead is not None
    return ahead._thread


def until(condition) -> bool:
    end = time.monotonic() + 30
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


def test_only_so_much_is_made_ahead():
    made = []
    items = Prefetch((made.append(number) or number for number in range(100)), ahead=3)
    assert until(lambda: len(made) >= 4)
    time.sleep(0.2)
    assert len(made) == 4  # three wait, one wants to
    assert [next(items), next(items)] == [0, 1]
    assert until(lambda: len(made) >= 6)
    items.close()
    assert not thread_of(items).is_alive() and list(items) == []


def test_an_error_comes_where_it_happened():
    def items():
        yield 1
        raise UserError("frame 1 is damaged")

    ahead = Prefetch(items())
    assert next(ahead) == 1
    with pytest.raises(UserError, match="frame 1"):
        next(ahead)
    with pytest.raises(UserError, match="frame 1"):  # and stays, or the next would believe that this is the end
        next(ahead)
    assert until(lambda: not thread_of(ahead).is_alive())


def test_a_forgotten_prefetch_ends_its_thread_and_closes_its_iterator():
    closed = []

    def items():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    ahead = Prefetch(items())
    assert next(ahead) == 1
    thread = thread_of(ahead)
    del ahead
    gc.collect()
    assert until(lambda: not thread.is_alive()) and closed == [True]


def test_frames_that_change_size_are_told_with_their_number(pictures):
    def changing():
        yield from pictures
        yield pictures[0].transpose(1, 0, 2)

    for source in (open_frames(list(changing())), open_frames(changing())):
        feed = Feed(source, batch=2, side=32, cached=2)
        assert feed.size() == (6, 9)
        groups = [feed._fetch(number, False, going_on=True) for number in range(4)]
        assert [None if group is None else len(group.images) for group in groups] == [2, 2, 1, None]
        assert groups[2] is not None and "is 6 x 9 px, the frames before are 9 x 6" in str(groups[2].failure)
        assert "frame 5 of" in str(groups[2].failure)
        thread = thread_of(feed._thread)
        feed.close()
        assert not thread.is_alive()


def test_an_empty_stream_has_no_size():
    with pytest.raises(UserError, match="the stream has no frames"):
        Feed(open_frames(iter(())), 2, 32, 2).size()


def test_a_video_of_another_length_than_its_packets_say_is_counted(tmp_path):
    write_video(tmp_path / "a.mp4", frames=7)
    source = VideoFrames(tmp_path / "a.mp4")
    source._exact = False  # as if times could not be trusted
    assert sum(1 for _ in source.frames(5)) == 2
    assert isinstance(open_frames(tmp_path / "a.mp4"), VideoFrames)
    assert ArrayFrames([np.zeros((2, 2, 3), np.uint8)]).length == 1
