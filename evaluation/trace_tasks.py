"""Tasks about traces: captions of them, traces of captions, and the object under them.

- `TraceCaptioning`: describe what a trace rests on; COCO's caption metrics against all narratives of the picture.
- `TracePrediction`: the trace of a caption; LBM of the predicted points (boxes without area) against the boxes of the
  true trace's words, for k = 0 and 1 alike, beside the LBM of the true trajectory itself (its keypoints, on the bins)
  and, as a control, of captions that belong to other pictures.
- `TracedObject`: are colour and shape of the traced object named; with a control whose traces are other samples'.
"""

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from evaluation.metrics.captions import METRICS, score_captions
from evaluation.metrics.lbm import trace_lbm
from evaluation.task import Prompt, Record, Samples, Table, another, mean, split_control, without_words
from tracevision_jax.inference.answers import Answer
from tracevision_jax.records import templates
from tracevision_jax.records.processor import Processor
from tracevision_jax.records.sample import Conversation, Question, Sample, TracePart, Turn
from tracevision_jax.trajectory.alignment import align_words, join_strokes, windows_of, word_boxes
from tracevision_jax.trajectory.tokens import format_digits, from_bins, to_bins

WINDOWS = (0, 1)
"""The k of LBM."""


@dataclass(frozen=True)
class TraceCaptioning:
    """Captions of traces."""

    max_new_tokens: int = 256
    blind: bool = False
    """Simplify traces without the words that were spoken over them, as a user's trace is."""
    java_timeout_s: float = 1800.0

    name = "trace_captioning"

    def budget(self, processor: Processor) -> int:
        return self.max_new_tokens

    def prompts(self, samples: Samples, index: int) -> list[Prompt]:
        sample = samples[index]
        if not sample.caption or not _has_trace(sample):
            return []
        asked = templates.describe_trace(templates.full_trace(sample), sample.caption)
        asked = without_words(asked) if self.blind else asked
        return [Prompt(sample.id, sample, asked, {"caption": sample.caption, "picture": _picture(sample)})]

    def record(self, prompt: Prompt, answer: Answer, processor: Processor) -> Record:
        return {"prediction": answer.text}

    def tables(self, records: Sequence[Record]) -> list[Table]:
        if not records:
            return []
        narratives: dict[str, list[str]] = {}
        for record in records:
            narratives.setdefault(record["picture"], []).append(record["caption"])
        predictions = {record["id"]: record["prediction"] for record in records}
        references = {record["id"]: narratives[record["picture"]] for record in records}
        tables = []
        for tokenizer in ("ptb", "simple"):
            scores = score_captions(predictions, references, tokenizer, self.java_timeout_s)
            title = f"Captions of traces, {tokenizer} tokens ({len(records)} traces)"
            tables.append(Table(title, scores.values, scores.reasons, scores.notes))
            if any(scores.values[name] is not None for name in METRICS):
                break  # the published tokenizer ran, so that no other table is needed
        return tables


@dataclass(frozen=True)
class TracePrediction:
    """Traces of captions."""

    control: bool = True
    """Also ask for the trace of another picture's caption."""
    phrase_tokens: int = 32
    """Room for phrases and tags between the parts of a linked trajectory."""

    name = "trace_prediction"

    def budget(self, processor: Processor) -> int:
        """As many tokens as the longest trajectory takes, with its tags, the end, and phrases between where linked."""
        config = processor.config
        phrases = self.phrase_tokens if config.linked else 0
        if config.coordinates == "bins":
            return 2 * config.max_points + 3 + phrases
        longest = np.full((config.max_points, 2), 0.999)
        return len(processor.vocabulary.encode(format_digits(longest))) + 3 + phrases

    def prompts(self, samples: Samples, index: int) -> list[Prompt]:
        sample = samples[index]
        if not sample.caption or not _has_trace(sample) or not len(true_word_boxes(sample)):
            return []
        truth = {"caption": sample.caption}
        asked = templates.predict_trace(sample.caption, None)
        outline = functools.partial(Processor.trajectory_outline, caption=sample.caption)
        prompts = [Prompt(sample.id, sample, asked, truth, outline)]
        other = another(samples, index, lambda sample: bool(sample.caption)) if self.control else None
        if other is not None:
            asked = templates.predict_trace(other.caption, None)
            truth = {"caption": other.caption}
            outline = functools.partial(Processor.trajectory_outline, caption=other.caption)
            prompts.append(Prompt(f"{sample.id} control", sample, asked, truth, outline, True))
        return prompts

    def record(self, prompt: Prompt, answer: Answer, processor: Processor) -> Record:
        boxes = true_word_boxes(prompt.sample)
        trace = templates.full_trace(prompt.sample)
        keypoints = from_bins(to_bins(processor.keypoints(trace, prompt.sample.size)))
        points = answer.points
        return {
            "prediction": points.round(4).tolist(),
            "parses": len(points) > 0,
            "lbm": {str(k): trace_lbm(points, boxes, k) if len(points) else None for k in WINDOWS},
            "truth_lbm": {str(k): trace_lbm(keypoints, boxes, k) for k in WINDOWS},
            "truth_points": keypoints.round(4).tolist(),
        }

    def tables(self, records: Sequence[Record]) -> list[Table]:
        asked, control = split_control(records)
        if not asked:
            return []
        values: dict[str, float | None] = {}
        for k in map(str, WINDOWS):
            ours = mean([record["lbm"][k] for record in asked if record["lbm"][k] is not None])
            truth = mean([record["truth_lbm"][k] for record in asked])
            shuffled = mean([record["lbm"][k] for record in control if record["lbm"][k] is not None])
            values[f"LBM k={k}"] = ours
            values[f"LBM k={k}, true trajectory"] = truth
            values[f"LBM k={k}, captions shuffled"] = shuffled
            values[f"LBM k={k}, share of the true one's"] = _ratio(ours, truth)
            values[f"LBM k={k}, share of shuffled"] = _ratio(ours, shuffled)
        values["trajectories that parse"] = mean([float(record["parses"]) for record in records])
        title = f"Traces of captions ({len(asked)} captions; lower LBM is better)"
        return [
            Table(title, values, notes=("Points count as boxes without area, against boxes of the truth's words.",))
        ]


@dataclass(frozen=True)
class TracedObject:
    """Naming the object under a trace."""

    colours: tuple[str, ...]
    """All words for colours that truths use."""
    shapes: tuple[str, ...]
    kinds: tuple[str, ...] = ("what",)
    """Kinds of a sample's questions that ask for the object under a trace."""
    control: bool = True
    """Also ask with the trace of another sample."""
    blind: bool = False
    """As in `TraceCaptioning`."""
    max_new_tokens: int = 24

    name = "traced_object"

    def budget(self, processor: Processor) -> int:
        return self.max_new_tokens

    def prompts(self, samples: Samples, index: int) -> list[Prompt]:
        sample = samples[index]
        questions = self._questions(sample)
        prompts = []
        other = another(samples, index, lambda s: bool(self._questions(s))) if questions and self.control else None
        for number, question in enumerate(questions):
            truth = _text(question.turns[-1])
            facts = {"truth": truth, "colour": _named(truth, self.colours), "shape": _named(truth, self.shapes)}
            asked = self._asked(question)
            prompts.append(Prompt(f"{sample.id} {number}", sample, asked, facts))
            if other is not None:
                foreign = self._questions(other)
                asked = self._asked(question, _trace_of(foreign[number % len(foreign)]))
                prompts.append(Prompt(f"{sample.id} {number} control", sample, asked, facts, control=True))
        return prompts

    def _questions(self, sample: Sample) -> list[Question]:
        """Questions about one trace, whose answer names a colour and a shape."""
        return [
            question
            for question in sample.questions
            if question.kind in self.kinds
            and _trace_of(question) is not None
            and _named(_text(question.turns[-1]), self.colours)
            and _named(_text(question.turns[-1]), self.shapes)
        ]

    def _asked(self, question: Question, trace: TracePart | None = None) -> Conversation:
        """The question, with another trace in the place of its own if one is given."""
        first, *rest = question.turns
        parts = tuple(trace if trace is not None and isinstance(p, TracePart) else p for p in first.parts)
        asked = Conversation("trace_qa", (Turn(first.role, parts), *rest))
        return without_words(asked) if self.blind else asked

    def record(self, prompt: Prompt, answer: Answer, processor: Processor) -> Record:
        colour, shape = _named(answer.text, self.colours), _named(answer.text, self.shapes)
        return {
            "prediction": answer.text,
            "colour_right": colour == prompt.truth["colour"],
            "shape_right": shape == prompt.truth["shape"],
        }

    def tables(self, records: Sequence[Record]) -> list[Table]:
        values: dict[str, float | None] = {}
        asked, control = split_control(records)
        if not asked:
            return []
        for suffix, some in (("", asked), (", traces shuffled", control)):
            both = [float(record["colour_right"] and record["shape_right"]) for record in some]
            values[f"colour and shape right{suffix}"] = mean(both)
            values[f"colour right{suffix}"] = mean([float(record["colour_right"]) for record in some])
            values[f"shape right{suffix}"] = mean([float(record["shape_right"]) for record in some])
        return [Table(f"Traced object ({len(asked)} traces)", values)]


def true_word_boxes(sample: Sample) -> Float[np.ndarray, "words 4"]:
    """Boxes of the trace over each word of the caption, words without a trace left out."""
    aligned = align_words(sample.caption, sample.words)
    boxes, missing = word_boxes(join_strokes(sample.strokes), windows_of(aligned))
    return boxes[~missing]


def _has_trace(sample: Sample) -> bool:
    return sum(len(stroke) for stroke in sample.strokes) > 1


def _picture(sample: Sample) -> str:
    """What narratives of one picture share: in Localized Narratives, the start of the id."""
    return f"{sample.source}/{sample.id.split('/')[0]}"


def _trace_of(question: Question) -> TracePart | None:
    """The trace of the first turn of a question, if there is just one."""
    traces = [part for part in question.turns[0].parts if isinstance(part, TracePart)]
    return traces[0] if len(traces) == 1 else None


def _text(turn: Turn) -> str:
    return "".join(part for part in turn.parts if isinstance(part, str))


def _named(text: str, names: Sequence[str]) -> str | None:
    """The one name in a text; None where there is none, or where there are several."""
    words = set(re.findall(r"\w+", text.lower()))
    found = [name for name in names if name in words]
    return found[0] if len(found) == 1 else None


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value is not None and base and math.isfinite(base) else None
