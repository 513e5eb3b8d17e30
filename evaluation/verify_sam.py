"""Segment Anything against that of `transformers`, on the same picture, prompts and video: the error of every stage.

    rows = verify_sam("sam2.1-hiera-tiny", config, lambda: params, say=print)
    all(row.passed for row in rows)

Both compute in float32, each prompt on one picture: points, boxes, both, masks, and none. Of a model with memory there
is a short video as well, with a click on one object and a mask of another on its first frame. Every later frame of ours
starts from what the reference remembers, since small differences grow from frame to frame in any recurrent model. Where
`transformers` departs from the authors' code, ours is told to follow it here. Needs torch.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from evaluation.verify import LIMIT, StageError, draw_pictures, draw_video, largest_error, require_torch
from tracevision_jax.errors import UserError
from tracevision_jax.hosts import sam2_video
from tracevision_jax.hosts.sam import Prompts, SegmentAnything
from tracevision_jax.hosts.sam_presets import SegmentAnythingConfig
from tracevision_jax.segmentation.memory_bank import insert
from tracevision_jax.segmentation.prompt_encoder import ABSENT, NOT_A_POINT, with_boxes
from tracevision_jax.segmentation.sam_config import hugging_face
from tracevision_jax.vision.sam_preprocess import IMAGENET_MEAN, IMAGENET_STD, fit_longest_side, fit_square
from tracevision_jax.weights.sam_config_export import SAM, model_type

FRAMES = 4
OBJECTS = 2
CLICKS = np.array([[[0.4, 0.3], [0.7, 0.2]], [[0.6, 0.8], [0.3, 0.5]]])
"""Of two objects, as parts of the square: inside the object, then outside."""
LABELS = np.array([[1, 0], [1, 0]])
BOXES = np.array([[0.2, 0.1, 0.6, 0.5], [0.5, 0.6, 0.9, 0.95]])
KINDS = ("points", "boxes", "points and boxes", "points and masks", "no prompt")

Rows = dict[str, Float[np.ndarray, "rows columns"]]
"""Every stage's result."""


def verify_sam(
    reference: str | Path,
    config: SegmentAnythingConfig,
    load: Callable[[], Mapping[str, Any]],
    say: Callable[[str], None] = print,
) -> list[StageError]:
    """Run both implementations and compare them stage by stage.

    Args:
        reference: Hugging Face directory that the reference is loaded from.
        config: of ours.
        load: gives the parameters of ours in float32.
        say: told what is being done.

    Raises:
        UserError: torch is missing, or the directory cannot be loaded.
    """
    require_torch()
    config = config.with_precision("float32", "float32")
    if config.heads.memory is not None:
        config = replace(config, heads=hugging_face(config.heads))
    picture, frames = draw_pictures()[0], draw_video()[:FRAMES]
    say("running transformers on a picture")
    theirs = reference_on_picture(Path(reference), config, picture)
    told: list[Told] = []
    if config.heads.memory is not None:
        say(f"running transformers on a video of {FRAMES} frames")
        told = reference_on_video(Path(reference), config, pixels_of(frames, config))
        theirs |= rows_of_video(told)
    gc.collect()
    say("running ours")
    params = load()
    with jax.default_matmul_precision("highest"):
        ours = ours_on_picture(config, params, picture)
        if told:
            ours |= rows_of_video(ours_on_video(config, params, pixels_of(frames, config), told))
    return [StageError(stage, largest_error(ours[stage], theirs[stage]), len(theirs[stage]), LIMIT) for stage in theirs]


def pixels_of(
    pictures: UInt8[np.ndarray, "pictures height width 3"], config: SegmentAnythingConfig
) -> Float[np.ndarray, "pictures side side 3"]:
    """As the model takes them."""
    fit = fit_longest_side if model_type(config) == SAM else fit_square
    return np.stack([fit(picture, config.image_size)[0] for picture in pictures])


def drawn_mask(side: int) -> Float[np.ndarray, "side side"]:
    """A binary mask of a disc."""
    row, column = np.mgrid[:side, :side] / side
    return ((row - 0.6) ** 2 + (column - 0.4) ** 2 < 0.2**2).astype(np.float32)


def drawn_logits(config: SegmentAnythingConfig) -> Float[np.ndarray, "size size"]:
    """A mask as the decoder would write it, to be a prompt."""
    row, column = np.mgrid[: config.mask_size, : config.mask_size] / config.mask_size
    return (8 * np.sin(7 * row) * np.cos(5 * column)).astype(np.float32)


def rows_of_answers(kind: str, answers: list[tuple[np.ndarray, np.ndarray, np.ndarray | None]]) -> Rows:
    """Masks, a row each, and scores, a row an object, of (masks, ious, object logits) with several masks and with one.

    Masks are (objects, masks, rows, columns), ious (objects, masks), object logits (objects, 1) or None.
    """
    masks = np.concatenate([masks for masks, _, _ in answers], axis=1)
    scores = [part for _, ious, there in answers for part in (ious, there) if part is not None]
    return {
        f"{kind}: masks": masks.reshape(-1, masks.shape[-1] ** 2),
        f"{kind}: scores": np.concatenate(scores, axis=1),
    }


def reference_on_picture(directory: Path, config: SegmentAnythingConfig, picture: UInt8[np.ndarray, "h w 3"]) -> Rows:
    """Every stage's result by the model for pictures of `transformers`."""
    import torch
    from transformers import Sam2Model, SamModel

    side, first = config.image_size, model_type(config) == SAM
    model = _load(SamModel if first else Sam2Model, directory)
    reference = _preprocessed(picture, side, first)
    found: Rows = {"preprocessing": reference.reshape(side, -1)}
    pixels = torch.from_numpy(pixels_of(picture[None], config)).permute(0, 3, 1, 2)
    places, boxes = torch.tensor(CLICKS[None] * side).float(), torch.tensor(BOXES[None] * side).float()
    points = {"input_points": places, "input_labels": torch.tensor(LABELS[None])}
    if first:
        nothing = {}
    else:
        nowhere = torch.full((1, OBJECTS, 1), NOT_A_POINT)
        nothing = {"input_points": torch.zeros(1, OBJECTS, 1, 2), "input_labels": nowhere}
    mask = {"input_masks": torch.from_numpy(drawn_logits(config))[None, None]}
    given: dict[str, dict[str, Any]] = {
        "points": points,
        "boxes": {"input_boxes": boxes},
        "points and boxes": {**points, "input_boxes": boxes},
        "points and masks": {**points, **mask},
        "no prompt": nothing,
    }
    with torch.no_grad():
        embeddings = model.get_image_embeddings(pixels)
        last = embeddings if first else embeddings[-1]
        found["image embedding"] = last[0].permute(1, 2, 0).reshape(config.grid, -1).numpy()
        for kind in KINDS:
            outs = [model(image_embeddings=embeddings, **given[kind], multimask_output=many) for many in (True, False)]
            answers = [
                (
                    out.pred_masks[0].numpy(),
                    out.iou_scores[0].numpy(),
                    None if first else out.object_score_logits[0].numpy(),
                )
                for out in outs
            ]
            found |= rows_of_answers(kind, answers)
    return found


def _preprocessed(picture: UInt8[np.ndarray, "h w 3"], side: int, first: bool) -> Float[np.ndarray, "side side 3"]:
    """By SAM's processor; for SAM 2 by PyTorch's antialiased resizing, which is what its processor does."""
    import torch
    from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

    if first:
        processor = SamImageProcessorPil(size={"longest_edge": side}, pad_size={"height": side, "width": side})
        return np.asarray(processor(picture, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    values = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    resize = partial(torch.nn.functional.interpolate, mode="bilinear", align_corners=False, antialias=True)
    small = resize(values, (side, side))[0].permute(1, 2, 0).numpy()
    return (small - np.asarray(IMAGENET_MEAN, np.float32)) / np.asarray(IMAGENET_STD, np.float32)


def _load(kind: Any, directory: Path) -> Any:
    """A model of `transformers` in float32."""
    import torch
    from transformers.utils import logging

    shown, spoken = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()  # progress is shown by whoever called
    logging.set_verbosity_error()  # a model for videos is loaded as one for pictures, which it warns of
    try:
        return kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    except Exception as error:  # whatever transformers finds wrong with it
        raise UserError(f"transformers cannot load {directory}: {error}") from error
    finally:
        logging.set_verbosity(spoken)
        if shown:
            logging.enable_progress_bar()


@dataclass(frozen=True)
class Told:
    """What one implementation says of a frame."""

    masks: Float[np.ndarray, "objects size size"]
    """Logits."""
    scores: Float[np.ndarray, "objects 1"]
    pointers: Float[np.ndarray, "objects width"]
    memories: Float[np.ndarray, "objects grid grid memory_width"]
    """Before they are rounded to be kept."""
    kept: Float[np.ndarray, "objects grid grid memory_width"] | None = None
    """As they are kept; None of ours."""


def rows_of_video(frames: list[Told]) -> Rows:
    """Masks and pointers a row each; scores a row a frame; memories a row each row of the map."""
    memories = np.concatenate([frame.memories for frame in frames])
    masks = np.concatenate([frame.masks for frame in frames])
    return {
        "video: masks": masks.reshape(len(masks), -1),
        "video: object scores": np.stack([frame.scores[:, 0] for frame in frames]),
        "video: object pointers": np.concatenate([frame.pointers for frame in frames]),
        "video: memories": memories.reshape(-1, memories.shape[2] * memories.shape[3]),
    }


def reference_on_video(
    directory: Path, config: SegmentAnythingConfig, pixels: Float[np.ndarray, "frames side side 3"]
) -> list[Told]:
    """What the model for videos of `transformers` says frame by frame."""
    import torch
    from transformers import Sam2VideoModel
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    model, side = _load(Sam2VideoModel, directory), config.image_size
    made: list[Any] = []
    model.memory_encoder.register_forward_hook(lambda module, given, output: made.append(output[0]))
    video = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    session = Sam2VideoInferenceSession(video, side, side, dtype=torch.float32)
    for thing in range(OBJECTS):
        session.obj_id_to_idx(thing)
    click = {"point_coords": torch.tensor(CLICKS[None, :1, :1] * side).float(), "point_labels": torch.tensor([[[1]]])}
    session.add_point_inputs(0, 0, click)
    session.add_mask_inputs(1, 0, torch.from_numpy(drawn_mask(side))[None, None])
    session.obj_with_new_inputs = list(range(OBJECTS))
    names = ("pred_masks", "object_score_logits", "object_pointer", "maskmem_features")
    frames = []
    for time in range(FRAMES):
        made.clear()
        with torch.no_grad():
            model(session, frame_idx=time)
        stored = []
        for thing in range(OBJECTS):
            outputs = session.output_dict_per_obj[thing]
            of_frame = outputs["cond_frame_outputs" if time == 0 else "non_cond_frame_outputs"][time]
            stored.append([of_frame[name].float().numpy() for name in names])
        masks, scores, pointers, kept = (np.stack(parts) for parts in zip(*stored, strict=True))
        frames.append(
            Told(
                masks[:, 0, 0],
                scores.reshape(OBJECTS, 1),
                pointers.reshape(OBJECTS, -1),
                # The mark of an absent object was added to them in place.
                torch.cat(made).permute(0, 2, 3, 1).numpy(),
                kept.reshape(OBJECTS, config.grid, config.grid, -1),
            )
        )
    return frames


def prompts_for_ours(kind: str, config: SegmentAnythingConfig) -> Prompts:
    """A kind of prompt, always of the same shape: what it does not have is padding."""
    side, size = config.image_size, config.mask_size
    points, labels = CLICKS * side, LABELS
    if kind == "boxes":
        labels = np.full_like(LABELS, ABSENT)
    if kind == "no prompt":
        labels = np.full_like(LABELS, ABSENT)
        labels[:, 0] = ABSENT if model_type(config) == SAM else NOT_A_POINT
    has_box = jnp.full((1, OBJECTS), "boxes" in kind)
    corners = jnp.asarray(BOXES[None] * side, jnp.float32)
    places: tuple[Any, Any] = (jnp.asarray(points[None], jnp.float32), jnp.asarray(labels[None], jnp.int32))
    masks = jnp.asarray(np.broadcast_to(drawn_logits(config), (1, OBJECTS, size, size)))
    return Prompts(*with_boxes(*places, corners, has_box), masks, jnp.full((1, OBJECTS), kind == "points and masks"))


def ours_on_picture(
    config: SegmentAnythingConfig, params: Mapping[str, Any], picture: UInt8[np.ndarray, "h w 3"]
) -> Rows:
    """Every stage's result by our model."""
    model, variables = SegmentAnything(config), {"params": params}
    pixels = pixels_of(picture[None], config)
    found: Rows = {"preprocessing": pixels[0].reshape(config.image_size, -1)}

    @jax.jit
    def encode(variables: Any, pixels: jax.Array) -> Any:
        maps = model.apply(variables, pixels, method="encode")
        return maps, model.apply(variables, maps, method="condition")

    @jax.jit
    def predict(variables: Any, maps: Any, prompts: Prompts) -> Any:
        return [model.apply(variables, maps, prompts, several=many, method="predict") for many in (True, False)]

    maps, embedding = encode(variables, jnp.asarray(pixels))
    found["image embedding"] = np.asarray(embedding).reshape(config.grid, -1)
    first = model_type(config) == SAM
    for kind in KINDS:
        # Without a prompt SAM in transformers knows of one object alone.
        count = 1 if first and kind == "no prompt" else OBJECTS
        answers = [
            (
                np.asarray(out.masks[0, :count]),
                np.asarray(out.ious[0, :count]),
                None if first else np.asarray(out.object_logits[0, :, None]),
            )
            for out in predict(variables, maps, prompts_for_ours(kind, config))
        ]
        found |= rows_of_answers(kind, answers)
    return found


def ours_on_video(
    config: SegmentAnythingConfig,
    params: Mapping[str, Any],
    pixels: Float[np.ndarray, "frames side side 3"],
    told: list[Told],
) -> list[Told]:
    """What our model says frame by frame, each time from what the reference remembers of the frames before."""
    model, side = SegmentAnything(config), config.image_size
    encode = jax.jit(lambda params, frame: sam2_video.encode(model, params, frame))
    labels: Int[np.ndarray, "objects 1"] = np.array([[1], [ABSENT]], np.int32)
    prompts = sam2_video.FramePrompts(
        jnp.asarray(CLICKS[:, :1] * side, jnp.float32),
        jnp.asarray(labels),
        jnp.asarray(np.broadcast_to(drawn_mask(side), (OBJECTS, side, side))),
        jnp.asarray([False, True]),
    )
    # The reference makes all masks of a frame binary as soon as one is prompted.
    start = jax.jit(
        lambda params, maps, bank: sam2_video.prompted_step(model, params, maps, bank, 0, prompts, binary=True)
    )
    follow = jax.jit(
        lambda params, maps, bank, time: sam2_video.propagate_step(
            model, params, maps, bank, time, video_frames=len(pixels)
        )
    )
    bank, frames = sam2_video.new_bank(config, OBJECTS), []
    for time, remembered in enumerate(told):
        maps = sam2_video.frame_of(encode(params, jnp.asarray(pixels[time : time + 1])), 0)
        frame, _ = start(params, maps, bank) if time == 0 else follow(params, maps, bank, time)
        frames.append(
            Told(
                np.asarray(frame.masks),
                np.asarray(frame.object_logits)[:, None],
                np.asarray(frame.pointers),
                np.asarray(frame.memories),
            )
        )
        memories, pointers = jnp.asarray(remembered.kept), jnp.asarray(remembered.pointers)
        bank = insert(bank, time, memories, pointers, jnp.full(OBJECTS, time == 0))
    return frames
