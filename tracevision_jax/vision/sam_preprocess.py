"""Pictures for SAM and SAM 2, and coordinates and masks there and back.

SAM resizes the longest side and fills up with zeros at the bottom and the right (segment-anything,
`utils/transforms.py`). SAM 2 squashes the picture to a square (sam2, `utils/transforms.py` for pictures and
`utils/misc.py` for the frames of a video). Both normalise with ImageNet's mean and deviation.

    pixels, frame = fit_longest_side(rgb, 1024)          # SAM
    pixels, frame = fit_square(rgb, 1024)                # SAM 2
    points_px = frame.to_input(points_px)                # (x, y) pairs for the prompt encoder
    logits = frame.masks_to_picture(low_res_logits)      # at the picture's own size
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image

from tracevision_jax.errors import UserError
from tracevision_jax.ops.interpolation import resize_masks_on_host
from tracevision_jax.vision.pictures import to_rgb
from tracevision_jax.vision.preprocess import normalise

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MASK_THRESHOLD = 0.5
"""Of a binary mask after it was resized."""

SquareFilter = Literal["bilinear", "bilinear_8bit", "bicubic_8bit"]
"""How SAM 2 resizes: `bilinear` in floats (the original for pictures), `bicubic_8bit` by Pillow (the original for
frames of a video), `bilinear_8bit` by Pillow (within one level of the processors of `transformers`)."""


@dataclass(frozen=True)
class Fitting:
    """How a picture lies in the square that enters the model; sizes in pixels."""

    height: int
    width: int
    """Of the picture."""
    input_height: int
    input_width: int
    """Of its copy at the upper left of the square; the square itself for SAM 2."""
    side: int
    padded: bool
    """Whether the longest side was fitted (SAM) or the picture squashed (SAM 2)."""

    def to_input(self, points_px: Float[np.ndarray, "*lead 2"]) -> Float[np.ndarray, "*lead 2"]:
        """Points (x, y) of the picture to points of the square; boxes as (..., 2, 2)."""
        return points_px * np.array([self.input_width / self.width, self.input_height / self.height])

    def to_picture(self, points_px: Float[np.ndarray, "*lead 2"]) -> Float[np.ndarray, "*lead 2"]:
        """Inverse of `to_input`."""
        return points_px * np.array([self.width / self.input_width, self.height / self.input_height])

    def masks_to_picture(
        self, logits: Float[np.ndarray, "*masks rows columns"]
    ) -> Float32[np.ndarray, "*masks height width"]:
        """Logits over the square, of any resolution, to the picture's size, bilinearly.

        SAM's go by way of the square's own resolution, where the filling is cut off.
        """
        if self.padded:
            logits = resize_masks_on_host(logits, (self.side, self.side))
            logits = logits[..., : self.input_height, : self.input_width]
        return resize_masks_on_host(logits, (self.height, self.width))

    def mask_to_input(
        self, mask_binary: Bool[np.ndarray, "height width"]
    ) -> Bool[np.ndarray, "{self.side} {self.side}"]:
        """A mask of the picture to the square: antialiased, then cut at one half.

        Raises:
            UserError: a mask of another size than the picture.
        """
        if mask_binary.shape != (self.height, self.width):
            raise UserError(
                f"a mask of {mask_binary.shape[1]} x {mask_binary.shape[0]} pixels for a picture of "
                f"{self.width} x {self.height}: they must agree"
            )
        small = _resize_float(mask_binary.astype(np.float32), (self.input_height, self.input_width))
        square = np.zeros((self.side, self.side), bool)
        square[: self.input_height, : self.input_width] = small >= MASK_THRESHOLD
        return square


def _resize_float(plane: Float32[np.ndarray, "h w"], size: tuple[int, int]) -> Float32[np.ndarray, "new_h new_w"]:
    """Pillow's bilinear filter on floats, antialiased when shrinking, which is PyTorch's with `antialias`."""
    if plane.shape == size:
        return plane
    return np.asarray(Image.fromarray(plane).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _resize_8bit(
    rgb: UInt8[np.ndarray, "h w 3"], size: tuple[int, int], resample: Image.Resampling
) -> UInt8[np.ndarray, "new_h new_w 3"]:
    if rgb.shape[:2] == size:
        return rgb
    return np.asarray(Image.fromarray(rgb).resize((size[1], size[0]), resample))


def longest_side_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Height and width, pixels, of a picture whose longest side becomes `side`; halves are rounded up.

    Raises:
        UserError: so narrow a picture that nothing would be left of its short side.
    """
    scale = side / max(height, width)
    size = int(height * scale + 0.5), int(width * scale + 0.5)
    if not min(size):
        raise UserError(
            f"a picture of {width} x {height} pixels, with {side} on its longest side, would be {size[1]} x {size[0]}: "
            "crop it to a less extreme shape"
        )
    return size


def fit_longest_side(
    image: Image.Image | np.ndarray, side: int = 1024
) -> tuple[Float32[np.ndarray, "{side} {side} 3"], Fitting]:
    """A picture as SAM takes it: longest side resized (Pillow, bilinear), normalised, then zeros up to the square.

    Raises:
        UserError: see `to_rgb` and `longest_side_size`.
    """
    rgb = to_rgb(image)
    height, width = rgb.shape[:2]
    size = longest_side_size(height, width, side)
    pixels = np.zeros((side, side, 3), np.float32)
    pixels[: size[0], : size[1]] = normalise(
        _resize_8bit(rgb, size, Image.Resampling.BILINEAR), IMAGENET_MEAN, IMAGENET_STD
    )
    return pixels, Fitting(height, width, *size, side, padded=True)


def fit_square(
    image: Image.Image | np.ndarray, side: int = 1024, resample: SquareFilter = "bilinear"
) -> tuple[Float32[np.ndarray, "{side} {side} 3"], Fitting]:
    """A picture or video frame as SAM 2 takes it: squashed to the square, and normalised.

    Raises:
        UserError: see `to_rgb`.
    """
    rgb = to_rgb(image)
    height, width = rgb.shape[:2]
    if resample == "bilinear":
        planes = [
            _resize_float(np.ascontiguousarray(rgb[..., channel], np.float32), (side, side)) for channel in range(3)
        ]
        mean, std = (np.asarray(values, np.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
        pixels = (np.stack(planes, axis=-1) / np.float32(255) - mean) / std
    else:
        filters = {"bilinear_8bit": Image.Resampling.BILINEAR, "bicubic_8bit": Image.Resampling.BICUBIC}
        pixels = normalise(_resize_8bit(rgb, (side, side), filters[resample]), IMAGENET_MEAN, IMAGENET_STD)
    return pixels, Fitting(height, width, side, side, side, padded=False)
