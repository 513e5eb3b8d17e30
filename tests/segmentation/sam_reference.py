"""The references of everything after SAM's image encoders: small models of `transformers` with drawn weights.

`table(heads)` are the rules of `weights` by which a state dictionary of `transformers` becomes our parameters;
`tree_of` applies them, and fails on a tensor that they leave over.

Weights are drawn so that rounding errors do not grow: matrices with standard deviation 1/sqrt(fan in), norm scales
1 +- 0.3, biases 0.1, tokens and embeddings 1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from transformers import Sam2VideoConfig, Sam2VideoModel, SamConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder

from tests.vision.sam_reference import error
from tracevision_jax.segmentation.prompt_encoder import ABSENT, NOT_A_POINT, with_boxes
from tracevision_jax.segmentation.sam_config import (
    HEADS_PRESETS,
    HeadsConfig,
    MaskDecoderConfig,
    MemoryConfig,
    PromptEncoderConfig,
    hugging_face,
)
from tracevision_jax.weights.engine import Table, flatten, unflatten
from tracevision_jax.weights.sam_heads_rules import heads_rules

GRID, STRIDE, WIDTH = 8, 16, 128
"""Of the small models; `transformers` wants memories 64 wide, and pointers are to be cut in two."""
MODULE = 1e-5
"""Largest relative error (Frobenius) of a module's outputs in float32."""
TOKENS = ("token", "embed", "embedding", "pointer", "parameter", "encoding")


def small_heads(release: str, **memory: Any) -> HeadsConfig:
    """A release's switches at the sizes of the small models, as `transformers` runs them."""
    heads = hugging_face(HEADS_PRESETS[release])
    prompts = {"width": WIDTH, "image_size": GRID * STRIDE, "mask_channels": 8}
    decoder = {"width": WIDTH, "heads": 4, "mlp_width": 48, "iou_hidden": 24}
    sizes = {"width": WIDTH, "fuser_hidden": 40, "layers": 2, "mlp_width": 56, **memory}
    return HeadsConfig(
        PromptEncoderConfig(**{**vars(heads.prompts), **prompts}),
        MaskDecoderConfig(**{**vars(heads.decoder), **decoder}),
        None if heads.memory is None else MemoryConfig(**{**vars(heads.memory), **sizes}),
    )


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Draw all parameters, and the matrix of the point codes, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        named = [*model.named_parameters(), *((n, b) for n, b in model.named_buffers() if "positional_embedding" in n)]
        for name, tensor in named:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            owner = name.removesuffix(".weight").split(".")[-1]
            if any(owner.endswith(word) for word in TOKENS) or ".point_embed." in name:
                tensor.copy_(noise)
            elif tensor.ndim == 1:
                tensor.copy_(0.1 * noise if name.endswith("bias") else 1 + 0.3 * noise)
            else:
                tensor.copy_(noise * float(np.prod(tensor.shape[1:])) ** -0.5)
        if hasattr(model, "shared_image_embedding"):
            shared = model.shared_image_embedding.positional_embedding
            shared.copy_(model.prompt_encoder.shared_embedding.positional_embedding)


class Sam(torch.nn.Module):
    """What SAM has after its image encoder."""

    def __init__(self, config: SamConfig):
        super().__init__()
        self.prompt_encoder = SamPromptEncoder(config)
        self.mask_decoder = SamMaskDecoder(config.mask_decoder_config)


def sam_config(heads: HeadsConfig) -> SamConfig:
    """The configuration of `transformers` for these heads of SAM; its image encoder is of no interest."""
    prompts, decoder = heads.prompts, heads.decoder
    config = SamConfig(
        vision_config={"num_pos_feats": prompts.width // 2, "output_channels": prompts.width},
        prompt_encoder_config={
            "hidden_size": prompts.width,
            "image_size": prompts.image_size,
            "patch_size": prompts.stride,
            "mask_input_channels": prompts.mask_channels,
        },
        mask_decoder_config={
            "hidden_size": decoder.width,
            "mlp_dim": decoder.mlp_width,
            "num_attention_heads": decoder.heads,
            "iou_head_hidden_dim": decoder.iou_hidden,
        },
    )
    config.mask_decoder_config._attn_implementation = "eager"
    return config


def sam2_config(heads: HeadsConfig) -> Sam2VideoConfig:
    """The configuration of `transformers` for these heads of SAM 2, with a tiny image encoder."""
    prompts, decoder, memory = heads.prompts, heads.decoder, heads.memory
    assert memory is not None
    grid = prompts.grid
    config = Sam2VideoConfig(
        vision_config={
            "model_type": "sam2_vision_model",
            "backbone_config": {
                "model_type": "sam2_hiera_det_model",
                "hidden_size": 8,
                "blocks_per_stage": [1, 1, 1, 1],
                "embed_dim_per_stage": [8, 16, 32, 64],
                "num_attention_heads_per_stage": [1, 1, 1, 1],
                "global_attention_blocks": [],
            },
            "backbone_channel_list": [64, 32, 16, 8],
            "fpn_hidden_size": prompts.width,
            "backbone_feature_sizes": [[4 * grid] * 2, [2 * grid] * 2, [grid] * 2],
        },
        prompt_encoder_config={
            "hidden_size": prompts.width,
            "image_size": prompts.image_size,
            "patch_size": prompts.stride,
            "mask_input_channels": prompts.mask_channels,
        },
        mask_decoder_config={
            "hidden_size": decoder.width,
            "mlp_dim": decoder.mlp_width,
            "num_attention_heads": decoder.heads,
            "iou_head_hidden_dim": decoder.iou_hidden,
            "dynamic_multimask_via_stability": decoder.dynamic_multimask,
        },
        image_size=prompts.image_size,
        num_maskmem=memory.frames,
        max_object_pointers_in_encoder=memory.max_pointers,
        max_cond_frame_num=-1 if memory.max_conditioning is None else memory.max_conditioning,
        enable_occlusion_spatial_embedding=memory.occlusion_embedding,
        enable_temporal_pos_encoding_for_object_pointers=memory.pointer_times,
        memory_attention_hidden_size=memory.width,
        memory_attention_num_layers=memory.layers,
        memory_attention_feed_forward_hidden_size=memory.mlp_width,
        memory_attention_rope_feat_sizes=[grid, grid],
        memory_encoder_hidden_size=memory.width,
        memory_encoder_output_channels=memory.memory_width,
        mask_downsampler_embed_dim=memory.width,
        memory_fuser_embed_dim=memory.width,
        memory_fuser_intermediate_dim=memory.fuser_hidden,
    )
    config._attn_implementation = "eager"
    return config


@cache
def reference(release: str, wide: bool = False) -> Any:
    """The small model of a release with drawn weights, in float32, or in float64 as the measure of both."""
    heads = small_heads(release)
    model = Sam(sam_config(heads)) if heads.memory is None else Sam2VideoModel(sam2_config(heads))
    draw_weights(model, seed=3)
    return model.eval().to(torch.float64 if wide else torch.float32)


@cache
def parameters(release: str) -> dict[str, Any]:
    """The small model's weights as our parameters, by module."""
    state = {name: value.numpy() for name, value in reference(release).state_dict().items()}
    return tree_of(table(small_heads(release)), state)


def tree_of(table: Table, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our tree from arrays under the reference's names; what belongs to the image encoder is left aside."""
    left = {name for name in state if not name.startswith(("vision_encoder.", "shared_image_embedding."))}
    leaves = {path: np.zeros(shape, np.float64) for path, shape in table.flax_shapes.items()}
    for move in table.moves:
        corner = zip(move.start, move.shape, strict=True)
        leaves[move.path][tuple(slice(start, start + size) for start, size in corner)] = move.to_flax(state[move.name])
        left.discard(move.name)
    assert not left, f"left over: {sorted(left)}"
    return unflatten({path: jnp.asarray(value, jnp.float32) for path, value in leaves.items()})


def table(heads: HeadsConfig) -> Table:
    """All tensors of these heads."""
    return Table(*heads_rules(heads))


IMAGES, OBJECTS, SLOTS = 2, 3, 4
"""Of prompts in tests: points have four slots beside the corners of a box."""


@dataclass(frozen=True)
class Prompts:
    """Prompts of objects on images, as far as they have any; places in pixels."""

    points: np.ndarray | None = None
    """(images, objects, points, 2)."""
    labels: np.ndarray | None = None
    boxes: np.ndarray | None = None
    """(images, objects, 4)."""
    masks: np.ndarray | None = None
    """(images, side, side): the reference takes one an image."""

    def for_reference(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the reference's prompt encoder; like its own model it makes "no prompt" an empty point."""
        points, labels = self.points, self.labels
        if points is None and self.boxes is None:
            points, labels = np.zeros((IMAGES, OBJECTS, 1, 2)), np.full((IMAGES, OBJECTS, 1), NOT_A_POINT)
        return {
            "input_points": None if points is None else torch.tensor(points, dtype=dtype),
            "input_labels": None if labels is None else torch.tensor(labels),
            "input_boxes": None if self.boxes is None else torch.tensor(self.boxes, dtype=dtype),
            "input_masks": None if self.masks is None else torch.tensor(self.masks, dtype=dtype)[:, None],
        }

    def ours(self, slots: int = SLOTS) -> dict[str, Any]:
        """Arguments of our prompt encoder, always of the same shape: what a prompt does not have is padding."""
        shape, points, labels = (IMAGES, OBJECTS), self.points, self.labels
        if points is None:
            empty = 0 if self.boxes is not None else 1
            points, labels = np.zeros((*shape, empty, 2)), np.full((*shape, empty), NOT_A_POINT)
        extra = ((0, 0), (0, 0), (0, slots - points.shape[2]))
        points = jnp.asarray(np.pad(points, (*extra, (0, 0)), constant_values=77.0), jnp.float32)
        labels = jnp.asarray(np.pad(labels, extra, constant_values=ABSENT))
        corners = np.full((*shape, 4), 55.0) if self.boxes is None else self.boxes
        has_box = jnp.full(shape, self.boxes is not None)
        points, labels = with_boxes(points, labels, jnp.asarray(corners, jnp.float32), has_box)
        masks = np.full((IMAGES, 4 * GRID, 4 * GRID), 33.0) if self.masks is None else self.masks
        return {
            "points_px": points,
            "labels": labels,
            "masks": jnp.asarray(np.broadcast_to(masks[:, None], (*shape, *masks.shape[1:])), jnp.float32),
            "has_mask": jnp.full(shape, self.masks is not None),
        }


KINDS = ("points", "box", "points and box", "mask", "points and mask", "nothing")


def random_prompts(kind: str) -> Prompts:
    """Prompts of a kind; clicks of both labels, and some places outside the picture."""
    rng = np.random.default_rng(len(kind))
    shape, side = (IMAGES, OBJECTS), GRID * STRIDE
    boxes = np.sort(rng.uniform(0, side, (*shape, 2, 2)), axis=2).reshape(*shape, 4)
    return Prompts(
        points=rng.uniform(-10, side + 10, (*shape, 2, 2)) if "points" in kind else None,
        labels=rng.permuted(np.tile([0, 1], (*shape, 1)), axis=-1) if "points" in kind else None,
        boxes=boxes if "box" in kind else None,
        masks=rng.standard_normal((IMAGES, 4 * GRID, 4 * GRID)) * 4 if "mask" in kind else None,
    )


def inert_tensors(
    release: str,
    prefixes: Sequence[str],
    ours: Callable[[dict[str, Any]], Sequence[Any]],
    theirs: Callable[[Any], Sequence[Any]],
) -> set[str]:
    """Perturb every tensor of the reference whose name has one of the prefixes, and the same in our parameters.

    Args:
        release: whose small models.
        prefixes: of names.
        ours: our outputs from parameters.
        theirs: the same of the reference, from the model in float64.

    Returns:
        The tensors that move no output, of neither.

    Raises:
        AssertionError: outputs that move differently.
    """
    model, heads, rng = reference(release, True), table(small_heads(release)), np.random.default_rng(13)
    state, leaves = model.state_dict(), flatten(parameters(release))
    before, inert, worst = [_numpy(x) for x in theirs(model)], set(), ("", 0.0)
    names = [name for name in heads.by_name if name.startswith(tuple(prefixes))]
    for name in names:
        tensor = state[name]
        kept = tensor.clone()
        noise = torch.tensor(rng.standard_normal(tuple(tensor.shape)))
        tensor.add_(noise, alpha=0.1 * float(kept.square().mean().sqrt()))
        after = [_numpy(x) for x in theirs(model)]
        changed = dict(leaves)
        for move in heads.by_name[name]:
            corner = zip(move.start, move.shape, strict=True)
            changed[move.path] = np.array(changed[move.path])
            changed[move.path][tuple(slice(start, start + size) for start, size in corner)] = move.to_flax(
                tensor.numpy()
            )
        tensor.copy_(kept)
        found = ours(unflatten(changed))
        worst = max(
            [worst, *((name, error(x, y)) for x, y in zip(found, after, strict=True))], key=lambda pair: pair[1]
        )
        moved = max(error(x, y) for x, y in zip(after, before, strict=True))
        if moved < 1e-6:
            inert.add(name)
        else:
            assert moved > 10 * MODULE, (name, moved)
    print(f"{len(names)} tensors perturbed: largest error {worst[1]:.1e}, with {worst[0]}")
    assert worst[1] <= MODULE, worst
    return inert


def _numpy(x: Any) -> np.ndarray:
    return x.detach().double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float64)
