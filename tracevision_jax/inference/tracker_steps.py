"""The compiled programs of tracking, and what each is asked to do; a batch of videos runs them together.

A program is compiled once for each combination of shapes: model's picture size, frames at once, rows of objects, slots
for conditioning frames, videos at once. Who has a prompt, which frames count, in which direction: all of that is data.

    programs = Programs(model, params)
    maps, = programs.run([Encode(pixels)])
    (frames, bank), = programs.run([Track(maps, bank, order, times, write, reverse, video_frames)])
    programs.compiled                              # {name of a program with its shapes: how often it was compiled}
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from tracevision_jax.hosts import sam2_video
from tracevision_jax.hosts.sam import Maps, SegmentAnything
from tracevision_jax.hosts.sam2_video import Frame, FramePrompts, frame_of
from tracevision_jax.segmentation.memory_bank import MemoryBank

UNKNOWN_LENGTH = 2**30
"""Frames of a video whose end nobody knows: more than any limit that depends on them."""


class Encode(NamedTuple):
    """Encode frames in one batch."""

    pixels: Float[Array, "frames side side 3"]


class Track(NamedTuple):
    """Track objects over frames of one batch, in any order."""

    maps: Maps
    bank: MemoryBank
    order: Int[Array, "frames"]
    """Which of the batch's frames are tracked, one after the other."""
    times: Int[Array, "frames"]
    """Their numbers in the video."""
    write: Bool[Array, "frames objects"]
    """Where the bank changes; a frame that only fills up changes nothing."""
    reverse: Bool[Array, ""]
    video_frames: Int[Array, ""]


class Prompted(NamedTuple):
    """Give prompts on a frame to the model, see `sam2_video.prompted_step`."""

    maps: Maps
    bank: MemoryBank
    index: Int[Array, ""]
    """Of the frame in its batch."""
    time: Int[Array, ""]
    prompts: FramePrompts
    initial: Bool[Array, "objects"]
    conditioning: Bool[Array, "objects"]
    reverse: Bool[Array, ""]
    video_frames: Int[Array, ""]


Work = Encode | Track | Prompted


class Outcome(NamedTuple):
    """What is told of frames; with a leading axis of frames for `Track`."""

    logits: Float[Array, "*frames objects size size"]
    ious: Float[Array, "*frames objects"]
    object_logits: Float[Array, "*frames objects"]


class Programs:
    """A model with its parameters, compiled for what it meets."""

    def __init__(self, model: SegmentAnything, params: Any):
        self.model, self.params = model, params
        self.compiled: Counter[str] = Counter()
        """How often each program was compiled."""
        self._encode = jax.jit(self._encode_all)
        self._steps = {kind: jax.jit(partial(self._all, kind)) for kind in (Track, Prompted)}

    def run(self, works: Sequence[Any], lanes: int = 1) -> list[Any]:
        """Do works of one kind, those of equal shapes together.

        Args:
            works: one a video.
            lanes: how many a program is made for; a smaller number is filled up.

        Returns:
            of each `Encode` its maps, of the others (`Outcome`, bank).
        """
        alike: dict[Hashable, list[int]] = {}
        for number, work in enumerate(works):
            leaves, structure = jax.tree.flatten(work)
            shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
            alike.setdefault((type(work), structure, shapes), []).append(number)
        done: dict[int, Any] = {}
        for numbers in alike.values():
            for first in range(0, len(numbers), lanes):
                members = numbers[first : first + lanes]
                filled = [works[number] for number in members] + [works[members[0]]] * (lanes - len(members))
                run = self._encode if isinstance(filled[0], Encode) else self._steps[type(filled[0])]
                done.update(zip(members, run(self.params, tuple(filled)), strict=False))
        return [done[number] for number in range(len(works))]

    def _encode_all(self, params: Any, works: tuple[Encode, ...]) -> tuple[Maps, ...]:
        frames, side = works[0].pixels.shape[:2]
        self.compiled[f"encode {len(works)} x {frames} frames of {side} px"] += 1
        pixels = jnp.concatenate([work.pixels for work in works])
        if jax.default_backend() == "cpu":
            # One after the other: a CPU's caches hold no more than a picture, and a quarter of the time is saved.
            maps = jax.lax.map(lambda one: frame_of(sam2_video.encode(self.model, params, one[None]), 0), pixels)
        else:
            maps = sam2_video.encode(self.model, params, pixels)
        return tuple(_part(maps, number * frames, frames) for number in range(len(works)))

    def _all(self, kind: type, params: Any, works: tuple[Any, ...]) -> tuple[tuple[Outcome, MemoryBank], ...]:
        objects, conditioning = len(works[0].bank.memory_times), works[0].bank.conditioning
        shapes = f"{len(works)} x {objects} objects, {conditioning} conditioning frames"
        if kind is Track:
            name, step = f"track {shapes}, {len(works[0].times)} frames", _track
        else:
            name, step = f"prompt {shapes}, {works[0].prompts.labels.shape[1]} points", _prompt
        self.compiled[name] += 1
        one = partial(step, self.model, params)
        if len(works) == 1:
            return (one(works[0]),)
        results = jax.vmap(one)(jax.tree.map(lambda *x: jnp.stack(x), *works))
        return tuple(jax.tree.map(lambda x, n=number: x[n], results) for number in range(len(works)))


def _part(maps: Maps, first: int, count: int) -> Maps:
    return jax.tree.map(lambda x: x[first : first + count], maps)


def _outcome(frame: Frame) -> Outcome:
    return Outcome(*(jnp.asarray(x, jnp.float32) for x in (frame.masks, frame.ious, frame.object_logits)))


def _track(model: SegmentAnything, params: Any, work: Any) -> tuple[Outcome, MemoryBank]:
    maps = jax.tree.map(lambda x: x[work.order], work.maps)
    options: dict[str, Any] = {"reverse": work.reverse, "video_frames": work.video_frames}
    frames, bank = sam2_video.propagate(model, params, maps, work.bank, work.times, write=work.write, **options)
    return _outcome(frames), bank


def _prompt(model: SegmentAnything, params: Any, work: Any) -> tuple[Outcome, MemoryBank]:
    frame, bank = sam2_video.prompted_step(
        model,
        params,
        frame_of(work.maps, work.index),
        work.bank,
        work.time,
        work.prompts,
        initial=work.initial,
        conditioning=work.conditioning,
        reverse=work.reverse,
        video_frames=work.video_frames,
    )
    return _outcome(frame), bank


def resized(bank: MemoryBank, empty: MemoryBank) -> MemoryBank:
    """What a bank holds, in an empty one with at least as many rows and slots for conditioning frames."""
    objects, kept = len(bank.memory_times), bank.conditioning

    def copy(old: Array, new: Array) -> Array:
        new = new.at[:objects, :kept].set(old[:, :kept])
        return new.at[:objects, empty.conditioning :].set(old[:, kept:])

    names = ("memories", "memory_times", "memory_valid", "pointers", "pointer_times", "pointer_valid")
    return empty.replace(**{name: copy(getattr(bank, name), getattr(empty, name)) for name in names})  # pyright: ignore


def cleared(bank: MemoryBank, rows: Bool[np.ndarray, "objects"]) -> MemoryBank:
    """A bank that has forgotten some rows."""
    stay = ~jnp.asarray(rows)[:, None]
    return bank.replace(memory_valid=bank.memory_valid & stay, pointer_valid=bank.pointer_valid & stay)  # pyright: ignore
