"""Task templates: what a sample says, put as a conversation. TraceVision, Sec. 3 and App. G.

A data set declares task kinds (`Sample.tasks`); each kind has one builder here, so data sets and systems meet only in
these names. Wording varies by the random generator in training; with `rng=None` the first wording is used, which is
also what `tracevision_jax.inference` asks.
"""

from collections.abc import Callable, Sequence

import numpy as np

from tracevision_jax.errors import UserError
from tracevision_jax.nearest import suggest
from tracevision_jax.records.sample import (
    BoxPart,
    Conversation,
    MaskPart,
    Part,
    PhrasePart,
    Question,
    Region,
    Sample,
    TracePart,
    Turn,
    UnitNamesPart,
)

Rng = np.random.Generator | None

DESCRIBE = (
    ("The user's gaze followed ", ". Describe what it rests on."),
    ("This is where someone looked: ", ". What did they look at?"),
    ("Follow ", " and describe what it passes."),
)
PREDICT = (
    ('Where would the gaze go while saying "', '"? Give the trajectory.'),
    ('Trace this description: "', '".'),
    ('Someone says "', '". Give their gaze trajectory.'),
)
JOINT = (
    "Describe the image and give the trajectory of your gaze.",
    "Narrate the image, then trace your narration.",
)
CAPTION = ("Describe the image.", "What is in this image?", "Give a short description of the image.")
LIST = ("List the objects with their boxes.", "What is where?")
WHERE = (("Where is ", "? Answer with a box."), ("Locate ", " with a box."), ("Give the box of ", "."))
WHAT_BOX = (("What is in ", "?"), ("Name the object in ", "."))
SEGMENT = (("Segment ", "."), ("Give the mask of ", "."), ("Outline ", "."))
SEGMENT_TRACE = (("Segment what ", " points at."), ("Give the mask of what ", " rests on."))


def choose(options: Sequence, rng: Rng):
    """The first option, or a random one."""
    return options[0] if rng is None else options[int(rng.integers(len(options)))]


def full_trace(sample: Sample) -> TracePart:
    """All strokes of a sample's narrative in order of time; raises ValueError where there are none."""
    if not any(len(stroke) for stroke in sample.strokes):
        raise ValueError(f"sample {sample.id} of {sample.source} has no trace")
    points = np.concatenate(sample.strokes)
    return TracePart(points[np.argsort(points[:, 2], kind="stable")], sample.words)


def conversation(task: str, user: Sequence[Part], assistant: Sequence[Part]) -> Conversation:
    """One question and its answer."""
    return Conversation(task, (Turn("user", tuple(user)), Turn("assistant", tuple(assistant))))


def describe_trace(trace: TracePart, answer: str, rng: Rng = None) -> Conversation:
    """Trajectory-guided captioning (App. G, prompt 1)."""
    before, after = choose(DESCRIBE, rng)
    return conversation("caption_from_trace", (before, trace, after), (answer,))


def predict_trace(caption: str, answer: TracePart | None, rng: Rng = None) -> Conversation:
    """Caption-guided trajectory prediction (App. G, prompt 2)."""
    before, after = choose(PREDICT, rng)
    return conversation("trace_from_caption", (f"{before}{caption}{after}",), (answer,) if answer else ())


def locate(phrase: str, box: np.ndarray | None, rng: Rng = None) -> Conversation:
    """Referring localisation; the answer is the phrase with its box."""
    before, after = choose(WHERE, rng)
    answer = (PhrasePart(phrase), BoxPart(box)) if box is not None else ()
    return conversation("refer_box", (f"{before}{phrase}{after}",), answer)


def segment_phrases(regions: Sequence[Region], rng: Rng = None, prompt: str | None = None) -> Conversation:
    """Referring segmentation of one or several targets; the answer interleaves phrases and [SEG]."""
    before, after = choose(SEGMENT, rng)
    asked = prompt if prompt is not None else _listed([region.phrase for region in regions])
    return conversation("refer_segment", (f"{before}{asked}{after}",), _masked_phrases(regions))


def segment_trace(trace: TracePart, regions: Sequence[Region], rng: Rng = None) -> Conversation:
    """Trajectory-guided segmentation."""
    before, after = choose(SEGMENT_TRACE, rng)
    return conversation("trace_segment", (before, trace, after), _masked_phrases(regions))


def _masked_phrases(regions: Sequence[Region]) -> list[Part]:
    parts: list[Part] = []
    for index, region in enumerate(regions):
        parts += [" and "] if index else []
        assert region.mask is not None
        parts += [PhrasePart(region.phrase), MaskPart(region.mask)]
    return parts


def _listed(phrases: Sequence[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _caption_from_trace(sample: Sample, rng: Rng) -> Conversation:
    return describe_trace(full_trace(sample), _caption(sample), rng)


def _trace_from_caption(sample: Sample, rng: Rng) -> Conversation:
    return predict_trace(_caption(sample), full_trace(sample), rng)


def _joint_caption_trace(sample: Sample, rng: Rng) -> Conversation:
    return conversation("joint_caption_trace", (choose(JOINT, rng),), (_caption(sample), full_trace(sample)))


def _plain_caption(sample: Sample, rng: Rng) -> Conversation:
    return conversation("plain_caption", (choose(CAPTION, rng),), (_caption(sample),))


def _plain_boxes(sample: Sample, rng: Rng) -> Conversation:
    region = _one_region(sample, rng)
    before, after = choose(WHAT_BOX, rng)
    return conversation("plain_boxes", (before, BoxPart(region.box[0]), after), (region.phrase,))


def _plain_objects(sample: Sample, rng: Rng) -> Conversation:
    """Every region with its box, in any order, so that no box can be told without its phrase."""
    regions = _present(sample)
    order = range(len(regions)) if rng is None else rng.permutation(len(regions))
    answer = [part for index in order for part in (PhrasePart(regions[index].phrase), BoxPart(regions[index].box[0]))]
    return conversation("plain_objects", (choose(LIST, rng),), answer)


def _plain_names(sample: Sample, rng: Rng) -> Conversation:
    """The name of each of several boxes, and of each visual token the noun of the phrase that it lies under."""
    regions = _present(sample)
    order = range(len(regions)) if rng is None else rng.permutation(len(regions))
    asked = [regions[index] for index in order]
    named = tuple((r.phrase.split()[-1], r.mask) for r in regions if r.mask is not None and r.phrase.split())
    question = [UnitNamesPart(named)] if named else []
    before, after = choose(WHAT_BOX, rng)
    return conversation(
        "plain_names",
        (*question, before, *(BoxPart(region.box[0]) for region in asked), after),
        (", ".join(region.phrase for region in asked) + ".",),
    )


def _refer_box(sample: Sample, rng: Rng) -> Conversation:
    asked = _question(sample, rng, QUESTIONS_OF["refer_box"])
    if asked is not None:
        return Conversation("refer_box", asked.turns)
    region = _one_region(sample, rng)
    return locate(region.phrase, region.box[0], rng)


def _refer_segment(sample: Sample, rng: Rng) -> Conversation:
    asked = _question(sample, rng, QUESTIONS_OF["refer_segment"])
    if asked is not None:
        return Conversation("refer_segment", asked.turns)
    masked = _masked(sample)
    count = 1 if rng is None else int(rng.integers(1, min(3, len(masked)) + 1))
    order = range(len(masked)) if rng is None else rng.permutation(len(masked))
    return segment_phrases([masked[index] for index in list(order)[:count]], rng)


def _trace_segment(sample: Sample, rng: Rng) -> Conversation:
    asked = _question(sample, rng, QUESTIONS_OF["trace_segment"])
    if asked is not None:
        return Conversation("trace_segment", asked.turns)
    return segment_trace(full_trace(sample), _masked(sample), rng)


def _trace_qa(sample: Sample, rng: Rng) -> Conversation:
    return _needed_question(sample, rng, "trace_qa")


def _dialogue(sample: Sample, rng: Rng) -> Conversation:
    return _needed_question(sample, rng, "dialogue")


def _caption(sample: Sample) -> str:
    if not sample.caption:
        raise ValueError(f"sample {sample.id} of {sample.source} has no caption")
    return sample.caption


def _one_region(sample: Sample, rng: Rng) -> Region:
    return choose(_present(sample), rng)


def _present(sample: Sample) -> list[Region]:
    present = [region for region in sample.regions if np.isfinite(region.box[0]).all()]
    if not present:
        raise ValueError(f"sample {sample.id} of {sample.source} has no region with a box in its first frame")
    return present


def _masked(sample: Sample) -> list[Region]:
    masked = [region for region in sample.regions if region.mask is not None]
    if not masked:
        raise ValueError(f"sample {sample.id} of {sample.source} has no region with a mask")
    return masked


QUESTIONS_OF: dict[str, frozenset[str]] = {
    "refer_box": frozenset({"box", "trace_box"}),
    "refer_segment": frozenset({"segment"}),
    "trace_segment": frozenset({"trace_segment"}),
    "dialogue": frozenset({"dialogue"}),
}
"""Which kinds of a sample's own questions serve a task; all other kinds serve trace_qa."""


def task_of_question(kind: str) -> str:
    """The task that a kind of question belongs to."""
    return next((task for task, kinds in QUESTIONS_OF.items() if kind in kinds), "trace_qa")


def _question(sample: Sample, rng: Rng, kinds: frozenset[str]) -> Question | None:
    fitting = [question for question in sample.questions if question.kind in kinds]
    return choose(fitting, rng) if fitting else None


def _needed_question(sample: Sample, rng: Rng, task: str) -> Conversation:
    fitting = [question for question in sample.questions if task_of_question(question.kind) == task]
    if not fitting:
        raise ValueError(f"sample {sample.id} of {sample.source} has no question for it")
    return Conversation(task, choose(fitting, rng).turns)


TASKS: dict[str, Callable[[Sample, Rng], Conversation]] = {
    "caption_from_trace": _caption_from_trace,
    "trace_from_caption": _trace_from_caption,
    "joint_caption_trace": _joint_caption_trace,
    "trace_qa": _trace_qa,
    "refer_box": _refer_box,
    "refer_segment": _refer_segment,
    "trace_segment": _trace_segment,
    "dialogue": _dialogue,
    "plain_caption": _plain_caption,
    "plain_boxes": _plain_boxes,
    "plain_objects": _plain_objects,
    "plain_names": _plain_names,
}
"""Task kind -> builder."""


def build(sample: Sample, task: str, rng: Rng = None) -> Conversation:
    """Build the conversation of a task from a sample.

    Raises:
        UserError: no such task, or the sample cannot serve it.
    """
    if task not in TASKS:
        raise UserError(f"No task '{task}'.{suggest(task, TASKS)} Tasks: {', '.join(TASKS)}.")
    try:
        return TASKS[task](sample, rng)
    except ValueError as error:
        raise UserError(f"Task '{task}' does not fit: {error}.") from error


def build_all(sample: Sample, tasks: Sequence[str], rng: Rng = None) -> list[Conversation]:
    """Build one conversation for each of `tasks`; no question of the sample is asked twice while others are left.

    Raises:
        UserError: see `build`.
    """
    left = list(sample.questions)
    conversations = []
    for task in tasks:
        fresh = [question for question in left if task_of_question(question.kind) == task]
        if fresh:
            question = choose(fresh, rng)
            left = [other for other in left if other is not question]
            conversations.append(Conversation(task, question.turns))
        else:
            conversations.append(build(sample, task, rng))
    return conversations


def join(conversations: Sequence[Conversation]) -> Conversation:
    """One multi-turn dialogue of conversations about the same sample, which it then shows only once.

    Training on joined questions costs the visual tokens once instead of once a question.
    """
    task = conversations[0].task if len(conversations) == 1 else "dialogue"
    return Conversation(task, tuple(turn for part in conversations for turn in part.turns))
