"""The memory bank against dictionaries of frames as the original keeps them."""

from dataclasses import dataclass, field, replace
from functools import cache, partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.on_devices import printed_on
from tests.segmentation.bank_on_mesh import TINY, content, entry, tracked
from tests.vision.sam_reference import error
from tracevision_jax.errors import UserError
from tracevision_jax.ops.sine_position import sine_position
from tracevision_jax.segmentation import memory_bank
from tracevision_jax.segmentation.memory_attention import MemoryConditioning
from tracevision_jax.segmentation.memory_bank import MemoryReading, empty
from tracevision_jax.segmentation.sam_config import HEADS_PRESETS, MemoryConfig

insert = jax.jit(memory_bank.insert)
read = jax.jit(memory_bank.read, static_argnames=("config", "video_frames"))
YES = jnp.array([True])


@dataclass
class Dictionaries:
    """One object's frames as the original keeps them (sam2_base.py): everything, by number."""

    config: MemoryConfig
    conditioning: dict[int, tuple[float, float]] = field(default_factory=dict)
    recent: dict[int, tuple[float, float]] = field(default_factory=dict)

    def insert(self, time: int, conditioning: bool) -> None:
        if conditioning:
            self.conditioning[time] = content(time)
            self.recent.pop(time, None)
        elif time not in self.conditioning:
            self.recent[time] = content(time)

    def read(self, time: int, reverse: bool, video_frames: int | None) -> tuple[list, list]:
        """[(steps back or 0, memory)], [(distance, pointer)]."""
        c = self.config
        chosen = self._selected(time)
        rest = {t: x for t, x in self.conditioning.items() if t not in chosen}
        memories = [(0, x[0]) for x in chosen.values()]
        for step in range(1, c.frames):
            stride = c.frame_stride
            if step == 1:
                wanted = time + 1 if reverse else time - 1
            elif reverse:
                wanted = -(-(time + 2) // stride) * stride + (step - 2) * stride
            else:
                wanted = (time - 2) // stride * stride - (step - 2) * stride
            found = self.recent.get(wanted, rest.get(wanted))
            if found is not None:
                memories.append((step, found[0]))

        sign = -1 if reverse else 1
        limit = c.max_pointers if video_frames is None else min(video_frames, c.max_pointers)
        eligible = chosen if c.pointers_follow_selection else self.conditioning
        pointers = []
        for t, x in eligible.items():
            distance = (time - t) * sign
            if distance >= 0 or not c.only_past_pointers:
                pointers.append((distance if c.signed_pointer_times else abs(distance), x[1]))
        for distance in range(1, limit):
            t = time - sign * distance
            found = self.recent.get(t, rest.get(t) if c.pointers_follow_selection else None)
            if found is not None:
                pointers.append((distance, found[1]))
        return sorted(memories), sorted((round(d / max(limit - 1, 1), 5), x) for d, x in pointers)

    def _selected(self, time: int) -> dict[int, tuple[float, float]]:
        limit, kept = self.config.max_conditioning, self.conditioning
        if limit is None or len(kept) <= limit:
            return dict(kept)
        before = [t for t in kept if t < time]
        after = [t for t in kept if t >= time]
        chosen = ([max(before)] if before else []) + ([min(after)] if after else [])
        others = sorted((t for t in kept if t not in chosen), key=lambda t: abs(t - time))
        return {t: kept[t] for t in chosen + others[: limit - len(chosen)]}


def seen(reading: MemoryReading, thing: int = 0) -> tuple[list, list]:
    """What an object sees, in the form of `Dictionaries.read`."""
    there = np.asarray(reading.memory_visible[thing])
    steps = np.asarray(reading.memory_steps[thing])[there].tolist()
    memories = np.asarray(reading.memories[thing], np.float32)[there]
    assert (memories == memories[:, :1, :1, :1]).all()
    there = np.asarray(reading.pointer_visible[thing])
    distances = [round(float(d), 5) for d in np.asarray(reading.pointer_distances[thing])[there]]
    pointers = np.asarray(reading.pointers[thing])[there]
    return (
        sorted(zip(steps, memories[:, 0, 0, 0].tolist(), strict=True)),
        sorted(zip(distances, pointers[:, 0].tolist(), strict=True)),
    )


@cache
def step(config: MemoryConfig, video_frames: int | None):
    """Compiled: read at a time, then insert."""

    def run(bank, time, reverse, conditioning):
        reading = memory_bank.read(bank, time, config, reverse=reverse, video_frames=video_frames)
        things = len(bank.memory_times)
        return reading, memory_bank.insert(bank, time, *entry(config, time, things), conditioning)

    return jax.jit(run)


def assert_same(found, wanted) -> None:
    """Fail unless two trees hold the same numbers."""
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


FORWARD = [(t, False, t in (2, 3, 9)) for t in range(2, 14)]
BACKWARD = [(t, True, t in (1, 4)) for t in range(9, -1, -1)]


@pytest.mark.parametrize(
    ("changes", "video_frames"),
    [
        ({}, None),
        ({}, 4),
        ({"max_conditioning": 2}, None),
        ({"max_conditioning": 3}, 14),
        ({"max_conditioning": 2, "pointers_follow_selection": False}, None),
        ({"max_conditioning": 2, "only_past_pointers": False}, None),
        ({"frame_stride": 3, "signed_pointer_times": False, "only_past_pointers": False}, None),
    ],
)
def test_a_frame_sees_what_it_sees_in_the_original(changes, video_frames):
    """Forwards, then backwards over the same frames, with conditioning frames on the way, past and to come."""
    config = replace(TINY, **changes)
    bank = empty(config, 1, 1, 1, conditioning=6, recent=14, recent_pointers=14)
    original = Dictionaries(config)
    for time, reverse, conditioning in [(12, False, True), *FORWARD, *BACKWARD]:
        reading, after = step(config, video_frames)(bank, time, reverse, jnp.array([conditioning]))
        assert seen(reading) == original.read(time, reverse, video_frames), (time, reverse)
        original.insert(time, conditioning)
        bank = after
    assert sorted(original.conditioning) == sorted(np.asarray(bank.memory_times)[0, :6][bank.memory_valid[0, :6]])


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_the_default_size_is_enough_for_one_direction(stride):
    config = replace(TINY, frame_stride=stride)
    for times in (range(20), range(40, 20, -1)):
        bank, original = empty(config, 1, 1, 1, conditioning=1), Dictionaries(config)
        for time in times:
            reverse = times[0] > times[-1]
            reading, bank = step(config, None)(bank, time, reverse, jnp.array([time == times[0]]))
            assert seen(reading) == original.read(time, reverse, None), time
            original.insert(time, time == times[0])
    slots = bank.memory_times.shape[1], bank.pointer_times.shape[1]
    assert slots == (1 + (config.frames - 2) * stride + 1, 1 + config.max_pointers - 1)


def test_an_empty_bank_shows_nothing():
    bank = empty(TINY, 2, 1, 1, conditioning=3)
    for reverse in (False, True):
        reading = read(bank, 0, config=TINY, reverse=reverse)
        assert not reading.memory_visible.any() and not reading.pointer_visible.any()
        assert not reading.any_memory.any()


def test_beyond_capacity_the_first_conditioning_frame_and_the_nearest_stay():
    bank = empty(TINY, 1, 1, 1, conditioning=3)
    kept = []
    for time in (10, 20, 30, 40, 0, 38):
        bank = step(TINY, None)(bank, time, False, YES)[1]
        kept.append(sorted(np.asarray(bank.memory_times[0, :3])[np.asarray(bank.memory_valid[0, :3])].tolist()))
    assert kept == [[10], [10, 20], [10, 20, 30], [10, 30, 40], [0, 10, 30], [10, 30, 38]]
    one = empty(TINY, 1, 1, 1, conditioning=1)
    for time in (5, 9):
        one = insert(one, time, *entry(TINY, time, 1), YES)
    assert seen(read(one, 10, config=TINY))[0] == [(0, content(9)[0])]


def test_a_frame_stands_in_one_place():
    bank = empty(TINY, 1, 1, 1, conditioning=2)
    bank = insert(bank, 3, *entry(TINY, 3, 1), YES)
    bank = insert(bank, 4, *entry(TINY, 4, 1))
    again = insert(bank, 4, *entry(TINY, 40, 1))
    assert seen(read(again, 5, config=TINY))[0] == [(0, content(3)[0]), (1, content(40)[0])]
    promoted = insert(bank, 4, *entry(TINY, 41, 1), YES)
    assert seen(read(promoted, 5, config=TINY))[0] == [(0, content(3)[0]), (0, content(41)[0])]
    ignored = insert(bank, 3, *entry(TINY, 42, 1))
    assert_same(ignored, bank)


def test_objects_keep_to_themselves():
    bank = empty(TINY, 3, 1, 1, conditioning=2)
    bank = insert(bank, 0, *entry(TINY, 0, 3), jnp.array([True, False, False]), jnp.array([True, False, False]))
    bank = insert(bank, 1, *entry(TINY, 1, 3), jnp.array([False, True, False]), jnp.array([True, True, False]))
    reading = read(bank, 2, config=TINY)
    assert seen(reading, 0)[0] == [(0, 1.0), (1, 2.0)]
    assert seen(reading, 1)[0] == [(0, 102.0)]
    assert seen(reading, 2) == ([], [])
    assert reading.any_memory.tolist() == [True, True, False]


def test_a_scan_over_frames_and_videos_side_by_side_are_frames_one_by_one():
    config, start = TINY, empty(TINY, 2, 1, 1, conditioning=1)
    times, reverse = jnp.stack([jnp.arange(12), jnp.arange(30, 18, -1)]), jnp.array([False, True])
    banks = jax.tree.map(lambda x: jnp.stack([x, x]), start)
    videos = jax.jit(jax.vmap(partial(tracked, config=config)))
    last, readings = videos(banks, times=times, reverse=reverse)
    for video in range(2):
        bank = start
        for index, time in enumerate(times[video]):
            first = jnp.full(2, index == 0)
            reading, bank = step(config, None)(bank, time, reverse[video], first)
            assert_same(jax.tree.map(itemgetter((video, index)), readings), reading)
        assert_same(jax.tree.map(itemgetter(video), last), bank)


def test_banks_are_split_over_objects_and_videos_without_moving_data():
    found = printed_on(4, "tests.segmentation.bank_on_mesh")
    assert found == {"devices": 4, "equal": True, "share": 0.25, "collectives": []}


ATTENDING = replace(
    TINY, width=32, memory_width=16, frames=5, layers=2, mlp_width=24, max_pointers=6, max_conditioning=2
)
SIDE = 3


@cache
def conditioning():
    """Compiled memory attention with drawn weights: from a reading of one video to features."""
    module, position = MemoryConditioning(ATTENDING), sine_position(SIDE, SIDE, ATTENDING.width)
    features = draw(1, 1, SIDE, SIDE, ATTENDING.width)[0]
    reading = jax.tree.map(lambda x: x[None], read(empty(ATTENDING, 1, SIDE, SIDE), 0, config=ATTENDING))
    shapes = jax.eval_shape(module.init, jax.random.key(0), features, position, reading)
    rng = np.random.default_rng(4)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape) / max(x.shape[-1], 1) ** 0.5 + (x.ndim == 1), jnp.float32),
        shapes,
    )
    apply = jax.jit(module.apply)
    return lambda reading: apply(params, features, position, jax.tree.map(lambda x: x[None], reading))[0, 0], (
        features[0] + params["params"]["no_memory_embedding"][0, 0]
    )


def draw(things: int, *shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((things, *shape)), jnp.float32)


@pytest.mark.parametrize("frames", [1, 3, 9])
def test_reading_a_partly_filled_bank_is_reading_its_entries_alone(frames):
    """To 1e-6: the attention over fixed shapes with hidden keys, and over the present entries without any."""
    bank = empty(ATTENDING, 1, SIDE, SIDE, conditioning=3)
    for time in range(frames):
        shape = (SIDE, SIDE, ATTENDING.memory_width)
        given = draw(1, *shape, seed=time), draw(1, ATTENDING.width, seed=time + 50)
        bank = insert(bank, time, *given, jnp.array([time in (0, 4, 5)]))
    reading = read(bank, frames, config=ATTENDING)
    memories, pointers = reading.memory_visible[0], reading.pointer_visible[0]
    assert int(memories.sum()) < len(memories) or frames == 9
    alone = MemoryReading(
        *(x[:, memories] for x in (reading.memories, reading.memory_steps, reading.memory_visible)),
        *(x[:, pointers] for x in (reading.pointers, reading.pointer_distances, reading.pointer_visible)),
    )
    assert alone.memory_visible.all() and alone.pointer_visible.all()
    run, without = conditioning()
    found, wanted = run(reading), run(alone)
    print(f"{frames} frames, {int(memories.sum())} memories: {error(found, wanted):.1e}")
    assert error(found, wanted) <= 1e-6
    assert error(found, without) > 1e-2


def test_reading_an_empty_bank_is_having_no_memory():
    run, without = conditioning()
    assert np.array_equal(run(read(empty(ATTENDING, 1, SIDE, SIDE, conditioning=3), 5, config=ATTENDING)), without)


@pytest.mark.parametrize("release", ["sam2", "sam2.1"])
def test_an_objects_bank_of_the_released_size_is_small(release):
    config = HEADS_PRESETS[release].memory
    assert config is not None
    bank = jax.eval_shape(lambda: empty(config, 1, 64, 64, conditioning=1))
    assert bank.memories.shape == (1, 7, 64, 64, 64) and bank.memories.dtype == jnp.bfloat16
    assert bank.pointers.shape == (1, 16, 256)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(bank))
    assert size < 4e6, size


def test_a_bank_without_slots_is_refused():
    with pytest.raises(UserError, match="0 conditioning frames"):
        empty(TINY, 1, 1, 1, conditioning=0)
