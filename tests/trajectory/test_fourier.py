"""Fourier features of places: what is near has a large inner product before anything is learned."""

import jax.numpy as jnp
import numpy as np
import pytest

from tracevision_jax.trajectory.fourier import bin_centres, frequencies, line_features, plane_features


@pytest.mark.parametrize("width", [4, 8, 64])
def test_features_have_unit_norm_everywhere(width, rng):
    places = jnp.asarray(rng.uniform(-0.5, 1.5, (50, 2)), jnp.float32)
    assert np.allclose(np.linalg.norm(line_features(places[:, 0], width), axis=-1), 1, atol=1e-5)
    assert np.allclose(np.linalg.norm(plane_features(places, width), axis=-1), 1, atol=1e-5)


def test_features_are_the_sines_and_cosines_of_geometric_frequencies():
    features = line_features(jnp.asarray([0.3]), 8, max_cycles=4.0)[0]
    cycles = 0.5 * 8 ** (np.arange(4) / 3)
    assert np.allclose(frequencies(4, 4.0), cycles)
    expected = np.concatenate([np.sin(2 * np.pi * cycles * 0.3), np.cos(2 * np.pi * cycles * 0.3)]) / 2
    assert np.allclose(features, expected, atol=1e-6)


def test_inner_products_fall_off_with_distance_along_both_axes():
    here = plane_features(jnp.asarray([0.5, 0.5]), 64, 8.0)
    steps = jnp.asarray([0.0, 0.02, 0.05, 0.08])
    for axis in (0, 1):
        places = jnp.full((4, 2), 0.5).at[:, axis].add(steps)
        products = np.asarray(plane_features(places, 64, 8.0) @ here)
        assert (np.diff(products) < -0.01).all(), products
    # x and y are told apart: a step along x is not one along y.
    one, other = plane_features(jnp.asarray([[0.8, 0.5], [0.5, 0.8]]), 64, 8.0)
    assert float(one @ other) < 0.95


def test_every_bin_is_nearest_to_itself():
    features = line_features(bin_centres(1000), 96)
    products = np.array(features @ features.T)
    assert (products.argmax(1) == np.arange(1000)).all()
    assert (products[np.arange(999), np.arange(1, 1000)] > 0.99).all()


def test_bin_centres_are_those_of_the_tokens():
    assert np.allclose(bin_centres(1000)[jnp.asarray([0, 999])], [0.0005, 0.9995])


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match="even width, got 7"):
        line_features(jnp.zeros(3), 7)
