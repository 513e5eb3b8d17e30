"""Pictures and videos to patches in window order, as the Qwen2-VL and Qwen2.5-VL processors make them.

Sizes, limits and arithmetic follow `transformers` (models/qwen2_vl, the image processor on Pillow) bit for
bit; videos follow its video processor and `qwen-vl-utils` (vision_process.py), frames resized one by one as
pictures.

    patches = preprocess_image(read_image("a.jpg"), VisionInputConfig())
    patches.values      # (frames, windows, slots, patch_dim), float32; a frame is one temporal patch
    patches.grid        # (frames, 2): rows and columns of patches

Slots of a window run (unit row, unit column, merge row, merge column); what lies outside the picture in an
edge window is zeros. `to_block_major` and `from_block_major` translate to and from the order of
`pixel_values`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Float, Float32, Int, UInt8
from PIL import Image

from tracevision_jax.errors import UserError
from tracevision_jax.vision.pictures import to_rgb

MAX_ASPECT_RATIO = 200
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class VisionInputConfig:
    """How pictures become patches; the defaults are the released models' (`qwen-vl-utils`)."""

    patch: int = 14
    """Side of a patch in pixels."""
    merge: int = 2
    """Patches on a side of a unit, which becomes one visual token."""
    temporal_patch: int = 2
    """Video frames in a patch; a still is repeated so often."""
    window_units: int = 4
    """Units on a side of an attention window."""
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 16384 * 28 * 28
    frames_per_second: float = 2.0
    """Rate at which videos are sampled."""
    min_frames: int = 4
    max_frames: int = 768
    video_min_pixels: int = 128 * 28 * 28
    """Least pixels of a video frame."""
    video_max_pixels: int = 768 * 28 * 28
    """Most pixels of a video frame."""
    video_total_pixels: int = int(128000 * 28 * 28 * 0.9)
    """Most pixels of a whole video, counted after two frames became one patch."""
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @property
    def unit_px(self) -> int:
        """Side of a unit in pixels; sides of resized pictures are multiples of it."""
        return self.patch * self.merge

    @property
    def window_patches(self) -> int:
        """Patches on a side of a window."""
        return self.window_units * self.merge

    @property
    def patch_dim(self) -> int:
        """Values in a patch: (channel, time, row, column)."""
        return 3 * self.temporal_patch * self.patch * self.patch


@dataclass(frozen=True)
class Patches:
    """One picture or video, ready for the vision tower."""

    values: Float32[np.ndarray, "frames windows slots patch_dim"]
    grid: Int[np.ndarray, "frames 2"]
    """Rows and columns of patches of each frame (all frames of one input agree)."""
    frame_times: Float[np.ndarray, " frames"]
    """Seconds from the start at which each frame begins; 0 for a still."""
    seconds_per_frame: float
    """Time between temporal patches, for the time part of multimodal rotary positions; 0 for a still."""


def config_from_json(image: Mapping[str, Any], video: Mapping[str, Any] | None = None) -> VisionInputConfig:
    """Read a checkpoint's `preprocessor_config.json` and, where there is one, its file for videos.

    Both spellings of the limits are read: `min_pixels`/`max_pixels`, and `size` with shortest and longest
    edge (which here hold pixel counts). What the files do not say keeps its default.
    """
    fields: dict[str, Any] = {}
    for ours, theirs in (
        ("patch", "patch_size"),
        ("merge", "merge_size"),
        ("temporal_patch", "temporal_patch_size"),
    ):
        if theirs in image:
            fields[ours] = int(image[theirs])
    for ours, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if theirs in image:
            fields[ours] = tuple(float(value) for value in image[theirs])
    for prefix, source in (("", image), ("video_", video or {})):
        size = source.get("size") or {}
        least, most = source.get("min_pixels"), source.get("max_pixels")
        least = size.get("shortest_edge") if least is None else least
        most = size.get("longest_edge") if most is None else most
        if least is not None:
            fields[f"{prefix}min_pixels"] = int(least)
        if most is not None:
            fields[f"{prefix}max_pixels"] = int(most)
    for name in ("min_frames", "max_frames"):
        if video and name in video:
            fields[name] = int(video[name])
    if video and video.get("fps"):
        fields["frames_per_second"] = float(video["fps"])
    return VisionInputConfig(**fields)


def config_to_json(config: VisionInputConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """`preprocessor_config.json` and `video_preprocessor_config.json` for `transformers`."""
    shared = {
        "processor_class": "Qwen2_5_VLProcessor",
        "patch_size": config.patch,
        "merge_size": config.merge,
        "temporal_patch_size": config.temporal_patch,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }
    image = {"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels}
    video = {"shortest_edge": config.video_min_pixels, "longest_edge": config.video_max_pixels}
    return (
        {"image_processor_type": "Qwen2VLImageProcessor", **shared, "size": image},
        {
            "video_processor_type": "Qwen2VLVideoProcessor",
            **shared,
            "size": video,
            "min_frames": config.min_frames,
            "max_frames": config.max_frames,
            "fps": config.frames_per_second,
        },
    )


def smart_resize(height: int, width: int, unit_px: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The size at which a picture enters the tower: multiples of `unit_px`, the area within the limits.

    Python's `round` (half to even) is part of the rule. The upper limit gives way where a side would vanish.

    Raises:
        UserError: a side is zero, or the longer is more than 200 times the shorter.
    """
    if height < 1 or width < 1:
        raise UserError(f"a picture of {width} x {height} pixels is empty; both sides must be at least 1")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise UserError(
            f"a picture of {width} x {height} pixels is too elongated: the longer side may be at most "
            f"{MAX_ASPECT_RATIO} times the shorter; crop it first"
        )
    new_height = round(height / unit_px) * unit_px
    new_width = round(width / unit_px) * unit_px
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(unit_px, math.floor(height / shrink / unit_px) * unit_px)
        new_width = max(unit_px, math.floor(width / shrink / unit_px) * unit_px)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / unit_px) * unit_px
        new_width = math.ceil(width * grow / unit_px) * unit_px
    return new_height, new_width


def image_size(height: int, width: int, config: VisionInputConfig) -> tuple[int, int]:
    """Size in pixels at which a still enters the tower."""
    return smart_resize(height, width, config.unit_px, config.min_pixels, config.max_pixels)


def video_size(height: int, width: int, frames: int, config: VisionInputConfig) -> tuple[int, int]:
    """Size in pixels of every frame of a video that has `frames` sampled frames.

    Each frame may use its even share of the total, within its own limits; the lower limit (with 5 % of room
    for rounding) wins over the total.
    """
    share = config.video_total_pixels * config.temporal_patch // frames
    most = max(min(config.video_max_pixels, share), int(config.video_min_pixels * 1.05))
    return smart_resize(height, width, config.unit_px, config.video_min_pixels, most)


def sample_frames(total: int, frames_per_second: float, config: VisionInputConfig) -> Int[np.ndarray, " sampled"]:
    """Which frames of a video to show: about two a second, 4 to 768, an even number, with both ends.

    As `qwen-vl-utils` chooses them; the processor of `transformers` takes the same number, each at the start
    of its interval. A video of fewer frames than a temporal patch is used whole.

    Raises:
        UserError: no frames, or a rate that is not positive.
    """
    if total < 1:
        raise UserError("the video has no frames")
    if not (math.isfinite(frames_per_second) and frames_per_second > 0):
        raise UserError(f"the video's frame rate is {frames_per_second}; it must be positive")
    step = config.temporal_patch
    if total < step:
        return np.arange(total)
    least = math.ceil(config.min_frames / step) * step
    most = math.floor(min(config.max_frames, total) / step) * step
    wanted = min(max(total / frames_per_second * config.frames_per_second, least), most, total)
    count = math.floor(wanted / step) * step
    return np.round(np.linspace(0, total - 1, count)).astype(np.int64)


def resize(rgb: UInt8[np.ndarray, "h w 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "new_h new_w 3"]:
    """Pillow's bicubic filter, which widens its support when shrinking; `size` is (height, width)."""
    if rgb.shape[:2] == size:
        return rgb
    return np.asarray(Image.fromarray(rgb).resize((size[1], size[0]), resample=Image.Resampling.BICUBIC))


def normalise(
    rgb: UInt8[np.ndarray, "*lead 3"], mean: Sequence[float], std: Sequence[float]
) -> Float32[np.ndarray, "*lead 3"]:
    """(value / 255 - mean) / std in the reference's order and widths, so that the result is the same float.

    There are 256 values a channel: they are computed once and looked up.
    """
    levels = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    table = (levels[:, None] - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return table[rgb, np.arange(3)]


def window_patches(
    pixels: Float32[np.ndarray, "video_frames height width 3"], config: VisionInputConfig
) -> tuple[Float32[np.ndarray, "frames windows slots patch_dim"], Int[np.ndarray, "frames 2"]]:
    """Cut normalised frames of one size into patches in window order; also their rows and columns of patches.

    A number of frames that is no multiple of the temporal patch is filled up with the last one. Sides must be
    multiples of a unit; past them windows are filled with zeros.
    """
    missing = -len(pixels) % config.temporal_patch
    pixels = np.concatenate([pixels, np.repeat(pixels[-1:], missing, axis=0)]) if missing else pixels
    frames, rows, columns = (
        len(pixels) // config.temporal_patch,
        pixels.shape[1] // config.patch,
        pixels.shape[2] // config.patch,
    )
    window_px = config.window_patches * config.patch
    bottom, right = -pixels.shape[1] % window_px, -pixels.shape[2] % window_px
    pixels = np.pad(pixels, ((0, 0), (0, bottom), (0, right), (0, 0)))
    values = rearrange(
        pixels,
        "(t tp) (wr ur mr pr) (wc uc mc pc) c -> t (wr wc) (ur uc mr mc) (c tp pr pc)",
        tp=config.temporal_patch,
        ur=config.window_units,
        uc=config.window_units,
        mr=config.merge,
        mc=config.merge,
        pr=config.patch,
        pc=config.patch,
    )
    grid = np.tile(np.array([rows, columns], np.int32), (frames, 1))
    return np.ascontiguousarray(values), grid


def preprocess_image(image: Image.Image | np.ndarray, config: VisionInputConfig) -> Patches:
    """A still of any mode and size to patches: one frame, the picture repeated in time.

    Raises:
        UserError: see `to_rgb` and `smart_resize`.
    """
    rgb = to_rgb(image)
    rgb = resize(rgb, image_size(rgb.shape[0], rgb.shape[1], config))
    pixels = normalise(rgb, config.mean, config.std)
    values, grid = window_patches(np.repeat(pixels[None], config.temporal_patch, axis=0), config)
    return Patches(values, grid, np.zeros(1), 0.0)


def preprocess_video(
    frames: UInt8[np.ndarray, "frames height width 3"], frames_per_second: float, config: VisionInputConfig
) -> Patches:
    """A video, all its frames at its own rate, to patches: sampled, all at one size, two frames to a patch.

    Raises:
        UserError: see `sample_frames` and `smart_resize`.
    """
    chosen = sample_frames(len(frames), frames_per_second, config)
    size = video_size(frames.shape[1], frames.shape[2], len(chosen), config)
    parts = []  # one temporal patch at a time: the whole of a long video in float32 takes a gigabyte more than once
    for first in range(0, len(chosen), config.temporal_patch):
        rgb = np.stack([resize(frames[index], size) for index in chosen[first : first + config.temporal_patch]])
        parts.append(window_patches(normalise(rgb, config.mean, config.std), config))
    values, grid = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    # The reference spreads the sampled frames evenly over the duration, whatever their exact places.
    seconds_per_frame = config.temporal_patch * len(frames) / (len(chosen) * frames_per_second)
    return Patches(values, grid, np.arange(len(values)) * seconds_per_frame, seconds_per_frame)


def to_block_major(
    values: np.ndarray, grid: Int[np.ndarray, "frames 2"], config: VisionInputConfig
) -> Float[np.ndarray, "patches width"]:
    """Window order (frames, windows, slots, width) to the order of `pixel_values`, without the padding.

    Frames follow each other, each as (unit row, unit column, merge row, merge column) over the whole picture.
    """
    side, merge = config.window_patches, config.merge
    flat = []
    for frame, (rows, columns) in zip(values, grid, strict=True):
        down, across = -(-rows // side), -(-columns // side)
        picture = rearrange(
            frame[: down * across],
            "(wr wc) (ur uc mr mc) d -> (wr ur mr) (wc uc mc) d",
            wr=down,
            ur=config.window_units,
            uc=config.window_units,
            mr=merge,
            mc=merge,
        )
        flat.append(rearrange(picture[:rows, :columns], "(r mr) (c mc) d -> (r c mr mc) d", mr=merge, mc=merge))
    return np.concatenate(flat)


def from_block_major(
    pixel_values: Float[np.ndarray, "patches width"],
    frames: int,
    rows: int,
    columns: int,
    config: VisionInputConfig,
) -> Float[np.ndarray, "frames windows slots width"]:
    """Inverse of `to_block_major` for one picture or video, its frames of `rows` x `columns` patches."""
    side, merge = config.window_patches, config.merge
    picture = rearrange(
        pixel_values,
        "(t r c mr mc) d -> t (r mr) (c mc) d",
        t=frames,
        r=rows // merge,
        mr=merge,
        mc=merge,
    )
    picture = np.pad(picture, ((0, 0), (0, -rows % side), (0, -columns % side), (0, 0)))
    return rearrange(
        picture,
        "t (wr ur mr) (wc uc mc) d -> t (wr wc) (ur uc mr mc) d",
        ur=config.window_units,
        uc=config.window_units,
        mr=merge,
        mc=merge,
    )
