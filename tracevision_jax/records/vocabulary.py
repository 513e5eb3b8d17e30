"""Tokens of the trace-aware systems: a Hugging Face tokenizer, and added tokens with ids of their own beside it.

Added tokens (`<traj>`, `[SEG]`, coordinate bins, ...) are never looked for in text: conversations carry traces, boxes
and masks as typed parts (`sample.py`), so a user who types "[SEG]" gets ordinary text tokens. Special tokens of the
tokenizer itself (`<|im_start|>`, ...) in users' text are likewise encoded as plain text.
"""

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from tokenizers import Encoding
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tracevision_jax.errors import UserError
from tracevision_jax.trajectory.tokens import (
    BINS,
    CODEBOOK_SLOTS,
    END_OFFSET,
    FIRST_BIN_OFFSET,
    FIRST_SLOT_OFFSET,
    SEGMENT_OFFSET,
    START_OFFSET,
    Format,
    added_tokens,
    to_bins,
)

SLOTS = CODEBOOK_SLOTS
"""Codebook slots after [SEG]: 2 scales x 3 tokens (App. F.2)."""
GAP = -2
"""Stands in the tokens that an answer is held to: here the model itself writes on, until what is open is closed."""
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

CoordinateFormat = Format


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
        return added_tokens(self.coordinates)

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return self.first_added + len(self.added_strings)

    @property
    def traj_open(self) -> int:
        """Id of `<traj>`."""
        return self.first_added + START_OFFSET

    @property
    def traj_close(self) -> int:
        """Id of `</traj>`."""
        return self.first_added + END_OFFSET

    def marked(self, phrase: str) -> list[int]:
        """A phrase between the marks of what the part after it belongs to."""
        return [self.special("<|object_ref_start|>"), *self.encode(phrase), self.special("<|object_ref_end|>")]

    @property
    def seg(self) -> int:
        """Id of `[SEG]`."""
        return self.first_added + SEGMENT_OFFSET

    @property
    def slots(self) -> list[int]:
        """Ids of the six codebook slots."""
        return [self.first_added + FIRST_SLOT_OFFSET + k for k in range(SLOTS)]

    @property
    def first_bin(self) -> int:
        """Id of `<0>`; only in the format "bins"."""
        if self.coordinates != "bins":
            raise ValueError("the format 'digits' has no bin tokens")
        return self.first_added + FIRST_BIN_OFFSET

    def special(self, token: str) -> int:
        """Id of a special token of the tokenizer, such as `<|im_end|>`."""
        return self._specials[token]

    @functools.cached_property
    def _specials(self) -> dict[str, int]:
        vocabulary = self.tokenizer.get_vocab()
        return {token: vocabulary[token] for token in CHAT_TOKENS}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; special and added token strings inside it are encoded as the characters they are.

        Raises:
            UserError: text that is no Unicode (half of a surrogate pair).
        """
        return self._encode(text).ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """`encode`, and the number of characters of the text up to the end of each token."""
        encoding = self._encode(text)
        return encoding.ids, [end for _, end in encoding.offsets]

    def _encode(self, text: str) -> Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text has half of a surrogate pair at character {error.start}, which is no Unicode: {text!r:.80}"
            ) from error
        backend = self.tokenizer.backend_tokenizer
        backend.encode_special_tokens = True
        return backend.encode(text, add_special_tokens=False)

    def encode_coordinates(self, points: Float[np.ndarray, "points 2"]) -> list[int]:
        """Bin tokens x y x y ... of points in [0, 1] (format "bins").

        Raises:
            UserError: a coordinate that is not finite.
        """
        return (self.first_bin + to_bins(points).reshape(-1)).tolist()

    def is_bin(self, ids: np.ndarray) -> np.ndarray:
        """Which ids are coordinate bins."""
        ids = np.asarray(ids)
        return (ids >= self.first_bin) & (ids < self.first_bin + BINS)

    def decode(self, ids: Iterable[int] | Int[np.ndarray, "tokens"]) -> str:
        """Text of ids, added tokens written as their strings, special tokens of the chat kept."""
        pieces: list[str] = []
        run: list[int] = []
        strings = self.added_strings
        for token in ids:
            if token >= self.first_added:
                pieces += [self._decode(run), strings[int(token) - self.first_added]]
                run = []
            else:
                run.append(int(token))
        return "".join([*pieces, self._decode(run)])

    def _decode(self, ids: list[int]) -> str:
        """Exactly what the ids say: some tokenizers would tidy up spaces before punctuation."""
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files; added tokens follow from the configuration."""
        self.tokenizer.save_pretrained(str(directory))


def load_vocabulary(directory: str | Path, coordinates: CoordinateFormat = "bins") -> Vocabulary:
    """Read the tokenizer of a checkpoint directory.

    Raises:
        UserError: there is no tokenizer in the directory, or none that can be read.
    """
    if not any((Path(directory) / name).exists() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"No tokenizer in {directory}: expected tokenizer.json or vocab.json and merges.txt.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
    except Exception as error:  # the tokenizers library raises bare Exceptions for damaged files
        raise UserError(f"The tokenizer in {directory} cannot be read: {error}.") from error
    return Vocabulary(tokenizer, coordinates)


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
