"""Clips of videos: which frames and objects a step sees, and the way from a source to batches."""

import numpy as np
import pytest

from data_loaders.clips import ClipRecords, make_row, size_table
from data_loaders.pipeline import Pipeline
from data_loaders.plan import Lengths, Plan
from data_loaders.synthetic.videos import SyntheticVideos
from data_loaders.synthetic.videos_config import VideoConfig
from tracevision_jax.records.clips import ClipBatch, ClipBucket, collate
from tracevision_jax.records.sample import BadRecord

VIDEOS = SyntheticVideos(0, 12, VideoConfig(height=32, width=32, frames=6))
RECORDS = ClipRecords(VIDEOS, frames=4, objects=2)
BUCKET = ClipBucket(frames=4, objects=2, side=32)


def clips():
    found = []
    for index in range(len(RECORDS)):
        try:
            found.append((index, RECORDS[index]))
        except BadRecord:
            continue
    return found


def test_a_clip_is_a_stretch_of_its_video_forwards_or_backwards():
    ways = set()
    for index, clip in clips():
        video = VIDEOS[index].frames
        starts = range(len(video) - 3)
        forwards = any(np.array_equal(clip.frames, video[s : s + 4]) for s in starts)
        backwards = any(np.array_equal(clip.frames, video[s : s + 4][::-1]) for s in starts)
        assert forwards or backwards
        ways.add(forwards)
    assert ways == {True, False}


def test_every_object_of_a_clip_is_seen_on_its_first_frame():
    for index, clip in clips():
        assert 1 <= len(clip.masks) <= 2 and clip.masks.shape[1:] == (4, 32, 32)
        assert (clip.masks[:, 0].sum((-2, -1)) >= RECORDS.least_px).all()
        np.testing.assert_array_equal(RECORDS[index].masks, clip.masks)


def test_a_clip_on_whose_first_frame_nothing_is_seen_is_a_bad_record():
    with pytest.raises(BadRecord, match="no object is seen"):
        ClipRecords(VIDEOS, frames=4, objects=2, least_px=1000)[0]


def test_what_is_no_clip_is_padding_and_what_is_too_large_is_refused():
    _, clip = clips()[0]
    batch = collate([clip, None], ClipBucket(frames=5, objects=3, side=32))
    assert batch.real[0].sum() == 4 * len(clip.masks) and not batch.real[1].any()
    assert not batch.masks[0, len(clip.masks) :].any() and not batch.frames[:, 4:].any()
    np.testing.assert_array_equal(batch.frames[0, :4], clip.frames)
    np.testing.assert_array_equal(batch.filled, batch.real)
    with pytest.raises(ValueError, match=r"4 frames of 32 x 32 px with . objects does not fit rows of 3 frames"):
        collate([clip], ClipBucket(frames=3, objects=2, side=32))


def test_the_pipeline_gives_each_clip_a_row_of_its_own():
    plan = Plan(0, [Lengths("videos", size_table(RECORDS))], [BUCKET], [4])
    assert "4 frames of 32 x 32 px with 2 objects: 3 batches of 4 rows" in plan.describe()
    assert all(len(row) == 1 for step in range(3) for row in plan.step(step).rows)
    pipeline = Pipeline(plan, [RECORDS], make_row, collate, steps=3)
    items = list(pipeline.batches())
    assert all(isinstance(item.batch, ClipBatch) for item in items)
    rows = sum(int(item.batch.real.any((1, 2)).sum()) for item in items)
    assert rows == len(clips()) and rows + sum(len(item.bad) for item in items) == 12
    np.testing.assert_array_equal(next(iter(pipeline.batches(2))).batch.frames, items[2].batch.frames)


def test_worker_processes_make_the_same_batches():
    plan = Plan(0, [Lengths("videos", size_table(RECORDS))], [BUCKET], [4])
    ours, theirs = (list(Pipeline(plan, [RECORDS], make_row, collate, 3, workers=n).batches()) for n in (0, 1))
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine.batch.masks, other.batch.masks)
