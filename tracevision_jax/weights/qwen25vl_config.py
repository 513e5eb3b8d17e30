"""The configuration files of Qwen2.5-VL: what stands beside the weights, read and written.

The host itself reads and writes its part of `config.json` (`Qwen25VLConfig.from_hf`, `to_hf`); here the stop
tokens of `generation_config.json` are joined, keys that the host does not know are kept, and our own
checkpoints get the dataclasses as JSON.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tracevision_jax.errors import UserError
from tracevision_jax.hosts.qwen25vl import Qwen25VLConfig
from tracevision_jax.systems.config_json import from_json, to_json

REWRITTEN_KEYS = ("text_config", "vision_config", "dtype", "rope_parameters", "layer_types")
"""Of a config.json, what is not kept: in the flat form that we write it stands elsewhere."""


def read_config(config: Mapping[str, Any], generation: Mapping[str, Any]) -> Qwen25VLConfig:
    """Our configuration from `config.json` and `generation_config.json` (or `{}`).

    Raises:
        UserError: quantised weights, or a model that ours cannot express (every reason is named).
    """
    if quantised := config.get("quantization_config"):
        raise UserError(
            f"the checkpoint is quantised ({quantised.get('quant_method', 'method not named')}); "
            "use the one in bfloat16 or float32"
        )
    try:
        ours = Qwen25VLConfig.from_hf(config)
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError) as error:
        raise UserError(f"config.json describes an impossible model: {error!r}") from error
    ends, pad = generation.get("eos_token_id"), generation.get("pad_token_id")
    if ends is not None:
        ours = replace(ours, end_tokens=(ends,) if isinstance(ends, int) else tuple(ends))
    return ours if pad is None else replace(ours, pad_token=pad)


def write_config(config: Qwen25VLConfig, dtype: np.dtype, base: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` for `transformers`, flat as released; keys of `base` that the host lacks are kept.

    Raises:
        UserError: the model has no counterpart there.
    """
    language = config.language
    if language.head_dim * language.heads != language.width or not language.qkv_bias:
        raise UserError(
            "transformers' Qwen2.5-VL has heads that share the width exactly and biases on q, k and v; "
            f"this one has {language.heads} heads of {language.head_dim} at width {language.width}, "
            f"{'with' if language.qkv_bias else 'without'} biases"
        )
    if config.tokens_per_second != int(config.tokens_per_second):
        raise UserError(f"transformers knows whole tokens_per_second only, not {config.tokens_per_second}")
    ours = config.to_hf()
    del ours["head_dim"]  # no key of transformers' Qwen2.5-VL
    vision = ours["vision_config"] | {"tokens_per_second": int(config.tokens_per_second)}
    text = {key: value for key, value in base.get("text_config", {}).items() if key not in REWRITTEN_KEYS}
    kept = {key: value for key, value in base.items() if key not in REWRITTEN_KEYS}
    seen = {key: value for key, value in base.get("vision_config", {}).items() if key not in REWRITTEN_KEYS}
    # What only the base knows wins over what the host writes for want of knowing it.
    known = {key: value for key, value in {**text, **kept}.items() if key == "max_position_embeddings"}
    return {**text, **kept, **ours, **known, "torch_dtype": str(dtype), "vision_config": {**seen, **vision}}


def write_generation_config(config: Qwen25VLConfig) -> dict[str, Any]:
    """`generation_config.json` for a checkpoint that comes with none."""
    return {
        "bos_token_id": config.pad_token,
        "pad_token_id": config.pad_token,
        "eos_token_id": list(config.end_tokens),
    }


def config_to_json(config: Qwen25VLConfig) -> dict[str, Any]:
    """The dataclasses as JSON values; precision and remat belong to a run, not to a checkpoint."""
    return to_json(config.with_precision("float32", "float32", "none"))


def config_from_json(content: Mapping[str, Any]) -> Qwen25VLConfig:
    """Inverse of `config_to_json`.

    Raises:
        UserError: unknown or missing fields, or impossible values.
    """
    return from_json(Qwen25VLConfig, content, "the checkpoint's configuration")
