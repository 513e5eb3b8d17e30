"""The measure of `convert --verify`."""

import numpy as np
import pytest

from evaluation.verify import StageError, draw_pictures, draw_video, largest_error


def test_the_worst_row_decides(rng):
    theirs = rng.standard_normal((50, 8))
    ours = theirs.copy()
    ours[17] *= 1.25
    assert largest_error(ours, theirs) == pytest.approx(0.25)
    assert largest_error(theirs, theirs) == 0


def test_rows_that_are_nearly_zero_do_not_blow_an_error_up(rng):
    theirs = rng.standard_normal((50, 8))
    theirs[3] = 0
    ours = theirs.copy()
    ours[3] += 1e-7
    assert largest_error(ours, theirs) < 1e-3


def test_what_cannot_be_compared_is_infinitely_wrong():
    good = np.ones((2, 2))
    for bad in (np.ones((2, 3)), np.array([[1, np.nan], [1, 1]]), np.array([[1, np.inf], [1, 1]])):
        assert largest_error(bad, good) == float("inf")
        assert not StageError("x", largest_error(bad, good), 2, 1e-4).passed
    assert not StageError("x", float("nan"), 2, 1e-4).passed


def test_pictures_are_the_same_every_time_and_the_video_moves():
    for first, second in zip(draw_pictures(), draw_pictures(), strict=True):
        np.testing.assert_array_equal(first, second)
        assert first.std() > 20
    frames = draw_video().astype(float)
    assert np.abs(np.diff(frames, axis=0)).mean() > 10
