"""The configuration of Qwen2.5-VL in both worlds: `config.json` of `transformers` and our frozen dataclasses.

`config.json` is read flat, as the released ones are, or nested, as transformers 5 writes it, and written
flat, which every version reads. Our own checkpoints hold the dataclasses as JSON.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from tracevision_jax.errors import UserError
from tracevision_jax.hosts.qwen25vl import Qwen25VLConfig
from tracevision_jax.language.config import LanguageConfig
from tracevision_jax.vision.config import QwenVisionConfig

KEPT_TEXT_KEYS = (
    "attention_dropout",
    "initializer_range",
    "max_position_embeddings",
    "max_window_layers",
    "pad_token_id",
    "sliding_window",
    "use_cache",
)
"""Of a nested text_config, what is kept although our model does not know it."""
REWRITTEN_KEYS = ("text_config", "vision_config", "dtype", "rope_parameters", "quantization_config")


def read_config(config: Mapping[str, Any], generation: Mapping[str, Any]) -> Qwen25VLConfig:
    """Our configuration from `config.json` (flat as released, or nested as transformers 5 writes it).

    Raises:
        UserError: not a Qwen2.5-VL, or one that the Flax model cannot express (everything is named).
    """
    from transformers import Qwen2_5_VLConfig

    if config.get("model_type") != "qwen2_5_vl":
        raise UserError(f"config.json is of model_type {config.get('model_type')!r}, expected 'qwen2_5_vl'")
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise UserError(f"the checkpoint is quantised ({method}); use the one in bfloat16 or float32")
    try:
        whole = Qwen2_5_VLConfig(**config)
    except Exception as error:  # its validators raise many kinds
        raise UserError(f"config.json is not valid: {error}") from error
    text: Any = whole.text_config
    vision: Any = whole.vision_config
    blocks = list(vision.fullatt_block_indexes)
    size = blocks[0] + 1 if blocks else 1
    rope = text.rope_parameters
    units = vision.window_size // (vision.patch_size * vision.spatial_merge_size)
    head_dim = text.hidden_size // text.num_attention_heads
    refusals = [
        f"{what} is {found!r}, only {known!r} is known here"
        for what, found, known in (
            ("hidden_act", text.hidden_act, "silu"),
            ("vision_config.hidden_act", vision.hidden_act, "silu"),
            ("use_sliding_window", bool(text.use_sliding_window), False),
            ("rope type", rope.get("rope_type", "default"), "default"),
            ("vision rope theta", vision.rope_parameters.get("rope_theta", 1e4), 1e4),
            ("fullatt_block_indexes", blocks, list(range(size - 1, vision.depth, size))),
            ("window_size", vision.window_size, units * vision.patch_size * vision.spatial_merge_size),
            ("hidden_size", text.hidden_size, head_dim * text.num_attention_heads),
        )
        if found != known
    ]
    if refusals:
        raise UserError("this Qwen2.5-VL cannot be expressed: " + "; ".join(refusals))
    ends = generation.get("eos_token_id", text.eos_token_id)
    pad = generation.get("pad_token_id", text.pad_token_id)
    pad = text.bos_token_id if pad is None else pad
    try:
        return Qwen25VLConfig(
            vision=QwenVisionConfig(
                out_width=vision.out_hidden_size,
                width=vision.hidden_size,
                heads=vision.num_heads,
                mlp_width=vision.intermediate_size,
                groups=vision.depth // size,
                window_blocks=size - 1,
                patch=vision.patch_size,
                temporal_patch=vision.temporal_patch_size,
                channels=vision.in_channels,
                merge=vision.spatial_merge_size,
                window_units=units,
            ),
            language=LanguageConfig(
                vocab_size=text.vocab_size,
                width=text.hidden_size,
                layers=text.num_hidden_layers,
                heads=text.num_attention_heads,
                kv_heads=text.num_key_value_heads,
                head_dim=head_dim,
                mlp_width=text.intermediate_size,
                rope_theta=float(rope["rope_theta"]),
                mrope_sections=tuple(rope.get("mrope_section", (16, 24, 24))),
                norm_eps=float(text.rms_norm_eps),
                tied=bool(whole.tie_word_embeddings),
            ),
            image_token=whole.image_token_id,
            video_token=whole.video_token_id,
            vision_start_token=whole.vision_start_token_id,
            vision_end_token=whole.vision_end_token_id,
            pad_token=0 if pad is None else int(pad),
            end_tokens=tuple(ends) if isinstance(ends, list | tuple) else (int(ends),),
            tokens_per_second=float(vision.tokens_per_second),
        )
    except ValueError as error:
        raise UserError(f"config.json describes an impossible model: {error}") from error


def write_config(config: Qwen25VLConfig, dtype: np.dtype, base: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` for `transformers`, flat as released; keys of `base` that we do not know are kept.

    Raises:
        UserError: the configuration has no counterpart there.
    """
    vision, language = config.vision, config.language
    if language.head_dim * language.heads != language.width or not language.qkv_bias:
        raise UserError(
            "transformers' Qwen2.5-VL has heads that share the width exactly and biases on q, k and v; "
            f"this one has {language.heads} heads of {language.head_dim} at width {language.width}, "
            f"{'with' if language.qkv_bias else 'without'} biases"
        )
    if config.tokens_per_second != int(config.tokens_per_second):
        raise UserError(f"transformers knows whole tokens_per_second only, not {config.tokens_per_second}")
    size = vision.window_blocks + 1
    text = {
        "vocab_size": language.output_size,
        "hidden_size": language.width,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "intermediate_size": language.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": language.norm_eps,
        "rope_theta": language.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(language.mrope_sections)},
        "use_sliding_window": False,
        "bos_token_id": config.pad_token,
        "eos_token_id": config.end_tokens[0],
    }
    kept = {key: value for key, value in base.items() if key not in REWRITTEN_KEYS}
    nested = {key: value for key, value in base.get("text_config", {}).items() if key in KEPT_TEXT_KEYS}
    seen = {key: value for key, value in base.get("vision_config", {}).items() if key not in REWRITTEN_KEYS}
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        **nested,
        **kept,
        **text,
        "model_type": "qwen2_5_vl",
        "torch_dtype": str(dtype),
        "tie_word_embeddings": language.tied,
        "image_token_id": config.image_token,
        "video_token_id": config.video_token,
        "vision_start_token_id": config.vision_start_token,
        "vision_end_token_id": config.vision_end_token,
        "vision_config": {
            **seen,
            "model_type": "qwen2_5_vl",
            "depth": vision.depth,
            "hidden_size": vision.width,
            "hidden_act": "silu",
            "intermediate_size": vision.mlp_width,
            "num_heads": vision.heads,
            "in_channels": vision.channels,
            "out_hidden_size": vision.out_width,
            "patch_size": vision.patch,
            "temporal_patch_size": vision.temporal_patch,
            "spatial_merge_size": vision.merge,
            "window_size": vision.window_units * vision.merge * vision.patch,
            "fullatt_block_indexes": list(range(size - 1, vision.depth, size)),
            "tokens_per_second": int(config.tokens_per_second),
        },
    }


def write_generation_config(config: Qwen25VLConfig) -> dict[str, Any]:
    """`generation_config.json` for a checkpoint that comes with none."""
    return {
        "bos_token_id": config.pad_token,
        "pad_token_id": config.pad_token,
        "eos_token_id": list(config.end_tokens),
    }


def config_to_json(config: Qwen25VLConfig) -> dict[str, Any]:
    """The dataclasses as JSON values; precision and remat belong to a run, not to a checkpoint."""
    return asdict(config.with_precision("float32", "float32", "none"))


def config_from_json(content: Mapping[str, Any]) -> Qwen25VLConfig:
    """Inverse of `config_to_json`.

    Raises:
        UserError: unknown or missing fields, or impossible values.
    """
    try:
        language = dict(content["language"])
        language["mrope_sections"] = tuple(language["mrope_sections"])
        rest = {key: value for key, value in content.items() if key not in ("vision", "language")}
        rest["end_tokens"] = tuple(rest["end_tokens"])
        return Qwen25VLConfig(QwenVisionConfig(**content["vision"]), LanguageConfig(**language), **rest)
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"the checkpoint's configuration is not valid: {error!r}") from error
