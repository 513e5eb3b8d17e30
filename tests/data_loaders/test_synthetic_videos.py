"""Synthetic videos: what is true of every one of them, and what many of them show together."""

import dataclasses

import numpy as np
import pytest

from data_loaders.sources.protocol import Source
from data_loaders.synthetic.videos import SyntheticVideos
from data_loaders.synthetic.videos_config import VideoConfig
from data_loaders.synthetic.videos_paths import curve, draw_path
from tracevision_jax.errors import UserError

CONFIG = VideoConfig(height=64, width=80, frames=12)
MANY = SyntheticVideos(3, 40, CONFIG)


@pytest.fixture(scope="module")
def videos():
    return [MANY.video(index) for index in range(40)]


def test_it_is_a_source():
    assert isinstance(MANY, Source) and len(MANY) == 40
    with pytest.raises(IndexError, match="video 40 of 40"):
        MANY[40]


def test_a_video_depends_on_its_seed_its_number_and_its_config_alone():
    again = SyntheticVideos(3, 1000, CONFIG).video(7)
    first = MANY.video(7)
    np.testing.assert_array_equal(again.frames, first.frames)
    np.testing.assert_array_equal(again.masks, first.masks)
    assert (SyntheticVideos(4, 40, CONFIG).video(7).frames != first.frames).any()
    assert SyntheticVideos(4, 40, CONFIG).fingerprint() != MANY.fingerprint()


def test_shapes_and_flags_are_what_they_say(videos):
    for video in videos:
        count = len(video.objects)
        assert 2 <= count <= 4
        assert video.frames.shape == (12, 64, 80, 3) and video.frames.dtype == np.uint8
        assert video.masks.shape == (12, count, 64, 80)
        np.testing.assert_array_equal(video.visible, video.masks.any((-2, -1)))


def test_a_pixel_belongs_to_one_object_at_most(videos):
    assert max(video.masks.sum(1).max() for video in videos) == 1


def test_masks_lie_on_what_is_drawn():
    """Without posts and textures, seen pixels of an object are nearer to its colour than the background ever is."""
    plain = dataclasses.replace(CONFIG, textured=0.0, posts=(0, 0), backgrounds=("plain",), alike=(0, 0))
    for index in range(6):
        video = SyntheticVideos(0, 6, plain).video(index)
        for number, thing in enumerate(video.objects):
            if not video.visible[0, number]:
                continue
            mean = video.frames[0][video.masks[0, number]].mean(0) / 255
            assert np.abs(mean - np.array(thing.rgb)).max() < 0.2


def test_objects_hide_each_other_leave_and_come_back(videos):
    hidden = returned = 0
    for video in videos:
        for number in range(len(video.objects)):
            seen = video.visible[:, number]
            areas = video.masks[:, number].sum((-2, -1))
            hidden += (areas < 0.5 * areas.max()).any()
            away = np.flatnonzero(~seen)
            returned += bool(len(away) and seen[: away[0]].any() and seen[away[0] :].any())
    assert hidden > 30 and returned > 5


def test_posts_hide_what_passes_behind_them():
    config = dataclasses.replace(CONFIG, posts=(1, 1))
    for index in range(10):
        masks = SyntheticVideos(0, 10, config).video(index).masks.any((0, 1))
        free = (~masks).all(0).any() or (~masks).all(1).any()
        assert free, "a bar across the picture belongs to nobody"


def test_every_video_has_objects_that_look_alike(videos):
    twins = 0
    for video in videos:
        looks = [(thing.colour, thing.shape) for thing in video.objects]
        colours, shapes = zip(*looks, strict=True)
        assert len(set(colours)) < len(looks) or len(set(shapes)) < len(looks)
        twins += len(set(looks)) < len(looks)
    assert 8 < twins < 32


def test_paths_are_smooth_and_as_fast_as_the_config_says():
    config = dataclasses.replace(CONFIG, frames=40, leaving=0.0)
    random = np.random.default_rng(0)
    for _ in range(20):
        path = draw_path(config, 8.0, random)
        speed = np.linalg.norm(np.diff(path, axis=0), axis=1)
        assert speed.max() < 2 * 64 * config.speed[1]
        assert np.abs(np.diff(path, n=2, axis=0)).max() < 64 * config.speed[1]
        assert (path > -8).all() and (path < np.array([88, 72])).all()


def test_a_curve_goes_through_its_points():
    points = np.array([[0.0, 0.0], [4.0, 1.0], [3.0, 5.0]])
    np.testing.assert_allclose(curve(points, np.array([0.0, 1.0, 2.0])), points)


def test_a_sample_says_the_same_with_boxes_that_are_nan_where_nothing_is_seen():
    for index in range(8):
        sample, video = MANY[index], MANY.video(index)
        size = MANY.sizes(index)
        assert size.frames == 12 and (size.height, size.width) == sample.size
        assert len(sample.regions) <= size.regions
        for number, region in enumerate(sample.regions):
            np.testing.assert_array_equal(region.mask, video.masks[:, number])
            np.testing.assert_array_equal(np.isnan(region.box).all(-1), ~video.visible[:, number])


def test_impossible_videos_are_refused_with_every_reason():
    with pytest.raises(UserError, match=r"frames and stretch at least 1.*speed is 0.2 to 0.1.*shapes sqare"):
        VideoConfig(frames=0, speed=(0.2, 0.1), shapes=("sqare",))
    with pytest.raises(UserError, match="more colours and shapes"):
        VideoConfig(objects=(2, 3), colours=("red", "blue"))
