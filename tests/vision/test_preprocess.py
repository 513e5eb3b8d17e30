"""Preprocessing equals the `transformers` image processor, on every shape and kind of picture."""

import io
import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tracevision_jax.errors import UserError
from tracevision_jax.vision.pictures import read_image, to_rgb
from tracevision_jax.vision.preprocess import (
    VisionInputConfig,
    config_from_json,
    config_to_json,
    from_block_major,
    preprocess_image,
    preprocess_video,
    sample_frames,
    smart_resize,
    to_block_major,
    video_size,
)

CONFIG = VisionInputConfig()


def reference_processor(config: VisionInputConfig = CONFIG):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=config.patch,
        merge_size=config.merge,
        temporal_patch_size=config.temporal_patch,
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
    )


def assert_equals_reference(image: Image.Image, config: VisionInputConfig = CONFIG) -> None:
    theirs = reference_processor(config)(images=[image], return_tensors="np")
    ours = preprocess_image(image, config)
    assert [1, *ours.grid[0]] == theirs["image_grid_thw"][0].tolist()
    flat = to_block_major(ours.values, ours.grid, config)
    np.testing.assert_array_equal(flat, theirs["pixel_values"])
    back = from_block_major(flat, 1, *ours.grid[0].tolist(), config)
    np.testing.assert_array_equal(back, ours.values)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("name", ["truck.jpg", "groceries.jpg", "example_image.jpg"])
def test_a_real_photograph_gives_the_same_floats_as_the_reference(shared_data, name):
    with Image.open(shared_data / "images" / name) as image:
        assert_equals_reference(image, VisionInputConfig(max_pixels=500 * 28 * 28))


@pytest.mark.parametrize(
    "size",
    [
        (1, 1),
        (1, 200),
        (20, 4000),
        (4000, 20),
        (13, 2600),
        (28, 28),
        (42, 70),
        (100, 333),
        (224, 224),
        (250, 118),
    ],
)
def test_odd_sizes_give_the_same_floats_as_the_reference(size):
    assert_equals_reference(Image.fromarray(noise(*size)))


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (VisionInputConfig(patch=8, min_pixels=1024, max_pixels=10_000), (97, 61)),
        (VisionInputConfig(patch=4, merge=3, temporal_patch=4, window_units=2, max_pixels=9_000), (70, 130)),
        (VisionInputConfig(patch=16, merge=1, temporal_patch=1, window_units=3), (75, 200)),
    ],
)
def test_other_patch_sizes_give_the_same_floats_as_the_reference(config, size):
    assert_equals_reference(Image.fromarray(noise(*size)), config)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_every_8_bit_mode_gives_the_same_floats_as_the_reference(mode):
    image = Image.fromarray(noise(60, 90, 4), "RGBA")
    image = image.convert(mode) if mode in ("LA", "RGBA") else image.convert("RGB").convert(mode)
    assert_equals_reference(image)


def test_a_palette_with_a_transparent_colour_is_laid_over_white():
    image = Image.fromarray(noise(40, 40, 1)[..., 0] % 4, "L").convert("P")
    image.info["transparency"] = 1
    assert_equals_reference(image)


@pytest.mark.parametrize("mode", ["RGBa", "La"])
def test_premultiplied_alpha_is_undone_before_white_is_put_under(mode):
    plain = Image.new(mode.upper(), (2, 2), (200, 100, 50, 128) if mode == "RGBa" else (200, 128))
    np.testing.assert_allclose(to_rgb(plain.convert(mode)).astype(int), to_rgb(plain).astype(int), atol=2)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bit_pictures_are_scaled_not_clipped(mode):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
    array = ramp.astype(">u2" if mode == "I;16B" else "<u2")
    image = Image.frombytes("I;16B" if mode == "I;16B" else "I;16", (64, 64), array.tobytes())
    image = image.convert("I") if mode == "I" else image
    rgb = to_rgb(image)
    np.testing.assert_array_equal(rgb[..., 0], np.round(array.astype(float) / 257).astype(np.uint8))
    assert rgb.min() == 0 and rgb.max() == 255 and (rgb[..., 0] == rgb[..., 2]).all()


def test_a_16_bit_png_reads_like_its_8_bit_version():
    grey = noise(30, 30, 1)[..., 0]
    wide, narrow = io.BytesIO(), io.BytesIO()
    Image.fromarray(grey.astype(np.uint16) * 257).save(wide, "png")
    Image.fromarray(grey).save(narrow, "png")
    np.testing.assert_array_equal(read_image(wide.getvalue()), read_image(narrow.getvalue()))


def test_float_pictures_are_scaled_and_others_refused():
    np.testing.assert_array_equal(to_rgb(Image.fromarray(np.float32([[0, 0.5, 1]])))[0, :, 0], [0, 128, 255])
    np.testing.assert_array_equal(to_rgb(Image.fromarray(np.float32([[0, 9, 255]])))[0, :, 0], [0, 9, 255])
    for bad in ([[math.nan, 1]], [[-1, 1]], [[0, 300]], [[math.inf, 0]]):
        with pytest.raises(UserError, match=r"values|beyond"):
            to_rgb(Image.fromarray(np.float32(bad)))


def test_lab_pictures_keep_their_colour():
    from PIL import ImageCms

    red = Image.new("RGB", (4, 4), (200, 30, 40))
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    np.testing.assert_allclose(to_rgb(ImageCms.applyTransform(red, to_lab))[0, 0], [200, 30, 40], atol=3)


def test_arrays_are_read_like_pictures():
    array = noise(20, 30)
    np.testing.assert_array_equal(to_rgb(array), array)
    np.testing.assert_array_equal(to_rgb(array[..., :1]), np.repeat(array[..., :1], 3, axis=2))
    for bad in (array.astype(np.float32), array[..., :2], np.zeros((0, 4, 3), np.uint8), array[0, 0]):
        with pytest.raises(UserError, match=r"uint8|empty"):
            to_rgb(bad)


@pytest.mark.parametrize("size", [(0, 10), (10, 0), (1, 4000), (4000, 1), (1, 201)])
def test_empty_and_too_elongated_pictures_are_refused(size):
    with pytest.raises(UserError, match=r"empty|elongated"):
        smart_resize(*size, 28, 3136, 10**6)


def test_damaged_files_are_refused_with_their_name(tmp_path):
    encoded = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(encoded, "jpeg")
    cases = {
        "truncated.jpg": encoded.getvalue()[:-600],
        "empty.jpg": b"",
        "text.jpg": b"this is no picture at all",
        "header.png": b"\x89PNG\r\n\x1a\n" + b"\0" * 8,
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match=r"absent\.jpg"):
        read_image(tmp_path / "absent.jpg")


def test_a_picture_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # shown by a quarter turn
    encoded = io.BytesIO()
    Image.fromarray(noise(20, 40)).save(encoded, "png", exif=exif)
    assert read_image(encoded.getvalue()).shape == (40, 20, 3)


def test_slots_past_the_picture_are_zero_and_none_within():
    patches = preprocess_image(Image.new("RGB", (140, 84), (255, 255, 255)), CONFIG)
    assert patches.grid.tolist() == [[6, 10]] and patches.values.shape == (1, 2, 64, 1176)
    slot = np.arange(64)
    row = slot // 16 * 2 + slot // 2 % 2
    column = slot // 4 % 4 * 2 + slot % 2
    for window in range(2):
        inside = (row < 6) & (column + 8 * window < 10)
        np.testing.assert_array_equal(np.abs(patches.values[0, window]).sum(-1) > 0, inside)


@pytest.mark.parametrize(
    ("total", "rate", "count"),
    [
        (1, 30, 1),
        (2, 30, 2),
        (3, 30, 2),
        (5, 30, 4),
        (300, 30, 20),
        (301, 25, 24),
        (10, 1, 10),
        (9000, 5, 768),
    ],
)
def test_videos_are_sampled_at_two_frames_a_second_in_even_numbers(total, rate, count):
    chosen = sample_frames(total, float(rate), CONFIG)
    assert len(chosen) == count
    assert chosen[0] == 0 and chosen[-1] == total - 1 and (np.diff(chosen) >= 0).all()


def test_sampled_places_are_those_of_the_published_rule():
    torch = pytest.importorskip("torch")
    for total in (4, 7, 50, 239, 1001, 5000):
        ours = sample_frames(total, 30.0, CONFIG)
        theirs = torch.linspace(0, total - 1, len(ours)).round().long().numpy()
        np.testing.assert_array_equal(ours, theirs)


def test_bad_videos_are_refused():
    for total, rate in ((0, 30.0), (5, 0.0), (5, math.nan)):
        with pytest.raises(UserError):
            sample_frames(total, rate, CONFIG)


def test_a_long_video_shares_the_total_and_a_short_one_meets_the_limit_of_a_frame():
    height, width = video_size(1080, 1920, 4, CONFIG)
    assert 0.9 * 768 * 784 < height * width <= 768 * 784
    height, width = video_size(1080, 1920, 768, CONFIG)
    assert height * width * 768 / 2 <= CONFIG.video_total_pixels
    assert height * width >= 128 * 784
    tiny = VisionInputConfig(video_total_pixels=1000)
    assert math.prod(video_size(1080, 1920, 8, tiny)) <= int(128 * 784 * 1.05)
    assert math.prod(video_size(30, 50, 8, CONFIG)) >= 128 * 784


def test_video_patches_are_those_of_its_frames_taken_as_pictures():
    config = VisionInputConfig(video_min_pixels=3136, frames_per_second=10.0)
    frames = np.stack([noise(60, 100, seed=index) for index in range(5)])
    video = preprocess_video(frames, 10.0, config)
    assert video.values.shape[0] == 2 and video.seconds_per_frame == pytest.approx(2 / 8)
    np.testing.assert_allclose(video.frame_times, [0, 0.25])
    stills = [preprocess_image(frames[index], config).values for index in (0, 1, 3, 4)]
    parts = [still.reshape(*still.shape[:-1], 3, 2, 196) for still in stills]
    for frame in range(2):
        both = video.values[frame : frame + 1].reshape(parts[0].shape)
        np.testing.assert_array_equal(both[..., 0, :], parts[2 * frame][..., 0, :])
        np.testing.assert_array_equal(both[..., 1, :], parts[2 * frame + 1][..., 1, :])


def test_a_video_of_one_frame_is_the_still_at_the_limits_of_videos():
    frame = noise(60, 100)
    video = preprocess_video(frame[None], 30.0, VisionInputConfig(video_min_pixels=3136))
    np.testing.assert_array_equal(video.values, preprocess_image(frame, CONFIG).values)


def test_videos_survive_the_way_to_the_reference_order_and_back():
    frames = np.stack([noise(90, 150, seed=index) for index in range(6)])
    video = preprocess_video(frames, 2.0, VisionInputConfig(video_min_pixels=3136))
    flat = to_block_major(video.values, video.grid, CONFIG)
    rows, columns = video.grid[0].tolist()
    assert flat.shape == (3 * rows * columns, CONFIG.patch_dim)
    np.testing.assert_array_equal(from_block_major(flat, 3, rows, columns, CONFIG), video.values)


def test_settings_are_read_from_the_files_of_a_checkpoint():
    old = {
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "min_pixels": 3136,
        "max_pixels": 12845056,
    }
    new = {
        "patch_size": 16,
        "size": {"shortest_edge": 1024, "longest_edge": 4096},
        "image_mean": [0.5, 0.5, 0.5],
    }
    assert config_from_json(old) == CONFIG
    config = config_from_json(new, {"size": {"shortest_edge": 7, "longest_edge": 8}, "max_frames": 16, "fps": 1})
    assert (config.patch, config.min_pixels, config.max_pixels, config.mean) == (
        16,
        1024,
        4096,
        (0.5, 0.5, 0.5),
    )
    assert (config.video_min_pixels, config.video_max_pixels) == (7, 8)
    assert (config.max_frames, config.frames_per_second) == (16, 1.0)


def test_settings_are_written_so_that_the_reference_processor_reads_them(tmp_path):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    config = VisionInputConfig(patch=8, merge=2, min_pixels=1024, max_pixels=9000, video_max_pixels=5000, min_frames=2)
    image, video = config_to_json(config)
    assert config_from_json(image, video) == config
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image))
    picture = Image.fromarray(noise(70, 130))
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)(images=[picture], return_tensors="np")
    ours = preprocess_image(picture, config)
    np.testing.assert_array_equal(to_block_major(ours.values, ours.grid, config), theirs["pixel_values"])


@given(
    height=st.integers(0, 700),
    width=st.integers(0, 700),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"]),
)
def test_any_picture_is_either_refused_or_cut_into_whole_units_within_the_limits(height, width, mode):
    config = VisionInputConfig(max_pixels=100 * 28 * 28)
    try:
        patches = preprocess_image(Image.new(mode, (width, height), 1), config)
    except UserError:
        assert min(height, width) == 0 or max(height, width) > 200 * min(height, width)
        return
    rows, columns = patches.grid[0]
    assert rows % 2 == columns % 2 == 0 and rows * columns >= 16
    # The upper limit gives way only where a side would vanish.
    assert rows * columns <= 400 or 2 in (rows, columns)
    assert np.isfinite(patches.values).all()


@given(data=st.data())
def test_any_damage_to_a_picture_file_is_a_picture_or_a_user_error(data):
    encoded = io.BytesIO()
    Image.fromarray(noise(24, 31)).save(
        encoded, data.draw(st.sampled_from(["png", "jpeg", "gif", "bmp", "tiff", "webp"]))
    )
    content = bytearray(encoded.getvalue())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=8)):
        content[place] ^= data.draw(st.integers(1, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own, about the damage
        try:
            rgb = read_image(content)
        except UserError:
            return
    assert rgb.ndim == 3 and rgb.shape[2] == 3 and rgb.dtype == np.uint8
