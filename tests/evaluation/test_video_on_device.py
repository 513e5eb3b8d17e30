"""The jitted counts are those of the host, whatever the batch, and J and F follow inside `jax.jit` as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from evaluation.metrics import video, video_on_device


def moving_discs(rng, batch, frame):
    """True discs and predictions a few pixels off, some empty, with a little noise."""
    rows, columns = np.mgrid[: frame[0], : frame[1]]
    centres = rng.uniform(0, 1, (*batch, 1, 1, 2)) * frame
    radii = rng.uniform(0, min(frame) / 3, (*batch, 1, 1)) * (rng.random((*batch, 1, 1)) < 0.8)
    masks = []
    for shift in (0.0, 4.0):
        moved = centres + rng.uniform(-shift, shift, centres.shape)
        masks.append((rows - moved[..., 0]) ** 2 + (columns - moved[..., 1]) ** 2 < radii**2)
    return masks[0], masks[1] ^ (rng.random(masks[1].shape) < 0.0005)


@pytest.mark.parametrize(
    ("batch", "frame"), [((), (40, 50)), ((2, 3, 4), (120, 160)), ((5,), (7, 400)), ((2,), (1, 1))]
)
def test_the_counts_are_exactly_those_of_the_host(rng, batch, frame):
    true, predicted = moving_discs(rng, batch, frame)
    counts = video_on_device.frame_counts(jnp.asarray(predicted), jnp.asarray(true))
    expected = video.frame_counts(predicted, true)
    for name, found, value in zip(video.FrameCounts._fields, counts, expected, strict=True):
        assert found.shape == batch and (np.asarray(found) == value).all(), name
    for found, value in zip(video.j_and_f(jax.device_get(counts)), video.j_and_f(expected), strict=True):
        assert (found == value).all()


def test_j_and_f_inside_jit_are_those_of_the_host_in_float32(rng):
    true, predicted = moving_discs(rng, (2, 6), (120, 160))

    @jax.jit
    def scores(predicted, true):
        return video.j_and_f(video_on_device.frame_counts(predicted, true))

    expected = video.j_and_f(video.frame_counts(predicted, true))
    assert 0.05 < expected[1].mean() < 0.95
    for found, value in zip(scores(jnp.asarray(predicted), jnp.asarray(true)), expected, strict=True):
        assert found.dtype == jnp.float32
        assert np.abs(np.asarray(found) - value).max() < 1e-6


@pytest.mark.parametrize("radius", [0, 1, 2, 5, 8, 18])
def test_dilation_is_that_of_the_host(rng, radius):
    marks = rng.random((3, 30, 40)) < 0.01
    assert (np.asarray(video_on_device.dilated(jnp.asarray(marks), radius)) == video.dilated(marks, radius)).all()


def test_each_of_a_batch_of_vmapped_videos_scores_alike(rng):
    true, predicted = moving_discs(rng, (3, 4), (60, 80))
    mapped = jax.vmap(video_on_device.frame_counts)(jnp.asarray(predicted), jnp.asarray(true))
    for found, value in zip(mapped, video.frame_counts(predicted, true), strict=True):
        assert (np.asarray(found) == value).all()


def test_real_masks_are_counted_alike(shared_data):
    paths = sorted((shared_data / "video" / "horsejump-high" / "masks").glob("*.png"))[::10]
    true = np.stack([np.asarray(Image.open(path)) > 0 for path in paths])
    predicted = np.roll(true, (7, -9), (1, 2))
    counts = jax.device_get(video_on_device.frame_counts(jnp.asarray(predicted), jnp.asarray(true)))
    j, f = video.j_and_f(counts)
    expected = video.j_and_f(video.frame_counts(predicted, true))
    assert (j == expected[0]).all() and (f == expected[1]).all() and 0.3 < f.mean() < 1
