"""The references of SAM's image encoders: small models of `transformers` with drawn weights, as our parameter trees.

Weights are drawn so that rounding errors do not grow: matrices with standard deviation 1/sqrt(fan in), norm scales
1 +- 0.3, biases 0.1; absolute positions 0.5 and relative ones 1/sqrt(head size), so that both have a say. The
mappings are the rules of `weights`, and fail on a tensor that they leave over.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from flax import traverse_util
from transformers import Sam2HieraDetConfig, Sam2VisionConfig, Sam2VisionModel, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from tracevision_jax.vision.sam_config import HieraConfig, SamVitConfig
from tracevision_jax.weights.engine import Table, unflatten
from tracevision_jax.weights.sam_vision_rules import hiera_rules, vit_rules


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Draw all parameters in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if "pos_embed" in name:
                parameter.copy_(0.5 * noise)
            elif "rel_pos" in name:
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
            elif parameter.ndim == 1:
                parameter.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.3 * noise)
            else:
                parameter.copy_(noise * float(np.prod(parameter.shape[1:])) ** -0.5)


def reference_vit(config: SamVitConfig) -> SamVisionEncoder:
    """SAM's encoder with these sizes; its weights are as `transformers` starts them."""
    built = SamVisionConfig(
        hidden_size=config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        image_size=config.image_size,
        patch_size=config.patch,
        mlp_ratio=float(config.mlp_ratio),
        output_channels=config.out_width,
        window_size=config.window,
        global_attn_indexes=[(group + 1) * (config.window_blocks + 1) - 1 for group in range(config.groups)],
    )
    built._attn_implementation = "eager"
    return SamVisionEncoder(built).eval()


def reference_hiera(config: HieraConfig) -> Sam2VisionModel:
    """SAM 2's encoder with these sizes; its weights are as `transformers` starts them."""
    widths = [config.stage_width(stage) for stage in range(4)]
    backbone = Sam2HieraDetConfig(
        hidden_size=config.width,
        num_attention_heads=config.heads,
        window_positional_embedding_background_size=[config.background] * 2,
        blocks_per_stage=list(config.blocks),
        embed_dim_per_stage=widths,
        num_attention_heads_per_stage=[config.heads * 2**stage for stage in range(4)],
        window_size_per_stage=list(config.windows),
        global_attention_blocks=list(config.global_blocks),
        mlp_ratio=float(config.mlp_ratio),
    )
    built = Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=widths[::-1], fpn_hidden_size=config.fpn_width
    )
    built._attn_implementation = "eager"
    return Sam2VisionModel(built).eval()


def vit_params(state: Mapping[str, Any], config: SamVitConfig) -> dict[str, Any]:
    """The tree of `SamVitEncoder` from the reference's state."""
    return _params(Table(*vit_rules(config, "", "")), state)


def hiera_params(state: Mapping[str, Any], config: HieraConfig) -> dict[str, Any]:
    """The tree of `Sam2ImageEncoder` from the reference's state."""
    return _params(Table(*hiera_rules(config, "", "")), state)


def _params(table: Table, state: Mapping[str, Any]) -> dict[str, Any]:
    """A tree by the rules of `weights`; each tensor is a parameter, or one layer of it."""
    leaves = {}
    for path, shape in table.flax_shapes.items():
        layers = [move.to_flax(state[move.name]).reshape(-1) for _, moves in table.blocks(path) for move in moves]
        leaves[path] = jnp.asarray(np.concatenate(layers).reshape(shape))
    left = set(state) - set(table.torch_shapes)
    assert not left, f"left over: {sorted(left)}"
    return unflatten(leaves)


def arrays_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """A reference's state in numpy."""
    return {name: value.detach().float().numpy() for name, value in model.state_dict().items()}


def mapped_shapes(rules: Any, model: torch.nn.Module, config: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of our tree by rules (`vit_rules`, `hiera_rules`), which fit a reference, be it on no device."""
    table = Table(*rules(config, "", ""))
    assert table.torch_shapes == {name: tuple(value.shape) for name, value in model.state_dict().items()}
    return {tuple(path.split("/")): shape for path, shape in table.flax_shapes.items()}


def shapes_in(tree: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape."""
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(tree).items()}


def channels_first(pixels: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Pictures as the references take them."""
    return torch.tensor(pixels).permute(0, 3, 1, 2).to(dtype)


def channels_last(maps: torch.Tensor) -> np.ndarray:
    """Maps of a reference, in float64."""
    return maps.detach().permute(0, 2, 3, 1).double().numpy()


def error(ours: object, reference: object) -> float:
    """Relative error by the Frobenius norm."""
    a, b = (np.asarray(x, np.float64) for x in (ours, reference))
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def shown(name: str, ours: float, floor: float) -> float:
    """Our error, printed beside the reference's own, float32 against float64."""
    print(f"{name}: error {ours:.1e}, floor {floor:.1e}")
    return ours
