"""Rules of the image encoders of SAM and SAM 2, with the names of `transformers` (SamModel, Sam2VideoModel).

    table = Table(*vit_rules(SAM_VIT_PRESETS["h"]))          # or hiera_rules(HIERA_PRESETS["large"])

Blocks of SAM's ViT stand in groups, the window blocks and then the global one; those of Hiera, all of other sizes,
stand alone.
"""

from tracevision_jax.vision.sam_config import HieraConfig, SamVitConfig
from tracevision_jax.weights.engine import Rule
from tracevision_jax.weights.layer_rules import (
    Layers,
    conv,
    conv_pattern,
    linear,
    norm,
    pointwise,
    pointwise_pattern,
    weight_and_bias,
)

THEIRS, OURS = "vision_encoder.", "vision_encoder/"
HIERA_PATCH = 7
"""Side of the first convolution of Hiera, pixels."""

Rules = tuple[list[Rule], dict[str, int]]
"""Rules and the lengths of their axes."""


def encoder_rules(config: SamVitConfig | HieraConfig, theirs: str = THEIRS, ours: str = OURS) -> Rules:
    """Those of either encoder, see `vit_rules` and `hiera_rules`."""
    return vit_rules(config, theirs, ours) if isinstance(config, SamVitConfig) else hiera_rules(config, theirs, ours)


def vit_rules(config: SamVitConfig, theirs: str = THEIRS, ours: str = OURS) -> Rules:
    """All tensors of SAM's ViT; prefixes of the names on both sides may be empty."""
    sizes = {
        "one": 1,
        "uno": 1,
        "qkv": 3,
        "colours": config.channels,
        "patch_row": config.patch,
        "patch_column": config.patch,
        "vit_width": config.width,
        "vit_heads": config.heads,
        "vit_head_dim": config.head_dim,
        "vit_mlp": config.mlp_ratio * config.width,
        "grid_row": config.grid,
        "grid_column": config.grid,
        "window_span": 2 * config.window - 1,
        "global_span": 2 * config.grid - 1,
        "map_width": config.out_width,
        "map_in": config.out_width,
        "three": 3,
        "tres": 3,
    }
    patches = ("vit_width", "colours", "patch_row", "patch_column")
    rules = [
        *conv(f"{theirs}patch_embed.projection", f"{ours}patch_embed", *patches),
        Rule(
            f"{theirs}pos_embed",
            f"{ours}pos_embed",
            "one grid_row grid_column vit_width -> (one grid_row) grid_column vit_width",
        ),
        Rule(f"{theirs}neck.conv1.weight", f"{ours}neck/conv1/kernel", pointwise_pattern("map_width", "vit_width")),
        Rule(
            f"{theirs}neck.conv2.weight",
            f"{ours}neck/conv2/kernel",
            conv_pattern("map_width", "map_in", "three", "tres"),
        ),
        *norm(f"{theirs}neck.layer_norm1", f"{ours}neck/layer_norm1", "map_width"),
        *norm(f"{theirs}neck.layer_norm2", f"{ours}neck/layer_norm2", "map_width"),
    ]
    size = config.window_blocks + 1
    places = [divmod(number, size) for number in range(config.depth)]
    window: Layers = {(n,): (group, place) for n, (group, place) in enumerate(places) if place < size - 1}
    full: Layers = {(n,): (group,) for n, (group, place) in enumerate(places) if place == size - 1}
    for kind, layers, span in (("window", window, "window_span"), ("full", full, "global_span")):
        rules += _vit_block_rules(f"{theirs}layers.{{}}.", f"{ours}groups/{kind}/", layers, span)
    return rules, sizes


def _vit_block_rules(theirs: str, ours: str, layers: Layers, span: str) -> list[Rule]:
    width = "vit_width"
    return [
        *_block_rules(theirs, ours, (width, width), "vit_heads", "vit_head_dim", layers),
        *linear(f"{theirs}mlp.lin1", f"{ours}mlp/proj_in", "vit_mlp", width, layers),
        *linear(f"{theirs}mlp.lin2", f"{ours}mlp/proj_out", width, "vit_mlp", layers),
        *(
            Rule(f"{theirs}attn.{name}", f"{ours}attn/{name}", f"{span} vit_head_dim -> {span} vit_head_dim", layers)
            for name in ("rel_pos_h", "rel_pos_w")
        ),
    ]


def _block_rules(
    theirs: str, ours: str, widths: tuple[str, str], heads: str, head_dim: str, layers: Layers | None = None
) -> list[Rule]:
    """Norms and attention, which blocks of both encoders have; `widths` are those of the input and of the output."""
    inner, out = widths
    qkv, joined = f"qkv {heads} {head_dim}", f"{heads} {head_dim}"
    weight, bias = f"({qkv}) {inner} -> {inner} {qkv}", f"({qkv}) -> {qkv}"
    return [
        *norm(f"{theirs}layer_norm1", f"{ours}layer_norm1", inner, layers),
        *norm(f"{theirs}layer_norm2", f"{ours}layer_norm2", out, layers),
        *weight_and_bias(f"{theirs}attn.qkv", f"{ours}attn/qkv", weight, bias, layers),
        *weight_and_bias(
            f"{theirs}attn.proj", f"{ours}attn/proj", f"{out} ({joined}) -> {joined} {out}", f"{out} -> {out}", layers
        ),
    ]


def hiera_rules(config: HieraConfig, theirs: str = THEIRS, ours: str = OURS) -> Rules:
    """All tensors of Hiera and its pyramid; prefixes of the names on both sides may be empty."""
    stages = range(len(config.blocks))
    sizes = {
        "one": 1,
        "uno": 1,
        "qkv": 3,
        "colours": config.channels,
        "patch_row": HIERA_PATCH,
        "patch_column": HIERA_PATCH,
        "hiera_head_dim": config.width // config.heads,
        "grid_row": config.background,
        "grid_column": config.background,
        "window_row": config.windows[0],
        "window_column": config.windows[0],
        "pyramid": config.fpn_width,
    }
    for stage in stages:
        width = config.stage_width(stage)
        sizes |= {f"stage{stage}": width, f"heads{stage}": config.heads * 2**stage}
        sizes[f"mlp{stage}"] = config.mlp_ratio * width
    patches = ("stage0", "colours", "patch_row", "patch_column")
    rules = list(conv(f"{theirs}backbone.patch_embed.projection", f"{ours}backbone/patch_embed", *patches))
    for name, row, column in (
        ("pos_embed", "grid_row", "grid_column"),
        ("pos_embed_window", "window_row", "window_column"),
    ):
        pattern = f"one stage0 {row} {column} -> (one {row}) {column} stage0"
        rules.append(Rule(f"{theirs}backbone.{name}", f"{ours}backbone/{name}", pattern))
    stage = 0
    for number, plan in enumerate(config.plan()):
        stage += plan.pools
        inner, out = f"stage{stage - plan.pools}", f"stage{stage}"
        block, name = f"{theirs}backbone.blocks.{number}.", f"{ours}backbone/blocks_{number}/"
        rules += _block_rules(block, name, (inner, out), f"heads{stage}", "hiera_head_dim")
        rules += linear(f"{block}mlp.proj_in", f"{name}mlp/proj_in", f"mlp{stage}", out)
        rules += linear(f"{block}mlp.proj_out", f"{name}mlp/proj_out", out, f"mlp{stage}")
        if plan.pools:
            rules += linear(f"{block}proj", f"{name}proj", out, inner)
    for number, stage in enumerate(reversed(stages)):
        rules += pointwise(f"{theirs}neck.convs.{number}", f"{ours}neck/convs_{number}", "pyramid", f"stage{stage}")
    return rules, sizes
