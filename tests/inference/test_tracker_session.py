"""What a session asks of the model, and when: with a stand-in for the model that remembers all that it was told.

The stand-in's logits are a number that follows from everything that an object went through: prompts, frames, their
order, its memory before. So two sessions that give equal results did the same things in the same order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inference import tracker_tiny as tiny
from tracevision_jax.errors import UserError
from tracevision_jax.hosts.sam import Maps
from tracevision_jax.inference.frames import open_frames
from tracevision_jax.inference.tracker import Session, _drive, run_together
from tracevision_jax.inference.tracker_feed import Feed
from tracevision_jax.inference.tracker_session import SessionSteps
from tracevision_jax.inference.tracker_steps import Encode, Outcome, Programs, Prompted, Track

PRIME, FRAMES, BUCKETS = 100_003, 17, (1, 2, 4)


class StandIn(Programs):
    """Does the works of `Programs` on the host."""

    def __init__(self):
        self.encoded: list[int] = []
        self.works: list[Any] = []

    def run(self, works, lanes=1):
        self.works += works
        return [self._one(work) for work in works]

    def _one(self, work):
        if isinstance(work, Encode):
            self.encoded.append(1)
            return Maps(np.asarray(work.pixels), None, None)
        story = np.asarray(work.bank.pointers)[:, 0, 0].astype(np.int64)
        known = np.asarray(work.bank.pointer_valid).any(-1)
        story = np.where(known, story, 0)
        if isinstance(work, Track):
            logits = []
            for place, time, write in zip(*map(np.asarray, (work.order, work.times, work.write)), strict=True):
                seen = int(abs(work.maps.image[place]).sum() * 100) + int(time) * 7 + int(work.reverse)
                after = (story * 31 + seen) % PRIME
                logits.append(after)
                story = np.where(write, after, story)
            return self._outcome(np.stack(logits)), self._bank(work.bank, story, known | work.write.any(0))
        assert isinstance(work, Prompted)
        p = jax.tree.map(np.asarray, work.prompts)
        assert p.masks_binary is not None and p.earlier is not None and p.has_earlier is not None
        said = (p.points_px * (p.labels >= 0)[..., None]).sum((1, 2)) + p.labels.sum(1) + 3 * p.masks_binary.sum((1, 2))
        said = said + p.earlier.mean((1, 2)) * p.has_earlier + 17 * np.asarray(work.initial) + 1000 * int(work.time)
        after = (story * 31 + said.astype(np.int64) + 5) % PRIME
        given = np.asarray(work.prompts.given)
        story = np.where(given, after, story)
        return self._outcome(after), self._bank(work.bank, story, known | given)

    def _outcome(self, story):
        logits = np.broadcast_to(story[..., None, None], (*story.shape, 8, 8)).astype(np.float32)
        return Outcome(logits, story.astype(np.float32), story.astype(np.float32))  # pyright: ignore

    def _bank(self, bank, story, known):
        pointers = np.array(bank.pointers)
        pointers[:, 0, 0] = story
        valid = np.array(bank.pointer_valid)
        valid[:, 0] = known
        return bank.replace(pointers=jnp.asarray(pointers), pointer_valid=jnp.asarray(valid))


@functools.cache
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (FRAMES, 6, 8, 3), np.uint8)


def session(video=None, batch=4, programs=None, cached=2, remember=None, key_frames=4) -> Session:
    source = open_frames(frames() if video is None else video)
    feed = Feed(source, batch, tiny.SIDE_PX, cached)
    steps = SessionSteps(tiny.config(), source, feed, BUCKETS, key_frames, remember)
    return Session(programs or StandIn(), steps)


def told(result) -> tuple[int, dict[int, float]]:
    return result.frame, {number: found.iou for number, found in sorted(result.found.items())}


def stories(run) -> list[tuple[int, dict[int, float]]]:
    return [told(result) for result in run]


EVENTS = st.dictionaries(
    st.integers(0, FRAMES - 1),
    st.sampled_from(["click", "new", "mask", "remove", "stop", "preview", "past", "save", "future"]),
    max_size=6,
)


def played(events: dict[int, str], batch: int, video=None, folder=None) -> list[Any]:
    """Track with something happening after some frames."""
    s = session(video, batch)
    stream = video is not None
    s.add(1, points=[(2, 3)])
    results, left, number = [], dict(events), 1
    over = False
    while not over:
        over = True
        for result in s.run():
            results.append(told(result))
            event, frame = left.pop(result.frame, None), result.frame
            if event == "click":
                s.add(s.objects[0], frame=frame, points=[(1, 1, 0), (frame % 8, 2)])
            elif event == "new" and len(s.objects) < 4:
                number += 1
                s.add(number, frame=frame, box=(1, 1, 4, 5))
            elif event == "mask":
                s.add(s.objects[-1], frame=frame, mask=frames()[frame, :, :, 0] > 90)
            elif event == "remove" and len(s.objects) > 1:
                s.remove(s.objects[0])
            elif event == "preview":
                s.add(s.objects[0], frame=frame, points=[(3, 3)])
                results.append(told(s.preview(frame)))
            elif event == "past" and not stream:
                s.add(s.objects[0], frame=frame // 2, points=[(5, 1)])
            elif event == "future" and frame + 3 < FRAMES:
                s.add(s.objects[0], frame=frame + 3, points=[(4, 4)])
            elif event == "save" and not stream and folder is not None:
                s.save(folder / "state.npz")
                s.close()
                s = session(video, batch)
                s.restore(folder / "state.npz")
                over = False
                break
            elif event == "stop":
                over = False
                break
    s.close()
    return results


@given(events=EVENTS, batch=st.sampled_from([2, 3, 5, 8]))
@settings(max_examples=30)
def test_where_batches_end_makes_no_difference_whatever_happens_in_between(events, batch, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()
    expected = played({frame: event for frame, event in events.items() if event != "save"}, 1)
    assert played(events, batch, folder=folder) == expected
    assert [frame for frame, _ in dict(expected).items()] == list(range(FRAMES))


@given(events=EVENTS, batch=st.sampled_from([2, 3, 5, 8]))
@settings(max_examples=30)
def test_a_stream_does_the_same_whatever_its_batches(events, batch):
    assert played(events, batch, iter(frames())) == played(events, 1, iter(frames()))


def test_prompts_given_before_tracking_count_from_the_first_frame_on():
    s = session()
    s.add(1, frame=2, points=[(2, 3)])
    s.add(2, frame=9, box=(1, 1, 4, 5))
    results = stories(s.run())
    assert [frame for frame, _ in results] == list(range(2, FRAMES))
    assert all(set(found) == {1, 2} for _, found in results)
    assert results[7][1][2] == s.preview(9).found[2].iou


def test_in_a_stream_an_object_begins_at_its_prompt():
    s = session(iter(frames()))
    s.add(1, points=[(2, 3)])
    s.add(2, frame=6, box=(1, 1, 4, 5))
    results = stories(s.run())
    assert [set(found) for _, found in results] == [{1}] * 6 + [{1, 2}] * (FRAMES - 6)


def test_backwards_starts_at_the_first_prompt_and_ends_at_the_beginning():
    s = session()
    s.add(1, frame=7, points=[(2, 3)])
    assert [result.frame for result in s.run()] == list(range(7, FRAMES))
    assert [result.frame for result in s.run(reverse=True)] == list(range(7, -1, -1))
    assert [result.frame for result in s.run(start=4, stop=6)] == [4, 5]
    assert [result.frame for result in s.run(start=6, stop=3, reverse=True)] == [6, 5, 4]


def test_a_run_goes_on_where_the_last_one_was_left():
    whole, parts = session(), session()
    for s in (whole, parts):
        s.add(1, points=[(2, 3)])
    expected = stories(whole.run())
    got = []
    for stop in (3, 4, 11, None):
        got += stories(parts.run(stop=stop))
    assert got == expected


def test_an_objects_results_do_not_depend_on_the_others():
    alone, both = session(), session()
    alone.add(1, points=[(2, 3)])
    both.add(2, points=[(7, 1)])
    both.add(1, points=[(2, 3)])
    for left, right in zip(stories(alone.run()), stories(both.run()), strict=True):
        assert left[1][1] == right[1][1]


def test_a_freed_row_is_forgotten_before_another_object_gets_it():
    first, second = session(), session()
    first.add(5, points=[(1, 1)])
    first.add(1, points=[(2, 3)])
    list(first.run(stop=4))
    first.remove(5)
    first.add(2, frame=3, points=[(3, 4)])
    second.add(1, points=[(2, 3)])
    list(second.run(stop=4))
    second.add(2, frame=3, points=[(3, 4)])
    assert stories(first.run()) == stories(second.run())
    assert first.objects == [1, 2]


def test_clicks_on_a_tracked_frame_correct_it_and_those_on_a_forgotten_one_begin_anew():
    programs = StandIn()
    s = session(programs=programs)
    s.add(1, points=[(2, 3)])
    list(s.run(stop=12))
    for frame, corrects in ((11, True), (3, False)):
        s.add(1, frame=frame, points=[(4, 4)])
        s.preview(frame)
        work = [work for work in programs.works if isinstance(work, Prompted)][-1]
        assert bool(work.initial[0]) is not corrects
        assert bool(work.prompts.has_earlier[0]) is corrects  # pyright: ignore


def test_more_frames_can_be_kept_for_correction():
    programs = StandIn()
    s = session(programs=programs, remember=12)
    s.add(1, points=[(2, 3)])
    list(s.run(stop=12))
    s.add(1, frame=3, points=[(4, 4)])
    s.preview(3)
    assert not programs.works[-1].initial[0]
    assert programs.works[-1].bank.memory_times.shape[1] == 1 + 12


def test_clicks_add_up_and_see_the_mask_before():
    programs = StandIn()
    s = session(programs=programs)
    s.add(1, points=[(2, 3)])
    s.preview()
    s.add(1, points=[(5, 1, 0)])
    s.preview()
    works = [work for work in programs.works if isinstance(work, Prompted)]
    assert [(work.prompts.labels >= 0).sum() for work in works] == [1, 2]
    assert [bool(work.prompts.has_earlier[0]) for work in works] == [False, True]  # pyright: ignore


def test_the_bank_grows_by_buckets_and_key_frames_and_keeps_what_it_holds():
    programs = StandIn()
    s = session(programs=programs)
    s.add(1, points=[(2, 3)])
    list(s.run(stop=3))
    for number in (2, 3):
        s.add(number, frame=2, points=[(number, 1)])
    s.add(1, frame=10, points=[(1, 1)])
    s.add(1, frame=12, points=[(1, 1)])
    list(s.run())
    shapes = [
        (work.bank.memory_times.shape[0], work.bank.conditioning) for work in programs.works if hasattr(work, "bank")
    ]
    assert shapes[0] == (1, 1) and shapes[-1] == (4, 4)
    assert sorted(set(shapes)) == [(1, 1), (4, 4)]


def test_frames_are_encoded_once_while_they_are_cached():
    programs = StandIn()
    s = session(programs=programs, cached=5)
    s.add(1, frame=9, points=[(2, 3)])
    s.preview(9)
    list(s.run())
    list(s.run(reverse=True))
    list(s.run(start=0))
    assert len(programs.encoded) == -(-FRAMES // 4)
    s.reset()
    assert s.objects == []
    s.add(1, points=[(1, 1)])
    list(s.run())
    assert len(programs.encoded) == -(-FRAMES // 4)


def test_the_cache_holds_no_more_than_it_says():
    s = session(cached=2)
    s.add(1, points=[(2, 3)])
    for _ in s.run():
        assert len(s.steps.feed._groups) <= 2


def test_several_videos_give_what_each_gives_alone():
    def made(programs):
        sessions = [session(video, 4, programs) for video in (frames(), frames()[::-1][:9], frames()[:3])]
        for number, s in enumerate(sessions):
            s.add(1, points=[(2, 3 + number)])
        sessions[1].add(2, frame=3, points=[(1, 1)])
        return sessions

    alone = [stories(s.run()) for s in made(StandIn())]
    together: list[list[Any]] = [[], [], []]
    for number, result in run_together(made(StandIn())):
        together[number].append(told(result))
    # Alone, the video with one object has one row; together all have two.
    assert together == alone


def test_works_of_several_videos_are_asked_for_at_the_same_time():
    calls = []

    class Counting(StandIn):
        def run(self, works, lanes=1):
            calls.append((len(works), lanes))
            return super().run(works, lanes)

    programs = Counting()
    sessions = [session(frames(), 4, programs) for _ in range(3)]
    for s in sessions:
        s.add(1, points=[(2, 3)])
    assert sum(1 for _ in run_together(sessions)) == 3 * FRAMES
    assert set(calls) == {(3, 3)}
    with pytest.raises(UserError, match="one tracker"):
        list(run_together([session(), session()]))
    assert list(run_together([])) == []


def test_an_error_in_one_of_several_videos_is_told():
    programs = StandIn()
    good, bad = session(programs=programs), session(iter(frames()[:3]), programs=programs)
    good.add(1, points=[(2, 3)])
    bad.add(1, frame=8, points=[(2, 3)])
    with pytest.raises(UserError, match="frame 8 has a prompt, but the stream ended after 3 frames"):
        list(run_together([good, bad]))


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("batch", [1, 4])
def test_what_comes_before_a_frame_that_cannot_be_read_is_handed_out(again, batch):
    pictures = [*frames()[:6], frames()[6].transpose(1, 0, 2)]
    s = session(pictures if again else iter(pictures), batch)
    s.add(1, points=[(2, 3)])
    seen = []
    with pytest.raises(UserError, match=r"frame 6 of .* is 6 x 8 px, the frames before are 8 x 6"):
        for result in s.run():
            seen.append(result.frame)
    assert seen == list(range(6))
    with pytest.raises(UserError, match="frame 6 of"):
        next(s.run())


def test_an_error_of_the_users_own_generator_is_his():
    def camera():
        yield from frames()[:3]
        raise ConnectionError("unplugged")

    s = session(camera())
    s.add(1, points=[(2, 3)])
    run = s.run()
    assert [next(run).frame for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ConnectionError, match="unplugged"):
        next(run)


def test_key_frames_of_a_stream_stay_as_many_as_the_bank_has_places_for():
    programs = StandIn()
    s = session((frames()[number % FRAMES] for number in range(60)), programs=programs)
    s.add(1, points=[(2, 3)])
    for result in s.run():
        if result.frame % 10 == 9 and result.frame < 50:
            s.add(1, frame=result.frame + 2, box=(1, 1, 4, 5))
    works = [work for work in programs.works if isinstance(work, Prompted)]
    assert [bool(work.initial[0]) for work in works] == [True] * 6
    assert [work.bank.conditioning for work in works] == [1, 2, 4, 4, 4, 4]
    assert len(s.steps.memory.conditioning) <= 5 and len(s.steps.memory.stored) <= 1


def test_work_is_sent_back_to_who_asked_for_it():
    def asks(number):
        got = yield Encode(np.full((1, 2, 2, 3), number, np.float32))
        assert float(got.image.mean()) == number

    assert list(_drive(StandIn(), [asks(number) for number in range(3)])) == []  # pyright: ignore


def test_a_saved_session_that_cannot_be_used_is_refused(tmp_path):
    file = tmp_path / "state.npz"
    s = session()
    with pytest.raises(UserError, match="cannot be read"):
        s.restore(file)
    s.add(1, points=[(2, 3)])
    s.save(file)
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged"):
        s.restore(file)
    file.write_bytes(data)
    with pytest.raises(UserError, match="frames come once"):
        session(iter(frames())).restore(file)
    s.restore(file)
    other = session()
    other.steps.config = jax.tree.map(lambda x: x, tiny.config().with_image_size(64))
    with pytest.raises(UserError, match="another model"):
        other.restore(file)
    waiting = session(iter(frames()))
    waiting.add(1, frame=7, points=[(1, 1)])
    with pytest.raises(UserError, match="frame 7 has a prompt and has not come yet"):
        waiting.save(file)
