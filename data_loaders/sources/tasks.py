"""Which tasks a sample can serve, from what is known about it; shared by all sources."""

from collections.abc import Iterable, Sequence

import numpy as np

from tracevision_jax.records.sample import Question, Region
from tracevision_jax.records.templates import task_of_question


def tasks_of(
    caption: str, strokes: Sequence[np.ndarray], regions: Iterable[Region], questions: Iterable[Question]
) -> frozenset[str]:
    """The names of `templates.TASKS` that a sample with these parts can serve.

    A trace of a single point shows no movement and counts as none.
    """
    tasks = {task_of_question(question.kind) for question in questions}
    traced = sum(len(stroke) for stroke in strokes) > 1
    if caption:
        tasks.add("plain_caption")
        if traced:
            tasks |= {"caption_from_trace", "trace_from_caption", "joint_caption_trace"}
    for region in regions:
        if np.isfinite(region.box[0]).all():
            tasks |= {"plain_boxes", "plain_names", "plain_objects", "refer_box"}
        if region.mask is not None:
            tasks.add("refer_segment")
            if traced:
                tasks.add("trace_segment")
    return frozenset(tasks)
