"""Tiny checkpoints in the true formats: drawn models of `transformers`, saved by `save_pretrained`."""

import json
from pathlib import Path

import torch

from tests.hosts.qwen25vl_reference import TINY, reference_model

SIDE_FILES = {
    "tokenizer_config.json": json.dumps({"model_max_length": 77}),
    "preprocessor_config.json": json.dumps({"patch_size": 8, "min_pixels": 1024, "max_pixels": 16_000}),
    "video_preprocessor_config.json": json.dumps({"size": {"shortest_edge": 2048, "longest_edge": 8_000}}),
    "merges.txt": "a b\n",
    "chat_template.jinja": "{{ messages }}",
    "LICENSE": "a licence",
}


def write_hugging_face(
    directory: Path, config: dict = TINY, dtype: str = "float32", shard_size: str = "300KB", seed: int = 0
) -> torch.nn.Module:
    """Write a checkpoint of several shards with files beside it, and return the model."""
    model = reference_model(config, seed, getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size=shard_size)
    for name, content in SIDE_FILES.items():
        (directory / name).write_text(content)
    return model


def assert_same_state(ours: dict, theirs: dict) -> None:
    """Two state dictionaries of torch, bit for bit."""
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        integers = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        assert torch.equal(ours[name].contiguous().view(integers), tensor.contiguous().view(integers)), name


def files_below(directory: Path) -> dict[str, bytes]:
    """Everything below a directory, hidden files included."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


class Malicious:
    """Unpickling it would create a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))
