"""What a user asks of TraceVision, one method a task; `tv.load(path)` makes one.

    model.describe(image, trace).text
    model.predict_trace(image, "a man throws a ball").points          # (n, 2) in [0, 1]
    model.segment(image, "the dog behind the fence").grounded         # phrases, boxes, masks
    model.locate(image, "the red kite").box
    model.answer(image, ["What is {A}?"], {"A": trace}).text
    model.answer("clip.mp4", ["What happens here?", first_answer, "Segment it."])
    model.attention(image, trace)[0].over_image

Pictures are files, Pillow images or arrays; videos are files, or arrays with a rate; traces are points (x, y) or
(x, y, t), or files (`media.py`). Prompts are the first wordings of the task templates, which training varies.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from tracevision_jax.inference.answers import Answer
from tracevision_jax.inference.attention import BlockAttention
from tracevision_jax.inference.dialogue import Ask, conversation_of
from tracevision_jax.inference.engine import GREEDY, Engine, Sampling
from tracevision_jax.inference.media import Media, TraceLike, read_media, read_trace
from tracevision_jax.records import templates
from tracevision_jax.records.batch import Bucket
from tracevision_jax.records.processor import Processor
from tracevision_jax.records.sample import Conversation, Sample, TracePart
from tracevision_jax.records.vocabulary import Vocabulary
from tracevision_jax.systems.tracevision import TraceVision

MAX_NEW_TOKENS = 256

OnText = Callable[[str], None]
"""Called with each new bit of the answer's readable text."""


class TraceVisionInference:
    """A loaded model.

    Every method but `attention` takes
        max_new_tokens: the answer's budget;
        sampling: how tokens are chosen, greedily by default;
        on_text: called with bits of readable text while the answer is written.
    and raises UserError for a picture, video or trace that cannot be used.
    """

    def __init__(
        self,
        system: TraceVision,
        params: Any,
        vocabulary: Vocabulary,
        *,
        mesh: Mesh | None = None,
        buckets: Sequence[Bucket] = (),
    ):
        """Wrap parameters; `mesh` and `buckets` as for `Engine`."""
        self.system = system
        self.processor = Processor(vocabulary, system.config.processor)
        self.engine = Engine(system.config, params, vocabulary, mesh=mesh, buckets=buckets)

    def describe(
        self,
        image: Media,
        trace: TraceLike,
        *,
        frames_per_second: float | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
        on_text: OnText | None = None,
    ) -> Answer:
        """Say what a trace rests on (trajectory-guided captioning)."""
        sample = self.read(image, frames_per_second)
        asked = templates.describe_trace(TracePart(read_trace(trace)), "")
        return self.ask(sample, asked, max_new_tokens=max_new_tokens, sampling=sampling, on_text=on_text)

    def predict_trace(
        self,
        image: Media,
        caption: str,
        *,
        frames_per_second: float | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
    ) -> Answer:
        """Where the gaze would go while a caption is spoken; `.points` always holds at least one point."""
        sample = self.read(image, frames_per_second)
        force = self.processor.trajectory_outline(caption)
        asked = templates.predict_trace(caption, None)
        return self.ask(sample, asked, force=force, max_new_tokens=max_new_tokens, sampling=sampling)

    def segment(
        self,
        image: Media,
        target: str | TraceLike,
        *,
        frames_per_second: float | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
        on_text: OnText | None = None,
    ) -> Answer:
        """Masks of what a text names, or of what a trace rests on; `.masks`, `.phrases`, `.grounded`.

        A text is a phrase, never the name of a file: read a trace's file with `read_trace` first. What it names may
        not be there; a trace always rests on something, so that its answer begins with a phrase.
        """
        sample = self.read(image, frames_per_second)
        if isinstance(target, str):
            asked, force = templates.segment_phrases([], prompt=target), []
        else:
            asked = templates.segment_trace(TracePart(read_trace(target)), [])
            force = self.processor.phrase_beginning()
        return self.ask(sample, asked, force=force, max_new_tokens=max_new_tokens, sampling=sampling, on_text=on_text)

    def locate(
        self,
        image: Media,
        phrase: str,
        *,
        frames_per_second: float | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
    ) -> Answer:
        """The box of what a phrase names; `.box`."""
        sample = self.read(image, frames_per_second)
        force = self.processor.box_beginning(phrase)
        asked = templates.locate(phrase, None)
        return self.ask(sample, asked, force=force, max_new_tokens=max_new_tokens, sampling=sampling)

    def answer(
        self,
        image: Media,
        turns: str | Sequence[Ask],
        traces: Mapping[str, TraceLike] | Sequence[TraceLike] = (),
        *,
        frames_per_second: float | None = None,
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
        on_text: OnText | None = None,
    ) -> Answer:
        """Answer a question, or the last question of a dialogue.

        Args:
            image: what is asked about.
            turns: a question; or turns of user and assistant by turns, beginning with the user: texts, earlier
                answers of this model, or `Turn` records.
            traces: by letter, or in the order A, B, ...; `{A}` in a text stands for trace A. Traces that no text
                speaks of are shown before the first question.
            frames_per_second: makes a video of an array of frames.
            max_new_tokens, sampling, on_text: see the class.

        Raises:
            UserError: turns that do not end with a question, or a trace that is not given.
        """
        sample = self.read(image, frames_per_second)
        asked = conversation_of(turns, _by_letter(traces), len(sample.frames))
        return self.ask(sample, asked, max_new_tokens=max_new_tokens, sampling=sampling, on_text=on_text)

    def attention(
        self, image: Media, trace: TraceLike, *, frames_per_second: float | None = None
    ) -> list[BlockAttention]:
        """The TVP's attention between a trace and the picture, block by block (Fig. 6)."""
        sample = self.read(image, frames_per_second)
        asked = templates.describe_trace(TracePart(read_trace(trace)), "")
        return self.engine.attention(self.processor.piece(sample, [asked], answer=False))

    def read(self, image: Media, frames_per_second: float | None = None) -> Sample:
        """A picture or video as a sample."""
        rate = self.system.config.processor.vision.frames_per_second
        return read_media(image, frames_per_second, rate)

    def ask(
        self,
        sample: Sample,
        conversation: Conversation,
        *,
        force: Sequence[int] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
        sampling: Sampling = GREEDY,
        on_text: OnText | None = None,
    ) -> Answer:
        """Answer the last question of any conversation; what all other methods come down to."""
        piece = self.processor.piece(sample, [conversation], answer=False)
        if on_text is not None:
            answer = self.engine.stream(piece, on_text, max_new_tokens=max_new_tokens, force=force, sampling=sampling)
        else:
            (answer,) = self.engine.generate([piece], max_new_tokens=max_new_tokens, force=force, sampling=sampling)
        return dataclasses.replace(answer, size=sample.size)


def _by_letter(traces: Mapping[str, TraceLike] | Sequence[TraceLike]) -> dict[str, np.ndarray]:
    """Checked traces by letter."""
    if not isinstance(traces, Mapping):
        traces = {chr(ord("A") + number): trace for number, trace in enumerate(traces)}
    return {name: read_trace(trace, f"trace {name}") for name, trace in traces.items()}
