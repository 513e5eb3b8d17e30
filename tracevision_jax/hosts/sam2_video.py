"""Videos with SAM 2: pure functions of a model, its parameters, frames and a memory bank (Ravi et al. 2024, Sec. 4).

They follow facebookresearch/sam2, `sam2_video_predictor.py`, whose session of dictionaries becomes a bank of fixed
shape (`segmentation.memory_bank`) that goes in and comes out. They are for one video and all its objects, which share
the frame's maps; `jax.vmap` adds videos. A frame on which somebody prompts is `prompted_step`; the others are
`propagate_step`, or many in a row `propagate`, a scan. Frames are encoded in batches before.

    bank = new_bank(model.config, objects, conditioning=2)
    maps = encode(model, params, frames)                                       # once
    result, bank = prompted_step(model, params, frame_of(maps, 0), bank, 0, prompts)
    results, bank = propagate(model, params, later_maps, bank, jnp.arange(1, 9))
    binary = without_overlap(results.masks) > 0
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from tracevision_jax.hosts.sam import FrameMasks, Maps, Prompts, SegmentAnything, no_prompts
from tracevision_jax.hosts.sam_presets import SegmentAnythingConfig
from tracevision_jax.ops.interpolation import resize_masks
from tracevision_jax.segmentation.memory_bank import MemoryBank, MemoryReading, empty, insert, read
from tracevision_jax.segmentation.object_pointer import outputs_of_mask
from tracevision_jax.segmentation.prompt_encoder import ABSENT, NOT_A_POINT

Params = Mapping[str, Any]
"""The model's own tree, {"vision_encoder": ..., ...}."""
Which = Bool[Array, "objects"] | Bool[Array, ""] | bool
Time = Int[Array, ""] | int
"""Number of a frame in its video."""

EARLIER_LIMIT = 32.0
"""Logits of an earlier result are clamped to +- this before they are a prompt."""
OVERLAP_LIMIT = -10.0
"""Logits of all but one object at a pixel are at most this, where objects must not overlap."""


class FramePrompts(NamedTuple):
    """What a user says about a frame; objects without a prompt have only NOT_A_POINT and ABSENT labels."""

    points_px: Float[Array, "objects points 2"]
    """Clicks, and boxes as two points, see `prompt_encoder.with_boxes`; pixels of the square picture."""
    labels: Int[Array, "objects points"]
    masks_binary: Float[Array, "objects side side"] | None = None
    """Masks in [0, 1] of the square picture's size, which become the result; None where no object has one."""
    has_mask: Bool[Array, "objects"] | None = None
    """Whose mask counts, all by default."""
    earlier: Float[Array, "objects mask_size mask_size"] | None = None
    """Logits of an earlier result on this frame, which points correct."""
    has_earlier: Bool[Array, "objects"] | None = None
    """Whose earlier logits count, all by default."""

    @property
    def by_mask(self) -> Bool[Array, "objects"]:
        """Whose prompt is a mask."""
        objects = len(self.labels)
        if self.masks_binary is None:
            return jnp.zeros(objects, bool)
        return jnp.ones(objects, bool) if self.has_mask is None else jnp.asarray(self.has_mask)

    @property
    def given(self) -> Bool[Array, "objects"]:
        """Who has a prompt."""
        return self.by_mask | jnp.asarray(self.labels >= 0).any(-1)


class Frame(NamedTuple):
    """Results of one frame; of many, with a leading axis."""

    masks: Float[Array, "objects mask_size mask_size2"]
    """Logits over the square picture; -1024 where the object is absent."""
    ious: Float[Array, "objects"]
    """Predicted IoU."""
    object_logits: Float[Array, "objects"]
    """The object is there where they are over 0."""
    pointers: Float[Array, "objects width"]
    settled: Bool[Array, "objects"]
    """Whether this is a conditioning frame of the object from before: its result is the one that the prompt gave then,
    the bank keeps what it has, and the other fields are to be ignored."""
    memories: Float[Array, "objects rows columns memory_width"] | None
    """As they enter the bank, before they are rounded; None in the results of `propagate`."""


def new_bank(
    config: SegmentAnythingConfig,
    objects: int,
    *,
    conditioning: int = 1,
    recent: int | None = None,
    recent_pointers: int | None = None,
) -> MemoryBank:
    """An empty bank for objects of one video, see `memory_bank.empty`.

    Raises:
        UserError: a model without memory, or a number of slots under 1.
    """
    return empty(
        config.video_memory(),
        objects,
        config.grid,
        config.grid,
        conditioning=conditioning,
        recent=recent,
        recent_pointers=recent_pointers,
    )


def encode(model: SegmentAnything, params: Params, pixels: Float[Array, "frames height width 3"]) -> Maps:
    """Maps of many frames, of one video or of several."""
    return _apply(model, params, "encode", pixels)


def frame_of(maps: Maps, index: Int[Array, ""] | int) -> Maps:
    """Maps of one frame, without the leading axis, as the steps take them."""
    return jax.tree.map(lambda x: x[index], maps)


def propagate_step(
    model: SegmentAnything,
    params: Params,
    maps: Maps,
    bank: MemoryBank,
    time: Time,
    *,
    write: Which = True,
    reverse: Bool[Array, ""] | bool = False,
    video_frames: Time | None = None,
    training: bool = False,
) -> tuple[Frame, MemoryBank]:
    """Track all objects on a frame without prompts: read the bank, decode, and insert what is to be remembered.

    Args:
        model: with memory.
        params: its parameters.
        maps: of the frame, see `frame_of`.
        bank: of this video. Objects that have nothing in it get a result that means nothing.
        time: number of the frame; the bank replaces what it had of it, but conditioning frames stay.
        write: for which objects the bank changes.
        reverse: whether tracking goes backwards in time.
        video_frames: length of the video, where known, see `memory_bank.read`.
        training: see `SegmentAnything.decode`.
    """
    reading = _read(model, bank, time, reverse, video_frames)
    found = _apply(model, params, "track", _batched(maps), reading, no_prompts(1, _objects(bank)), training=training)
    prompted = jnp.zeros((1, _objects(bank)), bool)
    return _remembered(model, params, maps, bank, time, found, found.masks, prompted, False, write)


def prompted_step(
    model: SegmentAnything,
    params: Params,
    maps: Maps,
    bank: MemoryBank,
    time: Time,
    prompts: FramePrompts,
    *,
    initial: Which | None = None,
    conditioning: Which | None = None,
    binary: Which | None = None,
    write: Which | None = None,
    reverse: Bool[Array, ""] | bool = False,
    video_frames: Time | None = None,
    training: bool = False,
) -> tuple[Frame, MemoryBank]:
    """A frame on which objects are prompted; one without a prompt is tracked as in `propagate_step`.

    The shapes of `prompts` alone decide what is compiled: who has a prompt, and of which kind, is data.

    Args:
        model, params, maps, bank, time, reverse, video_frames: see `propagate_step`.
        prompts: of the objects.
        initial: for which objects the frame was never tracked: they do without memory. By default for those that have
            a prompt. A correction of a tracked frame reads memory, and `prompts.earlier` goes with it.
        conditioning: for which objects it becomes a conditioning frame, by default where it is initial.
        binary: whose mask is made binary before it is remembered; by default, outside training, of those that have a
            prompt. (`transformers` does it for all objects as soon as one has.)
        write: for which objects the bank changes, by default for those that have a prompt.
        training: no mask is made binary, and a single mask stays even if it is unstable.
    """
    objects, given, by_mask = _objects(bank), prompts.given, prompts.by_mask
    initial = given if initial is None else jnp.broadcast_to(jnp.asarray(initial), (objects,))
    conditioning = initial if conditioning is None else conditioning
    binary = (jnp.zeros_like(given) if training else given) if binary is None else binary
    batched, reading = _batched(maps), _read(model, bank, time, reverse, video_frames)
    found = _apply(model, params, "track", batched, reading, _points(prompts), ~initial[None], training=training)
    remembered = found.masks
    if prompts.masks_binary is not None:
        taken = _apply(model, params, "take_mask", batched, prompts.masks_binary[None])
        found = jax.tree.map(lambda x, y: _where(by_mask[None], x, y), taken, found)
        remembered = found.masks
        if model.config.video_memory().exact_mask_memory:
            exact, _, _ = outputs_of_mask(prompts.masks_binary[None])
            side = model.config.image_size
            remembered = _where(by_mask[None], exact, resize_masks(found.masks, (side, side)))
    prompted = jnp.broadcast_to(jnp.asarray(binary), (objects,))[None]
    write = given if write is None else write
    return _remembered(model, params, maps, bank, time, found, remembered, prompted, conditioning, write)


def propagate(
    model: SegmentAnything,
    params: Params,
    maps: Maps,
    bank: MemoryBank,
    times: Int[Array, "frames"],
    *,
    write: Bool[Array, "#frames #objects"] | Which = True,
    reverse: Bool[Array, ""] | bool = False,
    video_frames: Time | None = None,
    training: bool = False,
) -> tuple[Frame, MemoryBank]:
    """`propagate_step` over frames, as a scan.

    Args:
        model, params, bank, reverse, video_frames, training: see `propagate_step`.
        maps: of the frames, in the order in which they are tracked: last one first when going backwards.
        times: their numbers in the video.
        write: on which frames and for which objects the bank changes, an axis of 1 standing for all; frames that only
            fill up a batch change nothing.

    Returns:
        (results with a leading axis of frames, the bank after them).
    """
    write = jnp.broadcast_to(jnp.asarray(write), (len(times), _objects(bank)))

    def step(bank: MemoryBank, given: tuple[Maps, Array, Array]) -> tuple[MemoryBank, Frame]:
        maps, time, write = given
        options: dict[str, Any] = {"reverse": reverse, "video_frames": video_frames, "training": training}
        frame, bank = propagate_step(model, params, maps, bank, time, write=write, **options)
        return bank, frame._replace(memories=None)

    bank, frames = jax.lax.scan(step, bank, (maps, times, write))
    return frames, bank


def without_overlap(
    masks: Float[Array, "*frames objects height width"], there: Bool[Array, "objects"] | None = None
) -> Float[Array, "*frames objects height width"]:
    """Give each pixel to the object with the highest logit; others are at most -10 there.

    It is an option of the original for its results alone (`non_overlap_masks`), of which its evaluation makes use where
    one picture holds all objects' masks.

    Args:
        masks: logits, at the size at which they are used.
        there: which rows are objects at all; the others neither win nor matter. All by default.
    """
    contest = masks if there is None else jnp.where(there[:, None, None], masks, -jnp.inf)
    winner = contest.argmax(-3, keepdims=True)
    own = winner == jnp.arange(masks.shape[-3])[:, None, None]
    return jnp.where(own, masks, jnp.minimum(masks, OVERLAP_LIMIT))


def _apply(model: SegmentAnything, params: Params, method: str, *given: Any, **options: Any) -> Any:
    return model.apply({"params": params}, *given, **options, method=method)


def _objects(bank: MemoryBank) -> int:
    return len(bank.memory_times)


def _batched(tree: Any) -> Any:
    """One video as a batch of one."""
    return jax.tree.map(lambda x: x[None], tree)


def _where(which: Bool[Array, "..."], x: Array, y: Array) -> Array:
    """Choose by the leading axes."""
    return jnp.where(which.reshape(*which.shape, *(1,) * (x.ndim - which.ndim)), x, y)


def _points(prompts: FramePrompts) -> Prompts:
    """The points and what they correct; who has no point gets the empty one that a video's frames have."""
    lacks = (prompts.labels == ABSENT).all(-1, keepdims=True)
    empty_point = jnp.where(lacks, NOT_A_POINT, ABSENT).astype(prompts.labels.dtype)
    points_px = jnp.pad(prompts.points_px, ((0, 0), (0, 1), (0, 0)))
    given = Prompts(points_px, jnp.concatenate([prompts.labels, empty_point], axis=1))
    if prompts.earlier is not None:
        earlier = jnp.clip(prompts.earlier, -EARLIER_LIMIT, EARLIER_LIMIT)
        given = given._replace(masks=earlier, has_mask=prompts.has_earlier)
    return _batched(given)


def _read(
    model: SegmentAnything, bank: MemoryBank, time: Time, reverse: Any, video_frames: Time | None
) -> MemoryReading:
    return _batched(read(bank, time, model.config.video_memory(), reverse=reverse, video_frames=video_frames))


def _remembered(
    model: SegmentAnything,
    params: Params,
    maps: Maps,
    bank: MemoryBank,
    time: Time,
    found: FrameMasks,
    masks: Array,
    prompted: Array,
    conditioning: Any,
    write: Any,
) -> tuple[Frame, MemoryBank]:
    """The frame's results, and the bank with it; `masks` are the logits that are remembered."""
    memories = _apply(model, params, "remember", _batched(maps), masks, found.object_logits, prompted)[0]
    settled = (bank.memory_valid & (bank.memory_times == time))[:, : bank.conditioning].any(-1)
    masks, ious, object_logits, pointers = (x[0] for x in found[:4])
    frame = Frame(masks, ious, object_logits, pointers, settled & ~jnp.asarray(conditioning), memories)
    return frame, insert(bank, time, memories, pointers, conditioning, write)
