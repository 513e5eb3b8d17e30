"""The vision tower against the reference's, module by module and whole, and what padding may not do."""

from dataclasses import replace
from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.hosts.qwen25vl_reference import (
    RELEASED_LAYOUT,
    TINY,
    block_major_patches,
    error,
    make_prompt,
    numpy_of,
    pack,
    params_of,
    random_visual,
    reference_model,
)
from tracevision_jax.hosts.qwen25vl import Qwen25VLConfig
from tracevision_jax.layers.basic import GatedMLP, RMSNorm
from tracevision_jax.ops.rotary import axial_angles, planar_frequencies
from tracevision_jax.vision.config import QwenVisionConfig
from tracevision_jax.vision.qwen_vit import Merger, VisionAttention, VisionBlock, VisionTower
from tracevision_jax.vision.windows import raster_slots, raster_units

MODULE, TOWER = 1e-5, 1e-5
"""Largest relative errors, Frobenius, float32."""

SIZES = ((1, 26, 18, None), (1, 2, 2, None), (1, 12, 34, None), (3, 16, 16, 1.0), (1, 10, 6, None))
"""Temporal patches, rows, columns, seconds of a video: partial, whole and less than whole windows."""


@cache
def models(name: str):
    """(configuration, reference tower in float32 and float64, our parameters)."""
    raw = {"tiny": TINY, "released layout": RELEASED_LAYOUT}[name]
    config = Qwen25VLConfig.from_hf(raw)
    full = reference_model(raw, seed=1)
    wide = reference_model(raw, seed=1, dtype=torch.float64)
    return config, full.model.visual, wide.model.visual, params_of(full, config)["vision"]


def block_of(params, group: int, place: str):
    """Parameters of one block: place is "window" (the group's first) or "full"."""
    index = (group, 0) if place == "window" else (group,)
    return {"params": jax.tree.map(lambda x: x[index], params["groups"][place])}


def as_in(model, values) -> torch.Tensor:
    """Values in the number type of a reference model."""
    return torch.tensor(values, dtype=next(model.parameters()).dtype)


def shown(name: str, ours: float, floor: float) -> float:
    """Our error, printed beside the reference's own, float32 against float64."""
    print(f"{name}: error {ours:.1e}, floor {floor:.1e}")
    return ours


def test_each_module_equals_the_reference(rng):
    config, tower, wide, params = models("tiny")
    v = config.vision
    states = rng.standard_normal((24, v.width)).astype(np.float32)
    patches = rng.standard_normal((24, v.patch_dim)).astype(np.float32)
    row, col = np.mgrid[:4, :6].reshape(2, -1)
    places = np.stack([row, col], axis=-1)

    def rotary(model, values):
        tables = model.rotary_pos_emb(values, torch.tensor(places))
        return {"cu_seqlens": torch.tensor([0, 24]), "position_embeddings": tables}

    angles = axial_angles(jnp.asarray(places), planar_frequencies(v.head_dim, v.rope_theta))[None]
    ones, x = jnp.ones((1, 24), jnp.int32), jnp.asarray(states)[None]
    block = block_of(params, 1, "full")
    attention = {"params": block["params"]["attn"]}
    embed = {"params": params["patch_embed"]}
    norm, mlp = ({"params": block["params"][name]} for name in ("norm1", "mlp"))
    full = (jnp.float32, jnp.float32)
    cases = {
        "patch embedding": (
            nn.Dense(v.width, use_bias=False).apply(embed, patches),
            lambda model: model.patch_embed(torch.tensor(patches)),
        ),
        "norm": (
            RMSNorm(v.norm_eps, *full).apply(norm, x)[0],
            lambda model: model.blocks[3].norm1(as_in(model, states)),
        ),
        "attention": (
            VisionAttention(v).apply(attention, x, angles, ones)[0],
            lambda model: model.blocks[3].attn(as_in(model, states), **rotary(model, as_in(model, states))),
        ),
        "mlp": (
            GatedMLP(v.mlp_width, True, ("sets", None), *full).apply(mlp, x)[0],
            lambda model: model.blocks[3].mlp(as_in(model, states)),
        ),
        "block": (
            VisionBlock(v).apply(block, x, angles, ones)[0][0],
            lambda model: model.blocks[3](as_in(model, states), **rotary(model, as_in(model, states))),
        ),
        "merger": (
            Merger(v).apply({"params": params["merger"]}, x)[0],
            lambda model: model.merger(as_in(model, states)),
        ),
    }
    for name, (ours, theirs) in cases.items():
        with torch.no_grad():
            narrow, exact = numpy_of(theirs(tower)), numpy_of(theirs(wide))
        assert shown(name, error(ours, exact), error(narrow, exact)) <= MODULE


@pytest.mark.parametrize("name", ["tiny", "released layout"])
def test_the_tower_equals_the_reference_on_odd_sizes(rng, name):
    config, tower, wide, params = models(name)
    v = config.vision
    visuals = [random_visual(rng, config, *size) for size in SIZES]
    cut = [block_major_patches(visual.pixels, config) for visual in visuals]
    pixels, grids = torch.tensor(np.concatenate([values for values, _ in cut])), [grid for _, grid in cut]
    with torch.no_grad():
        narrow, exact = (
            model(pixels.to(dtype), grid_thw=torch.tensor(grids), output_hidden_states=True)
            for model, dtype in ((tower, torch.float32), (wide, torch.float64))
        )
    ready = pack([make_prompt(rng, config, visuals, 1)], extra_frames=1, extra_windows=3)
    groups = tuple(range(1, v.groups + 1))
    units, hidden = jax.jit(lambda patches, grid: VisionTower(v).apply({"params": params}, patches, grid, groups))(
        ready["patches"], ready["grid"]
    )

    def in_raster_order(values, places_of, scale):
        frames = []
        for frame, (rows, cols) in enumerate(ready["grid"][0, :-1]):
            row, col = np.mgrid[: rows // scale, : cols // scale]
            places = places_of(row, col, cols, v.window_units, v.merge).reshape(-1)
            frames.append(np.asarray(values)[0, frame][places])
        return np.concatenate(frames)

    ours = in_raster_order(units, raster_units, v.merge)
    theirs, theirs_narrow = (numpy_of(x.pooler_output) for x in (exact, narrow))
    assert shown(f"{name} units", error(ours, theirs), error(theirs_narrow, theirs)) <= TOWER

    # The reference's hidden states lie in window order without padding; ours are put into that.
    order = []
    start = 0
    for rows, cols in ready["grid"][0, :-1]:
        row, col = np.mgrid[:rows, :cols]
        order.append(start + np.argsort(raster_slots(row, col, cols, v.window_units, v.merge).reshape(-1)))
        start += rows * cols
    order = np.concatenate(order)
    for group, state in zip(groups, hidden, strict=True):
        block = group * (v.window_blocks + 1)
        theirs, theirs_narrow = (numpy_of(x.hidden_states[block]) for x in (exact, narrow))
        found = error(in_raster_order(state, raster_slots, 1)[order], theirs)
        assert shown(f"{name} after group {group}", found, error(theirs_narrow, theirs)) <= TOWER


SMALL = QwenVisionConfig(
    out_width=12, width=16, heads=2, mlp_width=20, groups=2, window_blocks=1, patch=2, window_units=2
)


@cache
def small_tower(config=SMALL):
    """A compiled tower, drawn parameters, patches of noise, and a grid whose last frame is absent."""
    tower = VisionTower(config)
    grid = jnp.array([[[6, 8], [4, 4], [0, 0]]])
    patches = jax.random.normal(jax.random.key(1), (1, 3, 6, config.slots, config.patch_dim))
    apply = jax.jit(tower.apply, static_argnums=3)
    return apply, jax.jit(tower.init)(jax.random.key(0), patches, grid), patches, grid


def own_units(units, grid, config):
    """Units of all present frames, padding left out."""
    rows = []
    for frame, (height, width) in enumerate(np.asarray(grid[0])):
        row, col = np.mgrid[: height // config.merge, : width // config.merge]
        rows.append(
            np.asarray(units)[0, frame][raster_units(row, col, width, config.window_units, config.merge).reshape(-1)]
        )
    return np.concatenate(rows)


def test_more_windows_and_frames_never_change_a_unit():
    apply, params, patches, grid = small_tower()
    more = jnp.pad(patches, ((0, 0), (0, 2), (0, 5), (0, 0), (0, 0)), constant_values=3.0)
    longer = jnp.pad(grid, ((0, 0), (0, 2), (0, 0)))
    units, _ = apply(params, patches, grid)
    padded, _ = apply(params, more, longer)
    np.testing.assert_allclose(own_units(padded, grid, SMALL), own_units(units, grid, SMALL), rtol=1e-5, atol=1e-6)


def test_frames_do_not_see_each_other_but_see_all_of_themselves():
    apply, params, patches, grid = small_tower()

    def changed(frame, window):
        units, _ = apply(params, patches, grid)
        moved, _ = apply(params, patches.at[0, frame, window].add(1.0), grid)
        return np.abs(np.asarray(moved - units))[0].max(-1)

    difference = changed(0, 3)  # the frame of 6 x 8 patches has windows 0..3
    assert (difference[1:] == 0).all()
    assert (difference[0, : 4 * 4].reshape(4, 2, 2)[:2] > 0).all()  # the whole windows of the first row


def test_gradients_are_finite_with_absent_frames_and_partial_windows():
    apply, params, patches, grid = small_tower()

    def loss(params, patches):
        units, (state,) = apply(params, patches, grid, (1,))
        return jnp.square(units[:, :2, :4]).sum() + state[:, 0, :1].sum()

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, patches)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    assert not np.asarray(gradients[1])[0, 2].any()


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_neither_tree_nor_gradients(remat):
    apply, params, patches, grid = small_tower()
    other, same_tree, *_ = small_tower(replace(SMALL, remat=remat))

    def gradients(apply):
        return jax.jit(jax.grad(lambda p: jnp.square(apply(p, patches, grid)[0][:, :2]).mean()))(params)

    def close(ours, theirs):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)

    assert jax.tree.map(jnp.shape, same_tree) == jax.tree.map(jnp.shape, params)
    jax.tree.map(close, gradients(other), gradients(apply))


def test_a_tower_without_window_blocks_attends_over_the_frame_everywhere():
    config = replace(SMALL, window_blocks=0)
    apply, params, patches, grid = small_tower(config)
    assert set(params["params"]["groups"]) == {"full"}
    units, _ = apply(params, patches, grid)
    moved, _ = apply(params, patches.at[0, 0, 3].add(1.0), grid)
    assert (np.abs(np.asarray(moved - units))[0, 0, :4].max(-1) > 0).all()


def test_arrays_that_are_not_the_towers_are_refused():
    apply, params, patches, grid = small_tower()
    with pytest.raises(ValueError, match="16 slots x 12 values; the tower has 16 x 24"):
        apply(params, patches[..., :12], grid)
    with pytest.raises(ValueError, match=r"groups 1\.\.2"):
        apply(params, patches, grid, (0,))
