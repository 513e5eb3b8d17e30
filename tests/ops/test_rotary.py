"""Rotary positions: what defines them, and how axes share the frequencies."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tracevision_jax.ops.rotary import (
    apply_rotary,
    axial_angles,
    inverse_frequencies,
    multimodal_frequencies,
    planar_frequencies,
)


def test_products_of_rotated_vectors_depend_on_position_differences_alone(rng):
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 8)), jnp.float32) for _ in range(2))
    frequencies = multimodal_frequencies(8, 100.0, (1, 2, 1))

    def product(at, to):
        turned = [apply_rotary(x, axial_angles(jnp.array([place]), frequencies)) for x, place in ((q, at), (k, to))]
        return float((turned[0] * turned[1]).sum())

    assert product((3, 5, 2), (1, 9, 2)) == pytest.approx(product((13, 1, 7), (11, 5, 7)), abs=1e-5)
    assert product((3, 5, 2), (1, 9, 2)) != pytest.approx(product((3, 5, 2), (1, 9, 3)), abs=1e-3)


def test_rotation_pairs_a_channel_with_the_one_half_a_head_away():
    x = jnp.array([[[1.0, 0.0, 0.0, 0.0]]])
    turned = apply_rotary(x, jnp.array([[np.pi / 2, 0.3]]))
    np.testing.assert_allclose(turned[0, 0], [0, 0, 1, 0], atol=1e-6)


def test_sections_cut_one_series_and_planes_repeat_it():
    series = inverse_frequencies(16, 1e6)
    np.testing.assert_array_equal(np.concatenate(multimodal_frequencies(16, 1e6, (2, 3, 3))), series)
    rows, cols = planar_frequencies(80, 1e4)
    np.testing.assert_array_equal(rows, cols)
    np.testing.assert_allclose(rows, 1e4 ** (-np.arange(0, 40, 2) / 40), rtol=1e-6)
    angles = axial_angles(jnp.array([[2, 7]]), (rows, cols))
    np.testing.assert_allclose(angles[0], np.concatenate([2 * rows, 7 * cols]), rtol=1e-6)


def test_sections_that_do_not_fill_the_head_are_refused():
    with pytest.raises(ValueError, match="must sum to half the head size, 8"):
        multimodal_frequencies(16, 1e6, (2, 2, 2))


def test_the_result_keeps_the_dtype_but_is_computed_in_float32(rng):
    x = jnp.asarray(rng.standard_normal((4, 2, 8)), jnp.bfloat16)
    angles = jnp.asarray(rng.uniform(0, 500, (4, 4)), jnp.float32)
    turned = apply_rotary(x, angles)
    assert turned.dtype == jnp.bfloat16
    exact = apply_rotary(x.astype(jnp.float32), angles)
    np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))


def test_frequencies_equal_those_of_the_public_implementations_to_the_last_bit_but_one():
    for channels, theta in ((128, 1e6), (40, 1e4), (64, 1e4)):
        exponent = torch.arange(0, channels, 2, dtype=torch.float) / channels
        theirs = (1.0 / (theta**exponent)).numpy()
        ours = inverse_frequencies(channels, theta)
        assert (ours != theirs).sum() <= 1  # torch's own power is not always the nearest float
        np.testing.assert_allclose(ours, theirs, rtol=1.3e-7)
