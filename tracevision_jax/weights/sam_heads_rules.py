"""Rules of all that follows the image encoder in SAM and SAM 2, with the names of `transformers`.

    rules, sizes = heads_rules(HEADS_PRESETS["sam2.1"])

SAM (`SamModel`) and SAM 2 (`Sam2VideoModel`; `Sam2Model` for pictures alone, which has no memory) have the same prompt
encoder and mask decoder, whose tensors have other names in part.
"""

import math
from collections.abc import Iterator

from tracevision_jax.segmentation.sam_config import HeadsConfig, MaskDecoderConfig, MemoryConfig
from tracevision_jax.weights.engine import Rule
from tracevision_jax.weights.layer_rules import Layers, conv, linear, mlp, norm, pointwise, weight_and_bias
from tracevision_jax.weights.sam_vision_rules import Rules

POINT_KINDS = 4
"""Background, foreground, and the two corners of a box."""
FOURIER = "prompt_encoder.shared_embedding.positional_embedding"
FOURIER_AGAIN = "shared_image_embedding.positional_embedding"
"""The matrix of the point codes, which `transformers` has twice."""


def is_first_generation(heads: HeadsConfig) -> bool:
    """Whether these are SAM's heads; SAM 2 without memory still adds maps of high resolution."""
    return heads.memory is None and not heads.decoder.high_resolution


def heads_rules(heads: HeadsConfig, points_apart: bool | None = None) -> Rules:
    """All tensors of these heads.

    Args:
        heads: their sizes.
        points_apart: whether each kind of point has a tensor of its own; by default as in `transformers`, where those
            of SAM have and those of SAM 2 stand in one.
    """
    prompts, decoder, memory = heads.prompts, heads.decoder, heads.memory
    first = is_first_generation(heads)
    sizes = {
        "one": 1,
        "uno": 1,
        "width": prompts.width,
        "input": prompts.width,
        "half": prompts.width // 2,
        "pair": 2,
        "kinds": POINT_KINDS,
        "row": 2,
        "column": 2,
        "few": prompts.mask_channels // 4,
        "channels": prompts.mask_channels,
        "heads": decoder.heads,
        "head_dim": decoder.width // decoder.heads,
        "half_dim": decoder.width // decoder.heads // 2,
        "mlp": decoder.mlp_width,
        "quarter": decoder.width // 4,
        "eighth": decoder.width // 8,
        "iou": decoder.iou_hidden,
        "iou_in": decoder.iou_hidden,
        "masks": decoder.several + 1,
    }
    rules = [*_prompt_rules(first if points_apart is None else points_apart), *_decoder_rules(decoder, first)]
    if memory is not None:
        sizes |= {
            "memory": memory.memory_width,
            "times": memory.frames,
            "hidden": memory.fuser_hidden,
            "inner": memory.mlp_width,
            "top": memory.fuser_kernel,
            "left": memory.fuser_kernel,
            "three": 3,
            "tres": 3,
            "four": 4,
            "quattro": 4,
            **{f"level{index}": 4**index for index in range(_halvings(memory) + 1)},
        }
        rules += [*_memory_encoder_rules(memory), *_conditioning_rules(memory), *_pointer_rules()]
    if not first:
        rules += _no_memory_rules(memory is not None)
    return rules, sizes


def _halvings(memory: MemoryConfig) -> int:
    return round(math.log2(memory.mask_stride))


def _vector(theirs: str, ours: str, first: str = "one") -> Rule:
    return Rule(theirs, ours, f"{first} width -> {first} width")


def _prompt_rules(points_apart: bool) -> Iterator[Rule]:
    p, ours = "prompt_encoder.", "prompt_encoder/"
    yield Rule(FOURIER, FOURIER.replace(".", "/"), "pair half -> pair half")
    if points_apart:
        places: Layers = {(index,): (index,) for index in range(POINT_KINDS)}
        yield Rule(p + "point_embed.{}.weight", ours + "point_embed", "one width -> (one width)", places)
    else:
        yield _vector(p + "point_embed.weight", ours + "point_embed", "kinds")
    for name in ("not_a_point_embed", "no_mask_embed"):
        yield _vector(f"{p}{name}.weight", ours + name)
    yield from conv(p + "mask_embed.conv1", ours + "mask_embed/conv1", "few", "one", "row", "column")
    yield from conv(p + "mask_embed.conv2", ours + "mask_embed/conv2", "channels", "few", "row", "column")
    yield from pointwise(p + "mask_embed.conv3", ours + "mask_embed/conv3", "width", "channels")
    yield from norm(p + "mask_embed.layer_norm1", ours + "mask_embed/layer_norm1", "few")
    yield from norm(p + "mask_embed.layer_norm2", ours + "mask_embed/layer_norm2", "channels")


def _decoder_rules(config: MaskDecoderConfig, first_generation: bool) -> Iterator[Rule]:
    p, ours = "mask_decoder.", "mask_decoder/"
    yield from _two_way_rules(config, first_generation)
    yield _vector(p + "iou_token.weight", ours + "iou_token")
    yield _vector(p + "mask_tokens.weight", ours + "mask_tokens", "masks")
    for name, out, inner in (("upscale_conv1", "quarter", "width"), ("upscale_conv2", "eighth", "quarter")):
        weight = f"{inner} {out} row column -> row column {inner} {out}"
        yield from weight_and_bias(p + name, ours + name, weight, f"{out} -> {out}")
    yield from norm(p + "upscale_layer_norm", ours + "upscale_layer_norm", "quarter")
    masks: Layers = {(index,): (index,) for index in range(config.several + 1)}
    name = "output_hypernetworks_mlps"
    yield from mlp(f"{p}{name}.{{}}", ours + name, ("input", "width", "input", "eighth"), masks)
    name = "iou_prediction_head"
    yield from mlp(p + name, ours + name, ("width", "iou", "iou_in", "masks"))
    if config.object_score:
        yield _vector(p + "obj_score_token.weight", ours + "obj_score_token")
        name = "pred_obj_score_head"
        yield from mlp(p + name, ours + name, ("input", "width", "input", "one"))
    if config.high_resolution:
        yield from pointwise(p + "conv_s0", "high_resolution/conv_s0", "eighth", "width")
        yield from pointwise(p + "conv_s1", "high_resolution/conv_s1", "quarter", "width")


def _two_way_rules(config: MaskDecoderConfig, first_generation: bool) -> Iterator[Rule]:
    p, ours = "mask_decoder.transformer.", "mask_decoder/transformer/"
    last, (enter, leave) = ("out_proj", ("lin1", "lin2")) if first_generation else ("o_proj", ("proj_in", "proj_out"))

    def attention(theirs: str, name: str, dim: str) -> Iterator[Rule]:
        joined = f"heads {dim}"
        for letter in "qkv":
            weight, bias = f"({joined}) width -> width {joined}", f"({joined}) -> {joined}"
            yield from weight_and_bias(f"{theirs}.{letter}_proj", f"{name}/{letter}", weight, bias)
        weight = f"width ({joined}) -> {joined} width"
        yield from weight_and_bias(f"{theirs}.{last}", f"{name}/o", weight, "width -> width")

    for index in range(config.layers):
        block, name = f"{p}layers.{index}.", f"{ours}block_{index}/"
        yield from attention(block + "self_attn", name + "self", "head_dim")
        yield from attention(block + "cross_attn_token_to_image", name + "to_image", "half_dim")
        yield from attention(block + "cross_attn_image_to_token", name + "to_tokens", "half_dim")
        yield from linear(f"{block}mlp.{enter}", name + "mlp_in", "mlp", "width")
        yield from linear(f"{block}mlp.{leave}", name + "mlp_out", "width", "mlp")
        for number, place in enumerate(("norm_self", "norm_to_image", "norm_mlp", "norm_to_tokens"), start=1):
            yield from norm(f"{block}layer_norm{number}", name + place, "width")
    yield from attention(p + "final_attn_token_to_image", ours + "last", "half_dim")
    yield from norm(p + "layer_norm_final_attn", ours + "norm_last", "width")


def _memory_encoder_rules(config: MemoryConfig) -> Iterator[Rule]:
    p, ours = "memory_encoder.", "memory_encoder/"
    for index in range(_halvings(config)):
        theirs, name = f"{p}mask_downsampler.layers.{index}.", f"{ours}mask_downsampler/layers_{index}_"
        yield from conv(theirs + "conv", name + "conv", f"level{index + 1}", f"level{index}", "three", "tres")
        yield from norm(theirs + "layer_norm", name + "layer_norm", f"level{index + 1}")
    name = "mask_downsampler.final_conv"
    yield from pointwise(p + name, ours + name.replace(".", "/"), "width", f"level{_halvings(config)}")
    yield from pointwise(p + "feature_projection", ours + "feature_projection", "width", "input")
    yield from pointwise(p + "projection", ours + "projection", "memory", "width")
    for index in range(config.fuser_layers):
        theirs, name = f"{p}memory_fuser.layers.{index}.", f"{ours}memory_fuser_layers_{index}/"
        yield from conv(theirs + "depthwise_conv", name + "depthwise_conv", "width", "one", "top", "left")
        yield from norm(theirs + "layer_norm", name + "layer_norm", "width")
        yield from linear(theirs + "pointwise_conv1", name + "pointwise_conv1", "hidden", "width")
        yield from linear(theirs + "pointwise_conv2", name + "pointwise_conv2", "width", "hidden")
        yield Rule(theirs + "scale", name + "scale", "width -> width")
    if config.occlusion_embedding:
        name = "occlusion_spatial_embedding_parameter"
        yield Rule(name, ours + name, "one memory -> one memory")


def _no_memory_rules(has_memory: bool) -> Iterator[Rule]:
    """What stands for memory where there is none; the second is only in models for video, and read by nobody."""
    for name in ("no_memory_embedding", "no_memory_positional_encoding")[: 1 + has_memory]:
        yield Rule(name, "memory_conditioning/" + name, "one uno width -> one uno width")


def _conditioning_rules(config: MemoryConfig) -> Iterator[Rule]:
    ours = "memory_conditioning/"
    name = "memory_temporal_positional_encoding"
    yield Rule(name, f"{ours}memory_embedding/{name}", "times one uno memory -> times (one uno memory)")
    if config.pointer_times:
        name = "temporal_positional_encoding_projection_layer"
        yield from linear(name, f"{ours}memory_embedding/{name}", "memory", "width")
    layers: Layers = {(index,): (index,) for index in range(config.layers)}
    theirs, name = "memory_attention.layers.{}.", ours + "memory_attention/layers/"
    for attention, inner in (("self_attn", "input"), ("cross_attn_image", "memory")):
        for letter, source in (("q", "input"), ("k", inner), ("v", inner)):
            # Rotary turns neighbouring channels there, the halves of a head here.
            torch, flax = ("(one width)", "one width") if letter == "v" else ("(one half pair)", "one (pair half)")
            more, path = f"{theirs}{attention}.{letter}_proj", f"{name}{attention}/{letter}_proj"
            weight = f"{torch} {source} -> {source} {flax}"
            yield from weight_and_bias(more, path, weight, f"{torch} -> {flax}", layers)
        more, path = f"{theirs}{attention}.o_proj", f"{name}{attention}/o_proj"
        yield from weight_and_bias(more, path, "width (one input) -> one input width", "width -> width", layers)
    yield from linear(theirs + "linear1", name + "linear1", "inner", "width", layers)
    yield from linear(theirs + "linear2", name + "linear2", "width", "inner", layers)
    for index in (1, 2, 3):
        yield from norm(f"{theirs}layer_norm{index}", f"{name}layer_norm{index}", "width", layers)
    yield from norm("memory_attention.layer_norm", ours + "memory_attention/layer_norm", "width")


def _pointer_rules() -> Iterator[Rule]:
    yield _vector("no_object_pointer", "object_pointer/no_object_pointer")
    name = "object_pointer_proj"
    yield from mlp(name, f"object_pointer/{name}", ("input", "width", "input", "width"))
    yield from conv("mask_downsample", "mask_downsample/mask_downsample", "one", "uno", "four", "quattro")
