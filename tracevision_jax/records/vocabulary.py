"""Tokens of the trace-aware systems: a Hugging Face tokenizer, and added tokens with ids of their own beside it.

Added tokens (`<traj>`, `[SEG]`, coordinate bins, ...) are never looked for in text: conversations carry traces, boxes
and masks as typed parts (`sample.py`), so a user who types "[SEG]" gets ordinary text tokens. Special tokens of the
tokenizer itself (`<|im_start|>`, ...) in users' text are likewise encoded as plain text.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tracevision_jax.errors import UserError

BINS = 1000
SLOTS = 6
"""Codebook slots after [SEG]: 2 scales x 3 tokens (App. F.2)."""
CHAT_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

CoordinateFormat = Literal["bins", "digits"]


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with the added tokens of a system.

    Attributes:
        tokenizer: a fast Hugging Face tokenizer that has `CHAT_TOKENS`.
        coordinates: "bins" adds one token a bin; "digits" writes plain numbers (the paper's text) and adds no bins.
    """

    tokenizer: PreTrainedTokenizerFast
    coordinates: CoordinateFormat = "bins"

    def __post_init__(self):
        known = self.tokenizer.get_vocab()
        missing = [token for token in CHAT_TOKENS if token not in known]
        if missing:
            raise UserError(
                f"The tokenizer lacks the chat tokens {', '.join(missing)}; use a Qwen2.5-VL tokenizer or one made by "
                "`train_tokenizer`."
            )

    @property
    def first_added(self) -> int:
        """Id of the first added token."""
        return len(self.tokenizer)

    @property
    def added_strings(self) -> list[str]:
        """The added tokens in the order of their ids."""
        bins = [f"<{index}>" for index in range(BINS)] if self.coordinates == "bins" else []
        return ["<traj>", "</traj>", "[SEG]", *(f"[SEG_{k}]" for k in range(SLOTS)), *bins]

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return self.first_added + len(self.added_strings)

    @property
    def traj_open(self) -> int:
        """Id of `<traj>`."""
        return self.first_added

    @property
    def traj_close(self) -> int:
        """Id of `</traj>`."""
        return self.first_added + 1

    @property
    def seg(self) -> int:
        """Id of `[SEG]`."""
        return self.first_added + 2

    @property
    def slots(self) -> list[int]:
        """Ids of the six codebook slots."""
        return [self.first_added + 3 + k for k in range(SLOTS)]

    @property
    def first_bin(self) -> int:
        """Id of `<0>`; only in the format "bins"."""
        if self.coordinates != "bins":
            raise ValueError("the format 'digits' has no bin tokens")
        return self.first_added + 3 + SLOTS

    def special(self, token: str) -> int:
        """Id of a special token of the tokenizer, such as `<|im_end|>`."""
        return self._specials[token]

    @functools.cached_property
    def _specials(self) -> dict[str, int]:
        vocabulary = self.tokenizer.get_vocab()
        return {token: vocabulary[token] for token in CHAT_TOKENS}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special and added token strings inside it are encoded as the characters they are."""
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        return backend.encode(text, add_special_tokens=False).ids

    def bins(self, coordinates: np.ndarray) -> np.ndarray:
        """Bins of coordinates in [0, 1]: clip(floor(1000 x), 0, 999)."""
        return np.clip(np.floor(np.asarray(coordinates, np.float64) * BINS), 0, BINS - 1).astype(np.int64)

    def encode_coordinates(self, values: Sequence[float] | np.ndarray) -> list[int]:
        """Bin tokens of a flat list of coordinates (format "bins")."""
        return (self.first_bin + self.bins(np.asarray(values))).tolist()

    def is_bin(self, ids: np.ndarray) -> np.ndarray:
        """Which ids are coordinate bins."""
        ids = np.asarray(ids)
        return (ids >= self.first_bin) & (ids < self.first_bin + BINS)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, added tokens written as their strings, special tokens of the chat kept."""
        pieces, run, strings = [], [], self.added_strings
        for token in ids:
            if token >= self.first_added:
                pieces += [self.tokenizer.decode(run), strings[token - self.first_added]]
                run = []
            else:
                run.append(int(token))
        return "".join([*pieces, self.tokenizer.decode(run)])

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files; added tokens follow from the configuration."""
        self.tokenizer.save_pretrained(str(directory))


def load_vocabulary(directory: str | Path, coordinates: CoordinateFormat = "bins") -> Vocabulary:
    """Read the tokenizer of a checkpoint directory.

    Raises:
        UserError: there is no tokenizer in the directory.
    """
    if not any((Path(directory) / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"No tokenizer in {directory}: expected tokenizer.json or vocab.json and merges.txt.")
    return Vocabulary(AutoTokenizer.from_pretrained(str(directory)), coordinates)


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of `size` tokens with Qwen's chat tokens; what a host drawn at random starts from."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(CHAT_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
