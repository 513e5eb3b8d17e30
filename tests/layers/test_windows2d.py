"""Windows of a map: where places go, what fills them up, and the way back."""

import jax.numpy as jnp
import numpy as np
import pytest

from tracevision_jax.layers.windows2d import from_windows, to_windows


@pytest.mark.parametrize(("height", "width", "side"), [(8, 8, 4), (8, 10, 4), (3, 5, 7), (9, 4, 3)])
def test_a_map_comes_back_from_its_windows(rng, height, width, side):
    x = jnp.asarray(rng.standard_normal((2, height, width, 3)), jnp.float32)
    windows = to_windows(x, side)
    assert windows.shape == (2 * -(-height // side) * -(-width // side), side, side, 3)
    np.testing.assert_array_equal(from_windows(windows, 2, height, width), x)


def test_windows_run_row_by_row_with_zeros_at_the_bottom_and_the_right():
    x = jnp.arange(1, 16, dtype=jnp.float32).reshape(1, 3, 5, 1)
    windows = np.asarray(to_windows(x, 2))[..., 0]
    np.testing.assert_array_equal(windows[1], [[3, 4], [8, 9]])
    np.testing.assert_array_equal(windows[2], [[5, 0], [10, 0]])
    np.testing.assert_array_equal(windows[5], [[15, 0], [0, 0]])


def test_pooled_windows_go_back_to_a_map_of_half_the_side(rng):
    x = jnp.asarray(rng.standard_normal((2, 16, 16, 3)), jnp.float32)
    halved = to_windows(x, 6)[:, ::2, ::2]
    np.testing.assert_array_equal(from_windows(halved, 2, 8, 8), x[:, ::2, ::2])
