"""Sizes of the language model, and those of the released Qwen2.5-VL models.

Source of the sizes: the config.json files of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class LanguageConfig:
    """A decoder-only language model with grouped heads and multimodal rotary positions."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float = 1e6
    mrope_sections: tuple[int, int, int] = (16, 24, 24)
    """Frequencies given to time, height and width; they sum to half of `head_dim`."""
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    tied: bool = False
    """Whether the output head is the embedding transposed."""
    added_tokens: int = 0
    """Rows of the parameters for tokens beyond the tokenizer's, see `first_added`."""
    first_added: int = 0
    """Id of the first added token; base rows from here on are unused when there are added tokens."""
    dtype: str = "float32"
    """In which it computes; norms, softmax and logits are float32 always."""
    param_dtype: str = "float32"
    remat: str = "none"
    """What the backward pass recomputes, see `layers.basic.REMAT_POLICIES`."""

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} key heads")
        if 2 * sum(self.mrope_sections) != self.head_dim:
            raise ValueError(f"mrope_sections {self.mrope_sections} must sum to half of head_dim {self.head_dim}")
        if self.added_tokens and not 0 < self.first_added <= self.vocab_size:
            raise ValueError(f"first_added {self.first_added} must lie in 1..{self.vocab_size}")

    @property
    def output_size(self) -> int:
        """Columns of the logits."""
        return self.first_added + self.added_tokens if self.added_tokens else self.vocab_size

    @property
    def merged_vocab_size(self) -> int:
        """Rows of embedding and head once the added tokens are merged into them."""
        return max(self.vocab_size, self.output_size)


LANGUAGE_PRESETS: dict[str, LanguageConfig] = {
    "3b": LanguageConfig(151936, 2048, 36, 16, 2, 128, 11008, tied=True),
    "7b": LanguageConfig(152064, 3584, 28, 28, 4, 128, 18944),
    "32b": LanguageConfig(152064, 5120, 64, 40, 8, 128, 27648),
    "72b": LanguageConfig(152064, 8192, 80, 64, 8, 128, 29568),
}
