"""The processor: a sample and its conversations become arrays, a `Piece`, which `collate.py` places in a row.

    processor = Processor(vocabulary, config)
    piece = processor.piece(sample, [templates.build(sample, task, rng) for task in tasks])

The chat layout is Qwen2.5-VL's. Conversations about one sample share its frames; each repeats the visual tokens in
the row. A trace that the user shows enters the TVP and the text; one that the assistant gives is only text.
"""

import itertools
from collections.abc import Iterable

import numpy as np

from tracevision_jax.errors import UserError
from tracevision_jax.language.mrope import VisualSpan, mrope_positions
from tracevision_jax.records.encoded import EncodedConversation, Frames, Piece
from tracevision_jax.records.processor_config import ProcessorConfig
from tracevision_jax.records.sample import Conversation, Sample, TracePart
from tracevision_jax.records.simplification import simplify_trace
from tracevision_jax.records.vocabulary import GAP, Vocabulary
from tracevision_jax.records.writer import Writer
from tracevision_jax.trajectory.checks import check_trace
from tracevision_jax.trajectory.linking import Link, link, subjects
from tracevision_jax.trajectory.phrases import PhraseProvider, RubricPhrases
from tracevision_jax.vision.preprocess import preprocess_image, preprocess_video, sample_frames


class Processor:
    """Lays out conversations as token rows; stateless but for its vocabulary and configuration."""

    def __init__(self, vocabulary: Vocabulary, config: ProcessorConfig, phrases: PhraseProvider | None = None):
        if vocabulary.coordinates != config.coordinates:
            raise UserError(
                f"The vocabulary writes coordinates as '{vocabulary.coordinates}', the processor as "
                f"'{config.coordinates}'; make them the same."
            )
        self.vocabulary, self.config = vocabulary, config
        self.phrases = phrases or RubricPhrases()

    def piece(self, sample: Sample, conversations: Iterable[Conversation], answer: bool = True) -> Piece:
        """Encode a sample with its conversations.

        Args:
            sample: the image or video.
            conversations: what is said about it.
            answer: False leaves the last assistant turn out and ends where its answer begins, for generation; masks
                of earlier answers are then no targets.

        Raises:
            UserError: an image or a trace that cannot be used, or turns that make no conversation.
        """
        frames = self.frames(sample)
        encoded = [self.encode(c, sample, frames, answer) for c in conversations]
        return Piece(encoded, frames.values, frames.grid, frames.times)

    def frames(self, sample: Sample) -> Frames:
        """Patches of a sample's video, or of each of its stills.

        Raises:
            UserError: see `preprocess_image` and `preprocess_video`.
        """
        config = self.config.vision
        if sample.frames_per_second > 0:
            video = preprocess_video(sample.frames, sample.frames_per_second, config)
            chosen = sample_frames(len(sample.frames), sample.frames_per_second, config)
            rows, cols = video.grid[0].tolist()
            span = VisualSpan(len(video.grid), rows, cols, video.seconds_per_frame)
            return Frames(video.values, video.grid, video.frame_times, [span], chosen[:: config.temporal_patch])
        stills = [preprocess_image(frame, config) for frame in sample.frames]
        return Frames(
            np.concatenate([still.values for still in stills]),
            np.concatenate([still.grid for still in stills]),
            np.zeros(len(stills)),
            [VisualSpan(1, *still.grid[0].tolist()) for still in stills],
            np.arange(len(stills)),
        )

    def encode(
        self, conversation: Conversation, sample: Sample, frames: Frames, answer: bool = True
    ) -> EncodedConversation:
        """Encode one conversation about the frames of a sample."""
        writer = Writer(self.vocabulary, self.config, self.keypoints, self.links, sample, frames, targets=answer)
        turns = list(conversation.turns)
        if not answer and turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        if not any(turn.role == "user" for turn in turns):
            raise UserError(f"A conversation of {sample.id} has no turn of the user, in which its frames are shown.")
        if self.config.system_prompt and turns[0].role != "system":
            writer.role("system")
            writer.text(self.config.system_prompt)
            writer.end()
        shown = False
        for turn in turns:
            if turn.role not in ("system", "user", "assistant"):
                raise UserError(f"A turn's role is '{turn.role}'; it must be system, user or assistant.")
            writer.role(turn.role)
            writer.learning = turn.role == "assistant"
            if turn.role == "user" and not shown:
                writer.frames()
                shown = True
            for part in turn.parts:
                writer.part(part)
            writer.end()
        if not answer:
            writer.role("assistant")
        writer.flush()
        tokens = np.asarray(writer.tokens, np.int32)
        positions, offset = mrope_positions(
            tokens,
            frames.spans,
            [self.vocabulary.special("<|image_pad|>"), self.vocabulary.special("<|video_pad|>")],
            self.config.vision.merge,
            self.config.tokens_per_second,
        )
        return EncodedConversation(
            task=conversation.task,
            tokens=tokens,
            learn=np.asarray(writer.learn, np.float32),
            visual=np.asarray(writer.visual, np.int64).reshape(-1, 2),
            point=np.asarray(writer.point, np.int32),
            positions=positions,
            points=np.concatenate(writer.points) if writer.points else np.zeros((0, 3)),
            point_trace=np.repeat(np.arange(len(writer.points)) + 1, [len(p) for p in writer.points]).astype(np.int32),
            mask_frame=writer.mask_frame,
            mask_target=writer.mask_target,
            mask_slots=writer.mask_slots,
            extra_targets=np.asarray(writer.extra_targets, np.int64).reshape(-1, 2),
            sought=writer.sought_boxes(),
            next_position=len(tokens) + offset,
        )

    def trajectory_outline(self, caption: str) -> list[int]:
        """What an answer is held to that has to be the trajectory of a caption.

        Where trajectories are linked, it goes to what each sentence is about, in the caption's own words and order:
        only where that is, and how long to stay there, is the model's (`GAP`).
        """
        about = subjects(caption, self.phrases) if self.config.linked else []
        if not about:
            return [self.vocabulary.traj_open]
        parts = [[*self.vocabulary.marked(phrase.text), self.vocabulary.traj_open, GAP] for phrase, _ in about]
        return [*itertools.chain.from_iterable(parts), self.vocabulary.special("<|im_end|>")]

    def box_beginning(self, phrase: str) -> list[int]:
        """What an answer begins with that has to locate a phrase: the phrase, and the opening of its box."""
        return [*self.vocabulary.marked(phrase), self.vocabulary.special("<|box_start|>")]

    def phrase_beginning(self) -> list[int]:
        """What an answer begins with that has to name things, each before its mask."""
        return [self.vocabulary.special("<|object_ref_start|>")]

    def links(self, trace: TracePart, size: tuple[int, int]) -> list[Link]:
        """Keypoints of an answer's trace, phrase by phrase where the configuration says so and words are known.

        Phrases share `max_points` evenly, so that how long each part goes on is no matter of chance.
        """
        if not (self.config.linked and trace.words):
            return [Link("", self.keypoints(trace, size))]
        links = link(self._simplified(trace, size), trace.words, self.phrases)
        share = max(self.config.max_points // len(links), 1)
        return [Link(phrase, thinned(points, share)) for phrase, points in links]

    def keypoints(self, trace: TracePart, size: tuple[int, int]) -> np.ndarray:
        """Check, simplify and, where still too long, thin a trace evenly to `max_points`; (points, 3)."""
        return thinned(self._simplified(trace, size), self.config.max_points)

    def _simplified(self, trace: TracePart, size: tuple[int, int]) -> np.ndarray:
        points = check_trace(trace.points)
        points = simplify_trace(points, trace.words, size, self.config.simplification, self.phrases)
        return np.concatenate([np.clip(points[:, :2], 0.0, 1.0), points[:, 2:]], 1)


def thinned(points: np.ndarray, most: int) -> np.ndarray:
    """Points (n, 3), of too many an even choice; of two or more the first and the last stay."""
    if len(points) <= most:
        return points
    return points[np.linspace(0, len(points) - 1, most).round().astype(int)]
