"""J, F, recall, decay and temporal stability: by hand, against pixel-by-pixel loops, and on real masks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from scipy import ndimage

from evaluation.metrics import video
from tests.evaluation import video_reference as naive

PAIRS = arrays.arrays(bool, st.tuples(st.just(2), st.integers(1, 12), st.integers(1, 12)))
KEYS = ["J", "F", "J&F", "J-recall", "J-decay", "F-recall", "F-decay"]


def frame_scores(predicted, true):
    return tuple(float(value) for value in video.j_and_f(video.frame_counts(predicted, true)))


def square(top, left, size=40, frame=(120, 160)):
    mask = np.zeros(frame, bool)
    mask[top : top + size, left : left + size] = True
    return mask


def blobs(rng, frame):
    """A few discs and boxes, some cut by the frame."""
    rows, columns = np.mgrid[: frame[0], : frame[1]]
    mask = np.zeros(frame, bool)
    for _ in range(rng.integers(1, 4)):
        y, x, r = rng.uniform(-5, frame[0] + 5), rng.uniform(-5, frame[1] + 5), rng.uniform(2, frame[0] / 3)
        mask |= (rows - y) ** 2 + (columns - x) ** 2 < r**2 if rng.random() < 0.5 else abs(rows - y) < r / 2
    return mask


@pytest.mark.parametrize(
    ("size", "radius"),
    [((480, 854), 8), ((1080, 1920), 18), ((75, 100), 1), ((76, 100), 2), ((300, 400), 4), ((1, 1), 1)],
)
def test_boundaries_match_within_eight_thousandths_of_the_diagonal(size, radius):
    assert video.tolerance_px(*size) == radius


def test_a_hand_example():
    """A square of 40 px moved by 4 px in a frame of 120 x 160, whose tolerance is ceil(0.008 x 200) = 2 px."""
    j, f = frame_scores(square(40, 54), square(40, 50))
    assert j == 36 * 40 / (44 * 40)
    # The boundary is a ring of 41 x 41 px: 160 pixels. The moved one has 41 px a row of its top and bottom, of which
    # the last 4 lie 1, 2, 3, 4 px beyond the other's: 39 are near; of its left and right columns none of 39 is, but
    # those whose distance to the other's top or bottom row is 2 at most: 2 at each end of the left one (inside),
    # and none of the right one, which is 4 px outside.
    assert f == (2 * 39 + 4) / 160


def test_a_frame_without_boundary_in_one_mask_scores_nothing_and_in_both_all():
    empty, full, some = np.zeros((9, 9), bool), np.ones((9, 9), bool), square(2, 2, 3, (9, 9))
    assert frame_scores(empty, empty) == (1, 1)
    assert frame_scores(full, full) == (1, 1)
    assert frame_scores(empty, some) == frame_scores(some, empty) == (0, 0)
    assert frame_scores(full, some) == (9 / 81, 0)
    assert frame_scores(full, empty) == (0, 1), "a full mask has no boundary, so F sees none missing"


@given(PAIRS)
def test_small_masks_score_as_in_pixel_by_pixel_loops(pair):
    assert frame_scores(*pair) == naive.frame_scores(*pair)


@given(PAIRS)
def test_the_score_of_a_mask_with_itself_is_one_and_order_does_not_matter(pair):
    assert frame_scores(pair[0], pair[0]) == (1, 1)
    assert frame_scores(*pair) == frame_scores(*pair[::-1])


@pytest.mark.parametrize("frame", [(60, 80), (90, 120), (200, 210)])
def test_larger_masks_with_larger_tolerances_score_as_in_pixel_by_pixel_loops(rng, frame):
    scores = []
    for _ in range(3):
        true = blobs(rng, frame)
        predicted = np.roll(true, rng.integers(-5, 6, 2), (0, 1)) ^ (rng.random(frame) < 0.001)
        scores.append(frame_scores(predicted, true))
        assert scores[-1] == naive.frame_scores(predicted, true)
    assert 0 < min(f for _, f in scores) < 1


@given(arrays.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.booleans()), st.integers(0, 14))
def test_dilation_reaches_as_far_as_a_disk(marks, radius):
    rows, columns = np.mgrid[: marks.shape[0], : marks.shape[1]]
    near = np.zeros_like(marks)
    for y, x in np.argwhere(marks):
        near |= (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
    assert (video.dilated(marks, radius) == near).all()


def test_a_batch_of_frames_scores_as_each_alone(rng):
    pairs = np.array([[blobs(rng, (50, 70)) for _ in range(2)] for _ in range(6)]).reshape(2, 3, 2, 50, 70)
    j, f = video.j_and_f(video.frame_counts(pairs[:, :, 0], pairs[:, :, 1]))
    assert j.shape == f.shape == (2, 3)
    for place in np.ndindex(2, 3):
        assert (j[place], f[place]) == frame_scores(*pairs[place])


def test_recall_and_decay_by_hand():
    # Eight frames: knots 0, 1.75, 3.5, 5.25, 7 round to 0, 2, 4, 5, 7. A value of exactly one half is not recalled.
    values = np.array([1, 1, 0.7, 0.6, 0.5, 0.3, 0.2, 0.1])
    expected = (values.mean(), 4 / 8, 2.7 / 3 - 0.6 / 3)
    assert video.statistics(values) == pytest.approx(expected, abs=1e-15)
    assert video.statistics(np.array([0.6])) == (0.6, 1, 0)
    assert video.statistics(np.array([0.9, 0.4])) == pytest.approx((0.65, 0.5, 0.5))
    # Three frames: the knots 0.5 and 1.5 are halves and go up, so the last quarter is the last frame alone.
    assert video.statistics(np.array([0.9, 0.6, 0.3])).decay == pytest.approx(0.75 - 0.3)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60))
def test_statistics_agree_with_exact_fractions(values):
    assert video.statistics(np.array(values)) == pytest.approx(naive.statistics(values), abs=1e-12)


def test_quarters_of_long_videos_do_not_wrap_at_256_frames():
    values = np.linspace(1, 0, 1001)
    assert video.statistics(values).decay == pytest.approx(0.75)


def test_the_semi_supervised_protocol_leaves_out_the_first_and_the_last_frame():
    true = np.stack([square(40, 50)] * 5)
    predicted = true.copy()
    predicted[[0, -1]] = False
    assert set(video.object_scores(predicted, true).named().values()) == {0, 1}
    assert video.object_scores(predicted, true).j == (1, 1, 0)
    assert video.object_scores(predicted, true, video.ALL_FRAMES).j.mean == pytest.approx(3 / 5)


@pytest.mark.parametrize("frames", [0, 1, 2])
def test_a_video_without_a_frame_between_the_first_and_the_last_is_undefined(frames):
    masks = np.ones((frames, 4, 5), bool)
    with pytest.raises(ValueError, match="no frames"):
        video.object_scores(masks, masks)


def test_the_score_of_a_data_set_is_the_mean_over_objects():
    one = video.Scores(video.Statistics(0.9, 1, 0.1), video.Statistics(0.7, 0.8, 0.3))
    two = video.Scores(video.Statistics(0.3, 0, -0.1), video.Statistics(0.5, 0.4, 0.1))
    named = video.mean_scores([one, two]).named()
    assert list(named) == KEYS
    assert named == pytest.approx(dict(zip(KEYS, (0.6, 0.6, 0.6, 0.5, 0, 0.6, 0.2), strict=True)))
    with pytest.raises(ValueError, match="no objects"):
        video.mean_scores([])


def test_temporal_stability_by_hand():
    """IoUs of neighbours 1, 1/3, 0 and, both empty, 1: mean 7/12, variance (1 + 1/9 + 1)/4 - (7/12)^2."""
    frames = np.zeros((5, 2, 3), bool)
    frames[0, 0, :2] = frames[1, 0, :2] = frames[2, 0, 1:] = True
    stability = video.temporal_stability(frames)
    assert stability == pytest.approx((7 / 12, 19 / 36 - 49 / 144))
    with pytest.raises(ValueError, match="two frames"):
        video.temporal_stability(frames[:1])


@given(arrays.arrays(bool, st.tuples(st.integers(2, 6), st.integers(1, 4), st.integers(1, 4))))
def test_temporal_stability_is_the_same_backwards(frames):
    assert video.temporal_stability(frames) == pytest.approx(video.temporal_stability(frames[::-1]))


def test_real_masks_score_as_with_scipys_morphology(shared_data):
    """A horse and its rider at 854 x 480 against themselves, and moved further and further."""
    paths = sorted((shared_data / "video" / "horsejump-high" / "masks").glob("*.png"))
    true = np.stack([np.asarray(Image.open(path)) > 0 for path in paths])
    assert true.shape == (50, 480, 854)
    assert set(video.object_scores(true, true).named().values()) == {0, 1}
    reach = np.arange(-8, 9)
    disk = reach[:, None] ** 2 + reach**2 <= 64
    means = []
    for shift in (4, 12, 30):
        predicted = np.roll(true, (shift // 2, shift), (1, 2))
        scores = video.object_scores(predicted, true)
        means.append((scores.j.mean, scores.f.mean))
        for frame in (1, 25, 48):
            edges = [video.boundary(mask[frame]) for mask in (predicted, true)]
            shares = [
                (one & ndimage.binary_dilation(other, disk)).sum() / one.sum() for one, other in (edges, edges[::-1])
            ]
            expected = 2 * shares[0] * shares[1] / (shares[0] + shares[1])
            assert frame_scores(predicted[frame], true[frame])[1] == expected
    assert means == sorted(means, reverse=True)
    assert means[0][1] == 1 and 0 < means[-1][1] < 0.6, "4 px lie within the tolerance of 8 px, 30 px do not"
    stability = video.temporal_stability(true)
    print(f"T-IoU of the true masks: {stability.mean_iou:.4f}, variance {stability.variance:.5f}")
    assert 0.6 < stability.mean_iou < 0.8
