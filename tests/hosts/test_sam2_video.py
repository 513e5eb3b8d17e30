"""Videos with SAM 2 from pixels on: every frame from the reference's own memory, scans, batches of videos, options."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.hosts.sam_reference import SIDE, WHOLE, Oracle, Told, disc, drawn_video, small_config, whole_parameters
from tests.vision.sam_reference import error
from tracevision_jax.errors import UserError
from tracevision_jax.hosts.sam import Prompts, SegmentAnything
from tracevision_jax.hosts.sam2_video import (
    Frame,
    FramePrompts,
    encode,
    frame_of,
    new_bank,
    prompted_step,
    propagate,
    propagate_step,
    without_overlap,
)
from tracevision_jax.segmentation.memory_bank import read
from tracevision_jax.segmentation.prompt_encoder import ABSENT, NOT_A_POINT
from tracevision_jax.weights.engine import flatten, unflatten

FRAMES, THINGS, SLOTS = 24, 3, 3
START, SECOND, CORRECTED = 4, 14, 18
"""Frames with prompts: of all objects; of two; and a click that corrects a frame which was tracked before."""
CLICK = [[40.0, 70.0]], [1]
BOX = [[20.0, 30.0], [90.0, 100.0]], [2, 3]
BOX_AND_CLICK = [[30.0, 8.0], [110.0, 90.0], [44.0, 60.0]], [2, 3, 0]
CLICKS = [[64.0, 50.0], [20.0, 20.0]], [1, 0]


@cache
def programs(release: str):
    """Compiled: (encode, a frame with prompts, a frame without), and how often each was traced."""
    model, traces = SegmentAnything(small_config(release)), []

    def counted(name: str, function):
        def run(*given, **named):
            traces.append(name)
            return function(model, *given, **named)

        return jax.jit(run)

    steps = [counted(step.__name__, partial(step, video_frames=FRAMES)) for step in (prompted_step, propagate_step)]
    return (counted("encode", encode), *steps, traces)


def said(points: dict[int, tuple[list, list]], masks: dict[int, np.ndarray] | None = None) -> FramePrompts:
    """Prompts of a frame by object, always of the same shape."""
    places, labels = np.full((THINGS, SLOTS, 2), 77.0, np.float32), np.full((THINGS, SLOTS), ABSENT, np.int32)
    drawn, has_mask = np.zeros((THINGS, SIDE, SIDE), np.float32), np.zeros(THINGS, bool)
    for thing, (where, what) in points.items():
        places[thing, : len(where)], labels[thing, : len(what)] = where, what
    for thing, mask in (masks or {}).items():
        drawn[thing], has_mask[thing] = mask, True
    return FramePrompts(*map(jnp.asarray, (places, labels, drawn, has_mask)))


class Errors:
    """What was compared: our errors beside the reference's own."""

    def __init__(self) -> None:
        self.worst, self.floor = dict.fromkeys(Told._fields, 0.0), dict.fromkeys(Told._fields, 0.0)
        self.present: list[bool] = []

    def compare(self, label: str, found: Frame, told: list[list[Told]]) -> None:
        """One frame of all objects; what a bank keeps from before is passed over."""
        for thing, (narrow, exact) in enumerate(zip(*told, strict=True)):
            assert bool(found.settled[thing]) == (exact.memory is None), (label, thing)
            if exact.memory is None or narrow.memory is None:
                continue
            assert found.memories is not None
            ours = Told(*(np.asarray(x[thing]) for x in (*found[:1], *found[2:4], found.memories)), kept=narrow.kept)
            for name in ("masks", "score", "pointer", "memory"):
                measured, floor = (error(getattr(x, name), getattr(exact, name)) for x in (ours, narrow))
                self.worst[name], self.floor[name] = max(self.worst[name], measured), max(self.floor[name], floor)
                assert measured <= WHOLE, (label, thing, name, measured, floor)
            # It keeps bfloat16: values on the edge between two of them may fall to either side.
            rounded = np.asarray(jnp.asarray(ours.memory).astype(jnp.bfloat16), np.float32)
            assert np.mean(rounded != narrow.kept) < 1e-2, (label, thing)
            self.present.append(bool(exact.score > 0))


@pytest.mark.parametrize("release", ["sam2.1", "sam2"])
def test_every_frame_from_the_references_memory_gives_what_the_reference_gives(release):
    """Clicks, boxes, masks (an empty one too); a second conditioning frame; a correction; forwards, then backwards."""
    pixels, errors = drawn_video(FRAMES), Errors()
    encode_frames, with_prompts, without, traces = programs(release)
    traced_before = len(traces)
    oracle = Oracle(release, pixels, THINGS)
    maps = encode_frames(whole_parameters(release), pixels)

    def prompt(time: int, prompts: FramePrompts, who: tuple[int, ...], initial: tuple[int, ...], score: float) -> None:
        params, bank = oracle.force(score), oracle.bank
        first = jnp.asarray([thing in initial for thing in range(THINGS)])
        # The reference tracks the others on such a frame, and makes the masks of all binary.
        everyone = jnp.ones(THINGS, bool)
        found, _ = with_prompts(
            params, frame_of(maps, time), bank, time, prompts, initial=first, binary=everyone, write=everyone
        )
        errors.compare(f"prompts on frame {time}", found, oracle.run(time, who))

    def track(times, reverse: bool) -> None:
        for time in times:
            params, bank = oracle.force(-9.0 if time % 3 == 2 else 9.0), oracle.bank
            found, _ = without(params, frame_of(maps, time), bank, time, reverse=reverse)
            errors.compare(f"frame {time}, reverse {reverse}", found, oracle.run(time, reverse=reverse))

    oracle.add_points(0, START, *CLICK)
    oracle.add_mask(1, START, disc(50, 80, 30))
    oracle.add_points(2, START, *BOX_AND_CLICK)
    prompt(START, said({0: CLICK, 2: BOX_AND_CLICK}, {1: disc(50, 80, 30)}), (0, 1, 2), (0, 1, 2), 9.0)
    oracle.add_points(0, SECOND, *BOX)
    oracle.add_mask(1, SECOND, disc(0, 0, 0))
    prompt(SECOND, said({0: BOX}, {1: disc(0, 0, 0)}), (0, 1), (0, 1), -9.0)
    track(range(START + 1, FRAMES), False)
    oracle.add_points(2, CORRECTED, *CLICKS)
    prompt(CORRECTED, said({2: CLICKS}), (2,), (), 9.0)
    track(range(SECOND - 1, -1, -1), True)

    for name in ("masks", "score", "pointer", "memory"):
        print(f"{release}, {name}: largest error {errors.worst[name]:.1e}, floor {errors.floor[name]:.1e}")
    print(f"{release}: {len(errors.present)} frames of objects, {sum(errors.present)} of them with the object")
    assert len(errors.present) == 3 + 3 + (19 * 3 - 2) + 3 + (14 * 3 - 3)
    traced = traces[traced_before:]  # programs are shared with other tests, which may come first
    assert len(traced) == len(set(traced)), "nothing is compiled twice"
    assert 30 < sum(errors.present) < 75


@cache
def started():
    """(maps of a video, a bank in which three objects were prompted on frame 0: one by points, two by masks)."""
    encode_frames, with_prompts, _, _ = programs("sam2.1")
    params = whole_parameters("sam2.1")
    maps = encode_frames(params, drawn_video(FRAMES))
    bank = new_bank(small_config("sam2.1"), THINGS, conditioning=2)
    prompts = said({0: BOX_AND_CLICK}, {1: disc(50, 80, 30), 2: disc(0, 0, 0)})
    everyone = jnp.ones(THINGS, bool)
    return maps, *with_prompts(
        params, frame_of(maps, 0), bank, 0, prompts, initial=everyone, binary=everyone, write=everyone
    )


def at(tree, index):
    """One of all leading axes, or several."""
    return jax.tree.map(lambda x: x[index], tree)


def results(frame: Frame) -> list[np.ndarray]:
    """All numbers but the memories, which `propagate` leaves out."""
    return [np.asarray(x) for x in frame[:4]]


def same(found, wanted, tolerance: float = 1e-5) -> None:
    """Two results or banks agree; whole numbers and flags exactly."""
    for ours, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        if ours.dtype in (jnp.int32, bool):
            np.testing.assert_array_equal(ours, other)
        else:
            assert error(np.asarray(ours, np.float32), np.asarray(other, np.float32)) <= tolerance


@cache
def clip():
    """Compiled: encode frames and track through them."""
    model, traces = SegmentAnything(small_config("sam2.1")), []

    @jax.jit
    def run(params, pixels, bank, times, write, reverse):
        traces.append(1)
        maps = encode(model, params, pixels)
        return propagate(model, params, maps, bank, times, write=write, reverse=reverse, video_frames=FRAMES)

    return run, traces


def test_a_scan_over_frames_is_a_loop_of_steps_and_compiles_once():
    """Forwards and backwards; frames that only fill up the batch leave the bank as it was.

    Memories are rounded to bfloat16, on whose edges two programs may differ: each step starts from the scan's own bank.
    """
    run, traces = clip()
    maps, _, before = started()
    _, _, without, _ = programs("sam2.1")
    params, write = whole_parameters("sam2.1"), jnp.array([[True], [True], [True], [False]])
    for times, reverse in ((jnp.arange(1, 5), False), (jnp.array([9, 8, 7, 6]), True)):
        pixels, after = drawn_video(FRAMES)[times], before
        found, bank = run(params, pixels, before, times, write, reverse)
        for index, time in enumerate(times):
            _, so_far = run(params, pixels, before, times, write & (jnp.arange(4) < index)[:, None], reverse)
            same(so_far, after, tolerance=1e-3)
            frame, next_one = without(params, frame_of(maps, time), so_far, time, reverse=reverse)
            same(results(at(found, index)), results(frame))
            assert not frame.settled.any()
            after = next_one if write[index] else so_far
        same(bank, after, tolerance=1e-3)
        assert found.memories is None and bank.memory_valid.sum() == 4 * THINGS
    assert len(traces) == 1


def test_videos_side_by_side_are_each_as_alone():
    """Different frames, banks, times and directions."""
    model, params = SegmentAnything(small_config("sam2.1")), whole_parameters("sam2.1")
    _, _, without, _ = programs("sam2.1")
    maps, _, bank = started()
    other = jax.tree.map(lambda x: x[::-1], bank)  # the same memories, of other objects
    step = partial(propagate_step, model, params, video_frames=FRAMES)
    side_by_side = jax.jit(jax.vmap(lambda maps, bank, time, reverse: step(maps, bank, time, reverse=reverse)))
    frames, times, reverse = jnp.array([3, 11]), jnp.array([1, -2]), jnp.array([False, True])
    banks = jax.tree.map(lambda *x: jnp.stack(x), bank, other)
    found = side_by_side(at(maps, frames), banks, times, reverse)
    for index, alone in enumerate((bank, other)):
        wanted = without(params, frame_of(maps, frames[index]), alone, times[index], reverse=reverse[index])
        same(at(found[0], index), wanted[0])
        same(at(found[1], index), wanted[1], tolerance=1e-3)
    first, second = (at(found[0], index).masks for index in range(2))
    assert error(first, second) > 0.1, "videos that look alike would hide a mix-up"


def test_a_prompted_frame_joins_what_its_parts_give():
    """Meta's switches: a correction with the earlier result, a mask by way of the decoder's size, and an object that
    nobody prompts, whose bank stays."""
    config = small_config("sam2.1")
    memory = replace(config.video_memory(), exact_mask_memory=False, several_for_mask_pointer=False)
    model = SegmentAnything(replace(config, heads=replace(config.heads, memory=memory)))
    maps, _, bank = started()
    corrects, is_new = jnp.array([True, False, False]), jnp.array([False, True, False])
    size = config.mask_size
    earlier = jnp.asarray(100 * np.random.default_rng(3).standard_normal((THINGS, size, size)), jnp.float32)
    prompts = said({0: CLICKS}, {1: disc(50, 80, 30)})._replace(earlier=earlier, has_earlier=corrects)

    @jax.jit
    def parts(params, maps, prompts):
        run = partial(model.apply, {"params": params})
        one, asked = (jax.tree.map(lambda x: x[None], tree) for tree in (maps, prompts))
        reading = jax.tree.map(lambda x: x[None], read(bank, 1, memory))
        labels = asked.labels.at[:, 1:, 0].set(NOT_A_POINT)
        points = Prompts(asked.points_px, labels, asked.earlier.clip(-32, 32), asked.has_earlier)
        tracked = run(one, reading, points, ~is_new[None], method="track")
        taken = run(one, asked.masks_binary, method="take_mask")
        joined = [jnp.stack([x[0, 0], y[0, 1], x[0, 2]]) for x, y in zip(tracked[:4], taken[:4], strict=True)]
        remembered = run(one, joined[0][None], joined[2][None], (corrects | is_new)[None], method="remember")
        return joined, remembered[0]

    params = whole_parameters("sam2.1")
    step = jax.jit(partial(prompted_step, model))
    frame, after = step(params, frame_of(maps, 1), bank, 1, prompts, initial=is_new)
    joined, remembered = parts(params, frame_of(maps, 1), prompts)
    same([*frame[:4], frame.memories], [*joined, remembered])
    same(*(jax.tree.map(lambda x: x[2], x) for x in (after, bank)), tolerance=0)
    assert (after.memory_times * after.memory_valid).argmax(1).tolist() == [bank.conditioning, 1, 0]


def test_masks_that_must_not_overlap_leave_each_pixel_to_one_object():
    masks = jnp.array([[[3.0, -1.0, -12.0]], [[1.0, 2.0, -11.0]], [[9.0, 9.0, 9.0]]])
    found = without_overlap(masks, jnp.array([True, True, False]))
    np.testing.assert_array_equal(found[0, 0], [3, -10, -12])
    np.testing.assert_array_equal(found[1, 0], [-10, 2, -11])
    np.testing.assert_array_equal(without_overlap(masks[:1]), masks[:1])
    np.testing.assert_array_equal(without_overlap(jnp.stack([masks, masks]))[1, 2], masks[2])


def test_a_bank_for_a_model_of_pictures_alone_is_refused():
    with pytest.raises(UserError, match="for videos take SAM 2"):
        new_bank(small_config("sam"), 1)
    with pytest.raises(UserError, match="each must be at least 1"):
        new_bank(small_config("sam2.1"), 0)


def test_every_part_of_the_parameters_has_a_say_in_what_frames_give():
    """So the parity above fails where a part is wrong; tensor by tensor it is shown in the tests of the modules."""
    encode_frames, with_prompts, without, _ = programs("sam2.1")
    seen, _, bank = started()
    everyone = jnp.ones(THINGS, bool)
    prompts = said({0: BOX_AND_CLICK}, {1: disc(50, 80, 30), 2: disc(0, 0, 0)})
    fresh = new_bank(small_config("sam2.1"), THINGS, conditioning=2)

    def outputs(leaves: dict, encodes: bool) -> list[np.ndarray]:
        params = unflatten(leaves)
        maps = encode_frames(params, drawn_video(FRAMES)) if encodes else seen
        flags = {"initial": everyone, "binary": everyone, "write": everyone}
        first, _ = with_prompts(params, frame_of(maps, 0), fresh, 0, prompts, **flags)
        second, _ = without(params, frame_of(maps, 1), bank, 1, reverse=False)
        return [np.asarray(x) for frame in (first, second) for x in (*frame[:4], frame.memories)]

    leaves, rng = flatten(whole_parameters("sam2.1")), np.random.default_rng(2)
    before, inert = outputs(leaves, encodes=False), set()
    for part in sorted({"/".join(path.split("/")[:2]) for path in leaves}):
        changed = {
            path: leaf + 0.1 * jnp.sqrt(jnp.mean(leaf**2)) * jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype)
            for path, leaf in leaves.items()
            if path == part or path.startswith(f"{part}/")
        }
        after = outputs(leaves | changed, part.startswith(("vision_encoder", "high_resolution")))
        moved = max(error(x, y) for x, y in zip(after, before, strict=True))
        print(f"{part}: {moved:.1e}")
        if moved < WHOLE:
            inert.add(part)
    # It is in every released file, and read by nobody.
    assert inert == {"memory_conditioning/no_memory_positional_encoding"}
