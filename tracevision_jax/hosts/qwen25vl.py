"""Qwen2.5-VL as released: the vision tower and the language model joined.

Sources: the Qwen2.5-VL technical report, and config.json of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct. Use:
`units, _ = host.apply(params, patches, grid, method="encode_vision")`, then `embed`, `run` and `logits` in the same way,
or `host.apply(params, tokens, positions, segments, patches, grid, visual_index)` for logits at every position.
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
from tracevision_jax.vision.config import VISION_PRESETS, QwenVisionConfig
from tracevision_jax.vision.qwen_vit import VisionTower


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
            raise ValueError(
                f"vision gives width {self.vision.out_width}, language takes {self.language.width}"
            )

    @property
    def visual_tokens(self) -> tuple[int, int]:
        """Ids of the pad tokens whose places visual units take."""
        return self.image_token, self.video_token

    def with_precision(
        self, dtype: str, param_dtype: str | None = None, remat: str | None = None
    ) -> "Qwen25VLConfig":
        """The same model computing in `dtype`; parameters and remat policy change only when given."""
        changes = {"dtype": dtype}
        if param_dtype is not None:
            changes["param_dtype"] = param_dtype
        if remat is not None:
            changes["remat"] = remat
        return replace(
            self, vision=replace(self.vision, **changes), language=replace(self.language, **changes)
        )


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
    ) -> tuple[
        Float[Array, "batch frames units width"], tuple[Float[Array, "batch frames places vision_width"], ...]
    ]:
        """Merged units of every frame, and the tower's hidden states after the given groups, see `VisionTower`."""
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

    def logits(self, hidden: Float[Array, "*rows width"]) -> Float[Array, "*rows output"]:
        """Logits of hidden states, float32."""
        return self.language.logits(hidden)

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
    chosen = jnp.take_along_axis(features, jnp.maximum(index, 0)[..., None], axis=1)
    placed = jnp.where((index >= 0)[..., None], chosen.astype(embeddings.dtype), embeddings)
    return constrain(placed, "batch", "tokens", "width")
