"""The `config.json` of `transformers` for SAM and SAM 2, and the files that its processors read.

    content = write_config(config, np.dtype("float32"), {})

Inverse of `sam_config.read_config`: reading what is written gives the same configuration.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tracevision_jax.errors import UserError
from tracevision_jax.hosts.sam_presets import SegmentAnythingConfig
from tracevision_jax.segmentation.sam_config import MemoryConfig
from tracevision_jax.vision.sam_config import STAGES, HieraConfig, SamVitConfig
from tracevision_jax.vision.sam_preprocess import IMAGENET_MEAN, IMAGENET_STD
from tracevision_jax.weights.sam_config import DECODER_ACTIVATION, FIXED, SAM, SAM2, SAM2_NORM_EPS, SAM2_VIDEO
from tracevision_jax.weights.sam_heads_rules import is_first_generation

ARCHITECTURES = {SAM: "SamModel", SAM2: "Sam2Model", SAM2_VIDEO: "Sam2VideoModel"}
NOT_KEPT = ("dtype", "torch_dtype", "memory_attention_rope_theta", "_name_or_path")
"""Of a config.json that is written anew, since it is said otherwise now."""
BILINEAR = 2
"""Pillow's number of the filter."""


def model_type(config: SegmentAnythingConfig) -> str:
    """What `transformers` calls such a model."""
    if is_first_generation(config.heads):
        return SAM
    return SAM2 if config.heads.memory is None else SAM2_VIDEO


def write_config(config: SegmentAnythingConfig, dtype: np.dtype, base: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` for `transformers`; keys of `base` that ours lacks are kept.

    Raises:
        UserError: the model has no counterpart there; every reason is named.
    """
    if reasons := _without_counterpart(config):
        raise UserError("transformers cannot hold this model: " + "; ".join(reasons))
    kind, heads, vision = model_type(config), config.heads, config.vision
    prompts, decoder = heads.prompts, heads.decoder
    first = kind == SAM
    content: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": str(dtype),
        "prompt_encoder_config": {
            "model_type": f"{kind}_prompt_encoder",
            **FIXED["prompt_encoder_config"],
            "hidden_size": prompts.width,
            "image_size": prompts.image_size,
            "patch_size": prompts.stride,
            "mask_input_channels": prompts.mask_channels,
            "layer_norm_eps": prompts.norm_eps,
        },
        "mask_decoder_config": {
            "model_type": f"{kind}_mask_decoder",
            **FIXED["mask_decoder_config"],
            "hidden_act": DECODER_ACTIVATION[first],
            "hidden_size": decoder.width,
            "num_attention_heads": decoder.heads,
            "mlp_dim": decoder.mlp_width,
            "num_hidden_layers": decoder.layers,
            "num_multimask_outputs": decoder.several,
            "iou_head_hidden_dim": decoder.iou_hidden,
        },
    }
    if first:
        content["mask_decoder_config"]["layer_norm_eps"] = decoder.norm_eps
    else:
        content["mask_decoder_config"] |= {
            "dynamic_multimask_via_stability": decoder.dynamic_multimask,
            "dynamic_multimask_stability_delta": decoder.stability_delta,
            "dynamic_multimask_stability_thresh": decoder.stability_threshold,
        }
    if isinstance(vision, SamVitConfig):
        content["vision_config"] = _write_vit(vision, prompts.width)
    else:
        content["vision_config"] = _write_hiera(vision, config.grid, config.image_size)
    if heads.memory is not None:
        content |= _write_memory(heads.memory, config.grid)
        content |= {
            "image_size": config.image_size,
            "multimask_min_pt_num": decoder.min_points,
            "multimask_max_pt_num": decoder.max_points,
        }
    return _over(base, content)


def _without_counterpart(config: SegmentAnythingConfig) -> list[str]:
    """Why `transformers` cannot hold a model."""
    heads, vision = config.heads, config.vision
    decoder, memory, first = heads.decoder, heads.memory, is_first_generation(config.heads)
    held = {
        "heads.decoder.object_score": (decoder.object_score, not first),
        "heads.decoder.high_resolution": (decoder.high_resolution, not first),
        "heads.decoder.iou_sigmoid": (decoder.iou_sigmoid, not first),
        "heads.decoder.iou_depth": (decoder.iou_depth, FIXED["mask_decoder_config"]["iou_head_depth"]),
        "heads.prompts.pad_with_boxes": (heads.prompts.pad_with_boxes, not first),
    }
    if first:
        held["heads.decoder.dynamic_multimask"] = (decoder.dynamic_multimask, False)
    else:
        held["heads.decoder.norm_eps"] = (decoder.norm_eps, SAM2_NORM_EPS)
    if isinstance(vision, SamVitConfig):
        held["heads.prompts.image_size"] = (config.image_size, vision.image_size)
    if memory is not None:
        held |= {
            "heads.memory.frame_stride": (memory.frame_stride, 1),
            "heads.memory.only_past_pointers": (memory.only_past_pointers, True),
            "heads.memory.signed_pointer_times": (memory.signed_pointer_times, memory.pointer_times),
            "heads.memory.norm_eps": (memory.norm_eps, 1e-5),
        }
    return [f"{name} is {ours}, there it is {theirs}" for name, (ours, theirs) in held.items() if ours != theirs]


def _write_vit(vision: SamVitConfig, prompt_width: int) -> dict[str, Any]:
    size = vision.window_blocks + 1
    return {
        "model_type": "sam_vision_model",
        **{name: FIXED["vision_config"][name] for name in ("hidden_act", "qkv_bias", "use_abs_pos", "use_rel_pos")},
        "hidden_size": vision.width,
        "num_hidden_layers": vision.depth,
        "num_attention_heads": vision.heads,
        "global_attn_indexes": list(range(size - 1, vision.depth, size)),
        "mlp_ratio": float(vision.mlp_ratio),
        "mlp_dim": vision.mlp_ratio * vision.width,
        "patch_size": vision.patch,
        "num_channels": vision.channels,
        "image_size": vision.image_size,
        "window_size": vision.window,
        "output_channels": vision.out_width,
        "num_pos_feats": prompt_width // 2,
        "layer_norm_eps": vision.norm_eps,
    }


def _write_hiera(vision: HieraConfig, grid: int, image_size: int) -> dict[str, Any]:
    widths = [vision.stage_width(stage) for stage in range(STAGES)]
    names = ("hidden_act", "fpn_kernel_size", "fpn_top_down_levels", "num_feature_levels")
    return {
        "model_type": "sam2_vision_model",
        **{name: FIXED["vision_config"][name] for name in names},
        "backbone_channel_list": widths[::-1],
        "backbone_feature_sizes": [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2],
        "fpn_hidden_size": vision.fpn_width,
        "layer_norm_eps": vision.norm_eps,
        "backbone_config": {
            "model_type": "sam2_hiera_det_model",
            **FIXED["backbone_config"],
            "hidden_size": vision.width,
            "num_attention_heads": vision.heads,
            "num_channels": vision.channels,
            "image_size": [image_size] * 2,
            "blocks_per_stage": list(vision.blocks),
            "embed_dim_per_stage": widths,
            "num_attention_heads_per_stage": [vision.heads * 2**stage for stage in range(STAGES)],
            "window_size_per_stage": list(vision.windows),
            "global_attention_blocks": list(vision.global_blocks),
            "window_positional_embedding_background_size": [vision.background] * 2,
            "mlp_ratio": float(vision.mlp_ratio),
            "layer_norm_eps": vision.norm_eps,
        },
    }


def _write_memory(memory: MemoryConfig, grid: int) -> dict[str, Any]:
    return {
        **FIXED[""],
        "num_maskmem": memory.frames,
        "max_object_pointers_in_encoder": memory.max_pointers,
        "max_cond_frame_num": -1 if memory.max_conditioning is None else memory.max_conditioning,
        "sigmoid_scale_for_mem_enc": memory.sigmoid_scale,
        "sigmoid_bias_for_mem_enc": memory.sigmoid_bias,
        "enable_occlusion_spatial_embedding": memory.occlusion_embedding,
        "enable_temporal_pos_encoding_for_object_pointers": memory.pointer_times,
        "memory_attention_hidden_size": memory.width,
        "memory_attention_num_layers": memory.layers,
        "memory_attention_feed_forward_hidden_size": memory.mlp_width,
        "memory_attention_rope_feat_sizes": [grid, grid],
        "memory_encoder_hidden_size": memory.width,
        "memory_encoder_output_channels": memory.memory_width,
        "mask_downsampler_embed_dim": memory.width,
        "mask_downsampler_total_stride": memory.mask_stride,
        "memory_fuser_num_layers": memory.fuser_layers,
        "memory_fuser_embed_dim": memory.width,
        "memory_fuser_intermediate_dim": memory.fuser_hidden,
        "memory_fuser_kernel_size": memory.fuser_kernel,
        "memory_fuser_padding": memory.fuser_kernel // 2,
        "rope_parameters": {"rope_type": "axial", "rope_theta": memory.rope_theta},
    }


def _over(base: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` over `base`, object by object."""
    kept = {name: value for name, value in base.items() if name not in NOT_KEPT}
    merged = {
        name: _over(kept.get(name) or {}, value) if isinstance(value, Mapping) else value
        for name, value in content.items()
    }
    return {**kept, **merged}


def write_processors(config: SegmentAnythingConfig) -> dict[str, dict[str, Any]]:
    """{file: content} of what the processors of `transformers` read, as they stand beside the released models."""
    pictures: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGENET_MEAN),
        "image_std": list(IMAGENET_STD),
        "resample": BILINEAR,
        "rescale_factor": 1 / 255,
    }
    side, low = {"height": config.image_size, "width": config.image_size}, {"height": config.mask_size}
    low["width"] = config.mask_size
    if model_type(config) == SAM:
        own = {"processor_class": "SamProcessor", "image_processor_type": "SamImageProcessor"}
        sizes = {"size": {"longest_edge": config.image_size}, "mask_size": {"longest_edge": config.mask_size}}
        padding = {"do_pad": True, "pad_size": side, "mask_pad_size": low}
        return {"preprocessor_config.json": {**own, **pictures, **sizes, **padding}}
    kind = "Sam2Processor" if config.heads.memory is None else "Sam2VideoProcessor"
    own = {"processor_class": kind, "image_processor_type": "Sam2ImageProcessor"}
    files = {"preprocessor_config.json": {**own, **pictures, "size": side, "mask_size": low}}
    if config.heads.memory is not None:
        own = {"processor_class": kind, "video_processor_type": "Sam2VideoVideoProcessor"}
        files["video_preprocessor_config.json"] = {**own, **pictures, "size": side}
    return files
