"""One video's objects while they are tracked: prompts at any moment, results as they come, in constant memory.

See `tracker.py` for how it is used. A session computes nothing itself: its methods that need the model are generators
that give out work (`tracker_steps.Work`) and are sent what came of it, so that sessions of several videos can have
their work done in one program (`tracker.run_together`).

Tracking runs a batch of frames ahead of what is handed out. When something is said in between, what was not handed out
is tracked anew: the bank before the batch is kept, and brought to the frame handed out last. So nothing depends on
where batches end.
"""

import contextlib
from collections import OrderedDict, defaultdict
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from tracevision_jax.errors import UserError
from tracevision_jax.hosts.sam2_video import new_bank
from tracevision_jax.inference.buckets import power_of_two
from tracevision_jax.inference.frames import FrameSource
from tracevision_jax.inference.tracker_feed import Feed, Group
from tracevision_jax.inference.tracker_prompts import Prompt, Said, check_prompt, frame_prompts, square_mask, together
from tracevision_jax.inference.tracker_results import Found, TrackedFrame
from tracevision_jax.inference.tracker_steps import (
    UNKNOWN_LENGTH,
    Prompted,
    Track,
    Work,
    cleared,
    resized,
)
from tracevision_jax.segmentation.memory_bank import MemoryBank

Steps = Generator[Work | TrackedFrame, Any, None]
"""Work to be done, whose result is sent back, and results to be handed out."""


class Place(NamedTuple):
    """Where tracking goes on."""

    frame: int
    reverse: bool


@dataclass
class _Ahead:
    """Frames that were tracked together, and how many of them were handed out."""

    work: Track
    write: Bool[np.ndarray, "frames objects"]
    """As in the work."""
    handed: int = 0


@dataclass
class Memory:
    """All that a session knows of its objects: what is saved, and loaded to go on."""

    rows: dict[int, int] = field(default_factory=dict)
    """Row of the bank of each object."""
    bank: MemoryBank | None = None
    stored: defaultdict[int, dict[int, Found]] = field(default_factory=lambda: defaultdict(dict))
    """Results that prompts gave, by frame and object."""
    conditioning: set[tuple[int, int]] = field(default_factory=set)
    """(frame, object) where the frame is a conditioning one."""
    said: dict[tuple[int, int], Prompt] = field(default_factory=dict)
    """(frame, object): all that was said, which further clicks add to."""
    recent: OrderedDict[int, dict[int, Found]] = field(default_factory=OrderedDict)
    """Results of the frames tracked last, which clicks can correct."""
    place: Place | None = None

    def forget(self, number: int) -> None:
        """Drop everything about an object."""
        self.rows.pop(number, None)
        for results in (*self.stored.values(), *self.recent.values()):
            results.pop(number, None)
        self.conditioning = {key for key in self.conditioning if key[1] != number}
        self.said = {key: prompt for key, prompt in self.said.items() if key[1] != number}

    def forget_frames_before(self, frame: int, kept: int) -> None:
        """Drop what was said of early frames, but for the last `kept` conditioning frames of each object."""
        for early in [number for number in self.stored if number < frame]:
            del self.stored[early]
        for number in self.rows:
            early = sorted(key for key in self.conditioning if key[1] == number and key[0] < frame)
            self.conditioning.difference_update(early[:-kept])
        self.said = {key: prompt for key, prompt in self.said.items() if key[0] >= frame}


class SessionSteps:
    """What a session does, as steps; `tracker.Session` lets them be done."""

    def __init__(
        self,
        config: Any,
        source: FrameSource,
        feed: Feed,
        buckets: tuple[int, ...],
        key_frames: int,
        remember: int | None,
    ):
        memory = config.video_memory()
        self.source, self.feed, self.buckets, self.key_frames = source, feed, buckets, key_frames
        self.config, self._mask_size = config, config.mask_size
        window = (memory.frames - 2) * memory.frame_stride + 1
        self._remember = window if remember is None else max(window, remember)
        self._pointers = max(memory.max_pointers - 1, 0 if remember is None else remember)
        self.memory = Memory()
        self.waiting: dict[int, dict[int, Prompt]] = {}
        """Prompts that the model was not given yet, by frame and object."""
        self._ahead: _Ahead | None = None
        self._changes = 0
        self.least_bucket = 1
        """Rows that the bank has at least."""

    @property
    def objects(self) -> list[int]:
        """Numbers of all objects, those that wait for their first frame included."""
        waiting = {number for said in self.waiting.values() for number in said}
        return sorted({*self.memory.rows, *waiting})

    def say(self, number: int, frame: int, points: Any, box: Any, mask: Any) -> None:
        """Check a prompt and let it wait; errors as `tracker.Session.add`."""
        where = f"object {number}, frame {frame}"
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
            raise UserError(f"an object's number must be 1 or more, not {number!r}")
        self._check_frame(frame, where)
        prompt = check_prompt(self.feed.size(), points, box, mask, where)
        known = self.objects
        if prompt.mask_binary is not None and self.feed.fitting is not None:
            if not prompt.mask_binary.any() and number not in known:
                raise UserError(f"{where}: the mask is empty, so there is nothing to track")
            square_mask(prompt.mask_binary, self.feed.fitting, where)
        if number not in known and len(known) == self.buckets[-1]:
            raise UserError(
                f"{where}: {len(known)} objects are tracked already, the most that this tracker takes; remove some, "
                "track in several sessions, or load it with larger buckets"
            )
        waiting = self.waiting.setdefault(int(frame), {})
        waiting[int(number)] = together(waiting.get(int(number)), prompt)
        self._changes += 1

    def _check_frame(self, frame: int, where: str) -> None:
        length = self.source.length
        if isinstance(frame, bool) or not isinstance(frame, int | np.integer) or frame < 0:
            raise UserError(f"{where}: a frame's number is 0 or more")
        if length is not None and frame >= length:
            raise UserError(f"{where}: there is no such frame; {self.source.name} has frames 0 to {length - 1}")
        if not self.feed.holds(frame // self.feed.batch):
            raise UserError(
                f"{where}: that frame of {self.source.name} has passed, and only the last ones are kept; say it while "
                "the frame is at hand, or let more frames be cached (cache_frames)"
            )

    def drop(self, number: int) -> None:
        """Forget an object; errors as `tracker.Session.remove`."""
        if number not in self.objects:
            raise UserError(f"there is no object {number} to remove; there are {self.objects}")
        self.memory.forget(number)
        for frame in list(self.waiting):
            self.waiting[frame].pop(number, None)
            if not self.waiting[frame]:
                del self.waiting[frame]

    def forget_all(self) -> Memory:
        """Begin without objects, where one is; gives the memory that is now empty."""
        self.memory = Memory(place=self.memory.place if not self.source.again else None)
        self.waiting.clear()
        self._ahead = None
        self._changes += 1
        return self.memory

    @property
    def at_rest(self) -> bool:
        """Whether all that was tracked was handed out."""
        return self._ahead is None or not self._ahead.write[self._ahead.handed :].any()

    def first_prompted(self) -> int | None:
        """The first frame with a prompt."""
        return min((*self.waiting, *(frame for frame, _ in self.memory.conditioning)), default=None)

    # Steps

    def run(self, start: int, stop: int | None, reverse: bool) -> Steps:
        """Track from a frame on, up to `stop`, exclusively, or the end of the video."""
        step, position, batch = -1 if reverse else 1, start, self.feed.batch
        self.memory.place = Place(start, reverse)
        while position >= 0 and (stop is None or (position - stop) * step < 0):
            yield from self.settle()
            group = yield from self.feed.group(position // batch, reverse, going_on=True)
            if not _holds(group, position % batch):
                break
            times = self._stretch(group, position, stop, step)
            outcome = yield from self._track(group, times, reverse)
            following = group.number + step
            if following >= 0 and self.feed.at_hand(following):
                # While the device tracks. A frame that cannot be read is told when it is asked for again.
                with contextlib.suppress(Exception):
                    yield from self.feed.group(following, reverse, going_on=True)
            host, changes = None if outcome is None else jax.device_get(outcome), self._changes
            for order, time in enumerate(times):
                found = self._found(host, order, time)
                self._remember_found(time, found)
                position = time + step
                self.memory.place = Place(position, reverse)
                if self._ahead is not None:
                    self._ahead.handed = order + 1
                yield TrackedFrame(time, group.images[time % batch], found, self._fitting)
                if self._changes != changes:
                    break
        self._check_nothing_waits(reverse)

    def settle(self) -> Generator[Work, Any, None]:
        """Bring the bank to the frame that was handed out last, and give the model all prompts that can be given."""
        yield from self._rewind()
        place = self.memory.place or Place(0, False)
        ready = [frame for frame in self.waiting if self.source.again or frame <= place.frame]
        self._make_room([(frame, number) for frame in ready for number in self.waiting[frame]])
        for frame in ready:
            group = yield from self.feed.group(frame // self.feed.batch)
            if not _holds(group, frame % self.feed.batch):
                break  # a stream that ended: told when its last frame was handed out
            yield from self._prompt(group, frame, self.waiting[frame], place.reverse)
            del self.waiting[frame]
            self._changes += 1

    def prompted_frame(self, frame: int) -> Steps:
        """What the prompts on a frame gave."""
        yield from self.settle()
        group = yield from self.feed.group(frame // self.feed.batch)
        if not _holds(group, frame % self.feed.batch) or not self.memory.stored.get(frame):
            raise UserError(f"frame {frame} has no prompt to show the result of")
        image = group.images[frame % self.feed.batch]
        yield TrackedFrame(frame, image, dict(self.memory.stored[frame]), self._fitting)

    def _stretch(self, group: Group, position: int, stop: int | None, step: int) -> list[int]:
        """Frames of a batch to be tracked at once: up to where a prompt waits for its frame to come."""
        first = group.number * self.feed.batch
        end = first + len(group.images) if step > 0 else first - 1
        if stop is not None:
            end = min(end, stop) if step > 0 else max(end, stop)
        if step > 0 and not self.source.again:
            end = min([end, *(frame for frame in self.waiting if frame > position)])
        return list(range(position, end, step))

    def _track(self, group: Group, times: list[int], reverse: bool) -> Generator[Work, Any, Any]:
        bank, rows = self.memory.bank, self.memory.rows
        self._ahead = None
        if bank is None or not rows:
            return None
        batch, objects = self.feed.batch, len(bank.memory_times)
        write = np.zeros((batch, objects), bool)
        for order, time in enumerate(times):
            for number, row in rows.items():
                write[order, row] = number not in self.memory.stored.get(time, {})
        padded = np.array(times + [times[-1]] * (batch - len(times)), np.int32)
        first = group.number * batch
        assert group.maps is not None
        order, times_of = jnp.asarray(padded - first), jnp.asarray(padded)
        work = Track(group.maps, bank, order, times_of, jnp.asarray(write), jnp.asarray(reverse), self._video_frames)
        self._ahead = _Ahead(work, write)
        outcome, self.memory.bank = yield work
        return outcome

    def _rewind(self) -> Generator[Work, Any, None]:
        """Take back what was tracked but not handed out."""
        at_rest, ahead, self._ahead = self.at_rest, self._ahead, None
        if at_rest or ahead is None:
            return
        write = ahead.write.copy()
        write[ahead.handed :] = False
        _, self.memory.bank = yield ahead.work._replace(write=jnp.asarray(write))
        self._changes += 1

    def _make_room(self, coming: list[tuple[int, int]]) -> None:
        """Rows for new objects and slots for their conditioning frames; the bank grows to the next bucket."""
        memory = self.memory
        new = sorted({number for _, number in coming} - set(memory.rows))
        needed = max(self.least_bucket, len(memory.rows) + len(new))
        bucket = next(size for size in self.buckets if size >= needed)
        frames = memory.conditioning | {key for key in coming if self._begins(*key)}
        most = max((sum(1 for _, other in frames if other == number) for _, number in frames), default=1)
        slots = min(self.key_frames, power_of_two(max(1, most)))
        bank = memory.bank
        if bank is not None:
            bucket, slots = max(bucket, len(bank.memory_times)), max(slots, bank.conditioning)
        if bank is None or (bucket, slots) != (len(bank.memory_times), bank.conditioning):
            options: dict[str, Any] = {"recent": self._remember, "recent_pointers": self._pointers}
            empty = new_bank(self.config, bucket, conditioning=slots, **options)
            memory.bank = empty if bank is None else resized(bank, empty)
        if new and memory.bank is not None:
            free = [row for row in range(bucket) if row not in memory.rows.values()]
            memory.rows.update(zip(new, free, strict=False))
            fresh = np.isin(np.arange(bucket), [memory.rows[number] for number in new])
            memory.bank = cleared(memory.bank, fresh)

    def _begins(self, frame: int, number: int) -> bool:
        """Whether a prompt on a frame makes a conditioning frame, or corrects what was tracked there."""
        return (frame, number) in self.memory.conditioning or number not in self.memory.recent.get(frame, {})

    def _prompt(
        self, group: Group, frame: int, prompts: Mapping[int, Prompt], reverse: bool
    ) -> Generator[Work, Any, None]:
        memory, bank = self.memory, self.memory.bank
        assert bank is not None and group.maps is not None
        objects = len(bank.memory_times)
        said, initial = {}, np.zeros(objects, bool)
        for number, prompt in prompts.items():
            key, row = (frame, number), memory.rows[number]
            memory.said[key] = together(memory.said.get(key), prompt)
            before = memory.stored.get(frame, {}).get(number) or memory.recent.get(frame, {}).get(number)
            said[row] = Said(memory.said[key], None if before is None else before.logits)
            initial[row] = self._begins(frame, number)
        work = Prompted(
            group.maps,
            bank,
            jnp.asarray(frame % self.feed.batch, jnp.int32),
            jnp.asarray(frame, jnp.int32),
            frame_prompts(said, objects, self._fitting, self._mask_size),
            jnp.asarray(initial),
            jnp.asarray(initial),
            jnp.asarray(reverse),
            self._video_frames,
        )
        outcome, memory.bank = yield work
        host = jax.device_get(outcome)
        for number in prompts:
            row = memory.rows[number]
            memory.stored[frame][number] = _found_of(host, row)
            if initial[row]:
                memory.conditioning.add((frame, number))

    def _found(self, host: Any, order: int, time: int) -> dict[int, Found]:
        """Results of a frame: what prompts gave there, else what was tracked."""
        stored = self.memory.stored.get(time, {})
        if host is None:
            return dict(stored)
        tracked = jax.tree.map(lambda x: x[order], host)
        return {number: stored.get(number) or _found_of(tracked, row) for number, row in self.memory.rows.items()}

    def _remember_found(self, time: int, found: dict[int, Found]) -> None:
        recent = self.memory.recent
        recent.pop(time, None)
        recent[time] = dict(found)
        while len(recent) > self._remember:
            recent.popitem(last=False)
        if not self.source.again:
            self.memory.forget_frames_before(time - self._remember, self.key_frames)

    def _check_nothing_waits(self, reverse: bool) -> None:
        if self.waiting and not reverse and not self.source.again:
            frame, last = min(self.waiting), (self.memory.place or Place(0, False)).frame
            raise UserError(
                f"frame {frame} has a prompt, but {self.source.name} ended after {last} frames, 0 to {last - 1}"
            )

    @property
    def _fitting(self) -> Any:
        return self.feed.fitting

    @property
    def _video_frames(self) -> jax.Array:
        length = self.source.length
        return jnp.asarray(UNKNOWN_LENGTH if length is None else length, jnp.int32)


def _holds(group: Group | None, place: int) -> TypeGuard[Group]:
    """Whether a batch has a frame at a place. Raises what prevented it, where something did."""
    if group is not None and place >= len(group.images) and group.failure is not None:
        raise group.failure
    return group is not None and place < len(group.images)


def _found_of(outcome: Any, row: int) -> Found:
    """An object's result; copied, so that those of the batch can go."""
    return Found(outcome.logits[row].copy(), float(outcome.ious[row]), float(outcome.object_logits[row]))
