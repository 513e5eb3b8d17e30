"""Pictures of answers: what was traced, what was answered, and what the TVP attended to.

draw_answer(sample, answer, [points]).save("picture.png")
draw_attention(sample, model.attention(image, points)).save("attention.png")
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from tracevision_jax.inference.answers import Answer, Grounded
from tracevision_jax.inference.attention import BlockAttention
from tracevision_jax.inference.pictures import draw_boxes, draw_trace, overlay_attention, overlay_masks, shown
from tracevision_jax.inference.pictures_sheets import Panel, contact_sheet, sheet
from tracevision_jax.records.sample import Sample


def frame_indices(sample: Sample, answer: Answer) -> list[int]:
    """The sample's frame at the start of each of the answer's; of several stills, their numbers."""
    if sample.frames_per_second <= 0:
        return list(range(len(sample.frames)))
    places = np.round(np.asarray(answer.frame_times) * sample.frames_per_second).astype(int)
    return np.minimum(places, len(sample.frames) - 1).tolist()


def draw_answer(sample: Sample, answer: Answer, traces: Sequence[np.ndarray] = ()) -> Image.Image:
    """The picture with masks, boxes and trajectories of an answer, and the traces that were shown; of a video, its
    frames on one sheet."""
    lines = answer.grounded
    drawn = [
        _draw_frame(sample.frames[index], lines, number, answer, traces)
        for number, index in enumerate(frame_indices(sample, answer))
    ]
    if len(drawn) == 1:
        return drawn[0]
    return contact_sheet(drawn, answer.frame_times if sample.frames_per_second > 0 else ())


def _draw_frame(
    frame: np.ndarray, lines: Sequence[Grounded], number: int, answer: Answer, traces: Sequence[np.ndarray]
) -> Image.Image:
    picture = shown(frame)
    masked = [line for line in lines if line.mask is not None]
    if masked:
        masks = np.stack([line.mask[number] for line in masked if line.mask is not None])
        picture = overlay_masks(picture, masks, [line.phrase or f"{n + 1}" for n, line in enumerate(masked)])
    boxed = [line for line in lines if line.box is not None and line.mask is None]
    if boxed:
        boxes = np.stack([line.box for line in boxed if line.box is not None])
        labels = [line.phrase for line in boxed]
        picture = draw_boxes(picture, boxes, labels if all(labels) else ())
    for points in [*traces, *answer.trajectories]:
        picture = draw_trace(picture, points)
    return picture


def draw_attention(sample: Sample, blocks: Sequence[BlockAttention], keypoints: int = 3) -> Image.Image:
    """For each TVP block: where the whole trace looks, and where some of its keypoints do, in the first frame."""
    picture = shown(sample.frames[0])
    panels = [Panel(draw_trace(picture, blocks[0].points), "", "trace (keypoints)")] if blocks else []
    for number, block in enumerate(blocks):
        panels.append(Panel(overlay_attention(picture, block.over_image[0]), "", f"block {number + 1}: all points"))
        if block.vision_to_trace is None:
            continue
        chosen = np.unique(np.linspace(0, len(block.points) - 1, keypoints).round().astype(int)).tolist()
        for index in chosen:
            looked = overlay_attention(picture, block.vision_to_trace[:, index, 0].mean(axis=0))
            at = draw_boxes(looked, _around(block.points[index]))
            panels.append(Panel(at, "", f"block {number + 1}: keypoint {index + 1}"))
    return sheet(panels, columns=1 + keypoints) if panels else picture


def _around(point: np.ndarray, radius: float = 0.02) -> np.ndarray:
    """A small box around a point."""
    return np.array([[point[0] - radius, point[1] - radius, point[0] + radius, point[1] + radius]])
