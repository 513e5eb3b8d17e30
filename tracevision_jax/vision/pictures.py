"""Pictures of any kind as upright 8-bit RGB arrays: files, bytes, every Pillow mode, arrays.

Transparency is laid over white, as the processors of `transformers` do. Unlike them, pictures of 16 bits, LAB
and floats are scaled properly instead of clipped.
"""

import io
import math
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from tracevision_jax.errors import UserError


def read_image(source: str | Path | bytes) -> UInt8[np.ndarray, "height width 3"]:
    """Read a picture file (or its bytes) upright, as RGB; of an animation the first frame.

    Raises:
        UserError: missing, empty, truncated, unknown or dangerously large.
    """
    name = "the picture" if isinstance(source, bytes) else f"the picture {source}"
    try:
        encoded = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise UserError(f"{name} cannot be read: {error.strerror or error}") from error
    if not encoded:
        raise UserError(f"{name} is empty (zero bytes)")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is in no format that Pillow knows, or its header is damaged") from error
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} is damaged or truncated: {error}") from error


def to_rgb(image: Image.Image | np.ndarray) -> UInt8[np.ndarray, "height width 3"]:
    """Any Pillow mode (or uint8 array: grey, RGB or RGBA) to RGB; transparency is laid over white.

    Raises:
        UserError: numbers outside every known range, or a mode that cannot be converted.
    """
    if isinstance(image, np.ndarray):
        return to_rgb(_image_from_array(image))
    if 0 in image.size:
        raise UserError(f"a picture of {image.size[0]} x {image.size[1]} pixels is empty")
    if image.mode.startswith("I") or image.mode == "F":
        return _rgb_from_wide_grey(image)
    if image.mode == "LAB":
        return _rgb_from_lab(image)
    try:
        if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
            # Premultiplied modes ("RGBa", "La") have to be undone before they can be laid over anything.
            image = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return np.asarray(image.convert("RGB"))
    except ValueError as error:
        raise UserError(f"a picture of Pillow mode {image.mode} cannot be converted to RGB: {error}") from error


def _image_from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise UserError(
            "a picture as an array must be uint8 of shape (height, width[, 1, 3 or 4]), not "
            f"{array.dtype} of {array.shape}"
        )
    if 0 in array.shape:
        raise UserError(f"a picture of {array.shape[1]} x {array.shape[0]} pixels is empty")
    return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def _rgb_from_wide_grey(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    """Grey of 16 bits ("I;16" and its byte orders), 32-bit integers ("I") or floats ("F") to 8 bits.

    "I" and "F" do not say their range: integers up to 255 are taken for 8 bits and up to 65535 for 16, floats
    up to 1 for fractions and up to 255 for 8 bits.
    """
    grey = np.asarray(image).astype(np.float64)
    lowest, highest = (float(grey.min()), float(grey.max()))
    if not (math.isfinite(lowest) and math.isfinite(highest)) or lowest < 0:
        raise UserError(f"a picture of Pillow mode {image.mode} holds values from {lowest} to {highest}")
    if image.mode.startswith("I;16"):
        full = 65535.0
    else:
        ranges = (255.0, 65535.0) if image.mode == "I" else (1.0, 255.0)
        full = next((top for top in ranges if highest <= top), 0.0)
    if not full:
        raise UserError(f"a picture of Pillow mode {image.mode} holds {highest}, beyond every known range")
    scaled = np.round(grey * (255.0 / full)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        scaled[grey == transparent] = 255
    return np.repeat(scaled[..., None], 3, axis=2)


def _rgb_from_lab(image: Image.Image) -> UInt8[np.ndarray, "height width 3"]:
    from PIL import ImageCms

    transform = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    return np.asarray(ImageCms.applyTransform(image, transform))
