"""Simulated clicks lie where a mask is wrong and say so; boxes are tight but for their noise."""

import jax
import jax.numpy as jnp
import numpy as np

from tracevision_jax.segmentation.clicks import BOX_NOISE, click_on_error, tight_box, unsteady_box
from tracevision_jax.segmentation.prompt_encoder import NEGATIVE, POSITIVE


def square(top: int, left: int, side: int, size: int = 24) -> np.ndarray:
    mask = np.zeros((size, size), bool)
    mask[top : top + side, left : left + side] = True
    return mask


TRUE = jnp.asarray(square(4, 6, 10))


def clicks(predicted=None, count: int = 200, true=TRUE):
    keys = jax.random.split(jax.random.key(0), count)
    points, labels = jax.vmap(lambda key: click_on_error(key, true, predicted))(keys)
    return np.asarray(points).astype(int), np.asarray(labels)


def test_a_first_click_lies_on_the_object_and_is_positive():
    points, labels = clicks()
    assert np.asarray(TRUE)[points[:, 1], points[:, 0]].all() and (labels == POSITIVE).all()


def test_every_pixel_of_the_object_may_be_clicked():
    points, _ = clicks(count=2000)
    hits = np.zeros((24, 24))
    np.add.at(hits, (points[:, 1], points[:, 0]), 1)
    chosen = hits[np.asarray(TRUE)]
    assert chosen.min() >= 5 and chosen.max() <= 45, "20 each on average"


def test_a_correcting_click_lies_in_the_error_and_says_which_kind_it_is():
    """The prediction lies two columns to the right: as much is missed on the left as is too much on the right."""
    predicted = jnp.asarray(square(4, 8, 10))
    points, labels = clicks(predicted)
    x, y = points.T
    wrong = np.asarray(TRUE ^ predicted)
    assert wrong[y, x].all()
    np.testing.assert_array_equal(labels == POSITIVE, np.asarray(TRUE)[y, x])
    assert 60 < (labels == NEGATIVE).sum() < 140


def test_a_mask_without_error_gets_a_negative_click_beside_the_object():
    points, labels = clicks(TRUE)
    assert not np.asarray(TRUE)[points[:, 1], points[:, 0]].any() and (labels == NEGATIVE).all()
    nothing = jnp.zeros_like(TRUE)
    assert (clicks(nothing, true=nothing)[1] == NEGATIVE).all()


def test_each_mask_of_a_batch_is_clicked_for_itself():
    true = jnp.stack([TRUE, jnp.asarray(square(0, 0, 2))])
    points, labels = click_on_error(jax.random.key(1), true[None])
    assert points.shape == (1, 2, 2) and labels.shape == (1, 2)
    assert (np.asarray(points[0, 1]) < 2).all()


def test_a_box_has_its_corners_on_the_outermost_pixels():
    boxes = tight_box(jnp.stack([TRUE, jnp.zeros_like(TRUE), jnp.asarray(square(3, 20, 1))]))
    np.testing.assert_array_equal(boxes, [[[6, 4], [15, 13]], [[0, 0], [0, 0]], [[20, 3], [20, 3]]])


def test_an_unsteady_box_is_off_by_a_tenth_of_its_size_at_most_and_within_the_picture():
    true = jnp.asarray(square(0, 14, 10))
    keys = jax.random.split(jax.random.key(0), 100)
    boxes = np.asarray(jax.vmap(lambda key: unsteady_box(key, true))(keys))
    errors = np.abs(boxes - np.asarray(tight_box(true)))
    assert errors.max() <= BOX_NOISE * 9 + 1e-5 and errors.max() > 0.7
    assert boxes.min() >= 0 and boxes.max() <= 23
