"""SAM's image encoder against the reference's, module by module and whole, at the trained size and at others."""

import copy
import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.vision.sam_reference import (
    arrays_of,
    channels_first,
    channels_last,
    draw_weights,
    error,
    mapped_shapes,
    reference_vit,
    shapes_in,
    shown,
    vit_params,
)
from tracevision_jax.errors import UserError
from tracevision_jax.vision.sam_config import SAM_VIT_PRESETS, SamVitConfig
from tracevision_jax.vision.sam_vit import SamAttention, SamBlock, SamNeck, SamVitEncoder
from tracevision_jax.weights.sam_vision_rules import vit_rules

MODULE, ENCODER = 1e-5, 1e-5
"""Largest relative errors, Frobenius, float32."""

SMALL = SamVitConfig(
    width=32, heads=2, groups=2, window_blocks=2, patch=8, image_size=80, window=4, out_width=24
)  # fmt: skip
"""Maps of 10 x 10 patches: windows of 4 are filled up to 12."""


@cache
def models():
    """(reference in float32 and float64, our parameters)."""
    model = reference_vit(SMALL)
    draw_weights(model, seed=1)
    return model, copy.deepcopy(model).double(), vit_params(arrays_of(model), SMALL)


@cache
def encode(config: SamVitConfig = SMALL):
    """Our encoder, compiled."""
    return jax.jit(lambda params, pixels: SamVitEncoder(config).apply({"params": params}, pixels))


def answers(model, pixels) -> np.ndarray:
    """A reference's embeddings, in float64."""
    with torch.no_grad():
        dtype = next(model.parameters()).dtype
        return channels_last(model(channels_first(pixels, dtype)).last_hidden_state)


def test_each_module_equals_the_reference(rng):
    model, wide, params = models()
    maps = rng.standard_normal((3, 10, 10, SMALL.width)).astype(np.float32)
    oblong = rng.standard_normal((2, 5, 8, SMALL.width)).astype(np.float32)
    first = jax.tree.map(lambda leaf: leaf[1, 0], params["groups"]["window"])  # layer 3
    last = jax.tree.map(lambda leaf: leaf[1], params["groups"]["full"])  # layer 5

    def ours(module, tree, x):
        y = jax.jit(module.apply)({"params": tree}, x)
        return y[0] if isinstance(y, tuple) else y

    cases = {
        "attention over a map of another shape": (
            ours(SamAttention(SMALL, 10), last["attn"], oblong),
            lambda reference, x: reference.layers[5].attn(x)[0],
            oblong,
        ),
        "window block": (ours(SamBlock(SMALL, 4), first, maps), lambda reference, x: reference.layers[3](x), maps),
        "global block": (ours(SamBlock(SMALL, 0), last, maps), lambda reference, x: reference.layers[5](x), maps),
        "neck": (
            ours(SamNeck(SMALL), params["neck"], maps),
            lambda reference, x: reference.neck(x).permute(0, 2, 3, 1),
            maps,
        ),
    }
    for name, (found, theirs, x) in cases.items():
        with torch.no_grad():
            narrow, exact = theirs(model, torch.tensor(x)).numpy(), theirs(wide, torch.tensor(x).double()).numpy()
        assert shown(name, error(found, exact), error(narrow, exact)) <= MODULE


def test_the_encoder_equals_the_reference(rng):
    model, wide, params = models()
    pixels = rng.standard_normal((2, 80, 80, 3)).astype(np.float32)
    exact = answers(wide, pixels)
    assert shown("encoder", error(encode()(params, pixels), exact), error(answers(model, pixels), exact)) <= ENCODER


@pytest.mark.parametrize("side", [56, 96])
def test_pictures_of_another_size_get_resized_positions(rng, side):
    """The reference resizes relative positions itself; absolute ones are resized for it by PyTorch."""
    model, _, params = models()
    other = reference_vit(dataclasses.replace(SMALL, image_size=side)).double()
    state = {name: value.double() for name, value in model.state_dict().items()}
    grid = side // SMALL.patch
    learned = state["pos_embed"].permute(0, 3, 1, 2)
    state["pos_embed"] = F.interpolate(learned, (grid, grid), mode="bicubic").permute(0, 2, 3, 1)
    for name, value in state.items():
        if "rel_pos" in name:
            owner, _, last = name.rpartition(".")
            setattr(other.get_submodule(owner), last, torch.nn.Parameter(value))
    other.load_state_dict(state)
    pixels = rng.standard_normal((1, side, side, 3)).astype(np.float32)
    assert shown(f"{side} px", error(encode()(params, pixels), answers(other, pixels)), 0.0) <= ENCODER


def test_every_tensor_matters_as_it_does_in_the_reference(rng):
    model, _, _ = models()
    pixels = rng.standard_normal((1, 80, 80, 3)).astype(np.float32)
    picture, state, run = jnp.asarray(pixels), arrays_of(model), encode(SMALL)
    before, changed = answers(model, pixels), copy.deepcopy(model)
    for name, value in state.items():
        moved = value + value.std() * rng.standard_normal(value.shape).astype(np.float32)
        changed.load_state_dict({name: torch.tensor(moved)}, strict=False)
        theirs = answers(changed, pixels)
        changed.load_state_dict({name: torch.tensor(value)}, strict=False)
        assert error(theirs, before) > 100 * ENCODER, name
        assert error(run(vit_params({**state, name: moved}, SMALL), picture), theirs) <= ENCODER, name


def test_key_biases_alone_change_nothing_and_lie_where_keys_are(rng):
    """A term that is the same for all keys of a query leaves its softmax as it is; filled windows have it, too."""
    model, _, params = models()
    pixels = rng.standard_normal((2, 80, 80, 3)).astype(np.float32)
    name, keys = "layers.3.attn.qkv.bias", slice(SMALL.width, 2 * SMALL.width)
    state = arrays_of(model)
    moved = state[name].copy()
    moved[keys] += 1
    other = vit_params({**state, name: moved}, SMALL)
    assert error(encode()(other, pixels), encode()(params, pixels)) < 1e-5
    bias = other["groups"]["window"]["attn"]["qkv"]["bias"][1, 0]
    np.testing.assert_array_equal(bias[1].reshape(-1), moved[keys])


def test_bfloat16_is_as_exact_as_the_references(rng):
    model, wide, params = models()
    pixels = rng.standard_normal((2, 80, 80, 3)).astype(np.float32)
    exact = answers(wide, pixels)
    config = dataclasses.replace(SMALL, dtype="bfloat16", param_dtype="bfloat16")
    rounded = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)
    ours = encode(config)(rounded, pixels)
    assert ours.dtype == jnp.bfloat16
    theirs = error(answers(copy.deepcopy(model).bfloat16(), pixels), exact)
    assert shown("bfloat16", error(ours, exact), theirs) <= 1.5 * theirs


@pytest.mark.parametrize(("name", "parameters"), [("b", 89_670_912), ("l", 308_278_272), ("h", 637_026_048)])
def test_released_sizes_have_the_references_names_shapes_and_count(name, parameters):
    config = SAM_VIT_PRESETS[name]
    pixels = jax.ShapeDtypeStruct((1, 1024, 1024, 3), jnp.float32)
    embedding, variables = jax.eval_shape(SamVitEncoder(config).init_with_output, jax.random.key(0), pixels)
    assert embedding.shape == (1, 64, 64, 256)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) == parameters
    with torch.device("meta"):
        reference = reference_vit(config)
    assert mapped_shapes(vit_rules, reference, config) == shapes_in(variables["params"])


def test_global_blocks_of_the_released_sizes_are_the_last_of_their_groups():
    published = {"b": (2, 5, 8, 11), "l": (5, 11, 17, 23), "h": (7, 15, 23, 31)}
    for name, config in SAM_VIT_PRESETS.items():
        size = config.window_blocks + 1
        assert tuple(range(size - 1, config.depth, size)) == published[name]


@cache
def gradients(remat: str):
    """(gradient of a loss on a small picture, lowered; parameters)."""
    config = dataclasses.replace(SMALL, groups=1, window_blocks=3, image_size=64, remat=remat)
    encoder, pixels = SamVitEncoder(config), jax.random.normal(jax.random.key(0), (1, 64, 64, 3))
    shapes, rng = jax.eval_shape(encoder.init, jax.random.key(0), pixels), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype), shapes)

    def loss(params):
        return jnp.square(encoder.apply(params, pixels)[:, :2]).mean()

    return jax.jit(jax.grad(loss)).lower(params), params


def test_remat_policies_recompute_nothing_some_and_most():
    none, dots, full = (gradients(remat)[0].cost_analysis()["flops"] for remat in ("none", "dots", "full"))
    assert 1.05 * none < dots and 1.05 * dots < full


def test_remat_changes_no_gradient_and_saves_memory():
    plain, params = gradients("none")
    again, _ = gradients("full")
    plain, again = plain.compile(), again.compile()
    ours, theirs = again(params), plain(params)
    assert max(jax.tree.leaves(jax.tree.map(error, ours, theirs))) <= MODULE
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(ours))
    assert again.memory_analysis().temp_size_in_bytes < 0.6 * plain.memory_analysis().temp_size_in_bytes


def test_pictures_and_sizes_that_do_not_fit_are_refused():
    for shape, message in (((1, 80, 84, 3), "80 x 84 px and 3 channels"), ((1, 80, 80, 4), "4 channels")):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(SamVitEncoder(SMALL).init, jax.random.key(0), jnp.zeros(shape))
    for change in ({"heads": 3}, {"image_size": 81}, {"window_blocks": 0}, {"remat": "some"}):
        with pytest.raises(UserError):
            dataclasses.replace(SMALL, **change)
