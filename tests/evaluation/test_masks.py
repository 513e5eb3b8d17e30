"""Mask overlaps: by hand, against COCO's own code, from run lengths as from arrays, and the jitted form."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco

from evaluation.metrics import on_device
from evaluation.metrics.masks import LISA_UNION_EPSILON, areas, ciou, giou, iou
from evaluation.metrics.run_lengths import overlap_areas, parse

PAIRS = arrays.arrays(bool, st.tuples(st.just(2), st.integers(1, 12), st.integers(1, 12)))


def packed(mask):
    rle = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def unpacked(mask):
    """The runs one by one, beginning with zeros."""
    runs, value = [0], False
    for pixel in mask.T.ravel():
        if pixel == value:
            runs[-1] += 1
        else:
            runs.append(1)
            value = pixel
    return {"size": list(mask.shape), "counts": runs}


def samples():
    """Three samples of 2 x 4 pixels: IoU 1/2, both empty, and nothing in common."""
    predicted, true = np.zeros((2, 3, 2, 4), bool)
    predicted[0, 0, :2], true[0, 0, :] = True, True
    predicted[2, 0, 0], true[2, 1, :3] = True, True
    return predicted, true


def test_the_overlaps_of_a_hand_example():
    intersections, unions = areas(*samples())
    assert (intersections.tolist(), unions.tolist()) == ([2, 0, 0], [4, 0, 4])
    assert iou(intersections, unions).tolist() == [0.5, 1, 0]
    assert giou(intersections, unions) == pytest.approx(0.5)
    assert ciou(intersections, unions) == pytest.approx(2 / 8)


def test_lisas_epsilon_enters_every_union_but_an_empty_one():
    values = iou(*areas(*samples()), LISA_UNION_EPSILON)
    assert values == pytest.approx([2 / (4 + 1e-5), 1, 0], abs=1e-12)
    assert values[0] < 0.5


def test_ignored_pixels_count_in_neither():
    predicted, true = samples()
    valid = np.ones_like(true)
    valid[0, 0, 2:] = False
    assert iou(*areas(predicted, true, valid)).tolist() == [1, 1, 0]


def test_masks_that_are_all_empty_score_one_and_no_masks_are_refused():
    nothing = np.zeros(2, int)
    assert giou(nothing, nothing) == 1 and ciou(nothing, nothing) == 1
    for score in (giou, ciou):
        with pytest.raises(ValueError, match="no samples"):
            score(np.zeros(0, int), np.zeros(0, int))


def test_cumulative_areas_do_not_overflow():
    large = np.full(3, 2**31 - 1, np.int32)
    assert ciou(large // 2, large) == pytest.approx(0.5)


@given(PAIRS)
def test_run_lengths_give_the_areas_of_the_arrays(pair):
    intersection, union = areas(pair[:1], pair[1:])
    for encode in (packed, unpacked):
        assert overlap_areas(parse(encode(pair[0])), parse(encode(pair[1]))) == (intersection, union)


def test_large_masks_have_cocos_areas(rng):
    """Long runs, whose packed differences take several characters and both signs."""
    rows, columns = np.mgrid[:300, :400]
    for _ in range(10):
        centre, radius = rng.uniform(50, 250, (2, 2)), rng.uniform(20, 140, 2)
        masks = [(rows - y) ** 2 + (columns - x) ** 2 < r**2 for (x, y), r in zip(centre, radius, strict=True)]
        encoded = [packed(mask) for mask in masks]
        both = coco.area(coco.merge(encoded, intersect=True))
        either = coco.area(coco.merge(encoded))
        assert overlap_areas(*map(parse, encoded)) == (both, either)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (None, "COCO RLE object"),
        ([[0, 1]], "COCO RLE object"),
        ({"size": [2, 2]}, "COCO RLE object"),
        ({"size": [2, 2, 2], "counts": [4]}, '"size" must be'),
        ({"size": [2.0, 2], "counts": [4]}, '"size" must be'),
        ({"size": [True, 4], "counts": [4]}, '"size" must be'),
        ({"size": "22", "counts": [4]}, '"size" must be'),
        ({"size": [0, 4], "counts": []}, "between 1 and"),
        ({"size": [-2, -2], "counts": [4]}, "between 1 and"),
        ({"size": [10**9, 10**9], "counts": [10**18]}, "between 1 and"),
        ({"size": [2, 2], "counts": 4}, "must be a string or a list"),
        ({"size": [2, 2], "counts": [1.5, 2.5]}, "must be a string or a list"),
        ({"size": [2, 2], "counts": [3]}, "covers 3 pixels"),
        ({"size": [2, 2], "counts": [3, 2]}, "covers 5 pixels"),
        ({"size": [2, 2], "counts": [-1, 5]}, "negative"),
        ({"size": [2, 2], "counts": [10**30]}, "longer than the mask"),
        ({"size": [2, 2], "counts": []}, "covers 0 pixels"),
        ({"size": [2, 2], "counts": ""}, "does not decode"),
        ({"size": [2, 2], "counts": "\x1f"}, "does not decode"),
        ({"size": [2, 2], "counts": "4é"}, "does not decode"),
        ({"size": [2, 2], "counts": "T"}, "ends inside a number"),
        ({"size": [2, 2], "counts": "o" * 12 + "0"}, "more than 40 bits"),
        ({"size": [2, 2], "counts": "O5"}, "negative run"),
        ({"size": [2, 2], "counts": "3"}, "covers 3 pixels"),
    ],
)
def test_a_malformed_mask_is_refused_with_the_reason(mask, reason):
    with pytest.raises(ValueError, match=reason):
        parse(mask)


@given(st.text(alphabet=[chr(code) for code in range(48, 112)], max_size=8))
def test_any_packed_string_is_measured_or_refused(counts):
    """What passes is what COCO's code reads as a mask of the same area."""
    mask = {"size": [6, 5], "counts": counts}
    try:
        runs = parse(mask)
    except ValueError:
        return
    assert overlap_areas(runs, runs) == (coco.area(mask), coco.area(mask))


def test_masks_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match="prediction 2 x 4, reference 4 x 2"):
        overlap_areas(*(parse({"size": size, "counts": [8]}) for size in ([2, 4], [4, 2])))


def test_the_jitted_form_agrees(rng):
    predicted, true, valid = rng.random((3, 5, 7, 16, 9)) < 0.5
    intersections, unions = on_device.mask_areas(jnp.asarray(predicted), jnp.asarray(true), jnp.asarray(valid))
    expected = areas(predicted, true, valid)
    assert (intersections == expected[0]).all() and (unions == expected[1]).all()
    for epsilon in (0.0, LISA_UNION_EPSILON):
        values = np.asarray(on_device.mask_ious(intersections, unions, union_epsilon=epsilon))
        assert values == pytest.approx(iou(*expected, epsilon), abs=1e-6)
    flat = intersections.ravel(), unions.ravel()
    assert giou(*flat) == pytest.approx(giou(*(counts.ravel() for counts in expected)), abs=1e-6)
    assert ciou(*flat) == pytest.approx(ciou(*(counts.ravel() for counts in expected)), abs=1e-12)
