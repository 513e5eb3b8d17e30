"""SAM 2 as a trainable system (Ravi et al. 2024, App. D.2.2): clips with memory in the loop and simulated prompts.

It follows facebookresearch/sam2, `training/model/sam2.py`. Frame 0 of a clip is prompted, by masks, or by points or
boxes that clicks on errors then correct; later frames are tracked one after the other from the bank that the frames
before filled, gradients flowing through it; some of them are corrected by clicks, too, and become conditioning frames.
Which prompts a clip gets is drawn from the step's key. All objects of all clips of a batch are tracked at once.

    system = Sam2(sam_preset("sam2.1_hiera_tiny"))
    sums, weights, _ = system.loss(params, (), batch, key)         # batch: records.clips.ClipBatch
    masks = system.follow(params, batch)                           # from the first frame's true masks, no other help

Where it differs from the public training: only frame 0 is prompted from the start, so frames are always seen in order;
prompts differ between the clips of a batch, not only between batches; and see `segmentation.clip_losses`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from tracevision_jax.errors import UserError
from tracevision_jax.hosts import sam2_video
from tracevision_jax.hosts.sam import Maps, Prompts, SegmentAnything, init_params
from tracevision_jax.hosts.sam_presets import SegmentAnythingConfig
from tracevision_jax.layers.sharding import constrain
from tracevision_jax.nearest import suggest
from tracevision_jax.ops.interpolation import resize_masks
from tracevision_jax.records.clips import ClipBatch, ClipBucket, empty_batch
from tracevision_jax.segmentation.clicks import click_on_error, unsteady_box
from tracevision_jax.segmentation.clip_losses import COEFFICIENTS, overlap, prompt_losses
from tracevision_jax.segmentation.mask_decoder import several_wanted
from tracevision_jax.segmentation.memory_bank import MemoryBank, insert, read
from tracevision_jax.segmentation.object_pointer import outputs_of_mask
from tracevision_jax.segmentation.prompt_encoder import ABSENT, BOTTOM_RIGHT, NOT_A_POINT, TOP_LEFT
from tracevision_jax.systems.protocol import Params, Scalars, State
from tracevision_jax.vision.sam_preprocess import IMAGENET_MEAN, IMAGENET_STD

STAGES: dict[str, str] = {"all": r".*", "heads": r"(?!vision_encoder/).*"}
"""What each stage trains, as a pattern of parameter paths."""


@dataclass(frozen=True)
class PromptingConfig:
    """How clips are prompted while training; the values of the released recipe."""

    points: float = 0.5
    """Chance that a clip is prompted by points or boxes, not by masks."""
    boxes: float = 0.5
    """Chance that these are boxes, not single clicks."""
    corrected_frames: int = 2
    """Most frames of a clip that clicks correct, frame 0 among them; only clips prompted by points or boxes are."""
    clicks: int = 7
    """Clicks that correct a frame, each after a look at what the one before did."""
    blind: float = 0.1
    """Chance that a correcting click is drawn from the whole object, not from the error."""
    loss_stride: int = 1
    """Pixels of the picture along a pixel at which masks are compared with the truth."""
    told: float = 0.0
    """Chance that a clip's true masks are remembered, not those that were found: a model that starts from nothing
    learns from memories worth reading."""
    remat: bool = True
    """Whether the backward pass computes each frame's heads again instead of keeping all of them."""

    def __post_init__(self) -> None:
        chances = {"points": self.points, "boxes": self.boxes, "blind": self.blind, "told": self.told}
        wrong = [f"{name} {value}" for name, value in chances.items() if not 0 <= value <= 1]
        if wrong or min(self.corrected_frames, self.loss_stride) < 1 or self.clicks < 0:
            raise UserError(
                f"prompting of clips: {', '.join(wrong) or 'all chances are well'}; chances are from 0 to 1, "
                f"corrected_frames ({self.corrected_frames}) and loss_stride ({self.loss_stride}) are at least 1, "
                f"clicks ({self.clicks}) at least 0"
            )


class Prompting(NamedTuple):
    """What was drawn for a batch."""

    by_points: Bool[Array, "videos"]
    by_boxes: Bool[Array, "videos"]
    """Among those by points."""
    corrected: Bool[Array, "time"]
    """Frames on which the clips prompted by points are corrected."""
    told: Bool[Array, "videos"]
    """Clips of which the true masks are remembered."""


class Outcome(NamedTuple):
    """What is remembered of a frame."""

    masks: Float[Array, "videos objects size size"]
    object_logits: Float[Array, "videos objects"]
    pointers: Float[Array, "videos objects width"]


class Attempt(NamedTuple):
    """A frame's outcome, and all that it has cost so far."""

    outcome: Outcome
    losses: dict[str, Float[Array, "videos objects"]]


def normalised(frames: UInt8[Array, "*batch 3"]) -> Float[Array, "*batch 3"]:
    """RGB as the image encoder takes it."""
    mean, std = jnp.asarray(IMAGENET_MEAN), jnp.asarray(IMAGENET_STD)
    return (frames.astype(jnp.float32) / 255 - mean) / std


def shrunk(masks: Bool[Array, "*lead height width"], stride: int) -> Float[Array, "*lead rows columns"]:
    """How much of each square of `stride` pixels a mask covers."""
    *lead, height, width = masks.shape
    squares = masks.astype(jnp.float32).reshape(*lead, height // stride, stride, width // stride, stride)
    return squares.mean((-3, -1))


def draw_prompting(key: PRNGKeyArray, videos: int, frames: int, config: PromptingConfig) -> Prompting:
    """Draw how each clip is prompted, and which frames are corrected: frame 0, and up to some later ones."""
    kind, box, number, order, telling = jax.random.split(key, 5)
    by_points = jax.random.bernoulli(kind, config.points, (videos,))
    later = jax.random.randint(number, (), 0, min(config.corrected_frames, frames))
    place = jnp.argsort(jnp.argsort(jax.random.uniform(order, (frames,)).at[0].set(-1.0)))
    by_boxes = jax.random.bernoulli(box, config.boxes, (videos,))
    return Prompting(by_points, by_boxes, place <= later, jax.random.bernoulli(telling, config.told, (videos,)))


def first_prompts(
    key: PRNGKeyArray, truth: Bool[Array, "videos objects side side"], by_boxes: Bool[Array, "videos"]
) -> tuple[Float[Array, "videos objects 2 2"], Int[Array, "videos objects 2"]]:
    """Points and labels that prompt each object: a box's corners, or a click and an empty slot."""
    place, corner = jax.random.split(key)
    point, label = click_on_error(place, truth)
    click = jnp.stack([label, jnp.full_like(label, ABSENT)], axis=-1)
    boxes = by_boxes[:, None, None]
    labels = jnp.where(boxes, jnp.array([TOP_LEFT, BOTTOM_RIGHT]), click)
    return jnp.where(boxes[..., None], unsteady_box(corner, truth), point[:, :, None]), labels


@dataclass(frozen=True)
class Sam2:
    """The system, see `protocol.py`."""

    config: SegmentAnythingConfig
    prompting: PromptingConfig = PromptingConfig()

    def __post_init__(self) -> None:
        self.config.video_memory()  # refuses a model without memory

    @property
    def model(self) -> SegmentAnything:
        """The network's module."""
        return SegmentAnything(self.config)

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Factors of the loss parts; the mean overlap of tracked masks is only reported."""
        return COEFFICIENTS

    def init(self, rng: jax.Array) -> Params:
        """Draw all parameters."""
        return init_params(self.model, rng)

    def init_state(self) -> State:
        """Nothing lives between steps."""
        return ()

    def trainable(self, stage: str) -> Callable[[str], bool]:
        """Tell from a parameter's path whether a stage of `STAGES` trains it.

        Raises:
            UserError: no such stage.
        """
        if stage not in STAGES:
            raise UserError(f"No stage '{stage}'.{suggest(stage, STAGES)} Stages: {', '.join(STAGES)}.")
        pattern = re.compile(STAGES[stage])
        return lambda path: pattern.fullmatch(path) is not None

    def batch_spec(self, bucket: ClipBucket, rows: int) -> ClipBatch:
        """Shapes and dtypes of a batch."""
        batch = empty_batch(1, bucket)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), batch)

    def loss(self, params: Params, state: State, batch: ClipBatch, rng: jax.Array) -> tuple[Scalars, Scalars, State]:
        """The parts of `clip_losses.COEFFICIENTS`, summed over prompts, by objects and frames; and "overlap".

        A frame that is corrected counts once for what was tracked and once for every click, as in the public training.
        """
        videos, objects, frames = batch.real.shape
        drawing, *keys = jax.random.split(rng, frames + 1)
        prompting = draw_prompting(drawing, videos, frames, self.prompting)
        bank = sam2_video.new_bank(self.config, objects, conditioning=self.prompting.corrected_frames)
        banks = jax.tree.map(lambda x: jnp.broadcast_to(x, (videos, *x.shape)), bank)
        truth = jnp.moveaxis(batch.masks & batch.real[..., None, None], 2, 0)
        real = jnp.moveaxis(batch.real, 2, 0).astype(jnp.float32)
        maps = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), self._encode(params, batch.frames))
        step = partial(self._frame, params, prompting)
        body = jax.checkpoint(step, prevent_cse=False) if self.prompting.remat else step
        _, sums = jax.lax.scan(
            body, banks, (maps, truth, real, jnp.arange(frames), prompting.corrected, jnp.stack(keys))
        )
        weights = {name: real.sum() for name in COEFFICIENTS}
        return jax.tree.map(jnp.sum, sums), weights | {"overlap": (real * truth.any((-2, -1)))[1:].sum()}, state

    def follow(self, params: Params, batch: ClipBatch, forget: bool = False) -> Bool[Array, "B O T side side"]:
        """Track every object from its true mask on the first frame, as a user would; frame 0 is that mask itself.

        Args:
            params: the model's.
            batch: clips with masks.
            forget: whether the memory is emptied at every frame, which shows what it is worth.
        """
        maps = self._encode(params, batch.frames)
        objects, frames, side = batch.masks.shape[1], batch.masks.shape[2], batch.masks.shape[-1]

        def one(maps: Maps, mask: Float[Array, "objects side side"]) -> Float[Array, "time objects size size"]:
            bank = sam2_video.new_bank(self.config, objects)
            prompts = sam2_video.FramePrompts(
                jnp.zeros((objects, 1, 2)), jnp.full((objects, 1), ABSENT, jnp.int32), masks_binary=mask
            )
            first = sam2_video.frame_of(maps, 0)
            _, bank = sam2_video.prompted_step(self.model, params, first, bank, 0, prompts, write=not forget)
            later = jax.tree.map(lambda x: x[1:], maps)
            found, _ = sam2_video.propagate(
                self.model, params, later, bank, jnp.arange(1, frames), write=not forget, video_frames=frames
            )
            return found.masks

        logits = jax.vmap(one)(maps, batch.masks[:, :, 0].astype(jnp.float32))
        masks = jnp.moveaxis(resize_masks(logits, (side, side)) > 0, 1, 2)
        return jnp.concatenate([batch.masks[:, :, :1], masks], axis=2)

    def _apply(self, params: Params, method: str, *given: Any, **options: Any) -> Any:
        return self.model.apply({"params": params}, *given, **options, method=method)

    def _encode(self, params: Params, frames: UInt8[Array, "videos time side side 3"]) -> Maps:
        """Maps of all frames, (videos, time, ...)."""
        videos, time = frames.shape[:2]
        maps = self._apply(params, "encode", normalised(frames).reshape(-1, *frames.shape[2:]))
        whole = jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), maps)  # a clip's frames together
        return jax.tree.map(lambda x: x.reshape(videos, time, *x.shape[1:]), whole)

    def _frame(self, params: Params, prompting: Prompting, banks: MemoryBank, given: Any) -> tuple[MemoryBank, Scalars]:
        """One frame of every clip: prompted or tracked, corrected where it is its turn, scored, and remembered."""
        maps, truth, real, time, corrected, key = given
        first, memory = time == 0, self.config.video_memory()
        drawing, clicking = jax.random.split(key)
        points, labels = first_prompts(drawing, truth, prompting.by_boxes)
        labels = jnp.where(first, labels, ABSENT)
        reading = jax.vmap(lambda bank: read(bank, time, memory, video_frames=len(prompting.corrected)))(banks)
        conditioned = self._apply(params, "condition", maps, reading)
        # A frame without prompts has an empty point.
        empty_point = jnp.where(first, labels, labels.at[:, :, 0].set(NOT_A_POINT))
        before = self._attempt(params, maps, conditioned, Prompts(points, empty_point), truth)
        wanted = shrunk(truth, self.prompting.loss_stride)
        matched = overlap(resize_masks(before.outcome.masks, (wanted.shape[-2], wanted.shape[-1])) > 0, wanted >= 0.5)
        clicked = prompting.by_points & corrected
        after = self._corrected(params, maps, conditioned, before, Prompts(points, labels), truth, clicked, clicking)
        # A mask that the user gave is the answer, and teaches nothing.
        by_mask = first & ~prompting.by_points
        taken = jax.lax.cond(first, lambda: self._taken(params, maps, truth), lambda: after.outcome)
        outcome = _choose(by_mask, taken, after.outcome)
        if self.prompting.told:
            _, masks, object_logits = outputs_of_mask(truth.astype(jnp.float32))
            outcome = _choose(prompting.told, outcome._replace(masks=masks, object_logits=object_logits), outcome)
        conditioning = jnp.broadcast_to((first | clicked)[:, None], real.shape)
        banks = self._remembered(params, maps, banks, time, outcome, conditioning)
        scored = jnp.where(by_mask[:, None], 0.0, real)
        sums = {name: (scored * values).sum() for name, values in after.losses.items()}
        seen = jnp.where(first, 0.0, real * truth.any((-2, -1)))
        return banks, sums | {"overlap": (seen * matched).sum()}

    def _attempt(self, params: Params, maps: Maps, conditioned: Array, prompts: Prompts, truth: Array) -> Attempt:
        """Masks from prompts, and what they cost."""
        found = self._apply(params, "decode", maps, conditioned, prompts, training=True)
        several = several_wanted(prompts.labels, self.config.heads.decoder)
        outcome = Outcome(found.masks, found.object_logits, found.pointers)
        targets = shrunk(truth, self.prompting.loss_stride)
        return Attempt(outcome, prompt_losses(found.decoded, several, targets))

    def _taken(self, params: Params, maps: Maps, truth: Bool[Array, "videos objects side side"]) -> Outcome:
        """True masks as prompts."""
        found = self._apply(params, "take_mask", maps, truth.astype(jnp.float32))
        return Outcome(found.masks, found.object_logits, found.pointers)

    def _corrected(
        self,
        params: Params,
        maps: Maps,
        conditioned: Array,
        before: Attempt,
        start: Prompts,
        truth: Bool[Array, "videos objects side side"],
        which: Bool[Array, "videos"],
        key: PRNGKeyArray,
    ) -> Attempt:
        """Correct a frame of some clips, click by click; nothing is computed where it is none's turn."""
        clicks, size, given = self.prompting.clicks, (truth.shape[-2], truth.shape[-1]), start.labels.shape[-1]
        if not clicks:
            return before
        room = ((0, 0), (0, 0), (0, clicks))
        points = jnp.pad(start.points_px, (*room, (0, 0)))
        labels = jnp.pad(start.labels, room, constant_values=ABSENT)

        def click(state: tuple[Attempt, Array, Array], turn: tuple[Array, PRNGKeyArray]) -> tuple[Any, None]:
            so_far, points, labels = state
            number, key = turn
            chance, place = jax.random.split(key)
            blind = jax.random.bernoulli(chance, self.prompting.blind, truth.shape[:2])[..., None, None]
            shown = resize_masks(so_far.outcome.masks, size) > 0
            point, label = click_on_error(place, truth, shown & ~blind)
            points, labels = points.at[:, :, given + number].set(point), labels.at[:, :, given + number].set(label)
            earlier = jnp.clip(so_far.outcome.masks, -sam2_video.EARLIER_LIMIT, sam2_video.EARLIER_LIMIT)
            new = self._attempt(params, maps, conditioned, Prompts(points, labels, earlier), truth)
            losses = {
                name: before + jnp.where(which[:, None], new.losses[name], 0.0)
                for name, before in so_far.losses.items()
            }
            return (Attempt(_choose(which, new.outcome, so_far.outcome), losses), points, labels), None

        def correct() -> Attempt:
            turns = jnp.arange(clicks), jax.random.split(key, clicks)
            (after, _, _), _ = jax.lax.scan(click, (before, points, labels), turns)
            return after

        # Without the checkpoint every frame would carry room for what the backward pass of a corrected one needs.
        return jax.lax.cond(which.any(), jax.checkpoint(correct), lambda: before)

    def _remembered(
        self,
        params: Params,
        maps: Maps,
        banks: MemoryBank,
        time: Int[Array, ""],
        outcome: Outcome,
        conditioning: Bool[Array, "videos objects"],
    ) -> MemoryBank:
        """The banks with a frame's outcome; masks stay soft, as always in training."""
        soft = jnp.zeros(conditioning.shape, bool)
        memories = self._apply(params, "remember", maps, outcome.masks, outcome.object_logits, soft)
        put = jax.vmap(lambda bank, *memory: insert(bank, time, *memory))
        return put(banks, memories, outcome.pointers, conditioning)


def _choose(which: Bool[Array, "videos"], ours: Any, others: Any) -> Any:
    """One tree where `which` says so, the other elsewhere, clip by clip."""
    return jax.tree.map(lambda x, y: jnp.where(which.reshape(-1, *(1,) * (x.ndim - 1)), x, y), ours, others)
