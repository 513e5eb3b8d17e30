"""The light pixel decoder: its size at the paper's configuration, its shapes, and that all of its inputs matter."""

import dataclasses
import functools

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tracevision_jax.errors import UserError
from tracevision_jax.segmentation.pixel_decoder import Doubling, PixelDecoder, PixelDecoderConfig, count_parameters

CONFIG = PixelDecoderConfig(
    visual_width=12, text_width=10, width=16, heads=2, mlp_width=24, token_hidden=14, grid=3, fine_upsamplings=2
)
MASKS, FRAMES = 3, 2


def inputs(config: PixelDecoderConfig = CONFIG, seed: int = 0) -> dict[str, jax.Array]:
    random = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(random.normal(size=shape), jnp.float32)

    return {
        "deep": draw(1, FRAMES, config.grid, config.grid, config.visual_width),
        "shallow": draw(1, FRAMES, 2 * config.grid, 2 * config.grid, config.visual_width),
        "seg": draw(1, MASKS, 6, config.text_width),
        "frame": jnp.asarray([[0, 1, 0]]),
    }


@functools.cache
def drawn(config: PixelDecoderConfig = CONFIG):
    random = np.random.default_rng(1)
    shapes = jax.eval_shape(PixelDecoder(config).init, jax.random.key(0), **inputs(config))["params"]

    def draw(leaf):
        scale = np.prod(leaf.shape[:-1]) ** -0.5 if leaf.ndim > 1 else 0.3
        return jnp.asarray(random.standard_normal(leaf.shape) * scale + (leaf.ndim == 1), leaf.dtype)

    return jax.tree.map(draw, shapes)


@functools.cache
def applied(config: PixelDecoderConfig = CONFIG):
    return jax.jit(lambda params, given: PixelDecoder(config).apply({"params": params}, **given))


def run(given) -> np.ndarray:
    return np.asarray(applied()(drawn(), given))


def test_the_decoder_has_the_papers_size():
    """App. F: 12 M parameters, masks of 256 x 256, at the widths of Qwen2.5-VL-7B."""
    config = PixelDecoderConfig()
    assert (config.visual_width, config.text_width, config.mask_size, config.layers) == (1280, 3584, 256, 2)
    count = count_parameters(config)
    print(f"pixel decoder: {count:,} parameters at the paper's size")
    assert 9_000_000 < count <= 12_500_000


@pytest.mark.parametrize(("grid", "upsamplings", "size"), [(3, 0, 6), (3, 1, 12), (4, 2, 32)])
def test_masks_have_the_size_that_the_configuration_says(grid, upsamplings, size):
    config = dataclasses.replace(CONFIG, grid=grid, fine_upsamplings=upsamplings)
    assert config.mask_size == size
    shapes = jax.eval_shape(PixelDecoder(config).init_with_output, jax.random.key(0), **inputs(config))[0]
    assert shapes.shape == (1, MASKS, size, size) and shapes.dtype == jnp.float32


def test_masks_are_float32_when_it_computes_in_bfloat16():
    decoder = PixelDecoder(CONFIG, jnp.bfloat16, jnp.float32)
    masks, params = jax.eval_shape(decoder.init_with_output, jax.random.key(0), **inputs())
    assert masks.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("slot", range(6))
def test_every_codebook_token_matters(slot):
    given = inputs()
    other = given | {"seg": given["seg"].at[:, :, slot].add(1.0)}
    assert np.abs(run(other) - run(given)).max() > 1e-2


@pytest.mark.parametrize("depth", ["deep", "shallow"])
def test_both_visual_depths_matter_at_every_cell(depth):
    given = inputs()
    gradient = jax.grad(lambda x: (applied()(drawn(), given | {depth: x}) ** 2).sum())(given[depth])
    assert np.abs(gradient).sum(-1).min() > 1e-6


def test_the_coarse_mask_guides_the_fine_scale():
    """The deep features reach the mask through the fine scale as well: with fusion taking the fine mask alone."""
    params, given = drawn(), inputs()
    fine_only = params | {"fusion": jnp.asarray([0.0, 1.0])}
    other = given | {"deep": given["deep"] * -1}
    assert np.abs(applied()(fine_only, given) - applied()(fine_only, other)).max() > 1e-3
    coarse_only = params | {"fusion": jnp.asarray([1.0, 0.0])}
    moved = given | {"shallow": given["shallow"] * -1}
    assert (applied()(coarse_only, given) == applied()(coarse_only, moved)).all()


def test_a_mask_is_made_on_the_frame_that_it_names():
    given = inputs()
    moved = given | {"frame": 1 - given["frame"], **{name: given[name][:, ::-1] for name in ("deep", "shallow")}}
    assert np.allclose(run(moved), run(given), atol=1e-5)
    assert np.abs(run(given | {"frame": 1 - given["frame"]}) - run(given)).max() > 1e-2


def test_doubling_is_the_transposed_convolution():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 4)), jnp.float32)
    layer = Doubling(6, jnp.float32, jnp.float32)
    params = layer.init(jax.random.key(0), x)["params"] | {"bias": jnp.arange(6.0)}
    flipped = params | {"kernel": params["kernel"][::-1, ::-1]}
    reference = flax.linen.ConvTranspose(6, (2, 2), (2, 2)).apply({"params": flipped}, x)
    assert np.allclose(layer.apply({"params": params}, x), reference, atol=1e-5)


def test_masks_do_not_see_each_other():
    given = inputs()
    alone = given | {"seg": given["seg"][:, 1:2], "frame": given["frame"][:, 1:2]}
    among_others, by_itself = np.asarray(run(given)[0, 1]), np.asarray(run(alone)[0, 0])
    assert np.linalg.norm(by_itself - among_others) <= 1e-5 * np.linalg.norm(among_others)


def test_the_mask_moves_with_the_picture():
    """Features that single out one corner give masks that differ there: the grid is not transposed or flipped."""
    given = inputs()
    flat = given | {name: jnp.zeros_like(given[name]) for name in ("deep", "shallow")}
    lit = flat | {"shallow": flat["shallow"].at[:, :, 0, -1].set(given["shallow"][:, :, 0, -1] * 3)}
    change = np.abs(run(lit) - run(flat))[0, 0]
    quarter = CONFIG.mask_size // 6
    peak = np.unravel_index(change.argmax(), change.shape)
    assert peak[0] < 2 * quarter and peak[1] >= CONFIG.mask_size - 2 * quarter, peak


def test_every_parameter_has_a_gradient():
    given = inputs()
    gradient = jax.grad(lambda params: (applied()(params, given) ** 2).sum())(drawn())
    silent = [
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
        # A bias added to all keys changes no softmax.
        if np.abs(leaf).max() < 1e-7 and "['k']['bias']" not in jax.tree_util.keystr(path)
    ]
    assert silent == []


def test_sizes_that_do_not_fit_each_other_are_refused():
    with pytest.raises(UserError, match="3 heads must divide half of it"):
        PixelDecoderConfig(width=16, heads=3)
    with pytest.raises(UserError, match="and 8 all of it"):
        PixelDecoderConfig(width=12, heads=2, fine_upsamplings=2)
