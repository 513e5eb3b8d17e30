"""Box overlaps: values by hand, what the definitions imply, and the jitted form."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.metrics import on_device
from evaluation.metrics.boxes import ciou_pairs, giou_pairs, iou_matrix, iou_pairs, precision_at


def random_boxes(seed, count):
    corners = np.sort(np.random.default_rng(seed).random((count, 2, 2)), axis=1)
    return corners.reshape(count, 4)


def test_the_overlaps_of_a_hand_example():
    """Unit squares, one moved by half a side: intersection 1/2, union 3/2, enclosing box 3/2 x 1."""
    left, right = np.array([[0.0, 0, 1, 1]]), np.array([[0.5, 0, 1.5, 1]])
    assert iou_pairs(left, right) == pytest.approx(1 / 3)
    assert giou_pairs(left, right) == pytest.approx(1 / 3)
    assert ciou_pairs(left, right) == pytest.approx(1 / 3 - 0.25 / (1.5**2 + 1))


def test_giou_of_boxes_apart_counts_the_gap():
    left, right = np.array([[0.0, 0, 1, 1]]), np.array([[2.0, 0, 3, 1]])
    assert iou_pairs(left, right) == 0
    assert giou_pairs(left, right) == pytest.approx(-1 / 3)


def test_ciou_charges_a_different_shape_of_equal_centre():
    """A square in a box twice as wide: IoU 1/2, centres equal, so only alpha v is left."""
    tall, wide = np.array([[1.0, 0, 2, 1]]), np.array([[0.5, 0, 2.5, 1]])
    shape = 4 / np.pi**2 * (np.arctan(2) - np.arctan(1)) ** 2
    assert ciou_pairs(tall, wide) == pytest.approx(0.5 - shape**2 / (0.5 + shape))


@given(st.integers(0, 2**32 - 1))
def test_every_overlap_keeps_its_range_and_order(seed):
    left, right = random_boxes(seed, 20), random_boxes(seed + 1, 20)
    iou, giou, ciou = (overlap(left, right) for overlap in (iou_pairs, giou_pairs, ciou_pairs))
    assert ((iou >= 0) & (iou <= 1)).all()
    assert (giou > -1).all() and (giou <= iou + 1e-12).all() and (ciou <= iou + 1e-12).all()
    for overlap in (iou_pairs, giou_pairs, ciou_pairs):
        assert overlap(left, left) == pytest.approx(np.ones(20))
        assert overlap(left, right) == pytest.approx(overlap(right, left))
        assert overlap(3 * left, 3 * right) == pytest.approx(overlap(left, right))
    assert iou_matrix(left, right).diagonal() == pytest.approx(iou)


def test_the_matrix_has_every_pair():
    left, right = random_boxes(0, 3), random_boxes(1, 5)
    matrix = iou_matrix(left, right)
    assert matrix.shape == (3, 5)
    assert matrix[2, 4] == iou_pairs(left[2:], right[4:])[0]


@pytest.mark.parametrize("other", [[0.2, 0.2, 0.2, 0.2], [0.1, 0.1, 0.4, 0.4], [0.2, 0.2, 0.6, 0.2]])
def test_a_box_without_area_overlaps_nothing_and_yields_finite_values(other):
    point, other = np.array([[0.2, 0.2, 0.2, 0.2]]), np.array([other])
    assert iou_pairs(point, other) == 0
    assert np.isfinite(giou_pairs(point, other)).all() and np.isfinite(ciou_pairs(point, other)).all()


def test_an_iou_of_exactly_a_half_is_no_hit():
    left, right = np.array([[0.0, 0, 1, 1], [0, 0, 1, 1]]), np.array([[0.0, 0, 1, 0.5], [0, 0, 1, 0.75]])
    assert precision_at(iou_pairs(left, right)) == 0.5
    assert precision_at(on_device.box_ious(jnp.asarray(left), jnp.asarray(right))) == 0.5
    with pytest.raises(ValueError, match="no boxes"):
        precision_at(np.zeros(0))


@pytest.mark.parametrize(
    ("jitted", "host"),
    [
        (on_device.box_ious, iou_pairs),
        (on_device.box_gious, giou_pairs),
        (on_device.box_cious, ciou_pairs),
    ],
)
def test_the_jitted_form_agrees(jitted, host):
    left, right = random_boxes(0, 64).astype(np.float32), random_boxes(1, 64).astype(np.float32)
    on_the_device = np.asarray(jitted(jnp.asarray(left), jnp.asarray(right)))
    assert on_the_device == pytest.approx(host(left, right), abs=2e-6)
