"""Tiny Segment Anything models of every kind, and what their tensors are called in the authors' files.

`original_state` renames a state dictionary of `transformers` step by step, independently of the tables of `weights`.
"""

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Sam2Config, Sam2Model, Sam2VideoConfig, Sam2VideoModel, SamConfig, SamModel

from tracevision_jax.hosts.sam_presets import SegmentAnythingConfig
from tracevision_jax.segmentation.sam_config import HEADS_PRESETS, HeadsConfig, MaskDecoderConfig, MemoryConfig
from tracevision_jax.segmentation.sam_config import PromptEncoderConfig as Prompts
from tracevision_jax.vision.sam_config import HieraConfig, SamVitConfig
from tracevision_jax.weights.sam_config_export import model_type, write_config

WIDTH, SIDE = 128, 64
"""`transformers` wants memories 64 wide, and pointers wider, to be cut in two."""
TABLES = "|".join((r"(tokens?|not_a_point_embed|no_mask_embed|point_embed(\.\d)?)\.weight$", r"(embedding|encoding)$"))
TABLES += "|no_object_pointer|occlusion_spatial_embedding_parameter"
"""Names of what is added to features as it is."""
CLASSES = {
    "sam": (SamConfig, SamModel),
    "sam2": (Sam2Config, Sam2Model),
    "sam2_video": (Sam2VideoConfig, Sam2VideoModel),
}


def tiny(release: str, memory: bool = True) -> SegmentAnythingConfig:
    """A model of a release's switches ("sam", "sam2", "sam2.1") that is small in every other way."""
    heads = HEADS_PRESETS[release]
    prompts = Prompts(**{**vars(heads.prompts), "width": WIDTH, "image_size": SIDE, "mask_channels": 8})
    sizes = {"width": WIDTH, "heads": 4, "mlp_width": 48, "iou_hidden": 24}
    decoder = MaskDecoderConfig(**{**vars(heads.decoder), **sizes})
    if heads.memory is None:
        vit = SamVitConfig(width=32, heads=2, groups=2, window_blocks=2, image_size=SIDE, window=3, out_width=WIDTH)
        return SegmentAnythingConfig(vit, HeadsConfig(prompts, decoder, None))
    sizes = {"width": WIDTH, "fuser_hidden": 40, "layers": 2, "mlp_width": 56}
    hiera = HieraConfig(
        width=16, heads=2, blocks=(1, 2, 2, 1), windows=(4, 2, 2, 2), global_blocks=(4,), background=3, fpn_width=WIDTH
    )
    kept = MemoryConfig(**{**vars(heads.memory), **sizes}) if memory else None
    return SegmentAnythingConfig(hiera, HeadsConfig(prompts, decoder, kept))


def reference(config: SegmentAnythingConfig) -> Any:
    """The model of `transformers` of these sizes; where its weights are, and what they are, is the caller's."""
    kind, model = CLASSES[model_type(config)]
    built = kind(**write_config(config, np.dtype(np.float32), {}))
    built._attn_implementation = "eager"
    return model(built).eval()


@cache
def drawn(release: str, memory: bool = True) -> Any:
    """A tiny model with drawn weights."""
    model = reference(tiny(release, memory))
    draw(model, 5)
    return model


def draw(model: torch.nn.Module, seed: int) -> None:
    """Draw all weights in place so that rounding errors do not grow; positions and tokens as large as features."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        buffers = [(name, value) for name, value in model.named_buffers() if "positional_embedding" in name]
        for name, tensor in [*model.named_parameters(), *buffers]:
            noise = torch.randn(tensor.shape, generator=generator)
            if "pos_embed" in name:
                tensor.copy_(0.5 * noise)
            elif "rel_pos" in name:
                tensor.copy_(noise * tensor.shape[1] ** -0.5)
            elif re.search(TABLES, name):
                tensor.copy_(noise)
            elif tensor.ndim == 1:
                tensor.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.3 * noise)
            else:
                tensor.copy_(noise * float(np.prod(tensor.shape[1:])) ** -0.5)
        shared = model.shared_image_embedding.positional_embedding
        shared.copy_(model.prompt_encoder.shared_embedding.positional_embedding)


def write_hugging_face(directory: Path, release: str, memory: bool = True, dtype: str = "float32") -> Any:
    """Write a tiny checkpoint as `transformers` does, and return the model."""
    model = copy.deepcopy(drawn(release, memory)).to(getattr(torch, dtype))
    model.save_pretrained(directory)
    return model


def write_original(path: Path, release: str, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """Write a tiny checkpoint as the authors do, and return its tensors."""
    state = original_state(drawn(release).state_dict(), release == "sam")
    state = {name: value.to(getattr(torch, dtype)) for name, value in state.items()}
    torch.save(state if release == "sam" else {"model": state}, path)
    return state


def original_state(state: dict[str, torch.Tensor], first: bool) -> dict[str, torch.Tensor]:
    """A state dictionary of `transformers` under the names of the authors' files; of the first generation or not."""
    found = {}
    for name, value in state.items():
        if name == "shared_image_embedding.positional_embedding":
            continue
        if name == "prompt_encoder.point_embed.weight":
            for kind, row in enumerate(value):
                found[f"sam_prompt_encoder.point_embeddings.{kind}.weight"] = row[None].clone()
            continue
        found[(_first if first else _second)(_heads(name))] = value.clone()
    return found


def _heads(name: str) -> str:
    """Parts of prompt encoder and mask decoder, whose numbers are places in a sequence of layers."""
    name = name.replace("shared_embedding.positional_embedding", "pe_layer.positional_encoding_gaussian_matrix")
    name = name.replace("prompt_encoder.point_embed.", "prompt_encoder.point_embeddings.")
    for ours, number in {"conv1": 0, "layer_norm1": 1, "conv2": 3, "layer_norm2": 4, "conv3": 6}.items():
        name = name.replace(f"mask_embed.{ours}.", f"mask_downscaling.{number}.")
    for ours, number in {"upscale_conv1": 0, "upscale_layer_norm": 1, "upscale_conv2": 3}.items():
        name = name.replace(f"mask_decoder.{ours}.", f"mask_decoder.output_upscaling.{number}.")
    three = "hypernetworks_mlps", "iou_prediction_head", "pred_obj_score_head", "object_pointer_proj"
    if any(word in name for word in three):
        for ours, number in (("proj_out", 2), ("layers.0", 1), ("proj_in", 0)):
            if f".{ours}." in name:
                return name.replace(f".{ours}.", f".layers.{number}.")
    return name


def _first(name: str) -> str:
    name = name.replace("vision_encoder.layers.", "image_encoder.blocks.").replace("vision_encoder.", "image_encoder.")
    for number, part in enumerate(("conv1", "layer_norm1", "conv2", "layer_norm2")):
        name = name.replace(f"image_encoder.neck.{part}.", f"image_encoder.neck.{number}.")
    return name.replace("patch_embed.projection.", "patch_embed.proj.").replace(".layer_norm", ".norm")


def _second(name: str) -> str:
    if found := re.fullmatch(r"memory_encoder\.mask_downsampler\.layers\.(\d)\.(conv|layer_norm)\.(\w+)", name):
        number = 3 * int(found[1]) + ("conv", "layer_norm").index(found[2])
        return f"memory_encoder.mask_downsampler.encoder.{number}.{found[3]}"
    if found := re.fullmatch(r"vision_encoder\.neck\.convs\.(\d)\.(\w+)", name):
        return f"image_encoder.neck.convs.{found[1]}.conv.{found[2]}"
    for theirs, original in (
        ("memory_encoder.mask_downsampler.final_conv", "memory_encoder.mask_downsampler.encoder.12"),
        ("memory_encoder.feature_projection", "memory_encoder.pix_feat_proj"),
        ("memory_encoder.projection", "memory_encoder.out_proj"),
        ("memory_encoder.memory_fuser", "memory_encoder.fuser"),
        ("vision_encoder.backbone", "image_encoder.trunk"),
        ("patch_embed.projection", "patch_embed.proj"),
        ("object_pointer_proj", "obj_ptr_proj"),
        ("temporal_positional_encoding_projection_layer", "obj_ptr_tpos_proj"),
        ("memory_temporal_positional_encoding", "maskmem_tpos_enc"),
        ("no_memory_embedding", "no_mem_embed"),
        ("no_memory_positional_encoding", "no_mem_pos_enc"),
        ("no_object_pointer", "no_obj_ptr"),
        ("occlusion_spatial_embedding_parameter", "no_obj_embed_spatial"),
        ("mlp.proj_in", "mlp.layers.0"),
        ("mlp.proj_out", "mlp.layers.1"),
        ("depthwise_conv", "dwconv"),
        ("pointwise_conv", "pwconv"),
        (".layer_norm", ".norm"),
        (".o_proj", ".out_proj"),
    ):
        name = name.replace(theirs, original)
    if name.startswith("memory_encoder.fuser"):
        name = re.sub(r"scale$", "gamma", name)
    return re.sub(r"^(prompt_encoder|mask_decoder)\.", r"sam_\1.", name)
