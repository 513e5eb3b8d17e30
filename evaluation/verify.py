"""Our host against the one of `transformers`, on the same prompt: the largest relative error of every stage.

    rows = verify_qwen25vl("Qwen2.5-VL-7B-Instruct", config, lambda: params, say=print)
    all(row.passed for row in rows)

Both compute in float32. The prompt holds two drawn pictures, which go through both preprocessors, a short video, a
question in the checkpoint's own tokens where it has a tokenizer, and tokens drawn from the whole vocabulary. The
reference runs first and is freed before our parameters are loaded: one model at a time is in memory. Needs torch.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from tracevision_jax.errors import UserError
from tracevision_jax.hosts.qwen25vl import Qwen25VL, Qwen25VLConfig, place_features
from tracevision_jax.language.mrope import VisualSpan, mrope_positions
from tracevision_jax.vision.preprocess import (
    Patches,
    VisionInputConfig,
    config_from_json,
    preprocess_image,
    preprocess_video,
    to_block_major,
)
from tracevision_jax.vision.windows import raster_units, slot_coordinates
from tracevision_jax.weights.hugging_face import read_json

PICTURE_SIZES = ((308, 420), (140, 392))
"""(height, width) of the drawn pictures."""
VIDEO_SIZE = (8, 168, 224)
"""(frames, height, width) of the drawn video, two frames a second."""
QUESTION = "Compare the two pictures, then describe what happens in the video and where it happens."
DRAWN_TOKENS = 64
LIMIT = 1e-4
"""Of the relative error of each stage in float32."""


@dataclass(frozen=True)
class StageError:
    """How far ours is from the reference at one stage."""

    stage: str
    error: float
    """Largest relative error of a row (a patch, a token), by the Frobenius norm."""
    rows: int
    """How many rows were compared."""
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the limit; not a number is not."""
        return self.error <= self.limit


@dataclass(frozen=True)
class Prompt:
    """One sequence with its visual inputs in reading order: the pictures, then the video."""

    tokens: Int[np.ndarray, " tokens"]
    pictures: tuple[Patches, ...]
    video: Patches

    @property
    def inputs(self) -> tuple[Patches, ...]:
        """All visual inputs."""
        return (*self.pictures, self.video)


def require_torch() -> None:
    """
    Raises:
        UserError: torch is not installed.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--verify runs the PyTorch implementation beside ours and torch is not installed: "
            "pip install 'tracevision-jax[torch]', or convert without --verify"
        ) from error


def verify_qwen25vl(
    reference: str | Path,
    config: Qwen25VLConfig,
    load: Callable[[], Mapping[str, Any]],
    say: Callable[[str], None] = print,
) -> list[StageError]:
    """Run both implementations and compare them stage by stage.

    Args:
        reference: Hugging Face directory that the reference is loaded from.
        config: of ours.
        load: gives the parameters of ours in float32.
        say: told what is being done.

    Raises:
        UserError: torch is missing, or the directory cannot be loaded.
    """
    require_torch()
    reference = Path(reference)
    config = config.with_precision("float32", "float32")
    inputs = vision_input_config(reference, config)
    pictures, video = draw_pictures(), draw_video()
    prompt = Prompt(
        np.zeros(0, np.int64),
        tuple(preprocess_image(picture, inputs) for picture in pictures),
        preprocess_video(video, 2.0, inputs),
    )
    prompt = replace(prompt, tokens=draw_tokens(reference, config, inputs, prompt))
    say(f"running transformers on {len(prompt.tokens)} tokens, two pictures and a video")
    theirs = run_reference(reference, config, inputs, pictures, prompt)
    gc.collect()
    say("running ours")
    ours = run_ours(config, load(), inputs, prompt)
    width = config.language.output_size
    theirs["logits"] = theirs["logits"][:, :width]
    return [StageError(stage, largest_error(ours[stage], theirs[stage]), len(theirs[stage]), LIMIT) for stage in theirs]


def vision_input_config(directory: Path, config: Qwen25VLConfig) -> VisionInputConfig:
    """Preprocessing as a checkpoint's files say, with the tower's geometry."""
    names = ("preprocessor_config.json", "video_preprocessor_config.json")
    vision = config.vision
    return replace(
        config_from_json(*(read_json(directory / name) for name in names)),
        patch=vision.patch,
        merge=vision.merge,
        temporal_patch=vision.temporal_patch,
        window_units=vision.window_units,
    )


def draw_pictures() -> list[UInt8[np.ndarray, "height width 3"]]:
    """Two smooth pictures with some noise, the same every time."""
    rng = np.random.default_rng(0)
    return [_draw(rng, *size, phase=0.0) for size in PICTURE_SIZES]


def draw_video() -> UInt8[np.ndarray, "frames height width 3"]:
    """A pattern that moves."""
    rng = np.random.default_rng(1)
    frames, height, width = VIDEO_SIZE
    return np.stack([_draw(rng, height, width, phase=0.4 * frame) for frame in range(frames)])


def _draw(rng: np.random.Generator, height: int, width: int, phase: float) -> UInt8[np.ndarray, "height width 3"]:
    row, column = np.mgrid[:height, :width] / 40
    waves = [np.sin(row * a + column * b + phase * c) for a, b, c in ((1, 2, 3), (2, -1, 1), (0.3, 0.7, 2))]
    noise = rng.standard_normal((height, width, 3))
    return np.clip(127 + 90 * np.stack(waves, axis=-1) + 15 * noise, 0, 255).astype(np.uint8)


def draw_tokens(
    directory: Path, config: Qwen25VLConfig, inputs: VisionInputConfig, prompt: Prompt
) -> Int[np.ndarray, " tokens"]:
    """A prompt in token ids: the visual inputs, the question if there is a tokenizer, drawn ids from everywhere."""
    rng = np.random.default_rng(2)
    special = {config.image_token, config.video_token, config.vision_start_token, config.vision_end_token}
    drawn = rng.integers(0, config.language.output_size, 2 * DRAWN_TOKENS)
    drawn = drawn[~np.isin(drawn, list(special))]
    parts: list[list[int]] = [drawn[:DRAWN_TOKENS].tolist()]
    for number, visual in enumerate(prompt.inputs):
        pad = config.image_token if number < len(prompt.pictures) else config.video_token
        count = int(visual.grid.prod(axis=1).sum()) // inputs.merge**2
        parts.append([config.vision_start_token, *[pad] * count, config.vision_end_token])
    parts += [_question(directory), drawn[DRAWN_TOKENS:].tolist()]
    return np.array([token for part in parts for token in part], np.int64)


def _question(directory: Path) -> list[int]:
    """The question in the checkpoint's tokens, nothing when its tokenizer is not there."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        return []
    from transformers import AutoTokenizer

    try:
        return list(AutoTokenizer.from_pretrained(directory)(QUESTION)["input_ids"])
    except Exception as error:  # tokenizers raise whatever the damage leads to
        raise UserError(f"the tokenizer in {directory} cannot be loaded: {error}") from error


def run_reference(
    directory: Path, config: Qwen25VLConfig, inputs: VisionInputConfig, pictures: list[np.ndarray], prompt: Prompt
) -> dict[str, Float[np.ndarray, "rows columns"]]:
    """Every stage's result by the model of `transformers`, visual rows in its own order."""
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.utils import logging

    size = {"shortest_edge": inputs.min_pixels, "longest_edge": inputs.max_pixels}
    processor = Qwen2VLImageProcessorPil(
        patch_size=inputs.patch,
        merge_size=inputs.merge,
        temporal_patch_size=inputs.temporal_patch,
        image_mean=list(inputs.mean),
        image_std=list(inputs.std),
        size=size,
    )
    processed = processor(images=list(pictures), return_tensors="pt")
    video = to_block_major(prompt.video.values, prompt.video.grid, inputs)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # progress is shown by whoever called
    try:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
    except Exception as error:  # whatever transformers finds wrong with it
        raise UserError(f"transformers cannot load {directory}: {error}") from error
    finally:
        if shown:
            logging.enable_progress_bar()
    tokens = torch.from_numpy(prompt.tokens)[None]
    kinds = (tokens == config.image_token) + 2 * (tokens == config.video_token)
    arguments = {
        "pixel_values": processed["pixel_values"],
        "image_grid_thw": processed["image_grid_thw"],
        "pixel_values_videos": torch.from_numpy(video),
        "video_grid_thw": torch.tensor([[len(prompt.video.grid), *prompt.video.grid[0].tolist()]]),
    }
    with torch.no_grad():
        seen = [
            model.model.visual(arguments[f"pixel_values{suffix}"], grid_thw=arguments[f"{kind}_grid_thw"])
            for kind, suffix in (("image", ""), ("video", "_videos"))
        ]
        hidden = model.model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            mm_token_type_ids=kinds.int(),
            second_per_grid_ts=torch.tensor([prompt.video.seconds_per_frame]),
            **arguments,
        ).last_hidden_state[0]
        logits = model.lm_head(hidden)
    return {
        "preprocessing": processed["pixel_values"].numpy(),
        "vision tower": torch.cat([part.last_hidden_state for part in seen]).numpy(),
        "merged visual tokens": torch.cat([part.pooler_output for part in seen]).numpy(),
        "hidden states": hidden.numpy(),
        "logits": logits.numpy(),
    }


def run_ours(
    config: Qwen25VLConfig, params: Mapping[str, Any], inputs: VisionInputConfig, prompt: Prompt
) -> dict[str, Float[np.ndarray, "rows columns"]]:
    """Every stage's result by our host, visual rows brought into the reference's order."""
    vision = config.vision
    windows = max(visual.values.shape[1] for visual in prompt.inputs)
    patches = np.concatenate(
        [np.pad(v.values, ((0, 0), (0, windows - v.values.shape[1]), (0, 0), (0, 0))) for v in prompt.inputs]
    )
    grid = np.concatenate([visual.grid for visual in prompt.inputs])
    places = _raster_places(grid, windows, config)
    spans = [VisualSpan(len(v.grid), int(v.grid[0, 0]), int(v.grid[0, 1]), v.seconds_per_frame) for v in prompt.inputs]
    positions, _ = mrope_positions(prompt.tokens, spans, config.visual_tokens, vision.merge, config.tokens_per_second)
    index = np.full(len(prompt.tokens), -1, np.int32)
    index[np.isin(prompt.tokens, config.visual_tokens)] = places

    host: Any = Qwen25VL(config)
    variables = {"params": params}

    @jax.jit
    def see(variables: Any, patches: jax.Array, grid: jax.Array) -> tuple[jax.Array, jax.Array]:
        units, (states,) = host.apply(variables, patches, grid, (vision.groups,), method="encode_vision")
        return units.reshape(-1, units.shape[-1]), states.reshape(-1, states.shape[-1])

    @jax.jit
    def read(variables: Any, tokens: jax.Array, positions: jax.Array, units: jax.Array, index: jax.Array):
        embeddings = place_features(host.apply(variables, tokens, method="embed"), units[None], index)
        hidden, _ = host.apply(variables, embeddings, positions, jnp.ones_like(tokens), method="run")
        return hidden[0], host.apply(variables, hidden[0], method="logits")

    with jax.default_matmul_precision("highest"):
        units, states = see(variables, jnp.asarray(patches[None]), jnp.asarray(grid[None]))
        tokens = jnp.asarray(prompt.tokens[None], jnp.int32)
        hidden, logits = read(variables, tokens, jnp.asarray(positions[None]), units, jnp.asarray(index[None]))
    slots = np.arange(vision.slots)
    _, _, inside = slot_coordinates(grid, np.arange(windows), slots, vision.window_units, vision.merge)
    return {
        "preprocessing": np.concatenate([to_block_major(v.values, v.grid, inputs) for v in prompt.pictures]),
        "vision tower": np.asarray(states)[inside.reshape(-1)],
        "merged visual tokens": np.asarray(units)[places],
        "hidden states": np.asarray(hidden),
        "logits": np.asarray(logits),
    }


def _raster_places(
    grid: Int[np.ndarray, "frames 2"], windows: int, config: Qwen25VLConfig
) -> Int[np.ndarray, " visual_tokens"]:
    """Where each visual token's unit stands among (frames, units) flattened, in reading order."""
    merge, window_units = config.vision.merge, config.vision.window_units
    places = []
    for frame, (rows, columns) in enumerate(grid):
        row, column = np.mgrid[: rows // merge, : columns // merge]
        units = raster_units(row.reshape(-1), column.reshape(-1), columns, window_units, merge)
        places.append(frame * windows * window_units**2 + units)
    return np.concatenate(places)


def largest_error(ours: Float[np.ndarray, "_ _"], theirs: Float[np.ndarray, "_ _"]) -> float:
    """Largest relative error of a row; rows that are nearly zero count as a thousandth of the usual norm.

    Rows that are not numbers give infinity, and so do arrays of different shapes.
    """
    if ours.shape != theirs.shape or not (np.isfinite(ours).all() and np.isfinite(theirs).all()):
        return float("inf")
    difference = np.linalg.norm(ours.astype(np.float64) - theirs, axis=1)
    size = np.linalg.norm(theirs.astype(np.float64), axis=1)
    usual = float(np.sqrt(np.mean(size**2)))
    return float(np.max(difference / np.maximum(size, 1e-3 * usual + 1e-30)))
