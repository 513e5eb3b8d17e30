"""Names of SAM's and SAM 2's tensors in the authors' own files, from those of `transformers`.

Sources: the modules of facebookresearch/segment-anything (`sam_vit_h_4b8939.pth`) and of facebookresearch/sam2
(`sam2.1_hiera_tiny.pt`), whose parameters have these names.

    rename = original_names(config.heads)
    rename("vision_encoder.layers.{}.layer_norm1.weight")     # "image_encoder.blocks.{}.norm1.weight"
"""

import re
from collections.abc import Callable

from tracevision_jax.segmentation.sam_config import HeadsConfig
from tracevision_jax.weights.sam_heads_rules import is_first_generation

Names = list[tuple[str, str]]
"""Pattern of a part of a name, and what stands there instead; applied in this order."""

DECODER: Names = [
    (r"\bshared_embedding\.positional_embedding$", "pe_layer.positional_encoding_gaussian_matrix"),
    (r"\bpoint_embed\.", "point_embeddings."),
    (r"\bmask_embed\.conv1\b", "mask_downscaling.0"),
    (r"\bmask_embed\.layer_norm1\b", "mask_downscaling.1"),
    (r"\bmask_embed\.conv2\b", "mask_downscaling.3"),
    (r"\bmask_embed\.layer_norm2\b", "mask_downscaling.4"),
    (r"\bmask_embed\.conv3\b", "mask_downscaling.6"),
    (r"\bupscale_conv1\b", "output_upscaling.0"),
    (r"\bupscale_layer_norm\b", "output_upscaling.1"),
    (r"\bupscale_conv2\b", "output_upscaling.3"),
    # Modules of three linear maps, the second before the first, whose name it takes.
    (r"\b(iou_prediction_head|pred_obj_score_head|object_pointer_proj)\.layers\.0\b", r"\1.layers.1"),
    (r"\b(iou_prediction_head|pred_obj_score_head|object_pointer_proj)\.proj_in\b", r"\1.layers.0"),
    (r"\b(iou_prediction_head|pred_obj_score_head|object_pointer_proj)\.proj_out\b", r"\1.layers.2"),
    (r"\b(output_hypernetworks_mlps\.[^.]+)\.layers\.0\b", r"\1.layers.1"),
    (r"\b(output_hypernetworks_mlps\.[^.]+)\.proj_in\b", r"\1.layers.0"),
    (r"\b(output_hypernetworks_mlps\.[^.]+)\.proj_out\b", r"\1.layers.2"),
]
"""Of the prompt encoder and the mask decoder."""

SAM: Names = [
    (r"^vision_encoder\.neck\.conv1\b", "image_encoder.neck.0"),
    (r"^vision_encoder\.neck\.layer_norm1\b", "image_encoder.neck.1"),
    (r"^vision_encoder\.neck\.conv2\b", "image_encoder.neck.2"),
    (r"^vision_encoder\.neck\.layer_norm2\b", "image_encoder.neck.3"),
    (r"^vision_encoder\.layers\.", "image_encoder.blocks."),
    (r"^vision_encoder\.", "image_encoder."),
    (r"\bpatch_embed\.projection\b", "patch_embed.proj"),
    (r"\blayer_norm", "norm"),
]

SAM2: Names = [
    (r"^vision_encoder\.neck\.(convs\.[^.]+)\.", r"image_encoder.neck.\1.conv."),
    (r"^vision_encoder\.backbone\.", "image_encoder.trunk."),
    (r"\bpatch_embed\.projection\b", "patch_embed.proj"),
    (r"\bmlp\.proj_in\b", "mlp.layers.0"),
    (r"\bmlp\.proj_out\b", "mlp.layers.1"),
    (r"^memory_encoder\.memory_fuser\.", "memory_encoder.fuser."),
    (r"\bdepthwise_conv\b", "dwconv"),
    (r"\bpointwise_conv", "pwconv"),
    (r"^(memory_encoder\.fuser\.layers\.[^.]+)\.scale$", r"\1.gamma"),
    (r"^memory_encoder\.feature_projection\b", "memory_encoder.pix_feat_proj"),
    (r"^memory_encoder\.projection\b", "memory_encoder.out_proj"),
    (r"\blayer_norm", "norm"),
    (r"\bo_proj\b", "out_proj"),
    (r"^prompt_encoder\.", "sam_prompt_encoder."),
    (r"^mask_decoder\.", "sam_mask_decoder."),
    (r"^object_pointer_proj\.", "obj_ptr_proj."),
    (r"^temporal_positional_encoding_projection_layer\.", "obj_ptr_tpos_proj."),
    (r"^memory_temporal_positional_encoding$", "maskmem_tpos_enc"),
    (r"^no_memory_embedding$", "no_mem_embed"),
    (r"^no_memory_positional_encoding$", "no_mem_pos_enc"),
    (r"^no_object_pointer$", "no_obj_ptr"),
    (r"^occlusion_spatial_embedding_parameter$", "no_obj_embed_spatial"),
]


def original_names(heads: HeadsConfig) -> Callable[[str], str]:
    """What turns a tensor's name in `transformers`, numbers or `{}` in it, into the one in the authors' files."""
    names = DECODER + (SAM if is_first_generation(heads) else SAM2)

    def rename(name: str) -> str:
        name = re.sub(r"\bmask_downsampler\.(layers\.\d+\.(conv|layer_norm)|final_conv)\b", numbered, name)
        for pattern, instead in names:
            name = re.sub(pattern, instead, name)
        return name

    def numbered(found: re.Match[str]) -> str:
        """Convolution, norm and activation are counted through, level by level; a last convolution follows."""
        assert heads.memory is not None
        if found[1] == "final_conv":
            number = 3 * (heads.memory.mask_stride.bit_length() - 1)
        else:
            number = 3 * int(found[1].split(".")[1]) + (found[2] == "layer_norm")
        return f"mask_downsampler.encoder.{number}"

    return rename
