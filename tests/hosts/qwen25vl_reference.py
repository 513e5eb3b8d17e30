"""The reference of the parity tests: a tiny Qwen2.5-VL of `transformers` with drawn weights, and prompts for
both.

Weights are drawn so that rounding errors do not grow through the layers: matrices with standard deviation
1/sqrt(fan in), norm scales 1 +- 0.3, biases 0.1. At that gain float32 against float64 differ by about 1e-6.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tracevision_jax.hosts.qwen25vl import Qwen25VLConfig
from tracevision_jax.language.mrope import VisualSpan, mrope_positions
from tracevision_jax.vision.preprocess import VisionInputConfig, window_patches
from tracevision_jax.vision.windows import raster_units
from tracevision_jax.weights.qwen25vl import from_torch

TINY = {
    "model_type": "qwen2_5_vl",
    "vocab_size": 300,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 112,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "tie_word_embeddings": False,
    "image_token_id": 290,
    "video_token_id": 291,
    "vision_start_token_id": 292,
    "vision_end_token_id": 293,
    "bos_token_id": 0,
    "eos_token_id": 299,
    "pad_token_id": 0,
    "vision_config": {
        "depth": 4,
        "hidden_size": 48,
        "num_heads": 3,
        "intermediate_size": 76,
        "out_hidden_size": 64,
        "in_channels": 3,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 32,
        "fullatt_block_indexes": [1, 3],
        "tokens_per_second": 2,
    },
}
"""Two groups of one window and one full block, windows of 2 x 2 units."""

RELEASED_LAYOUT = {
    **TINY,
    "tie_word_embeddings": True,
    "vision_config": {
        **TINY["vision_config"],
        "depth": 8,
        "patch_size": 4,
        "window_size": 32,
        "fullatt_block_indexes": [3, 7],
    },
}
"""Windows of 4 x 4 units as released, groups of three window blocks and a full one, tied embeddings."""


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Draw all parameters in place; embeddings have standard deviation 1, since each reads one row."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.3 * noise)
            elif "embed_tokens" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * float(np.prod(parameter.shape[1:])) ** -0.5)


def reference_model(config: dict, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A model of `transformers` with drawn weights, in evaluation mode, plain attention."""
    built = Qwen2_5_VLConfig(**config)
    built._attn_implementation = "eager"
    model = Qwen2_5_VLForConditionalGeneration(built)
    draw_weights(model, seed)
    return model.eval().to(dtype=dtype)


@dataclass(frozen=True)
class Visual:
    """Random normalised pixels (video frames, height, width, 3); without seconds they are a still."""

    pixels: np.ndarray
    seconds_per_frame: float | None = None

    @property
    def video(self) -> bool:
        """Whether it goes in as a video."""
        return self.seconds_per_frame is not None


def random_visual(
    rng: np.random.Generator,
    config: Qwen25VLConfig,
    frames: int,
    rows: int,
    cols: int,
    seconds: float | None = None,
) -> Visual:
    """Noise of `frames` temporal patches and (rows, cols) patches; a still repeats its picture in time."""
    v = config.vision
    pixels = rng.standard_normal((frames * v.temporal_patch, rows * v.patch, cols * v.patch, 3)).astype(np.float32)
    if seconds is None:
        pixels = np.repeat(pixels[:1], v.temporal_patch, axis=0)
    return Visual(pixels, seconds)


def block_major_patches(pixels: np.ndarray, config: Qwen25VLConfig) -> tuple[np.ndarray, list[int]]:
    """Patches in the reference's order (frame, unit row, unit column, row, column), and its (t, h, w)."""
    v = config.vision
    t, h, w = (
        pixels.shape[0] // v.temporal_patch,
        pixels.shape[1] // v.patch,
        pixels.shape[2] // v.patch,
    )
    m = v.merge
    cut = pixels.reshape(t, v.temporal_patch, h // m, m, v.patch, w // m, m, v.patch, 3)
    ordered = cut.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    return ordered.reshape(t * h * w, v.patch_dim), [t, h, w]


@dataclass(frozen=True)
class Prompt:
    """One sequence of tokens with its pictures and videos in reading order."""

    tokens: np.ndarray
    visuals: tuple[Visual, ...]
    config: Qwen25VLConfig

    @property
    def spans(self) -> list[VisualSpan]:
        """What `mrope_positions` wants to know of the visuals."""
        v = self.config.vision
        return [
            VisualSpan(
                len(visual.pixels) // v.temporal_patch,
                visual.pixels.shape[1] // v.patch,
                visual.pixels.shape[2] // v.patch,
                visual.seconds_per_frame or 0.0,
            )
            for visual in self.visuals
        ]

    def for_reference(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        """Arguments of the reference model, batch 1."""
        tokens = torch.tensor(self.tokens)[None]
        kinds = (tokens == self.config.image_token) + 2 * (tokens == self.config.video_token)
        arguments = {
            "input_ids": tokens,
            "mm_token_type_ids": kinds.int(),
            "attention_mask": torch.ones_like(tokens),
        }
        for video, pixel_name, grid_name in (
            (False, "pixel_values", "image_grid_thw"),
            (True, "pixel_values_videos", "video_grid_thw"),
        ):
            cut = [block_major_patches(x.pixels, self.config) for x in self.visuals if x.video == video]
            if cut:
                arguments[pixel_name] = torch.tensor(np.concatenate([patches for patches, _ in cut])).to(dtype)
                arguments[grid_name] = torch.tensor([grid for _, grid in cut])
        seconds = [x.seconds_per_frame for x in self.visuals if x.seconds_per_frame is not None]
        if seconds:
            arguments["second_per_grid_ts"] = torch.tensor(seconds)
        return arguments


def make_prompt(rng: np.random.Generator, config: Qwen25VLConfig, visuals: Sequence[Visual], text: int) -> Prompt:
    """`text` random tokens before, between and after the visuals."""
    v = config.vision
    pieces = [rng.integers(1, 280, text)]
    for visual in visuals:
        count = (
            len(visual.pixels) // v.temporal_patch
            * (visual.pixels.shape[1] // v.unit_pixels) * (visual.pixels.shape[2] // v.unit_pixels)
        )  # fmt: skip
        pad = config.video_token if visual.video else config.image_token
        pieces += [
            [config.vision_start_token],
            [pad] * count,
            [config.vision_end_token],
            rng.integers(1, 280, text),
        ]
    return Prompt(np.concatenate(pieces).astype(np.int64), tuple(visuals), config)


def pack(
    prompts: Sequence[Prompt], *, extra_tokens: int = 0, extra_frames: int = 0, extra_windows: int = 0
) -> dict[str, np.ndarray]:
    """Our arguments for prompts as the rows of one batch, padded to their largest and the extras beyond."""
    config = prompts[0].config
    v = config.vision
    inputs = VisionInputConfig(v.patch, v.merge, v.temporal_patch, v.window_units)
    cut = [[window_patches(visual.pixels, inputs) for visual in prompt.visuals] for prompt in prompts]
    rows, length = len(prompts), max(len(prompt.tokens) for prompt in prompts) + extra_tokens
    frames = max([sum(len(grid) for _, grid in row) for row in cut] + [1]) + extra_frames
    windows = max([patches.shape[1] for row in cut for patches, _ in row] + [1]) + extra_windows
    units = windows * v.window_units**2
    tokens = np.zeros((rows, length), np.int32)
    segments, index = np.zeros_like(tokens), np.full_like(tokens, -1)
    positions = np.zeros((rows, length, 3), np.int32)
    patches = np.zeros((rows, frames, windows, v.slots, v.patch_dim), np.float32)
    grid = np.zeros((rows, frames, 2), np.int32)
    for row, prompt in enumerate(prompts):
        count = len(prompt.tokens)
        tokens[row, :count], segments[row, :count] = prompt.tokens, 1
        positions[row, :count], _ = mrope_positions(
            prompt.tokens, prompt.spans, config.visual_tokens, v.merge, config.tokens_per_second
        )
        places, frame = [], 0
        for values, size in cut[row]:
            for picture, (height, width) in zip(values, size, strict=True):
                patches[row, frame, : len(picture)], grid[row, frame] = picture, (height, width)
                r, c = np.mgrid[: height // v.merge, : width // v.merge]
                places.append(frame * units + raster_units(r, c, width, v.window_units, v.merge).reshape(-1))
                frame += 1
        if places:
            index[row, np.flatnonzero(np.isin(tokens[row], config.visual_tokens))] = np.concatenate(places)
    return {
        "tokens": tokens, "positions": positions, "segments": segments,
        "patches": patches, "grid": grid, "visual_index": index,
    }  # fmt: skip


def error(ours: object, reference: object) -> float:
    """Relative error by the Frobenius norm."""
    a, b = (np.asarray(x, np.float64) for x in (ours, reference))
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's values in float64 unless it holds integers."""
    return tensor.detach().double().numpy() if tensor.is_floating_point() else tensor.numpy()


def params_of(model: torch.nn.Module, config: Qwen25VLConfig) -> dict:
    """The reference's weights as our parameter tree."""
    return from_torch(model.state_dict(), config)
