"""The configuration of SAM and SAM 2 from the `config.json` of `transformers`, and in our own checkpoints.

    config = read_config(json.loads(...))         # of SamModel, Sam2Model or Sam2VideoModel

The way back is in `sam_config_export.py`. Values are taken as the files say them; where `transformers` computes
otherwise than the authors' code, whatever the values, ours follows the authors
(`segmentation.sam_config.hugging_face` tells how to follow `transformers`).
"""

from collections.abc import Mapping
from typing import Any

from tracevision_jax.errors import UserError
from tracevision_jax.hosts.sam_presets import SegmentAnythingConfig
from tracevision_jax.segmentation.sam_config import HeadsConfig, MaskDecoderConfig, MemoryConfig, PromptEncoderConfig
from tracevision_jax.systems.config_json import from_json, to_json
from tracevision_jax.vision.sam_config import STAGES, HieraConfig, SamVitConfig
from tracevision_jax.weights.sam_heads_rules import POINT_KINDS
from tracevision_jax.weights.sam_vision_rules import HIERA_PATCH

SAM, SAM2, SAM2_VIDEO = "sam", "sam2", "sam2_video"
"""`model_type` of a config.json."""
SAM2_NORM_EPS = 1e-5
"""Of the mask decoder of SAM 2, which config.json does not say."""

DECODER_ACTIVATION = {True: "relu", False: "gelu"}
"""What config.json calls the mask decoder's activation, in the first generation and in the second."""

FIXED: dict[str, dict[str, Any]] = {
    "mask_decoder_config": {
        "attention_downsample_rate": 2,
        "iou_head_depth": 3,
    },
    "prompt_encoder_config": {"num_point_embeddings": POINT_KINDS, "hidden_act": "gelu"},
    "": {
        "multimask_output_in_sam": True,
        "multimask_output_for_tracking": True,
        "memory_attention_num_attention_heads": 1,
        "memory_attention_downsample_rate": 1,
        "memory_attention_feed_forward_hidden_act": "relu",
        "mask_downsampler_kernel_size": 3,
        "mask_downsampler_stride": 2,
        "mask_downsampler_hidden_act": "gelu",
        "memory_fuser_hidden_act": "gelu",
    },
    "vision_config": {
        "hidden_act": "gelu",
        "qkv_bias": True,
        "use_abs_pos": True,
        "use_rel_pos": True,
        "fpn_kernel_size": 1,
        "fpn_top_down_levels": [2, 3],
        "num_feature_levels": 3,
    },
    "backbone_config": {
        "hidden_act": "gelu",
        "patch_kernel_size": [HIERA_PATCH] * 2,
        "patch_stride": [4, 4],
        "query_stride": [2, 2],
        "num_query_pool_stages": STAGES - 1,
    },
}
"""What all released models have, hence ours, by the part of config.json where it may stand."""


class _Part:
    """A part of config.json whose values are taken one by one, each with the default of `transformers`."""

    def __init__(self, content: Mapping[str, Any], place: str = ""):
        self.content, self.place = content, place

    def part(self, name: str) -> "_Part":
        """An object within; an empty one where it is absent, since `transformers` then takes its defaults."""
        content = self.content.get(name) or {}
        if not isinstance(content, Mapping):
            raise ValueError(f"{name} is no object")
        return _Part(content, name)

    def take(self, name: str, default: Any) -> Any:
        """A value; null counts as absent."""
        value = self.content.get(name)
        return default if value is None else value

    def side(self, name: str, default: int) -> int:
        """A size that is said once or, the same, for both sides."""
        value = self.take(name, default)
        sides = {int(side) for side in value} if isinstance(value, list | tuple) else {int(value)}
        if len(sides) != 1:
            raise ValueError(f"{name} is {value}; only squares are known")
        return sides.pop()

    def others(self) -> list[str]:
        """What ours cannot express."""
        return [
            f"{name} is {self.content[name]}, only {value} is known"
            for name, value in FIXED[self.place].items()
            if self.content.get(name) not in (None, value)
        ]


def read_config(content: Mapping[str, Any], _generation: Mapping[str, Any] | None = None) -> SegmentAnythingConfig:
    """Our configuration from `config.json`.

    Raises:
        UserError: a model that ours cannot express; every reason is named.
    """
    whole = _Part(content)
    vision, prompts, decoder = (
        whole.part(name) for name in ("vision_config", "prompt_encoder_config", "mask_decoder_config")
    )
    first = content.get("model_type") == SAM
    parts = [vision, prompts, decoder, *([] if first else [vision.part("backbone_config"), whole])]
    faults = [fault for part in parts for fault in part.others()]
    activation = DECODER_ACTIVATION[first]
    if (other := decoder.take("hidden_act", activation)) != activation:
        faults.append(f"the mask decoder's hidden_act is {other}, only {activation} is known")
    if faults:
        raise UserError("config.json describes a model that ours cannot express: " + "; ".join(faults))
    try:
        image = prompts.side("image_size", 1024)
        encoder = PromptEncoderConfig(
            width=prompts.take("hidden_size", 256),
            image_size=image,
            stride=prompts.side("patch_size", 16),
            mask_channels=prompts.take("mask_input_channels", 16),
            norm_eps=prompts.take("layer_norm_eps", 1e-6),
            pad_with_boxes=not first,
        )
        memory = _read_memory(whole) if content.get("model_type") == SAM2_VIDEO else None
        heads = HeadsConfig(encoder, _read_decoder(decoder, whole, first), memory)
        return SegmentAnythingConfig(_read_vit(vision) if first else _read_hiera(vision), heads)
    except (ValueError, TypeError, AttributeError, KeyError, ArithmeticError) as error:
        raise UserError(f"config.json describes an impossible model: {error}") from error


def _read_decoder(decoder: _Part, whole: _Part, first: bool) -> MaskDecoderConfig:
    return MaskDecoderConfig(
        width=decoder.take("hidden_size", 256),
        heads=decoder.take("num_attention_heads", 8),
        mlp_width=decoder.take("mlp_dim", 2048),
        layers=decoder.take("num_hidden_layers", 2),
        several=decoder.take("num_multimask_outputs", 3),
        iou_hidden=decoder.take("iou_head_hidden_dim", 256),
        norm_eps=decoder.take("layer_norm_eps", 1e-6) if first else SAM2_NORM_EPS,
        object_score=not first,
        high_resolution=not first,
        iou_sigmoid=not first,
        dynamic_multimask=not first and decoder.take("dynamic_multimask_via_stability", True),
        stability_delta=decoder.take("dynamic_multimask_stability_delta", 0.05),
        stability_threshold=decoder.take("dynamic_multimask_stability_thresh", 0.98),
        min_points=whole.take("multimask_min_pt_num", 0),
        max_points=whole.take("multimask_max_pt_num", 1),
    )


def _read_memory(whole: _Part) -> MemoryConfig:
    width, most = whole.take("memory_encoder_hidden_size", 256), whole.take("max_cond_frame_num", -1)
    for name in ("memory_attention_hidden_size", "mask_downsampler_embed_dim", "memory_fuser_embed_dim"):
        if (other := whole.take(name, 256)) != width:
            raise ValueError(f"{name} is {other}, memory_encoder_hidden_size {width}: they must agree")
    kernel = whole.take("memory_fuser_kernel_size", 7)
    if (padding := whole.take("memory_fuser_padding", 3)) != kernel // 2:
        raise ValueError(f"memory_fuser_padding is {padding}; only {kernel // 2} keeps the size of maps")
    times = bool(whole.take("enable_temporal_pos_encoding_for_object_pointers", True))
    theta = whole.part("rope_parameters").take("rope_theta", whole.take("memory_attention_rope_theta", 1e4))
    return MemoryConfig(
        width=width,
        memory_width=whole.take("memory_encoder_output_channels", 64),
        frames=whole.take("num_maskmem", 7),
        max_pointers=whole.take("max_object_pointers_in_encoder", 16),
        max_conditioning=None if most == -1 else most,
        pointer_times=times,
        signed_pointer_times=times,
        occlusion_embedding=bool(whole.take("enable_occlusion_spatial_embedding", True)),
        sigmoid_scale=whole.take("sigmoid_scale_for_mem_enc", 20.0),
        sigmoid_bias=whole.take("sigmoid_bias_for_mem_enc", -10.0),
        mask_stride=whole.take("mask_downsampler_total_stride", 16),
        fuser_layers=whole.take("memory_fuser_num_layers", 2),
        fuser_kernel=kernel,
        fuser_hidden=whole.take("memory_fuser_intermediate_dim", 1024),
        layers=whole.take("memory_attention_num_layers", 4),
        mlp_width=whole.take("memory_attention_feed_forward_hidden_size", 2048),
        rope_theta=float(theta),
    )


def _read_vit(vision: _Part) -> SamVitConfig:
    depth, width = vision.take("num_hidden_layers", 12), vision.take("hidden_size", 768)
    ends = list(vision.take("global_attn_indexes", [2, 5, 8, 11]))
    groups = len(ends)
    size = depth // groups if groups else 0
    if ends != [(group + 1) * size - 1 for group in range(groups)] or size * groups != depth or size < 2:
        raise ValueError(f"global_attn_indexes {ends} of {depth} layers do not end equal groups, each of 2 or more")
    mlp_width = vision.take("mlp_dim", int(width * vision.take("mlp_ratio", 4.0)))
    if mlp_width % width:
        raise ValueError(f"mlp_dim {mlp_width} is no multiple of hidden_size, {width}")
    return SamVitConfig(
        width=width,
        heads=vision.take("num_attention_heads", 12),
        groups=groups,
        window_blocks=size - 1,
        mlp_ratio=mlp_width // width,
        patch=vision.side("patch_size", 16),
        channels=vision.take("num_channels", 3),
        image_size=vision.side("image_size", 1024),
        window=vision.take("window_size", 14),
        out_width=vision.take("output_channels", 256),
        norm_eps=vision.take("layer_norm_eps", 1e-6),
    )


def _read_hiera(vision: _Part) -> HieraConfig:
    backbone = vision.part("backbone_config")
    widths = backbone.take("embed_dim_per_stage", [96, 192, 384, 768])
    heads = backbone.take("num_attention_heads_per_stage", [1, 2, 4, 8])
    for name, values in (("embed_dim_per_stage", widths), ("num_attention_heads_per_stage", heads)):
        if list(values) != [values[0] * 2**stage for stage in range(STAGES)]:
            raise ValueError(f"{name} {values}: {STAGES} stages are known, each with twice as many as the one before")
    channels = vision.take("backbone_channel_list", [768, 384, 192, 96])
    if list(channels) != list(widths)[::-1]:
        raise ValueError(f"backbone_channel_list {channels} is not embed_dim_per_stage backwards")
    ratio = backbone.take("mlp_ratio", 4.0)
    if ratio != int(ratio):
        raise ValueError(f"mlp_ratio {ratio} is no whole number")
    return HieraConfig(
        width=widths[0],
        heads=heads[0],
        blocks=tuple(backbone.take("blocks_per_stage", [1, 2, 7, 2])),
        windows=tuple(backbone.take("window_size_per_stage", [8, 4, 14, 7])),
        global_blocks=tuple(backbone.take("global_attention_blocks", [5, 7, 9])),
        background=backbone.side("window_positional_embedding_background_size", 7),
        mlp_ratio=int(ratio),
        channels=backbone.take("num_channels", 3),
        fpn_width=vision.take("fpn_hidden_size", 256),
        norm_eps=backbone.take("layer_norm_eps", 1e-6),
    )


def config_to_json(config: SegmentAnythingConfig) -> dict[str, Any]:
    """The dataclasses as JSON values; precision and remat belong to a run, not to a checkpoint."""
    return to_json(config.with_precision("float32", "float32", "none"))


def config_from_json(content: Mapping[str, Any]) -> SegmentAnythingConfig:
    """Inverse of `config_to_json`.

    Raises:
        UserError: unknown or missing fields, or impossible values.
    """
    return from_json(SegmentAnythingConfig, content, "the checkpoint's configuration")
