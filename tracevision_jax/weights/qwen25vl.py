"""Qwen2.5-VL: its table of weights, its configuration in both worlds, and the functions that use them.

Names and shapes are those of the released safetensors (`visual.*`, `model.layers.*`); the names that
transformers 5 has in memory (`model.visual.*`, `model.language_model.*`) are understood as well.

    config, params = load("Qwen2.5-VL-7B-Instruct", sharding_of=lambda path, shape: ...)
    params = from_torch(model.state_dict(), config)
    save("exported", params, config, side_files="Qwen2.5-VL-7B-Instruct")

Tokens that we added stand in parameters of their own; on the PyTorch side they are the rows of the vocabulary
from `first_added` on, and the head is untied, since their rows of embedding and head are trained apart.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tracevision_jax.hosts.qwen25vl import Qwen25VLConfig
from tracevision_jax.language.config import LanguageConfig
from tracevision_jax.vision.config import QwenVisionConfig
from tracevision_jax.weights import hugging_face
from tracevision_jax.weights.arrays import Leaf, ShardingOf, TransposedLeaf, first_device
from tracevision_jax.weights.engine import Part, Rule, Shape, Table
from tracevision_jax.weights.family import Family
from tracevision_jax.weights.hugging_face import MAX_SHARD_BYTES
from tracevision_jax.weights.qwen25vl_config import (
    config_from_json,
    config_to_json,
    read_config,
    write_config,
    write_generation_config,
)
from tracevision_jax.weights.safetensors_io import Progress

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def table(config: Qwen25VLConfig) -> Table:
    """All tensors of a Qwen2.5-VL of these sizes.

    Raises:
        ValueError: tied embeddings with added tokens, which PyTorch cannot hold, see `for_export`.
    """
    vision, language = config.vision, config.language
    if language.tied and language.added_tokens:
        raise ValueError("tied embeddings with added tokens have no counterpart in PyTorch")
    sizes = {
        "channels": vision.channels,
        "time": vision.temporal_patch,
        "row": vision.patch,
        "column": vision.patch,
        "vision_width": vision.width,
        "vision_heads": vision.heads,
        "vision_head_dim": vision.head_dim,
        "vision_mlp": vision.mlp_width,
        "qkv": 3,
        "merged": vision.merge**2 * vision.width,
        "merged_out": vision.merge**2 * vision.width,
        "width": language.width,
        "heads": language.heads,
        "kv_heads": language.kv_heads,
        "head_dim": language.head_dim,
        "mlp": language.mlp_width,
        "vocabulary": language.vocab_size,
    }
    rules = [*_vision_rules(vision), *_language_rules(language), *_vocabulary_rules(language)]
    same = {HEAD: EMBEDDING} if language.tied else {}
    return Table(rules, sizes, same)


def _vision_rules(config: QwenVisionConfig) -> Iterator[Rule]:
    yield Rule(
        "visual.patch_embed.proj.weight",
        "vision/patch_embed/kernel",
        "vision_width channels time row column -> (channels time row column) vision_width",
    )
    # Blocks of a group: the window blocks, then the full one.
    size = config.window_blocks + 1
    numbers = [divmod(number, size) for number in range(config.depth)]
    window: dict[Shape, Shape] = {(n,): (group, place) for n, (group, place) in enumerate(numbers) if place < size - 1}
    full: dict[Shape, Shape] = {(n,): (group,) for n, (group, place) in enumerate(numbers) if place == size - 1}
    for kind, layers in (("window", window), ("full", full)):
        if layers:
            yield from _vision_block_rules("visual.blocks.{}.", f"vision/groups/{kind}/", layers)
    yield Rule("visual.merger.ln_q.weight", "vision/merger/norm/scale", "vision_width -> vision_width")
    yield Rule("visual.merger.mlp.0.weight", "vision/merger/fc1/kernel", "merged_out merged -> merged merged_out")
    yield Rule("visual.merger.mlp.0.bias", "vision/merger/fc1/bias", "merged_out -> merged_out")
    yield Rule("visual.merger.mlp.2.weight", "vision/merger/fc2/kernel", "width merged -> merged width")
    yield Rule("visual.merger.mlp.2.bias", "vision/merger/fc2/bias", "width -> width")


def _vision_block_rules(torch: str, flax: str, layers: Mapping[Shape, Shape]) -> Iterator[Rule]:
    heads = "vision_heads vision_head_dim"
    for theirs, ours, pattern in (
        ("norm1.weight", "norm1/scale", "vision_width -> vision_width"),
        ("norm2.weight", "norm2/scale", "vision_width -> vision_width"),
        ("attn.qkv.weight", "attn/qkv/kernel", f"(qkv {heads}) vision_width -> vision_width qkv {heads}"),
        ("attn.qkv.bias", "attn/qkv/bias", f"(qkv {heads}) -> qkv {heads}"),
        ("attn.proj.weight", "attn/proj/kernel", f"vision_width ({heads}) -> {heads} vision_width"),
        ("attn.proj.bias", "attn/proj/bias", "vision_width -> vision_width"),
        ("mlp.gate_proj.weight", "mlp/gate/kernel", "vision_mlp vision_width -> vision_width vision_mlp"),
        ("mlp.gate_proj.bias", "mlp/gate/bias", "vision_mlp -> vision_mlp"),
        ("mlp.up_proj.weight", "mlp/up/kernel", "vision_mlp vision_width -> vision_width vision_mlp"),
        ("mlp.up_proj.bias", "mlp/up/bias", "vision_mlp -> vision_mlp"),
        ("mlp.down_proj.weight", "mlp/down/kernel", "vision_width vision_mlp -> vision_mlp vision_width"),
        ("mlp.down_proj.bias", "mlp/down/bias", "vision_width -> vision_width"),
    ):
        yield Rule(torch + theirs, flax + ours, pattern, layers)


def _language_rules(config: LanguageConfig) -> Iterator[Rule]:
    layers: dict[Shape, Shape] = {(n,): (n,) for n in range(config.layers)}
    attention = [
        (f"self_attn.{name}_proj.{kind}", f"attn/{name}/{ours}", pattern)
        for name, heads in (("q", "heads"), ("k", "kv_heads"), ("v", "kv_heads"))
        for kind, ours, pattern in (
            ("weight", "kernel", f"({heads} head_dim) width -> width {heads} head_dim"),
            ("bias", "bias", f"({heads} head_dim) -> {heads} head_dim"),
        )
        if kind == "weight" or config.qkv_bias
    ]
    for theirs, ours, pattern in (
        ("input_layernorm.weight", "attn_norm/scale", "width -> width"),
        ("post_attention_layernorm.weight", "mlp_norm/scale", "width -> width"),
        *attention,
        ("self_attn.o_proj.weight", "attn/o/kernel", "width (heads head_dim) -> heads head_dim width"),
        ("mlp.gate_proj.weight", "mlp/gate/kernel", "mlp width -> width mlp"),
        ("mlp.up_proj.weight", "mlp/up/kernel", "mlp width -> width mlp"),
        ("mlp.down_proj.weight", "mlp/down/kernel", "width mlp -> mlp width"),
    ):
        yield Rule(f"model.layers.{{}}.{theirs}", f"language/layers/{ours}", pattern, layers)
    yield Rule("model.norm.weight", "language/final_norm/scale", "width -> width")


def _vocabulary_rules(config: LanguageConfig) -> Iterator[Rule]:
    """Embedding and head; in PyTorch rows of added tokens take the place of base rows, which are unused."""
    embedding = (EMBEDDING, "language/embed/embedding", "vocabulary width -> vocabulary width")
    head = (HEAD, "language/head/kernel", "vocabulary width -> width vocabulary")
    if not config.added_tokens:
        yield Rule(*embedding)
        if not config.tied:
            yield Rule(*head)
        return
    first, last = config.first_added, config.output_size
    merged, base = config.merged_vocab_size, config.vocab_size
    added = Part("vocabulary", first, last, merged)
    for torch, flax, pattern in (embedding, head):
        for start, stop in ((0, first), (last, base)):
            if start < stop:
                yield Rule(
                    torch,
                    flax,
                    pattern,
                    torch_part=Part("vocabulary", start, stop, merged),
                    flax_part=Part("vocabulary", start, stop, base),
                    unused_rest=True,
                )
        rows = "language/added/embedding" if torch == EMBEDDING else "language/added/head"
        yield Rule(torch, rows, "vocabulary width -> vocabulary width", torch_part=added)


def canonical_name(name: str) -> str:
    """A tensor's name on disk from its name on disk or in memory."""
    name = re.sub(r"^model\.visual\.", "visual.", name)
    return re.sub(r"^model\.language_model\.", "model.", name)


def for_export(leaves: Mapping[str, Leaf], config: Qwen25VLConfig) -> tuple[Mapping[str, Leaf], Qwen25VLConfig]:
    """The parameters as `transformers` can hold them: tied embeddings with added tokens become untied."""
    if not (config.language.tied and config.language.added_tokens):
        return leaves, config
    embedding = leaves.get("language/embed/embedding")
    head = {} if embedding is None else {"language/head/kernel": TransposedLeaf(embedding)}
    return {**leaves, **head}, replace(config, language=replace(config.language, tied=False))


def with_dtype(config: Qwen25VLConfig, dtype: str) -> Qwen25VLConfig:
    """The configuration of a model whose parameters have this dtype and that computes in it."""
    return config.with_precision(dtype, dtype)


FAMILY = Family(
    name="qwen2_5_vl",
    table=table,
    canonical_name=canonical_name,
    for_export=for_export,
    read_config=read_config,
    write_config=write_config,
    other_files=lambda config: {"generation_config.json": write_generation_config(config)},
    config_to_json=config_to_json,
    config_from_json=config_from_json,
    with_dtype=with_dtype,
)


def load(
    directory: str | Path,
    sharding_of: ShardingOf = first_device,
    dtype: str | None = None,
    progress: Progress | None = None,
) -> tuple[Qwen25VLConfig, dict[str, Any]]:
    """Read a Hugging Face directory, one tensor at a time, straight to the devices.

    Args:
        directory: config.json and safetensors (or PyTorch files).
        sharding_of: (path, shape) -> where a parameter goes; the first device by default.
        dtype: of the parameters, such as "bfloat16"; as stored by default.
        progress: told of each tensor that is read.

    Raises:
        UserError: see `hugging_face.open_checkpoint`.
    """
    return hugging_face.load_directory(directory, FAMILY, sharding_of, dtype, progress=progress)


def from_torch(state: Mapping[str, Any], config: Qwen25VLConfig) -> dict[str, Any]:
    """Parameters from a state dictionary (torch tensors or arrays, names on disk or in memory)."""
    return hugging_face.from_torch(state, FAMILY, config)


def to_torch_names(params: Mapping[str, Any], config: Qwen25VLConfig) -> Iterator[tuple[str, np.ndarray]]:
    """(name on disk, array) of every tensor, one at a time; added tokens are merged into the vocabulary."""
    return hugging_face.to_torch_names(params, FAMILY, config)


def save(
    directory: str | Path,
    params: Mapping[str, Any],
    config: Qwen25VLConfig,
    *,
    side_files: str | Path | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Write a directory that `transformers` loads, see `hugging_face.save`."""
    hugging_face.save(
        directory,
        params,
        FAMILY,
        config,
        side_files=side_files,
        dtype=dtype,
        overwrite=overwrite,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
