"""Resizing equals PyTorch's `interpolate`, for every kernel that the models use."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tracevision_jax.ops.interpolation import (
    double_nearest,
    resize_maps,
    resize_masks,
    resize_masks_on_host,
    resize_matrix,
    resize_rows,
    taps,
)

SIZES = (((7, 7), (256, 256)), ((14, 14), (64, 64)), ((64, 64), (32, 32)), ((9, 31), (20, 17)), ((1, 3), (4, 1)))
TOLERANCE = 2e-6


def torch_resize(masks: np.ndarray, size: tuple[int, int], mode: str, antialias: bool = False) -> np.ndarray:
    """PyTorch's answer, in float64 where nothing is antialiased (which it has in float32 only on some builds)."""
    values = torch.tensor(masks)[:, None].double()
    return F.interpolate(values, size, mode=mode, align_corners=False, antialias=antialias)[:, 0].numpy()


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_linear_and_cubic_resizing_equal_pytorchs(rng, source, target):
    masks = rng.standard_normal((3, *source)).astype(np.float32)
    maps = jnp.moveaxis(masks, 0, -1)
    for kernel, mode in (("linear", "bilinear"), ("cubic", "bicubic")):
        ours = jnp.moveaxis(resize_maps(maps, target, kernel), -1, 0)
        np.testing.assert_allclose(ours, torch_resize(masks, target, mode), rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize(("source", "target"), SIZES)
def test_masks_resize_alike_on_device_and_host(rng, source, target):
    masks = rng.standard_normal((3, *source)).astype(np.float32)
    expected = torch_resize(masks, target, "bilinear")
    for ours in (resize_masks(jnp.asarray(masks), target), resize_masks_on_host(masks, target)):
        np.testing.assert_allclose(ours, expected, rtol=TOLERANCE, atol=TOLERANCE)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_antialiased_masks_equal_pytorchs_at_any_size(height, width, new_height, new_width):
    masks = np.random.default_rng(height * 41 + width).standard_normal((2, height, width)).astype(np.float32)
    size = (new_height, new_width)
    rows, columns = (resize_matrix(a, b, antialias=True) for a, b in zip((height, width), size, strict=True))
    expected = torch_resize(masks, size, "bilinear", antialias=True)
    np.testing.assert_allclose(rows @ masks @ columns.T, expected, rtol=1e-5, atol=1e-5)


def test_antialiasing_reaches_the_masks(rng):
    masks = rng.standard_normal((2, 32, 32)).astype(np.float32)
    ours = resize_masks(jnp.asarray(masks), (8, 8), antialias=True)
    np.testing.assert_allclose(ours, torch_resize(masks, (8, 8), "bilinear", antialias=True), rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(ours) - torch_resize(masks, (8, 8), "bilinear")).max() > 0.1


def test_rows_of_a_table_resize_as_pytorchs_linear_mode(rng):
    table = rng.standard_normal((27, 5)).astype(np.float32)
    for size in (11, 27, 63):
        expected = F.interpolate(torch.tensor(table.T)[None].double(), size, mode="linear")[0].numpy().T
        np.testing.assert_allclose(resize_rows(jnp.asarray(table), size), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_doubling_repeats_each_place_as_pytorchs_nearest_does(rng):
    maps = rng.standard_normal((2, 3, 5, 4)).astype(np.float32)
    expected = F.interpolate(torch.tensor(maps).permute(0, 3, 1, 2), scale_factor=2.0, mode="nearest")
    np.testing.assert_array_equal(double_nearest(jnp.asarray(maps)), expected.permute(0, 2, 3, 1).numpy())


def test_weights_sum_to_one_so_that_a_flat_mask_stays_flat():
    for kernel, antialias in (("linear", False), ("cubic", False), ("linear", True)):
        for source, target in ((7, 256), (256, 7), (1, 5), (5, 1)):
            np.testing.assert_allclose(taps(source, target, kernel, antialias)[1].sum(1), 1, atol=1e-12)


def test_the_dtype_stays_and_the_sums_are_float32(rng):
    masks = jnp.asarray(rng.standard_normal((1, 16, 16)), jnp.bfloat16)
    resized = jax.jit(lambda x: resize_masks(x, (64, 64)))(masks)
    assert resized.dtype == jnp.bfloat16
    np.testing.assert_array_equal(resized, resize_masks(masks.astype(jnp.float32), (64, 64)).astype(jnp.bfloat16))


def test_resizing_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="an axis of 4 places cannot be resized to 0"):
        taps(4, 0)
    with pytest.raises(ValueError, match="linear kernel only"):
        taps(8, 4, "cubic", antialias=True)
