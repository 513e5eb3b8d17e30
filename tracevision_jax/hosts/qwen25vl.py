"""Qwen2.5-VL as released: the vision tower and the language model joined.

Sources: the Qwen2.5-VL technical report, and config.json of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct. Use:
`units, _ = host.apply(params, patches, grid, method="encode_vision")`, then `embed`, `run` and `logits` in
the same way, or `host.apply(params, tokens, positions, segments, patches, grid, visual_index)` for logits at
every position.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from tracevision_jax.errors import UserError
from tracevision_jax.language.cache import KVCache
from tracevision_jax.language.config import LANGUAGE_PRESETS, LanguageConfig
from tracevision_jax.language.model import LanguageModel
from tracevision_jax.layers.sharding import constrain
from tracevision_jax.nearest import suggest
from tracevision_jax.ops.cross_entropy import LogitParts
from tracevision_jax.vision.config import VISION_PRESETS, QwenVisionConfig
from tracevision_jax.vision.qwen_vit import VisionTower

_TEXT_KEYS = {
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
_TOWER_KEYS = {
    "out_width": "out_hidden_size",
    "width": "hidden_size",
    "heads": "num_heads",
    "patch": "patch_size",
    "temporal_patch": "temporal_patch_size",
    "merge": "spatial_merge_size",
}
_TOKEN_NAMES = ("image_token", "video_token", "vision_start_token", "vision_end_token")


@dataclass(frozen=True)
class Qwen25VLConfig:
    """Sizes of both parts, and the token ids that join them."""

    vision: QwenVisionConfig
    language: LanguageConfig
    image_token: int = 151655
    video_token: int = 151656
    vision_start_token: int = 151652
    vision_end_token: int = 151653
    pad_token: int = 151643
    end_tokens: tuple[int, ...] = (151645, 151643)
    tokens_per_second: float = 2.0
    """Steps of the time position for one second of video."""

    def __post_init__(self) -> None:
        if self.vision.out_width != self.language.width:
            raise ValueError(f"vision gives width {self.vision.out_width}, language takes {self.language.width}")

    @property
    def visual_tokens(self) -> tuple[int, int]:
        """Ids of the pad tokens whose places visual units take."""
        return self.image_token, self.video_token

    def with_precision(self, dtype: str, param_dtype: str | None = None, remat: str | None = None) -> "Qwen25VLConfig":
        """The same model computing in `dtype`; parameters and remat policy change only when given."""
        changes = {"dtype": dtype}
        if param_dtype is not None:
            changes["param_dtype"] = param_dtype
        if remat is not None:
            changes["remat"] = remat
        return replace(self, vision=replace(self.vision, **changes), language=replace(self.language, **changes))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen25VLConfig":
        """Read a checkpoint's config.json, in the released flat form or with a `text_config`.

        Raises UserError that lists every key that is missing, and what the model cannot do.
        """
        text = config.get("text_config") or config
        tower = config.get("vision_config") or {}
        problems = [f"'{key}' is missing" for key in _TEXT_KEYS.values() if key not in text]
        problems += [f"'vision_config.{key}' is missing" for key in _TOWER_KEYS.values() if key not in tower]
        if config.get("model_type") not in ("qwen2_5_vl", None):
            problems.append(f"model_type is '{config['model_type']}', not 'qwen2_5_vl'")
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        if rope.get("rope_type", rope.get("type", "default")) not in ("mrope", "default"):
            problems.append(f"rotary positions of type '{rope.get('rope_type', rope.get('type'))}' are not supported")
        if text.get("use_sliding_window"):
            problems.append("sliding window attention (use_sliding_window) is not supported")
        for name, part in (("hidden_act", text), ("vision_config.hidden_act", tower)):
            if part.get("hidden_act", "silu") != "silu":
                problems.append(f"{name} is '{part['hidden_act']}', not 'silu'")
        full_blocks = [int(block) for block in tower.get("fullatt_block_indexes", ())]
        groups = max(len(full_blocks), 1)
        blocks = tower.get("depth", 0) // groups
        if full_blocks != [blocks * (group + 1) - 1 for group in range(groups)] or blocks * groups != tower.get(
            "depth"
        ):
            problems.append(f"full attention in blocks {full_blocks} of {tower.get('depth')}: only every n-th can be")
        if problems:
            raise UserError("this config.json is of no Qwen2.5-VL that can be read: " + "; ".join(problems))
        heads = text["num_attention_heads"]
        language = LanguageConfig(
            **{ours: text[theirs] for ours, theirs in _TEXT_KEYS.items()},
            head_dim=text.get("head_dim") or text["hidden_size"] // heads,
            rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1e6))),
            mrope_sections=tuple(rope.get("mrope_section", (16, 24, 24))),
            tied=bool(config.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)),
        )
        vision = QwenVisionConfig(
            **{ours: tower[theirs] for ours, theirs in _TOWER_KEYS.items()},
            mlp_width=tower.get("intermediate_size", 3420),
            groups=groups,
            window_blocks=blocks - 1,
            channels=tower.get("in_channels", tower.get("in_chans", 3)),
            window_units=tower["window_size"] // tower["patch_size"] // tower["spatial_merge_size"],
        )
        ends = text.get("eos_token_id", config.get("eos_token_id"))
        # The released files name one end token; the chat model also stops at <|endoftext|>.
        named = (ends,) if isinstance(ends, int) else tuple(ends or (151645,))
        pad = text.get("pad_token_id", config.get("pad_token_id"))
        return cls(
            vision,
            language,
            **{name: config[f"{name}_id"] for name in _TOKEN_NAMES if f"{name}_id" in config},
            pad_token=151643 if pad is None else pad,
            end_tokens=named if 151643 in named or language.vocab_size <= 151643 else (*named, 151643),
            tokens_per_second=float(tower.get("tokens_per_second", 2)),
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json of this model in the released flat form, added tokens merged into the vocabulary.

        Embedding and head of added tokens differ, so a tied model with added tokens is written untied.
        """
        v, c = self.vision, self.language
        return {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            **{theirs: getattr(c, ours) for ours, theirs in _TEXT_KEYS.items()},
            "vocab_size": c.merged_vocab_size,
            "head_dim": c.head_dim,
            "hidden_act": "silu",
            "rope_theta": c.rope_theta,
            "rope_scaling": {"type": "mrope", "mrope_section": list(c.mrope_sections)},
            "tie_word_embeddings": c.tied and not c.added_tokens,
            "use_sliding_window": False,
            "max_position_embeddings": 128000,
            "bos_token_id": self.pad_token,
            "pad_token_id": self.pad_token,
            "eos_token_id": self.end_tokens[0],
            "torch_dtype": c.param_dtype,
            **{f"{name}_id": getattr(self, name) for name in _TOKEN_NAMES},
            "vision_config": {
                "model_type": "qwen2_5_vl",
                **{theirs: getattr(v, ours) for ours, theirs in _TOWER_KEYS.items()},
                "depth": v.depth,
                "intermediate_size": v.mlp_width,
                "hidden_act": "silu",
                "in_channels": v.channels,
                "window_size": v.window_units * v.unit_pixels,
                "fullatt_block_indexes": [(g + 1) * (v.window_blocks + 1) - 1 for g in range(v.groups)],
                "tokens_per_second": int(self.tokens_per_second),
            },
        }


def preset(name: str) -> Qwen25VLConfig:
    """A released size: "3b", "7b", "32b" or "72b". Raises UserError for another name."""
    if name not in LANGUAGE_PRESETS:
        raise UserError(f"no Qwen2.5-VL of size '{name}'; known are {', '.join(LANGUAGE_PRESETS)}."
                        + suggest(name, LANGUAGE_PRESETS))  # fmt: skip
    return Qwen25VLConfig(VISION_PRESETS[name], LANGUAGE_PRESETS[name])


class Qwen25VL(nn.Module):
    """The joined model; parameters are {"vision": ..., "language": ...}."""

    config: Qwen25VLConfig

    def setup(self) -> None:
        self.vision = VisionTower(self.config.vision)
        self.language = LanguageModel(self.config.language)

    def encode_vision(
        self,
        patches: Float[Array, "batch frames windows slots patch_dim"],
        grid: Int[Array, "batch frames 2"],
        after_groups: tuple[int, ...] = (),
    ) -> tuple[Float[Array, "batch frames units width"], tuple[Float[Array, "batch frames places vision_width"], ...]]:
        """Merged units of every frame, and the tower's states after the given groups, see `VisionTower`."""
        return self.vision(patches, grid, after_groups)

    def embed(self, tokens: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens width"]:
        """Embeddings of tokens, visual pad tokens included as what they are."""
        return self.language.embed(tokens)

    def run(
        self,
        embeddings: Float[Array, "batch tokens width"],
        positions: Int[Array, "batch tokens 3"],
        segments: Int[Array, "batch tokens"],
        cache: KVCache | None = None,
        fresh: bool = False,
    ) -> tuple[Float[Array, "batch tokens width"], KVCache | None]:
        """The language model's layers, see `LanguageModel.__call__`."""
        return self.language(embeddings, positions, segments, cache, fresh)

    def normed(self, embeddings: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
        """Embeddings as the head reads hidden states, with no layer between."""
        return self.language.normed(embeddings)

    def logits(self, hidden: Float[Array, "*rows width"]) -> Float[Array, "*rows output"]:
        """Logits of hidden states, float32."""
        return self.language.logits(hidden)

    def logit_parts(self, hidden: Float[Array, "*rows width"]) -> LogitParts:
        """Logits of base and added tokens apart, see `LanguageModel.logit_parts`."""
        return self.language.logit_parts(hidden)

    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        positions: Int[Array, "batch tokens 3"],
        segments: Int[Array, "batch tokens"],
        patches: Float[Array, "batch frames windows slots patch_dim"],
        grid: Int[Array, "batch frames 2"],
        visual_index: Int[Array, "batch tokens"],
    ) -> Float[Array, "batch tokens output"]:
        """Logits at every position; `visual_index` counts over a row's (frames, units), -1 for text."""
        units, _ = self.encode_vision(patches, grid)
        features = units.reshape(units.shape[0], -1, units.shape[-1])
        embeddings = place_features(self.embed(tokens), features, visual_index)
        hidden, _ = self.run(embeddings, positions, segments)
        return self.logits(hidden)


def place_features(
    embeddings: Float[Array, "batch tokens width"],
    features: Float[Array, "batch features width"],
    index: Int[Array, "batch tokens"],
) -> Float[Array, "batch tokens width"]:
    """Replace the embeddings of tokens with `index` >= 0 by the feature of that number in their row."""
    features = constrain(features, "batch", None, "width")  # whole rows: any token may name any feature
    chosen = jnp.take_along_axis(features, jnp.maximum(index, 0)[..., None], axis=1)
    placed = jnp.where((index >= 0)[..., None], chosen.astype(embeddings.dtype), embeddings)
    return constrain(placed, "batch", "tokens", "width")
