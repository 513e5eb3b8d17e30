"""SAM 2's image encoder against the reference's: blocks of every kind, all maps, every released layout."""

import copy
import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.vision.sam_reference import (
    arrays_of,
    channels_first,
    channels_last,
    draw_weights,
    error,
    hiera_params,
    mapped_shapes,
    reference_hiera,
    shapes_in,
    shown,
)
from tracevision_jax.errors import UserError
from tracevision_jax.vision.hiera import FpnNeck, Hiera, HieraAttention, HieraBlock, Sam2ImageEncoder
from tracevision_jax.vision.sam_config import HIERA_PRESETS, HieraConfig
from tracevision_jax.weights.sam_vision_rules import hiera_rules

MODULE, ENCODER = 1e-5, 1e-5
"""Largest relative errors, Frobenius, float32."""

SMALL = HieraConfig(width=16, blocks=(1, 2, 3, 2), windows=(8, 4, 6, 3), global_blocks=(4,), fpn_width=24)
FEW = {"width": 16, "heads": 2, "blocks": (1, 1, 3, 2), "global_blocks": (3,), "fpn_width": 24}
LAYOUTS = {
    "small": (SMALL, 128),
    "tiny and base_plus": (HieraConfig(**FEW, background=14), 256),
    "large": (HieraConfig(**FEW, windows=(8, 4, 16, 8)), 192),
}
"""Windows of the released models, few blocks, and sides in pixels. In the first two the last two stages fill up their
windows as the released models do at 1024 px: inside the stages, and where the last one is entered."""


@cache
def models(name: str):
    """(reference in float32 and float64, our parameters)."""
    config, _ = LAYOUTS[name]
    model = reference_hiera(config)
    draw_weights(model, seed=1)
    return model, copy.deepcopy(model).double(), hiera_params(arrays_of(model), config)


@cache
def encode(config: HieraConfig):
    """Our encoder, compiled."""
    return jax.jit(lambda params, pixels: Sam2ImageEncoder(config).apply({"params": params}, pixels))


def answers(model, pixels) -> tuple[np.ndarray, ...]:
    """A reference's maps at strides 4, 8, 16 and the positions of the last, in float64."""
    with torch.no_grad():
        out = model(channels_first(pixels, next(model.parameters()).dtype))
    return (*map(channels_last, out.fpn_hidden_states), channels_last(out.fpn_position_encoding[2])[0])


def joined(maps) -> np.ndarray:
    """The three maps as one vector."""
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in maps[:3]])


def test_each_module_equals_the_reference(rng):
    model, wide, params = models("small")
    plans, blocks = SMALL.plan(), params["backbone"]
    cases = {}
    for name, number, side in (
        ("block that enters a stage", 1, 32),
        ("block in filled windows", 5, 8),
        ("block that enters the last stage, in filled windows", 6, 8),
    ):
        x = rng.standard_normal((2, side, side, plans[number].in_width)).astype(np.float32)
        ours = jax.jit(HieraBlock(SMALL, plans[number]).apply)({"params": blocks[f"blocks_{number}"]}, x)
        cases[name] = (ours, lambda reference, x, n=number: reference.backbone.blocks[n](x), x)
    x = rng.standard_normal((3, 6, 6, plans[6].in_width)).astype(np.float32)
    ours = jax.jit(HieraAttention(SMALL, plans[6]).apply)({"params": blocks["blocks_6"]["attn"]}, x)
    cases["attention of pooled queries"] = (ours, lambda reference, x: reference.backbone.blocks[6].attn(x), x)
    for name, (found, theirs, x) in cases.items():
        with torch.no_grad():
            narrow, exact = theirs(model, torch.tensor(x)).numpy(), theirs(wide, torch.tensor(x).double()).numpy()
        assert shown(name, error(found, exact), error(narrow, exact)) <= MODULE

    stages = tuple(
        rng.standard_normal((2, side, side, SMALL.stage_width(stage))).astype(np.float32)
        for stage, side in enumerate((16, 8, 4, 2))
    )
    maps = jax.jit(FpnNeck(SMALL).apply)({"params": params["neck"]}, stages)
    with torch.no_grad():
        narrow, exact = (
            [channels_last(x) for x in reference.neck([torch.tensor(x).to(dtype) for x in stages])[0][::-1]]
            for reference, dtype in ((model, torch.float32), (wide, torch.float64))
        )
    for stride, ours, theirs, rounded in zip((4, 8, 16), maps, exact, narrow, strict=False):
        assert shown(f"neck, stride {stride}", error(ours, theirs), error(rounded, theirs)) <= MODULE


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_encoder_equals_the_reference_in_every_released_layout(rng, name):
    (config, side), (model, wide, params) = LAYOUTS[name], models(name)
    pixels = rng.standard_normal((2, side, side, 3)).astype(np.float32)
    narrow, exact = answers(model, pixels), answers(wide, pixels)
    for field, ours, theirs, rounded in zip(
        ("stride4", "stride8", "stride16", "position"), encode(config)(params, pixels), exact, narrow, strict=True
    ):
        assert shown(f"{name}, {field}", error(ours, theirs), error(rounded, theirs)) <= ENCODER


def test_stages_and_pictures_of_another_size_equal_the_reference(rng):
    """The trunk's four stages, at a side for which nothing was configured."""
    model, wide, params = models("small")
    pixels = rng.standard_normal((1, 96, 96, 3)).astype(np.float32)
    stages = jax.jit(Hiera(SMALL).apply)({"params": params["backbone"]}, pixels)
    with torch.no_grad():
        narrow, exact = (
            reference.backbone(channels_first(pixels, dtype)).intermediate_hidden_states
            for reference, dtype in ((model, torch.float32), (wide, torch.float64))
        )
    for number, (ours, theirs, rounded) in enumerate(zip(stages, exact, narrow, strict=True)):
        assert shown(f"stage {number}", error(ours, theirs), error(rounded, theirs)) <= ENCODER


def test_every_tensor_matters_as_it_does_in_the_reference(rng):
    model, _, _ = models("small")
    pixels = rng.standard_normal((1, 64, 64, 3)).astype(np.float32)
    picture, state, run = jnp.asarray(pixels), arrays_of(model), encode(SMALL)
    before, changed = joined(answers(model, pixels)), copy.deepcopy(model)
    for name, value in state.items():
        moved = value + value.std() * rng.standard_normal(value.shape).astype(np.float32)
        changed.load_state_dict({name: torch.tensor(moved)}, strict=False)
        theirs = joined(answers(changed, pixels))
        changed.load_state_dict({name: torch.tensor(value)}, strict=False)
        assert error(theirs, before) > 100 * ENCODER, name
        assert error(joined(run(hiera_params({**state, name: moved}, SMALL), picture)), theirs) <= ENCODER, name


@pytest.mark.parametrize("number", [0, 1, 4, 6])
def test_key_biases_alone_change_nothing_and_lie_where_keys_are(rng, number):
    """A term that is the same for all keys of a query leaves its softmax as it is; filled windows have it, too."""
    model, _, params = models("small")
    pixels = rng.standard_normal((2, 128, 128, 3)).astype(np.float32)
    name, width = f"backbone.blocks.{number}.attn.qkv.bias", SMALL.plan()[number].out_width
    state = arrays_of(model)
    moved = state[name].copy()
    moved[width : 2 * width] += 1
    other = hiera_params({**state, name: moved}, SMALL)
    run = encode(SMALL)
    assert error(joined(run(other, pixels)), joined(run(params, pixels))) < 1e-5
    bias = other["backbone"][f"blocks_{number}"]["attn"]["qkv"]["bias"]
    np.testing.assert_array_equal(bias[1].reshape(-1), moved[width : 2 * width])


def test_bfloat16_is_as_exact_as_the_references(rng):
    model, wide, params = models("small")
    pixels = rng.standard_normal((2, 128, 128, 3)).astype(np.float32)
    exact = joined(answers(wide, pixels))
    narrow = dataclasses.replace(SMALL, dtype="bfloat16", param_dtype="bfloat16")
    ours = encode(narrow)(jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params), pixels)
    assert {x.dtype for x in ours} == {jnp.dtype(jnp.bfloat16)}
    theirs = error(joined(answers(copy.deepcopy(model).bfloat16(), pixels)), exact)
    assert shown("bfloat16", error(joined(ours), exact), theirs) <= 1.5 * theirs


RELEASED = {
    "tiny": (27_219_136, (1, 3, 10)),
    "small": (34_316_992, (1, 3, 14)),
    "base_plus": (69_106_816, (2, 5, 21)),
    "large": (212_703_280, (2, 8, 44)),
}
"""Parameters of the encoder, and the blocks that pool."""


@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_have_the_references_names_shapes_and_count(name):
    config = HIERA_PRESETS[name]
    parameters, pooling = RELEASED[name]
    pixels = jax.ShapeDtypeStruct((1, 1024, 1024, 3), jnp.float32)
    features, variables = jax.eval_shape(Sam2ImageEncoder(config).init_with_output, jax.random.key(0), pixels)
    assert [x.shape[-3:] for x in features] == [(256, 256, 256), (128, 128, 256), (64, 64, 256), (64, 64, 256)]
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters
    assert tuple(number for number, plan in enumerate(config.plan()) if plan.pools) == pooling
    with torch.device("meta"):
        reference = reference_hiera(config)
    assert mapped_shapes(hiera_rules, reference, config) == shapes_in(variables["params"])


@pytest.mark.parametrize("name", RELEASED)
def test_released_blocks_have_the_references_windows_and_pooling(name):
    config = HIERA_PRESETS[name]
    with torch.device("meta"):
        blocks = reference_hiera(config).backbone.blocks
    plans = [(plan.window, plan.pools, plan.heads, plan.in_width, plan.out_width) for plan in config.plan()]
    assert plans == [
        (block.window_size, block.query_stride is not None, block.attn.num_attention_heads, block.dim, block.dim_out)
        for block in blocks
    ]


@cache
def gradients(remat: str):
    """(gradient of a loss on a small picture, lowered; parameters)."""
    config = dataclasses.replace(SMALL, blocks=(1, 1, 1, 1), global_blocks=(), remat=remat)
    encoder, pixels = Sam2ImageEncoder(config), jax.random.normal(jax.random.key(0), (1, 64, 64, 3))
    shapes, rng = jax.eval_shape(encoder.init, jax.random.key(0), pixels), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)

    def loss(params):
        return sum(jnp.square(x[:, 1:]).mean() for x in encoder.apply(params, pixels)[:3])

    return jax.jit(jax.grad(loss)).lower(params), params


def test_remat_policies_recompute_nothing_some_and_most():
    none, dots, full = (gradients(remat)[0].cost_analysis()["flops"] for remat in ("none", "dots", "full"))
    assert 1.05 * none < dots and 1.05 * dots < full


def test_remat_changes_no_gradient_and_survives_compilation():
    """Memory is no witness here: XLA's CPU compiler orders unrolled blocks as it likes. Products that stay are."""
    plain, params = gradients("none")
    again, _ = gradients("full")
    plain, again = plain.compile(), again.compile()
    ours, theirs = again(params), plain(params)
    assert max(jax.tree.leaves(jax.tree.map(error, ours, theirs))) <= MODULE
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(ours))
    assert again.cost_analysis()["flops"] > 1.2 * plain.cost_analysis()["flops"]


def test_pictures_and_sizes_that_do_not_fit_are_refused():
    for shape, message in (((1, 64, 48, 3), "64 x 48 px.*multiples of 32 px"), ((1, 64, 64, 1), "1 channels")):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(Sam2ImageEncoder(SMALL).init, jax.random.key(0), jnp.zeros(shape))
    for change in (
        {"heads": 3}, {"windows": (8, 4, 7, 7)}, {"blocks": (1, 0, 1, 1)}, {"global_blocks": (8,)},
        {"fpn_width": 30}, {"remat": "some"},
    ):  # fmt: skip
        with pytest.raises(UserError):
            dataclasses.replace(SMALL, **change)
