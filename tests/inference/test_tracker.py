"""Tracking with a real model of tiny size: what it computes, what it compiles, and what it keeps."""

import gc
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.inference import tracker_tiny as tiny
from tracevision_jax.errors import UserError
from tracevision_jax.hosts import sam2_video
from tracevision_jax.hosts.sam2_video import FramePrompts, frame_of, new_bank
from tracevision_jax.inference.tracker import Tracker, run_together
from tracevision_jax.inference.tracker_steps import Encode
from tracevision_jax.segmentation.prompt_encoder import BOTTOM_RIGHT, POSITIVE, TOP_LEFT
from tracevision_jax.systems.config_json import to_json
from tracevision_jax.vision.sam_preprocess import fit_square
from tracevision_jax.weights.model_directory import save_model

FRAMES = 10
TOLERANCE = 1e-4
"""Relative (Frobenius): drawn models are chaotic, and batches of other sizes round otherwise."""


def error(found, expected) -> float:
    return float(np.linalg.norm(np.subtract(found, expected)) / np.linalg.norm(expected))


def said(session) -> None:
    session.add(1, mask=tiny.disc())
    session.add(2, points=[(30, 5)], box=(25, 2, 38, 12))


@pytest.fixture(scope="module")
def tracked() -> list:
    """The usual video with two objects."""
    with tiny.tracker().session(tiny.video(FRAMES)) as session:
        said(session)
        return list(session.run())


def test_tracking_is_the_hosts_steps_one_after_the_other(tracked):
    """Against `prompted_step` and `propagate_step` called by hand, a frame at a time."""
    model, params, side = tiny.tracker().programs.model, tiny.params(), tiny.SIDE_PX
    squares = [fit_square(frame, side, "bicubic_8bit") for frame in tiny.video(FRAMES)]
    fitting = squares[0][1]
    batches = np.zeros((2, tiny.BATCH, side, side, 3), np.float32)
    batches.reshape(-1, side, side, 3)[:FRAMES] = [square for square, _ in squares]
    encoded = [tiny.tracker().programs.run([Encode(batch)])[0] for batch in batches]
    maps = jax.tree.map(lambda *x: jnp.concatenate(x), *encoded)
    bank = new_bank(tiny.config(), 2)
    corners = fitting.to_input(np.array([(25.0, 2.0), (38.0, 12.0), (30.0, 5.0)]))
    points = np.stack([np.zeros((3, 2)), corners]).astype(np.float32)
    labels = np.array([[-10] * 3, [TOP_LEFT, BOTTOM_RIGHT, POSITIVE]], np.int32)
    masks = np.stack([fitting.mask_to_input(tiny.disc()), np.zeros((side, side), bool)]).astype(np.float32)
    prompts = FramePrompts(jnp.asarray(points), jnp.asarray(labels), jnp.asarray(masks), jnp.array([True, False]))
    step = jax.jit(
        lambda bank, maps, time: sam2_video.propagate_step(model, params, maps, bank, time, video_frames=FRAMES)
    )
    prompt = jax.jit(
        lambda bank, maps, said: sam2_video.prompted_step(model, params, maps, bank, 0, said, video_frames=FRAMES)
    )
    frame, bank = prompt(bank, frame_of(maps, 0), prompts)
    for time, result in enumerate(tracked):
        if time:
            frame, bank = step(bank, frame_of(maps, time), time)
        for row, number in enumerate((1, 2)):
            found = result.found[number]
            assert error(found.logits, frame.masks[row]) < TOLERANCE
            assert abs(found.object_logit - float(frame.object_logits[row])) < 1e-3


def test_a_mask_that_is_the_prompt_is_the_result_of_its_frame(tracked):
    assert tracked[0].frame == 0
    first = tracked[0].masks[1]
    assert (first & tiny.disc()).sum() / (first | tiny.disc()).sum() > 0.6  # 8 x 8 logits
    assert tracked[0].scores[1] > 0.99


def test_results_do_not_depend_on_where_frames_come_from(tracked, tmp_path):
    from PIL import Image

    video = tiny.video(FRAMES)
    for number, frame in enumerate(video):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    for source in (list(video), tmp_path):
        with tiny.tracker().session(source) as session:
            said(session)
            for result, expected in zip(session.run(), tracked, strict=True):
                for number in (1, 2):
                    np.testing.assert_array_equal(result.found[number].logits, expected.found[number].logits)


def test_each_program_is_compiled_once_for_a_bucket_and_a_size(tracked):
    tracker = tiny.tracker()
    before = dict(tracker.programs.compiled)
    with tracker.session(tiny.video(7, seed=5, height=30, width=20)) as session:  # frames of another size, too
        session.add(1, frame=2, points=[(3, 3)])
        session.add(2, frame=2, mask=tiny.disc(height=30, width=20))
        for result in session.run():
            if result.frame == 4:
                session.add(2, frame=4, points=[(9, 9)])
                session.remove(1)
        list(session.run(reverse=True))
    assert dict(tracker.programs.compiled) == before
    assert set(before.values()) == {1}
    assert sorted(name.split()[0] for name in before if " 2 objects" in name or "encode" in name) == [
        "encode",
        "prompt",
        "track",
    ]


def test_videos_in_one_program_give_what_each_gives_alone(tracked):
    tracker = tiny.tracker()
    sessions = [tracker.session(video) for video in (tiny.video(FRAMES), tiny.video(6, seed=7))]
    for session in sessions:
        said(session)
    results: list[list] = [[], []]
    for number, result in run_together(sessions):
        results[number].append(result)
    assert [len(one) for one in results] == [FRAMES, 6]
    for result, expected in zip(results[0], tracked, strict=True):
        for number in (1, 2):
            assert error(result.found[number].logits, expected.found[number].logits) < TOLERANCE
    assert any(name.startswith("track 2 x 2 objects") for name in tracker.programs.compiled)


def test_backwards_is_forwards_in_a_mirror_when_times_allow():
    """From the last frame back, the frames are those of the mirrored video, which differ only in the sign of times."""
    video = tiny.video(FRAMES)
    with tiny.tracker().session(video) as session:
        session.add(1, frame=FRAMES - 1, points=[(12, 12)])
        session.add(2, frame=FRAMES - 1, points=[(30, 5)])
        back = list(session.run(reverse=True))
    with tiny.tracker().session(video[::-1]) as session:
        session.add(1, points=[(12, 12)])
        session.add(2, points=[(30, 5)])
        forth = list(session.run())
    assert [result.frame for result in back] == list(range(FRAMES))[::-1]
    for left, right in zip(back, forth, strict=True):
        assert error(left.found[1].logits, right.found[1].logits) < TOLERANCE


def test_a_session_is_saved_and_goes_on_to_the_same_bits(tracked, tmp_path):
    with tiny.tracker().session(tiny.video(FRAMES)) as session:
        said(session)
        for result in session.run():
            if result.frame == 5:  # in the middle of a batch
                break
        session.save(tmp_path / "state.npz")
    with tiny.tracker().session(tiny.video(FRAMES)) as session:
        session.restore(tmp_path / "state.npz")
        assert session.objects == [1, 2]
        rest = list(session.run())
    assert [result.frame for result in rest] == [6, 7, 8, 9]
    for result, expected in zip(rest, tracked[6:], strict=True):
        for number in (1, 2):
            np.testing.assert_array_equal(result.found[number].logits, expected.found[number].logits)


def test_two_thousand_frames_take_no_more_memory_than_two_hundred():
    """From a stream, results dropped as they come; objects come and go on the way."""
    live, held = [], []
    pictures = tiny.video(16)

    def stream():
        for number in range(2000):
            yield pictures[number % 16].copy()

    tracker = tiny.tracker()
    with tracker.session(stream()) as session:
        session.add(1, mask=tiny.disc())
        session.add(2, points=[(30, 5)])
        count = 0
        for result in session.run():
            count += 1
            if result.frame % 250 == 100:
                session.add(2, frame=result.frame, points=[(20, 10)])
            if result.frame == 150:
                tracemalloc.start()
            if result.frame % 300 == 199:
                gc.collect()
                live.append(sum(array.nbytes for array in jax.live_arrays()))
                held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert count == 2000 and len(live) == 7
    assert max(live[1:]) <= live[0] + 2 * tracker.frame_bytes * tiny.BATCH  # a batch more or less may be on its way
    assert max(held[2:]) <= held[1] + 1e6
    assert len(session.steps.memory.stored) <= 2 and len(session.steps.memory.recent) == 6


def test_the_memory_of_a_cached_frame_is_what_it_says():
    cells, width = (tiny.SIDE_PX // 16) ** 2, tiny.WIDTH
    assert tiny.tracker().frame_bytes == 4 * cells * (width + 4 * width // 4 + 16 * width // 8)


def test_what_training_exports_and_what_is_converted_load_alike(tmp_path):
    content = {"system": "sam2", "model": to_json(tiny.config())}
    save_model(tmp_path / "run" / "model", content, tiny.params())
    for place in (tmp_path / "run", tmp_path / "run" / "model"):
        tracker = Tracker.load(place, batch=2, dtype="bfloat16", image_size=64)
        assert tracker.batch == 2 and tracker.config.image_size == 64
        assert {leaf.dtype for leaf in jax.tree.leaves(tracker.programs.params)} == {jnp.dtype("bfloat16")}
    assert Tracker.load(tmp_path / "run").config == tiny.config()


def test_what_does_not_track_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not there"):
        Tracker.load(tmp_path / "nowhere")
    save_model(tmp_path / "other", {"system": "tracevision", "model": {}}, {"a": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match="of the system 'tracevision', tracking takes 'sam2'"):
        Tracker.load(tmp_path / "other")
    with pytest.raises(UserError, match="dtype is 'float63'"):
        Tracker.load(tmp_path, dtype="float63")
    with pytest.raises(UserError, match="each must be at least 1"):
        Tracker(tiny.config(), {}, batch=0)
    with pytest.raises(UserError, match="remember is 0"):
        tiny.tracker().session(tiny.video(2), remember=0)
