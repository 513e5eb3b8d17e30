"""The memory bank of SAM 2 (Ravi et al. 2024, Sec. 4) as arrays of fixed shape: `empty`, `insert`, `read`.

It follows facebookresearch/sam2, `sam2_base.py`, whose dictionaries of frames become slots with their times. The bank
belongs to one video and has a leading axis of objects; `jax.vmap` adds videos. All three are pure functions, so that
they run inside `jax.lax.scan`, and each object keeps to itself, so that objects and videos can be split over devices.

    bank = empty(config, objects, rows, columns, conditioning=2)
    bank = insert(bank, time, memories, pointers, conditioning=prompted)
    reading = read(bank, time + 1, config)              # what memory attention is given, see memory_attention.py

What is kept. The first `conditioning` slots are for frames that a user prompted, the others for recent frames; a frame
stands in one slot only. When all slots of its kind are taken, a new frame takes that of the frame farthest from it in
time, so that a bank's size does not depend on the video's length; only the conditioning frame in the first slot, which
is the first prompt, is never given up (where there is more than one slot). Recent slots suffice for tracking in one
direction; who turns back after more frames than there are, and wants the frames that were tracked before to be seen
again, as the original keeps all of them, gives `recent` and `recent_pointers` as many slots as the video has frames.
That costs memory, hardly time: the few memories that are read are gathered; of pointers, which are small, all are given
and masked.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from tracevision_jax.errors import UserError
from tracevision_jax.segmentation.sam_config import MemoryConfig

FAR = jnp.iinfo(jnp.int32).max


@struct.dataclass
class MemoryBank:
    """Memories and pointers of objects; of both the first `conditioning` slots are for conditioning frames.

    Under `jax.vmap` every array has videos before objects.
    """

    memories: Float[Array, "objects slots rows columns memory_width"]
    memory_times: Int[Array, "objects slots"]
    """Number of the frame in the video."""
    memory_valid: Bool[Array, "objects slots"]
    pointers: Float[Array, "objects pointer_slots width"]
    pointer_times: Int[Array, "objects pointer_slots"]
    pointer_valid: Bool[Array, "objects pointer_slots"]
    conditioning: int = struct.field(pytree_node=False)
    """Slots for conditioning frames."""


@struct.dataclass
class MemoryReading:
    """What the current frame sees of a bank, padded to a fixed shape."""

    memories: Float[Array, "objects frames rows columns memory_width"]
    memory_steps: Int[Array, "objects frames"]
    """How many steps of the memory's stride a frame lies back, 1..; 0 for a conditioning frame."""
    memory_visible: Bool[Array, "objects frames"]
    pointers: Float[Array, "objects pointers width"]
    pointer_distances: Float[Array, "objects pointers"]
    """Distance in time from the current frame, positive on the side that tracking comes from; 1 is the farthest."""
    pointer_visible: Bool[Array, "objects pointers"]

    @property
    def any_memory(self) -> Bool[Array, "*objects"]:
        """Whether an object has anything to read; without it memory attention has no meaning."""
        return self.memory_visible.any(-1)


def empty(
    config: MemoryConfig,
    objects: int,
    rows: int,
    columns: int,
    *,
    conditioning: int = 1,
    recent: int | None = None,
    recent_pointers: int | None = None,
) -> MemoryBank:
    """A bank that holds nothing.

    Args:
        config: widths, and how far back memories are read.
        objects: length of the leading axis.
        rows, columns: of the image embedding.
        conditioning: conditioning frames that are kept; TrajSeg keeps all key frames of a video.
        recent: recent frames whose memories are kept, by default as many as tracking in one direction reads.
        recent_pointers: recent frames whose pointers are kept, by default likewise.

    Raises:
        UserError: a number of slots under 1.
    """
    recent = (config.frames - 2) * config.frame_stride + 1 if recent is None else recent
    recent_pointers = config.max_pointers - 1 if recent_pointers is None else recent_pointers
    if min(objects, conditioning, recent, recent_pointers) < 1:
        raise UserError(
            f"memory bank of {objects} objects, {conditioning} conditioning frames, {recent} recent frames and "
            f"{recent_pointers} recent pointers: each must be at least 1"
        )
    slots, pointer_slots = conditioning + recent, conditioning + recent_pointers
    return MemoryBank(
        memories=jnp.zeros((objects, slots, rows, columns, config.memory_width), jnp.dtype(config.store_dtype)),
        memory_times=jnp.zeros((objects, slots), jnp.int32),
        memory_valid=jnp.zeros((objects, slots), bool),
        pointers=jnp.zeros((objects, pointer_slots, config.width), jnp.dtype(config.dtype)),
        pointer_times=jnp.zeros((objects, pointer_slots), jnp.int32),
        pointer_valid=jnp.zeros((objects, pointer_slots), bool),
        conditioning=conditioning,
    )


def _slot(
    times: Int[Array, "slots"], valid: Bool[Array, "slots"], time: Int[Array, ""], protected: int
) -> Int[Array, ""]:
    """Where a frame goes: its own slot, else a free one, else that of the frame farthest in time."""
    here = valid & (times == time)
    distance = jnp.abs(times - time).at[:protected].set(-1)
    return jnp.where(here.any(), here.argmax(), jnp.where(valid.all(), distance.argmax(), valid.argmin()))


def _places(
    times: Int[Array, "slots"],
    valid: Bool[Array, "slots"],
    time: Int[Array, ""],
    conditioning: Bool[Array, ""],
    write: Bool[Array, ""],
    capacity: int,
) -> tuple[Int[Array, ""], Int[Array, "slots"], Bool[Array, "slots"]]:
    """The slot to write, beyond the last one for none, and times and validity after it."""
    among_conditioning = _slot(times[:capacity], valid[:capacity], time, protected=int(capacity > 1))
    among_recent = capacity + _slot(times[capacity:], valid[capacity:], time, protected=0)
    stays = (valid & (times == time))[:capacity].any()
    write = write & (conditioning | ~stays)
    slot = jnp.where(conditioning, among_conditioning, among_recent)
    number = jnp.arange(len(times))
    # A frame that becomes a conditioning one leaves the recent ones.
    leaves = write & conditioning & (number >= capacity) & (times == time)
    chosen = write & (number == slot)
    return jnp.where(write, slot, len(times)), jnp.where(chosen, time, times), (valid & ~leaves) | chosen


def insert(
    bank: MemoryBank,
    time: Int[Array, ""] | int,
    memories: Float[Array, "objects rows columns memory_width"],
    pointers: Float[Array, "objects width"],
    conditioning: Bool[Array, "objects"] | Bool[Array, ""] | bool = False,
    write: Bool[Array, "objects"] | Bool[Array, ""] | bool = True,
) -> MemoryBank:
    """The bank after a frame.

    Args:
        bank: as before.
        time: number of the frame in the video; a frame that is already kept is replaced.
        memories: of the frame, see `MemoryEncoder`; kept in the bank's number type.
        pointers: of the frame, see `ObjectPointer`.
        conditioning: for which objects it is a conditioning frame. One that is stays one: without this flag a frame
            that is kept as a conditioning one is left as it is, as in the original.
        write: for which objects anything happens at all.
    """
    objects = len(bank.memory_times)
    time = jnp.asarray(time, jnp.int32)
    conditioning = jnp.broadcast_to(jnp.asarray(conditioning), (objects,))
    write = jnp.broadcast_to(jnp.asarray(write), (objects,))

    def one(row: MemoryBank, memory: Array, pointer: Array, conditioning: Array, write: Array) -> MemoryBank:
        place = partial(_places, time=time, conditioning=conditioning, write=write, capacity=bank.conditioning)
        memory_slot, memory_times, memory_valid = place(row.memory_times, row.memory_valid)
        pointer_slot, pointer_times, pointer_valid = place(row.pointer_times, row.pointer_valid)
        return dataclasses.replace(
            row,
            memories=row.memories.at[memory_slot].set(memory.astype(row.memories.dtype), mode="drop"),
            memory_times=memory_times,
            memory_valid=memory_valid,
            pointers=row.pointers.at[pointer_slot].set(pointer.astype(row.pointers.dtype), mode="drop"),
            pointer_times=pointer_times,
            pointer_valid=pointer_valid,
        )

    return jax.vmap(one)(bank, memories, pointers, conditioning, write)


def _nearest(
    times: Int[Array, "slots"], valid: Bool[Array, "slots"], time: Int[Array, ""], limit: int
) -> Int[Array, "limit"]:
    """Slots of the conditioning frames to read: the last before `time`, the first from it on, then the nearest."""
    distance = jnp.where(valid, jnp.abs(times - time), FAR)

    def first(side: Bool[Array, "slots"]) -> Bool[Array, "slots"]:
        nearest = jnp.where(side & valid, distance, FAR)
        return (jnp.arange(len(times)) == nearest.argmin()) & side & valid

    rank = jnp.where(first(times < time), -2, jnp.where(first(times >= time), -1, distance))
    return jnp.argsort(rank, stable=True)[:limit]


def _recent_times(time: Int[Array, ""], direction: Int[Array, ""], config: MemoryConfig) -> Int[Array, "steps"]:
    """Times of the recent frames to read, farthest first: the last one, and before it each of the stride's."""
    # Backwards in time everything is mirrored.
    now = time * direction
    steps = jnp.arange(config.frames - 1, 0, -1)
    strided = (now - 2) // config.frame_stride * config.frame_stride - (steps - 2) * config.frame_stride
    return jnp.where(steps == 1, now - 1, strided) * direction


def read(
    bank: MemoryBank,
    time: Int[Array, ""] | int,
    config: MemoryConfig,
    *,
    reverse: Bool[Array, ""] | bool = False,
    video_frames: Int[Array, ""] | int | None = None,
) -> MemoryReading:
    """What the frame at `time` sees.

    Memories: of the conditioning frames, past and future, all or the `max_conditioning` nearest; then of the
    `frames - 1` frames before `time`, where they are kept. Pointers: of the conditioning frames read that are not still
    to come, and of up to `max_pointers - 1` frames before `time`. A conditioning frame that is not read as such counts
    as a recent one where it lies among them. "Before" means after when `reverse` is true.

    Args:
        bank: all that is kept.
        time: number of the current frame.
        config: what is read.
        reverse: whether tracking goes backwards in time.
        video_frames: length of the video, where known: fewer than `max_pointers` limit and rescale the pointers.
    """
    time = jnp.asarray(time, jnp.int32)
    direction = jnp.where(jnp.asarray(reverse), -1, 1)
    span = config.max_pointers if video_frames is None else jnp.minimum(video_frames, config.max_pointers)
    farthest = jnp.maximum(jnp.asarray(span) - 1, 1)
    kept = bank.conditioning
    limited = config.max_conditioning is not None and config.max_conditioning < kept

    def one(row: MemoryBank) -> MemoryReading:
        valid = row.memory_valid[:kept]
        chosen = jnp.arange(kept)
        if limited:
            chosen = _nearest(row.memory_times[:kept], valid, time, config.max_conditioning or kept)
        selected = valid & (jnp.arange(kept)[:, None] == chosen).any(-1)

        wanted = _recent_times(time, direction, config)
        offered = row.memory_valid.at[:kept].set(valid & ~selected)
        match = offered & (row.memory_times == wanted[:, None])
        slots = jnp.concatenate([chosen, match.argmax(-1)])
        steps = jnp.concatenate([jnp.zeros_like(chosen), jnp.arange(config.frames - 1, 0, -1)])

        distance = (time - row.pointer_times) * direction
        near = row.pointer_valid & (distance >= 1) & (distance < span)
        of_conditioning = jnp.arange(len(distance)) < kept
        as_conditioning = row.pointer_valid & of_conditioning
        if config.only_past_pointers:
            as_conditioning = as_conditioning & (distance >= 0)
        if config.pointers_follow_selection:
            as_conditioning = as_conditioning & jnp.zeros_like(of_conditioning).at[:kept].set(selected)
        else:
            near = near & ~of_conditioning
        if not config.signed_pointer_times:
            distance = jnp.abs(distance)
        return MemoryReading(
            memories=row.memories[slots],
            memory_steps=steps,
            memory_visible=jnp.concatenate([valid[chosen], match.any(-1)]),
            pointers=row.pointers,
            pointer_distances=distance / farthest,
            pointer_visible=as_conditioning | near,
        )

    return jax.vmap(one)(bank)
