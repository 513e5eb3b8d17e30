"""Tiled copies are copies."""

import ml_dtypes
import numpy as np
import pytest

from tracevision_jax.weights.copying import contiguous, copy_into


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (5,), (0, 3), (300, 700), (2, 300, 3, 270), (1, 513, 1, 257)])
def test_every_transposition_is_copied_exactly(rng, shape, dtype):
    array = rng.standard_normal(shape).astype(dtype)
    for shift in range(max(array.ndim, 1)):
        view = array.transpose(np.roll(np.arange(array.ndim), shift))
        copy = contiguous(view)
        assert copy.flags.c_contiguous and copy.dtype == view.dtype
        np.testing.assert_array_equal(copy, view)
        turned = np.zeros(view.shape, np.float64)
        copy_into(turned, view)
        np.testing.assert_array_equal(turned, view.astype(np.float64))


def test_what_is_in_order_is_not_copied():
    array = np.zeros((3, 4), np.float32)
    assert contiguous(array) is array
    assert contiguous(array, np.dtype(np.float64)).dtype == np.float64
