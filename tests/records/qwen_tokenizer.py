"""The released Qwen tokenizer, made from its published ranks, and the layout of its chat template.

The ranks are a list of byte strings; merges follow from them. Added tokens and the pre-tokenizer's pattern are those
of Qwen2.5-VL's tokenizer.json.
"""

import base64
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
PLAIN = [
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
]
"""Added as well, but not marked as special."""

CHAT_TEMPLATE = """{% if messages[0].role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{% for item in message.content %}{% if item.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>\
{% elif item.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ item.text }}{% endif %}\
{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""The layout of the released template, for contents that are lists."""


def released_tokenizer(ranks_file: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of Qwen2.5-VL from `qwen.tiktoken`."""
    ranks = {}
    for line in ranks_file.read_bytes().split(b"\n"):
        if line.strip():
            token, rank = line.split()
            ranks[base64.b64decode(token)] = int(rank)
    letters = dict(zip(sorted(range(256), key=_order), _letters(), strict=True))

    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(ranks[a], ranks[b], a, b) for a, b in halves if a in ranks and b in ranks]
        merges += [(rank, spell(a), spell(b)) for _, _, a, b in sorted(known)]
    merges.sort(key=lambda merge: merge[0])
    model = models.BPE({spell(token): rank for token, rank in ranks.items()}, [merge[1:] for merge in merges])
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _order(byte: int) -> tuple[bool, int]:
    """Printable bytes first, as byte-level BPE gives letters to bytes."""
    printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
    return not printable, byte


def _letters() -> list[str]:
    printable = [chr(byte) for byte in range(256) if not _order(byte)[0]]
    return printable + [chr(256 + k) for k in range(256 - len(printable))]
