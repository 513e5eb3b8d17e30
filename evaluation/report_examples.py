"""Held-out examples of the report: what was asked, the truth and the answer, side by side on pictures.

    evaluated_section(Evaluated("refer_box", ReferBox(), outcome), samples, images, count=12)
    asked_section(model, "dialogue", samples, images, count=12)

The first kind shows records that the sweep kept; the second asks the model itself, turn by turn, with its own earlier
answers before each question. Both take the first samples that serve: nothing is picked by hand.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image

from evaluation.metrics.run_lengths import parse
from evaluation.report_page import Card, Line, Section
from evaluation.report_pictures import Images
from evaluation.sweep import Outcome
from evaluation.task import Prompt, Record, Samples, Task
from tracevision_jax.errors import UserError
from tracevision_jax.inference.answers import Answer
from tracevision_jax.inference.dialogue import parts_of_answer
from tracevision_jax.inference.pictures import Picture, draw_boxes, draw_trace, overlay_masks, shown
from tracevision_jax.inference.pictures_sheets import Panel, sheet
from tracevision_jax.records import templates
from tracevision_jax.records.sample import (
    BadRecord,
    BoxPart,
    Conversation,
    MaskPart,
    Part,
    PhrasePart,
    Sample,
    TracePart,
    Turn,
)

PANEL_PX = 320
ANSWER_TOKENS = 160
BOX_RIGHT_ABOVE = 0.5
"""IoU above which a box or a mask counts as right."""

TITLES = {
    "trace_captioning": ("Trajectory-guided captions", "The trace is shown to the model, which says what it passes."),
    "trace_prediction": ("Trajectories of captions", "The caption is given to the model, which draws the trace."),
    "traced_object": (
        "The object under a trace",
        'The model names what the trace is over. "With another trace" is its answer to the same question about the '
        "same picture with another scene's trace: the control.",
    ),
    "refer_box": ("Boxes of phrases", "The model gives the box of what a phrase names."),
    "refer_segment": ("Masks of phrases", "The model gives the mask of what a phrase names."),
    "trace_segment": ("Masks of what a trace rests on", "The model gives phrase and mask of what the trace is over."),
    "joint_caption_trace": ("Caption and trajectory together", "The model describes the picture and draws the trace."),
    "trace_qa": ("Questions about traces", "The model answers a question about one or two traces."),
    "dialogue": (
        "Dialogues",
        "Each answer is the model's own, given its own earlier answers. The picture shows places of all its answers.",
    ),
}
"""Title and note of each task's examples."""


@dataclass(frozen=True)
class Evaluated:
    """One task that the sweep has run."""

    name: str
    """As it was run under."""
    task: Task
    outcome: Outcome


@dataclass(frozen=True)
class Places:
    """What can be drawn of an answer or a truth."""

    traces: tuple[Float[np.ndarray, "_ _"], ...] = ()
    boxes: tuple[Float[np.ndarray, "4"], ...] = ()
    masks: tuple[Bool[np.ndarray, "height width"], ...] = ()
    names: tuple[str, ...] = ()
    """Of the masks; none, or as many as there are."""

    def __bool__(self) -> bool:
        return bool(self.traces or self.boxes or self.masks)

    def __add__(self, other: "Places") -> "Places":
        names = self.names + other.names
        masks = self.masks + other.masks
        names = names if len(names) == len(masks) else ()
        return Places(self.traces + other.traces, self.boxes + other.boxes, masks, names)


@runtime_checkable
class Asking(Protocol):
    """What dialogues ask of a model: `tv.load(...)`'s processor and engine."""

    @property
    def processor(self) -> Any: ...

    @property
    def engine(self) -> Any: ...


# Drawing


def draw_places(image: Picture, places: Places) -> Image.Image:
    """Masks, boxes and traces on a picture."""
    picture = shown(image)
    if places.masks:
        masks = np.stack(places.masks)
        # One mask's name stands below the picture already; on it, it would hide what is masked.
        picture = overlay_masks(_faded(picture, masks), masks, places.names if len(masks) > 1 else ())
    if places.boxes:
        picture = draw_boxes(picture, np.stack(places.boxes))
    for points in places.traces:
        picture = draw_trace(picture, points)
    return picture


def _faded(picture: Image.Image, masks: Bool[np.ndarray, "masks height width"]) -> Image.Image:
    """The picture paler outside all masks: a mask must be seen on an object of any colour."""
    inside = Image.fromarray(masks.any(axis=0).astype(np.uint8) * 255).resize(picture.size, Image.Resampling.BILINEAR)
    pale = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, (235, 235, 235)), 0.45)
    return Image.composite(picture, pale, inside)


class Drawn(NamedTuple):
    """A picture of so many panels side by side."""

    picture: Image.Image
    panels: int


def example_picture(image: Picture, asked: Places, truth: Places, answer: Places) -> Drawn:
    """The picture with what the question shows; beside each other, truth and answer where one of them has places."""
    if truth or answer:
        panels = [
            Panel(draw_places(draw_places(image, said), asked), title=title)
            for said, title in ((truth, "true"), (answer, "predicted"))
        ]
        return Drawn(sheet(panels, 2, PANEL_PX), 2)
    if len(asked.traces) > 1:
        panels = [
            Panel(draw_trace(image, points), title=f"trajectory {chr(ord('A') + number)}")
            for number, points in enumerate(asked.traces)
        ]
        return Drawn(sheet(panels, 2, PANEL_PX), 2)
    return Drawn(draw_places(image, asked), 1)


def places_of_parts(parts: Sequence[Part]) -> Places:
    """The traces, boxes and masks (of the first frame) of a turn."""
    masks = [part.mask[0] for part in parts if isinstance(part, MaskPart)]
    names = [part.text for part in parts if isinstance(part, PhrasePart)]
    return Places(
        tuple(part.points for part in parts if isinstance(part, TracePart)),
        tuple(np.asarray(part.box) for part in parts if isinstance(part, BoxPart)),
        tuple(masks),
        tuple(names) if len(names) == len(masks) else (),
    )


def places_of_answer(answer: Answer) -> Places:
    """The trajectories, boxes and masks (of the first frame) of an answer."""
    masks = tuple(mask[0] for mask in answer.masks)
    names = tuple(answer.phrases) if len(answer.phrases) == len(masks) else ()
    return Places(tuple(answer.trajectories), tuple(answer.boxes), masks, names)


def text_of_parts(parts: Sequence[Part]) -> str:
    """A turn as text, with a word in brackets for what is drawn."""
    words = {TracePart: "(trace)", BoxPart: "(box)", MaskPart: "(mask)"}
    said = [
        part if isinstance(part, str) else part.text if isinstance(part, PhrasePart) else f" {words[type(part)]} "
        for part in parts
    ]
    text = " ".join("".join(said).split())
    return text.replace(" .", ".").replace(" ?", "?")


# Records of the sweep


@dataclass(frozen=True)
class Shown:
    """What a record says, ready to be drawn."""

    truth: Places
    answer: Places
    lines: tuple[Line, ...]


def decode_mask(run_lengths: dict[str, Any]) -> Bool[np.ndarray, "height width"]:
    """A mask from COCO run lengths."""
    runs = parse(run_lengths)
    values = np.arange(len(runs.ends)) % 2 == 1
    return np.repeat(values, np.diff(runs.ends, prepend=0)).reshape(runs.width, runs.height).T


def _verdict(right: bool) -> str:
    return "right" if right else "wrong"


def _captioned(prompt: Prompt, record: Record, control: Record | None) -> Shown:
    return Shown(Places(), Places(), (Line("true", record["caption"]), Line("model", record["prediction"])))


def _predicted_trace(prompt: Prompt, record: Record, control: Record | None) -> Shown:
    points = np.array(record["prediction"], np.float64).reshape(-1, 2)
    answer = Places((points,)) if len(points) else Places()
    lbm, own = record["lbm"]["0"], record["truth_lbm"]["0"]
    distance = "no points" if lbm is None else f"{lbm:.3f}"
    lines = (
        Line("caption", record["caption"]),
        Line("LBM (k=0)", f"{distance}; the true trajectory's own is {own:.3f}"),
    )
    return Shown(Places((np.array(record["truth_points"], np.float64),)), answer, lines)


def _named_object(prompt: Prompt, record: Record, control: Record | None) -> Shown:
    right = record["colour_right"] and record["shape_right"]
    lines = [
        Line("asked", text_of_parts(prompt.conversation.turns[0].parts)),
        Line("true", record["truth"]),
        Line("model", record["prediction"], _verdict(right)),
    ]
    if control is not None:
        lines.append(Line("with another trace", control["prediction"]))
    return Shown(Places(), Places(), tuple(lines))


def _located(prompt: Prompt, record: Record, control: Record | None) -> Shown:
    box = record["prediction"]
    answer = Places(boxes=(np.array(box, np.float64),)) if box is not None else Places()
    lines = (
        Line("phrase", record["phrase"]),
        Line("IoU", f"{record['iou']:.2f}", _verdict(record["iou"] > BOX_RIGHT_ABOVE)),
    )
    return Shown(Places(boxes=(np.array(record["truth"], np.float64),)), answer, lines)


def _segmented(prompt: Prompt, record: Record, control: Record | None) -> Shown:
    truth = places_of_parts(prompt.conversation.turns[-1].parts)
    mask = decode_mask(record["prediction"][0])
    # A phrase that names nothing but the whole answer: with several masks the record keeps them together.
    names = (" and ".join(record["phrases"]),) if record["phrases"] else ()
    answer = Places(masks=(mask,), names=names) if record["masks"] else Places()
    iou = record["intersection"] / record["union"] if record["union"] else 1.0
    lines = (
        Line("asked", text_of_parts(prompt.conversation.turns[0].parts)),
        Line("model", record["text"] or "(no words)"),
        Line("IoU", f"{iou:.2f}", _verdict(iou > BOX_RIGHT_ABOVE)),
    )
    return Shown(truth, answer, lines)


READERS: dict[str, Callable[[Prompt, Record, Record | None], Shown]] = {
    "trace_captioning": _captioned,
    "trace_prediction": _predicted_trace,
    "traced_object": _named_object,
    "refer_box": _located,
    "refer_segment": _segmented,
    "trace_segment": _segmented,
}
"""How the record of each task is read; (prompt, its record, its control's record)."""


def evaluated_section(evaluated: Evaluated, samples: Samples, images: Images, count: int) -> Section:
    """The first `count` examples of a task that the sweep ran, one a sample."""
    name = evaluated.task.name
    title, note = TITLES.get(name, (evaluated.name, ""))
    records = {record["id"]: record for record in evaluated.outcome.records}
    cards: list[Card] = []
    for index in range(len(samples)):
        if len(cards) == count or name not in READERS:
            break
        try:
            prompts = evaluated.task.prompts(samples, index)
        except BadRecord:
            continue
        prompt = next((prompt for prompt in prompts if prompt.id in records and not prompt.control), None)
        if prompt is None:
            continue
        read = READERS[name](prompt, records[prompt.id], records.get(f"{prompt.id} control"))
        asked = places_of_parts(prompt.conversation.turns[0].parts)
        drawn = example_picture(prompt.sample.frames[0], asked, read.truth, read.answer)
        alternative = f"{title}, {prompt.id}"
        file = f"{evaluated.name}_{len(cards)}"
        cards.append(images.card(file, drawn.picture, alternative, *read.lines, panels=drawn.panels))
    missing = "" if cards else "No held-out scene served this task, so there is nothing to show."
    return Section(f"examples-{evaluated.name}", title, note, tuple(cards), missing)


# Asked here


def asked_section(model: Asking, task: str, samples: Samples, images: Images, count: int) -> Section:
    """The first `count` conversations of a task, each question asked with the model's own answers before it."""
    title, note = TITLES.get(task, (task, ""))
    chosen: list[tuple[Sample, Conversation]] = []
    for index in range(len(samples)):
        if len(chosen) == count:
            break
        try:
            sample = samples[index]
            # Drawn by the sample's number, so that kinds of questions vary and are the same in every report.
            chosen.append((sample, templates.build(sample, task, np.random.default_rng(index))))
        except (BadRecord, UserError):
            continue
    answers = ask_in_turn(model, chosen)
    cards = []
    for number, ((sample, asked), answered) in enumerate(zip(chosen, answers, strict=True)):
        drawn = _asked_picture(sample, asked, answered)
        alternative, lines = f"{title}, scene {sample.id}", _asked_lines(asked, answered)
        cards.append(images.card(f"{task}_{number}", drawn.picture, alternative, *lines, panels=drawn.panels))
    missing = "" if cards else "The held-out scenes hold no question of this kind, so there is nothing to show."
    return Section(f"examples-{task}", title, note, tuple(cards), missing)


def ask_in_turn(model: Asking, chosen: Sequence[tuple[Sample, Conversation]]) -> list[list[Answer]]:
    """The model's answers to every question of every conversation, a batch a round, all of as many rows."""
    histories: list[list[Turn]] = [[] for _ in chosen]
    answers: list[list[Answer]] = [[] for _ in chosen]
    questions = [[turn for turn in asked.turns if turn.role == "user"] for _, asked in chosen]
    for round_ in range(max(map(len, questions), default=0)):
        going = [number for number, turns in enumerate(questions) if round_ < len(turns)]
        pieces = []
        for number in going:
            sample, asked = chosen[number]
            histories[number].append(questions[number][round_])
            conversation = Conversation(asked.task, tuple(histories[number]))
            pieces.append(model.processor.piece(sample, [conversation], answer=False))
        made = model.engine.generate(pieces, max_new_tokens=ANSWER_TOKENS, rows=len(chosen))
        for number, answer in zip(going, made, strict=True):
            sample = chosen[number][0]
            answers[number].append(dataclasses.replace(answer, size=sample.size))
            histories[number].append(Turn("assistant", parts_of_answer(answer, len(sample.frames))))
    return answers


def _asked_lines(asked: Conversation, answers: Sequence[Answer]) -> list[Line]:
    """Every question with its truth and the model's answer; a verdict where both are words alone."""
    questions = [turn for turn in asked.turns if turn.role == "user"]
    truths = [turn for turn in asked.turns if turn.role == "assistant"]
    lines: list[Line] = []
    for question, truth, answer in zip(questions, truths, answers, strict=True):
        said, true = text_of_parts(parts_of_answer(answer, 1)), text_of_parts(truth.parts)
        in_words = not places_of_parts(truth.parts)
        lines += [
            Line("asked", text_of_parts(question.parts)),
            Line("true", true),
            Line("model", said or "(nothing)", _verdict(said.lower() == true.lower()) if in_words else ""),
        ]
    return lines


def _asked_picture(sample: Sample, asked: Conversation, answers: Sequence[Answer]) -> Drawn:
    """All places of a conversation on one picture."""
    sides = {
        role: sum((places_of_parts(turn.parts) for turn in asked.turns if turn.role == role), Places())
        for role in ("user", "assistant")
    }
    given = sum((places_of_answer(answer) for answer in answers), Places())
    return example_picture(sample.frames[0], sides["user"], sides["assistant"], given)
