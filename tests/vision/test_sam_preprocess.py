"""Pictures for SAM and SAM 2 equal the references' pixel by pixel, and coordinates and masks find their way back."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from tracevision_jax.errors import UserError
from tracevision_jax.vision.sam_preprocess import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    fit_longest_side,
    fit_square,
    longest_side_size,
)

SIZES = ((60, 90), (200, 131), (64, 64), (33, 257), (300, 40))


def picture(rng, height: int, width: int) -> np.ndarray:
    """Smooth colours with noise, so that a shift shows and every level occurs."""
    rows, columns = np.mgrid[:height, :width]
    waves = np.stack([rows * 255 / height, columns * 255 / width, 127 + 120 * np.sin((rows + columns) / 9)], -1)
    return np.clip(waves + rng.normal(0, 20, waves.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_sams_input_equals_the_reference_processors(rng, height, width):
    rgb, side = picture(rng, height, width), 128
    processor = SamImageProcessorPil(size={"longest_edge": side}, pad_size={"height": side, "width": side})
    theirs = processor(Image.fromarray(rgb), return_tensors="np")
    pixels, frame = fit_longest_side(rgb, side)
    np.testing.assert_allclose(pixels, theirs["pixel_values"][0].transpose(1, 2, 0), atol=1e-6)
    assert (frame.input_height, frame.input_width) == tuple(theirs["reshaped_input_sizes"][0])
    assert (frame.height, frame.width) == (height, width)
    assert not pixels[frame.input_height :].any() and not pixels[:, frame.input_width :].any()


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_sam_2s_input_equals_pytorchs_antialiased_resizing_in_floats(rng, height, width):
    rgb, side = picture(rng, height, width), 64
    pixels, frame = fit_square(rgb, side)
    values = torch.tensor(rgb).permute(2, 0, 1)[None].float() / 255
    small = F.interpolate(values, (side, side), mode="bilinear", align_corners=False, antialias=True)[0]
    theirs = (small.permute(1, 2, 0).numpy() - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
    np.testing.assert_allclose(pixels, theirs, atol=1e-5)
    assert (frame.input_height, frame.input_width, frame.padded) == (side, side, False)


def test_video_frames_go_through_pillows_bicubic_filter_in_8_bits(rng):
    rgb, side = picture(rng, 90, 160), 64
    exact = {name: fit_square(rgb, side, name)[0] for name in ("bilinear", "bilinear_8bit", "bicubic_8bit")}
    small = np.asarray(Image.fromarray(rgb).resize((side, side)))  # Pillow's default filter
    theirs = (small / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(exact["bicubic_8bit"], theirs, atol=1e-6)
    levels = np.abs(exact["bilinear_8bit"] - exact["bilinear"]) * IMAGENET_STD * 255
    assert 0.1 < levels.max() <= 1.0  # rounded once an axis
    assert np.abs(exact["bicubic_8bit"] - exact["bilinear"]).max() > 0.1


def test_grey_and_transparent_pictures_are_read_as_colour(rng):
    grey = picture(rng, 20, 30)[..., 0]
    np.testing.assert_array_equal(fit_square(grey, 32)[0], fit_square(np.repeat(grey[..., None], 3, 2), 32)[0])
    clear = Image.new("RGBA", (30, 20), (0, 0, 0, 0))
    np.testing.assert_array_equal(fit_longest_side(clear, 32)[0], fit_longest_side(np.full_like(grey, 255), 32)[0])


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([64, 512, 1024]))
def test_the_longest_side_fills_the_square_and_halves_are_rounded_up(height, width, side):
    if 2 * side * min(height, width) < max(height, width):
        with pytest.raises(UserError, match="less extreme shape"):
            longest_side_size(height, width, side)
        return
    size = longest_side_size(height, width, side)
    assert max(size) == side and min(size) >= 1
    exact = min(height, width) * side / max(height, width)
    assert -0.5 < exact - min(size) < 0.5 or min(size) == pytest.approx(exact + 0.5)


@pytest.mark.parametrize("fit", [fit_longest_side, fit_square])
def test_points_and_boxes_go_to_the_input_and_back(rng, fit):
    _, frame = fit(picture(rng, 50, 80), 64)
    corners = np.array([[0.0, 0.0], [80.0, 50.0]])
    size = (64.0, 40.0) if frame.padded else (64.0, 64.0)
    np.testing.assert_allclose(frame.to_input(corners), [(0.0, 0.0), size])
    boxes = rng.uniform(0, 50, (3, 2, 2))
    np.testing.assert_allclose(frame.to_picture(frame.to_input(boxes)), boxes, atol=1e-12)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_masks_come_back_as_the_references_do(rng, height, width):
    logits = rng.standard_normal((2, 1, 16, 16)).astype(np.float32)
    side = 64
    _, frame = fit_longest_side(picture(rng, height, width), side)
    processor = SamImageProcessorPil()
    theirs = processor.post_process_masks(
        torch.tensor(logits)[None],
        [(height, width)],
        [(frame.input_height, frame.input_width)],
        binarize=False,
        pad_size={"height": side, "width": side},
    )[0]
    np.testing.assert_allclose(frame.masks_to_picture(logits), theirs, atol=1e-5)

    _, frame = fit_square(picture(rng, height, width), side)
    theirs = F.interpolate(torch.tensor(logits), (height, width), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(frame.masks_to_picture(logits), theirs, atol=1e-5)


@pytest.mark.parametrize("fit", [fit_longest_side, fit_square])
def test_a_mask_finds_its_way_to_the_input_and_back(rng, fit):
    height, width = 150, 220
    rows, columns = np.mgrid[:height, :width]
    disc = np.hypot(rows - 60, columns - 140) < 45
    _, frame = fit(picture(rng, height, width), 128)
    square = frame.mask_to_input(disc)
    assert square.shape == (128, 128) and square.dtype == bool
    assert not square[frame.input_height :].any()
    back = frame.masks_to_picture(square * 20.0 - 10.0) > 0
    assert (back & disc).sum() / (back | disc).sum() > 0.97


def test_a_mask_shrinks_antialiased_as_the_references_does(rng):
    mask = rng.uniform(size=(96, 160)) < 0.5
    _, frame = fit_square(picture(rng, 96, 160), 32)
    small = F.interpolate(torch.tensor(mask)[None, None].float(), (32, 32), mode="bilinear", antialias=True)[0, 0]
    sure = (small - 0.5).abs().numpy() > 1e-5
    np.testing.assert_array_equal(frame.mask_to_input(mask)[sure], (small >= 0.5).numpy()[sure])


def test_a_mask_of_another_size_is_refused(rng):
    _, frame = fit_square(picture(rng, 20, 30), 32)
    with pytest.raises(UserError, match="a mask of 20 x 30 pixels for a picture of 30 x 20"):
        frame.mask_to_input(np.zeros((30, 20), bool))
