"""The references of whole Segment Anything models: small ones of `transformers` with drawn weights, from pixels on.

`Oracle` runs the reference over a video and tells its memory at every frame as our bank; beside it runs the same frame
from the same memory in float64, the measure of both.
"""

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import Sam2Model, Sam2VideoModel, SamModel
from transformers.models.sam2.configuration_sam2 import Sam2Config
from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

from tests.segmentation.sam_reference import (
    GRID,
    STRIDE,
    WIDTH,
    sam2_config,
    sam_config,
    small_heads,
    table,
    tree_of,
)
from tests.segmentation.sam_reference import draw_weights as draw_heads
from tests.vision.sam_reference import channels_first, hiera_params, reference_hiera, reference_vit, vit_params
from tests.vision.sam_reference import draw_weights as draw_encoder
from tracevision_jax.hosts.sam_presets import SegmentAnythingConfig
from tracevision_jax.segmentation.memory_bank import MemoryBank, empty, insert
from tracevision_jax.vision.sam_config import HieraConfig, SamVitConfig
from tracevision_jax.weights.engine import flatten, unflatten

SIDE = GRID * STRIDE
WHOLE = 1e-4
"""Largest relative error (Frobenius) of a whole model's outputs in float32."""
VIT = SamVitConfig(
    width=32, heads=2, groups=2, window_blocks=1, patch=STRIDE, image_size=SIDE, window=3, out_width=WIDTH
)
HIERA = HieraConfig(width=16, blocks=(1, 2, 3, 2), windows=(8, 4, 6, 3), global_blocks=(4,), fpn_width=WIDTH)
SCORE_BIAS = "mask_decoder/pred_obj_score_head/proj_out/bias"


def small_config(release: str) -> SegmentAnythingConfig:
    """A release's switches, as `transformers` runs them, at small sizes."""
    return SegmentAnythingConfig(VIT if release == "sam" else HIERA, small_heads(release))


def _configuration(release: str) -> Any:
    """The configuration of `transformers` for it."""
    config = small_config(release)
    if release == "sam":
        whole = sam_config(config.heads)
        whole.vision_config = reference_vit(VIT).config
        whole.vision_config.num_pos_feats = WIDTH // 2
    else:
        whole = sam2_config(config.heads)
        sizes = whole.vision_config.backbone_feature_sizes
        whole.vision_config = reference_hiera(HIERA).config
        whole.vision_config.backbone_feature_sizes = sizes
    whole._attn_implementation = "eager"
    return whole


@cache
def whole_reference(release: str, wide: bool = False) -> Any:
    """The small model of a release, `SamModel` or `Sam2VideoModel`, in float32 or in float64."""
    model = (SamModel if release == "sam" else Sam2VideoModel)(_configuration(release))
    draw_heads(model, seed=3)
    draw_encoder(model.vision_encoder, seed=4)
    return model.eval().to(torch.float64 if wide else torch.float32)


@cache
def image_reference(release: str, wide: bool = False) -> Any:
    """The model for pictures with the same weights: `SamModel` or `Sam2Model`."""
    whole = whole_reference(release, wide)
    if release == "sam":
        return whole
    config = whole.config
    model = Sam2Model(
        Sam2Config(
            vision_config=config.vision_config,
            prompt_encoder_config=config.prompt_encoder_config.to_dict(),
            mask_decoder_config=config.mask_decoder_config.to_dict(),
        )
    )
    state = whole.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model.eval().to(torch.float64 if wide else torch.float32)


def tree_from(release: str, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our tree of a whole model from arrays under the reference's names."""
    config, prefix = small_config(release), "vision_encoder."
    encoder = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    params = tree_of(table(config.heads), state)
    if isinstance(config.vision, HieraConfig):
        return params | {"vision_encoder": hiera_params(encoder, config.vision)}
    return params | {"vision_encoder": vit_params(encoder, config.vision)}


@cache
def whole_parameters(release: str) -> dict[str, Any]:
    """The small model's weights as our parameters."""
    state = {name: value.numpy() for name, value in whole_reference(release).state_dict().items()}
    return jax.tree.map(jnp.asarray, tree_from(release, state))


class Told(NamedTuple):
    """What the reference says of one object on one frame."""

    masks: np.ndarray
    """Logits."""
    score: np.ndarray
    pointer: np.ndarray
    memory: np.ndarray | None
    """Before it is rounded; None where it keeps the one it had."""
    kept: np.ndarray
    """The memory as it is stored, in bfloat16."""


class Oracle:
    """The reference, prompted and run frame by frame over a video."""

    def __init__(self, release: str, pixels: np.ndarray, things: int):
        """Take frames (time, height, width, channels), and objects numbered from 0."""
        self.things, self.frames = things, len(pixels)
        self.config = small_config(release).video_memory()
        self.models = [copy.deepcopy(whole_reference(release, wide)) for wide in (False, True)]
        self.params = flatten(whole_parameters(release))
        self.fresh: list[dict[int, np.ndarray]] = [{}, {}]
        for model, fresh in zip(self.models, self.fresh, strict=True):
            model.mask_decoder.dynamic_multimask_via_stability = True
            _record_memories(model, fresh)
        video = channels_first(pixels)
        self.session = Sam2VideoInferenceSession(video, SIDE, SIDE, dtype=torch.float32)
        self.twin = Sam2VideoInferenceSession(video.double(), SIDE, SIDE, dtype=torch.float64)
        for thing in range(things):
            self.session.obj_id_to_idx(thing)
            self.twin.obj_id_to_idx(thing)
        self.bank: MemoryBank = empty(
            self.config, things, GRID, GRID, conditioning=2, recent=self.frames, recent_pointers=self.frames
        )
        """All that it keeps."""

    def add_points(self, thing: int, frame: int, points: list, labels: list) -> None:
        for session in (self.session, self.twin):
            places = torch.tensor([[points]], dtype=session.dtype)
            session.add_point_inputs(thing, frame, {"point_coords": places, "point_labels": torch.tensor([[labels]])})

    def add_mask(self, thing: int, frame: int, mask: np.ndarray) -> None:
        for session in (self.session, self.twin):
            session.add_mask_inputs(thing, frame, torch.tensor(mask)[None, None])

    def force(self, score: float) -> dict[str, Any]:
        """Make all objects present or absent by the score's bias; return our parameters with it."""
        with torch.no_grad():
            for model in self.models:
                model.mask_decoder.pred_obj_score_head.proj_out.bias.fill_(score)
        return unflatten(self.params | {SCORE_BIAS: jnp.full_like(self.params[SCORE_BIAS], score)})

    def run(self, time: int, prompted: tuple[int, ...] = (), reverse: bool = False) -> list[list[Told]]:
        """Run a frame; return what it says of every object, in float32 and, from the same memory, in float64."""
        self.twin.output_dict_per_obj = _widened(self.session.output_dict_per_obj)
        self.twin.frames_tracked_per_obj = copy.deepcopy(self.session.frames_tracked_per_obj)
        told = []
        for model, session, fresh in zip(self.models, (self.session, self.twin), self.fresh, strict=True):
            fresh.clear()
            session.obj_with_new_inputs = list(prompted)
            model(session, frame_idx=time, reverse=reverse)
            told.append([self._told(session, fresh, thing, time)[1] for thing in range(self.things)])
        self._insert(time)
        return told

    def _told(
        self, session: Sam2VideoInferenceSession, fresh: dict[int, np.ndarray], thing: int, time: int
    ) -> tuple[bool, Told]:
        """(whether the frame is a conditioning one, its outputs)."""
        frames = session.output_dict_per_obj[thing]
        conditioning = time in frames["cond_frame_outputs"]
        stored = frames["cond_frame_outputs" if conditioning else "non_cond_frame_outputs"][time]
        names = ("pred_masks", "object_score_logits", "object_pointer")
        masks, score, pointer = (stored[name].double().numpy() for name in names)
        kept = stored["maskmem_features"].float().numpy().reshape(GRID, GRID, -1)
        return conditioning, Told(masks[0, 0], score.reshape(()), pointer.reshape(WIDTH), fresh.get(thing), kept)

    def _insert(self, time: int) -> None:
        """Follow what the reference has just stored."""
        rows = [self._told(self.session, self.fresh[0], thing, time) for thing in range(self.things)]
        memories = jnp.asarray(np.stack([told.kept for _, told in rows]))
        pointers = jnp.asarray(np.stack([told.pointer for _, told in rows]), jnp.float32)
        conditioning = jnp.asarray([first for first, _ in rows])
        self.bank = _insert(self.bank, time, memories, pointers, conditioning)


_insert = jax.jit(insert)


def _widened(outputs: Any) -> Any:
    """What is stored of frames, in float64; what is kept in bfloat16 stays."""
    if isinstance(outputs, dict):
        return {name: _widened(value) for name, value in outputs.items()}
    return outputs.double() if outputs.dtype == torch.float32 else outputs


def _record_memories(model: Any, fresh: dict[int, np.ndarray]) -> None:
    """Have a reference write down, by object, the memories of each frame before it rounds them."""
    encode, made = model._batch_encode_memories, []

    def told(module, given, output) -> None:
        made[:] = [output[0]]  # the mark of an absent object is added to it afterwards, in place

    def recorded(*given: Any, **named: Any) -> None:
        things = named["objects_needing_memory_encoding"]
        encode(*given, **named)
        if things:
            memories = made[0].permute(0, 2, 3, 1).double().numpy()
            fresh.update(zip(things, memories, strict=True))

    model.memory_encoder.register_forward_hook(told)
    model._batch_encode_memories = recorded


@cache
def drawn_video(frames: int) -> np.ndarray:
    """Frames of smooth noise that changes slowly, as normalised pixels."""
    rng = np.random.default_rng(21)
    coarse = rng.standard_normal((2, SIDE // 8, SIDE // 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
    angle = np.linspace(0, np.pi / 2, frames)[:, None, None, None]
    noise = 0.3 * rng.standard_normal((frames, SIDE, SIDE, 3))
    return (np.cos(angle) * coarse[0] + np.sin(angle) * coarse[1] + noise).astype(np.float32)


def disc(row: int, column: int, radius: int) -> np.ndarray:
    """A binary mask of a disc, pixels."""
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return ((rows - row) ** 2 + (columns - column) ** 2 < radius**2).astype(np.float32)
