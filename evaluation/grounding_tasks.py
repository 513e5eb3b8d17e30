"""Tasks that are answered with places: boxes of phrases, masks of phrases, masks of what a trace rests on.

- `ReferBox`: P@0.5 of the first frame's box, one prompt for each region that a sample names.
- `ReferSegment`: cIoU and gIoU of the mask of a phrase, at the picture's own resolution.
- `TraceSegment`: the same for what a trace rests on; all masks of an answer together against all of the truth.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from evaluation.metrics import boxes, masks
from evaluation.task import Prompt, Record, Samples, Table, mean, without_words
from tracevision_jax.inference.answers import Answer
from tracevision_jax.inference.rendering import frame_indices
from tracevision_jax.records import templates
from tracevision_jax.records.processor import Processor
from tracevision_jax.records.sample import Conversation, MaskPart, PhrasePart, Sample
from tracevision_jax.vision.run_lengths import encode_mask


@dataclass(frozen=True)
class ReferBox:
    """Boxes of phrases."""

    name = "refer_box"

    def budget(self, processor: Processor) -> int:
        """Four coordinates, the tag after them, the end."""
        return 6 if processor.config.coordinates == "bins" else 31

    def prompts(self, samples: Samples, index: int) -> list[Prompt]:
        sample = samples[index]
        return [
            Prompt(
                f"{sample.id} {number}",
                sample,
                templates.locate(region.phrase, None),
                {"phrase": region.phrase, "truth": region.box[0].tolist()},
                outline=functools.partial(Processor.box_beginning, phrase=region.phrase),
            )
            for number, region in enumerate(sample.regions)
            if np.isfinite(region.box[0]).all()
        ]

    def record(self, prompt: Prompt, answer: Answer, processor: Processor) -> Record:
        if answer.box is None:
            return {"prediction": None, "iou": 0.0}
        iou = boxes.iou_pairs(answer.box[None], np.array([prompt.truth["truth"]]))[0]
        return {"prediction": answer.box.round(4).tolist(), "iou": float(iou)}

    def tables(self, records: Sequence[Record]) -> list[Table]:
        if not records:
            return []
        ious = np.array([record["iou"] for record in records])
        values: dict[str, float | None] = {"P@0.5": boxes.precision_at(ious), "mean IoU": float(ious.mean())}
        return [Table(f"Boxes of phrases ({len(records)} phrases)", values)]


@dataclass(frozen=True)
class ReferSegment:
    """Masks of phrases."""

    max_new_tokens: int = 32

    name = "refer_segment"

    def budget(self, processor: Processor) -> int:
        return self.max_new_tokens

    def prompts(self, samples: Samples, index: int) -> list[Prompt]:
        sample = samples[index]
        return [
            Prompt(
                f"{sample.id} {number}",
                sample,
                templates.segment_phrases([region], prompt=region.phrase),
                {"phrase": region.phrase},
            )
            for number, region in enumerate(sample.regions)
            if region.mask is not None
        ]

    def record(self, prompt: Prompt, answer: Answer, processor: Processor) -> Record:
        return mask_record(prompt, answer)

    def tables(self, records: Sequence[Record]) -> list[Table]:
        return mask_tables(f"Masks of phrases ({len(records)} phrases)", records)


@dataclass(frozen=True)
class TraceSegment:
    """Masks of what a trace rests on."""

    max_new_tokens: int = 32
    blind: bool = False
    """Simplify traces without the words that were spoken over them, as a user's trace is."""

    name = "trace_segment"

    def budget(self, processor: Processor) -> int:
        return self.max_new_tokens

    def prompts(self, samples: Samples, index: int) -> list[Prompt]:
        """The sample's own questions of this kind; of a sample without any, its whole trace with all its regions."""
        sample = samples[index]
        kinds = templates.QUESTIONS_OF[self.name]
        conversations = [Conversation(self.name, q.turns) for q in sample.questions if q.kind in kinds]
        if not conversations and self.name in sample.tasks:
            conversations = [templates.build(sample, self.name)]
        return [
            Prompt(
                f"{sample.id} {number}",
                sample,
                without_words(asked) if self.blind else asked,
                outline=Processor.phrase_beginning if _begins_with_phrase(asked) else None,
            )
            for number, asked in enumerate(conversations)
        ]

    def record(self, prompt: Prompt, answer: Answer, processor: Processor) -> Record:
        return mask_record(prompt, answer)

    def tables(self, records: Sequence[Record]) -> list[Table]:
        return mask_tables(f"Masks of what a trace rests on ({len(records)} traces)", records)


def _begins_with_phrase(asked: Conversation) -> bool:
    """Whether the true answer names its target first, as answers to requests for masks do, so that ours has to."""
    parts = asked.turns[-1].parts
    return bool(parts) and isinstance(parts[0], PhrasePart)


def mask_record(prompt: Prompt, answer: Answer) -> Record:
    """Pixels of intersection and union of all masks of an answer with all of the truth, over the shown frames."""
    shown = frame_indices(prompt.sample, answer)
    true = true_mask(prompt.conversation, prompt.sample)[shown]
    predicted = np.asarray(answer.masks.any(axis=0))
    intersection, union = masks.areas(predicted, true)
    return {
        "prediction": [encode_mask(frame) for frame in predicted],
        "phrases": answer.phrases,
        "masks": len(answer.masks),
        "intersection": int(intersection.sum()),
        "union": int(union.sum()),
    }


def true_mask(conversation: Conversation, sample: Sample) -> Bool[np.ndarray, "frames height width"]:
    """All masks of a conversation's last answer together."""
    parts = [part.mask for part in conversation.turns[-1].parts if isinstance(part, MaskPart)]
    return np.logical_or.reduce(parts) if parts else np.zeros(sample.frames.shape[:3], bool)


def mask_tables(title: str, records: Sequence[Record]) -> list[Table]:
    """cIoU and gIoU of mask records, and how many answers had a mask at all."""
    if not records:
        return []
    intersections = np.array([record["intersection"] for record in records])
    unions = np.array([record["union"] for record in records])
    values = {
        "cIoU": masks.ciou(intersections, unions),
        "gIoU": masks.giou(intersections, unions),
        "answers with a mask": mean([float(record["masks"] > 0) for record in records]),
    }
    return [Table(title, values)]
