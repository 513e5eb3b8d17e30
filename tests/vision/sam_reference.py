"""The references of SAM's image encoders: small models of `transformers` with drawn weights, as our parameter trees.

Weights are drawn so that rounding errors do not grow: matrices with standard deviation 1/sqrt(fan in), norm scales
1 +- 0.3, biases 0.1; absolute positions 0.5 and relative ones 1/sqrt(head size), so that both have a say. The
mappings take arrays, or shapes alone under `jax.eval_shape`, and fail on a tensor that they leave over.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import traverse_util
from transformers import Sam2HieraDetConfig, Sam2VisionConfig, Sam2VisionModel, SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from tracevision_jax.vision.sam_config import HieraConfig, SamVitConfig


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


def _conv(weight: Any) -> Any:
    """(out, in, row, column) to (row, column, in, out)."""
    return jnp.transpose(weight, (2, 3, 1, 0))


def _pointwise(weight: Any) -> Any:
    """A convolution of 1 x 1 to a matrix (in, out)."""
    return jnp.transpose(weight[:, :, 0, 0])


def _block(state: dict[str, Any], prefix: str, heads: int, mlp: tuple[str, str]) -> dict[str, Any]:
    """What blocks of both encoders have: norms, attention and MLP."""

    def take(name: str) -> Any:
        return state.pop(prefix + name)

    qkv, proj = take("attn.qkv.weight"), take("attn.proj.weight")
    head_dim = qkv.shape[0] // 3 // heads
    ours = {
        ("attn", "qkv", "kernel"): jnp.transpose(qkv).reshape(qkv.shape[1], 3, heads, head_dim),
        ("attn", "qkv", "bias"): take("attn.qkv.bias").reshape(3, heads, head_dim),
        ("attn", "proj", "kernel"): jnp.transpose(proj).reshape(heads, head_dim, proj.shape[0]),
        ("attn", "proj", "bias"): take("attn.proj.bias"),
    }
    for norm in ("layer_norm1", "layer_norm2"):
        ours[norm, "scale"], ours[norm, "bias"] = take(f"{norm}.weight"), take(f"{norm}.bias")
    for name, theirs in zip(("proj_in", "proj_out"), mlp, strict=True):
        ours["mlp", name, "kernel"] = jnp.transpose(take(f"mlp.{theirs}.weight"))
        ours["mlp", name, "bias"] = take(f"mlp.{theirs}.bias")
    return ours


def vit_params(state: Mapping[str, Any], config: SamVitConfig) -> dict[str, Any]:
    """The tree of `SamVitEncoder` from the reference's state."""
    state = dict(state)
    ours = {
        ("patch_embed", "kernel"): _conv(state.pop("patch_embed.projection.weight")),
        ("patch_embed", "bias"): state.pop("patch_embed.projection.bias"),
        ("pos_embed",): state.pop("pos_embed")[0],
        ("neck", "conv1", "kernel"): _pointwise(state.pop("neck.conv1.weight")),
        ("neck", "conv2", "kernel"): _conv(state.pop("neck.conv2.weight")),
    }
    for norm in ("layer_norm1", "layer_norm2"):
        ours["neck", norm, "scale"] = state.pop(f"neck.{norm}.weight")
        ours["neck", norm, "bias"] = state.pop(f"neck.{norm}.bias")
    blocks = []
    for number in range(config.depth):
        block = _block(state, f"layers.{number}.", config.heads, ("lin1", "lin2"))
        for table in ("rel_pos_h", "rel_pos_w"):
            block["attn", table] = state.pop(f"layers.{number}.attn.{table}")
        blocks.append(block)
    assert not state, f"left over: {sorted(state)}"
    size = config.window_blocks + 1
    groups = [blocks[start : start + size] for start in range(0, config.depth, size)]
    for path in blocks[0]:
        windows = [jnp.stack([block[path] for block in group[:-1]]) for group in groups]
        ours["groups", "window", *path] = jnp.stack(windows)
        ours["groups", "full", *path] = jnp.stack([group[-1][path] for group in groups])
    return traverse_util.unflatten_dict(ours)


def hiera_params(state: Mapping[str, Any], config: HieraConfig) -> dict[str, Any]:
    """The tree of `Sam2ImageEncoder` from the reference's state."""
    state = dict(state)
    ours = {
        ("backbone", "patch_embed", "kernel"): _conv(state.pop("backbone.patch_embed.projection.weight")),
        ("backbone", "patch_embed", "bias"): state.pop("backbone.patch_embed.projection.bias"),
    }
    for name in ("pos_embed", "pos_embed_window"):
        ours["backbone", name] = jnp.transpose(state.pop(f"backbone.{name}")[0], (1, 2, 0))
    for number, plan in enumerate(config.plan()):
        prefix = f"backbone.blocks.{number}."
        block = _block(state, prefix, plan.heads, ("proj_in", "proj_out"))
        if plan.pools:
            block["proj", "kernel"] = jnp.transpose(state.pop(prefix + "proj.weight"))
            block["proj", "bias"] = state.pop(prefix + "proj.bias")
        ours |= {("backbone", f"blocks_{number}", *path): value for path, value in block.items()}
    for number in range(4):
        ours["neck", f"convs_{number}", "kernel"] = _pointwise(state.pop(f"neck.convs.{number}.weight"))
        ours["neck", f"convs_{number}", "bias"] = state.pop(f"neck.convs.{number}.bias")
    assert not state, f"left over: {sorted(state)}"
    return traverse_util.unflatten_dict(ours)


def arrays_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """A reference's state in numpy."""
    return {name: value.detach().float().numpy() for name, value in model.state_dict().items()}


def shapes_of(model: torch.nn.Module) -> dict[str, jax.ShapeDtypeStruct]:
    """A reference's state as shapes; the model may be on the meta device."""
    return {name: jax.ShapeDtypeStruct(tuple(value.shape), np.float32) for name, value in model.state_dict().items()}


def mapped_shapes(mapping: Any, model: torch.nn.Module, config: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of our tree, as a mapping makes it from a reference's shapes."""
    return shapes_in(jax.eval_shape(partial(mapping, config=config), shapes_of(model)))


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
