"""The processor: a sample and its conversations become arrays, a `Piece`, which `collate.py` places in a row.

    processor = Processor(vocabulary, config)
    piece = processor.piece(sample, [templates.build(sample, task, rng) for task in tasks])

The chat layout is Qwen2.5-VL's. Conversations about one sample share its frames; each repeats the visual tokens in
the row. A trace that the user shows enters the TVP and the text; one that the assistant gives is only text.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from tracevision_jax.errors import UserError
from tracevision_jax.language.mrope import VisualSpan, mrope_positions
from tracevision_jax.records.sample import (
    BoxPart,
    Conversation,
    MaskPart,
    PhrasePart,
    Sample,
    TracePart,
    UnitNamesPart,
)
from tracevision_jax.records.simplification import Simplification, simplify_trace
from tracevision_jax.records.vocabulary import SLOTS, CoordinateFormat, Vocabulary
from tracevision_jax.trajectory.checks import check_trace
from tracevision_jax.trajectory.phrases import PhraseProvider, RubricPhrases
from tracevision_jax.trajectory.tokens import format_digits
from tracevision_jax.vision.preprocess import (
    VisionInputConfig,
    preprocess_image,
    preprocess_video,
    sample_frames,
)
from tracevision_jax.vision.windows import raster_units

ARTICLES = ("a", "an", "the")
NAMED_SHARE = 0.2
"""Least part of a visual token's area that an object covers for the token to be named after it."""


@dataclasses.dataclass(frozen=True)
class ProcessorConfig:
    """What a system needs to know of its host to lay out rows."""

    vision: VisionInputConfig = VisionInputConfig()
    coordinates: CoordinateFormat = "bins"
    system_prompt: str = "You are a helpful assistant."
    """Empty: no system turn."""
    tokens_per_second: float = 2.0
    """Time scaling of the multimodal rotary positions."""
    mask_size: int = 256
    """Side of the decoder's masks."""
    max_points: int = 64
    """Keypoints of one trajectory; longer ones are thinned evenly after simplification."""
    max_traces: int = 8
    """Trajectories that the user may show in one conversation; the TVP tells no more of them apart."""
    simplification: Simplification = Simplification()
    slot_tokens: int = 0
    """Tokens of a row that each conversation has to itself, so that attention may treat conversations as a batch axis
    instead of masking the square of a row; worth its padding where no block-sparse kernel serves (CPU). 0 packs
    tightly."""
    learned_share: float = 1.0
    """Largest share of a row's tokens that may be learned; the loss makes logits for no more than these."""

    answer_weighting: float = 0.0
    """Each of the n learned tokens of an answer weighs n ** -answer_weighting: 0 is the papers' mean over tokens, 0.5
    the square averaging of InternVL 2.5 (arXiv:2412.05271), 1 counts all answers alike, so that the many and noisy
    coordinates of a trajectory do not outweigh a name."""

    slot_words: bool = False
    """Whether the six slots of a mask also learn the words of the phrase before it, in turn. From scratch this is what
    makes E_seg tell targets apart; a pretrained host does without."""

    def answer_weight(self, tokens: int) -> float:
        """Weight of each of the learned tokens of an answer that has so many."""
        return float(max(tokens, 1)) ** -self.answer_weighting

    def learned_tokens(self, tokens: int) -> int:
        """How many tokens of a row of this length may be learned."""
        return min(tokens, math.ceil(tokens * self.learned_share))


@dataclasses.dataclass
class EncodedConversation:
    """One conversation as arrays of its own, not yet placed in a row."""

    task: str
    tokens: np.ndarray
    learn: np.ndarray
    """Weight of each token where it is to be predicted, 0 where it is given."""
    visual: np.ndarray
    """(tokens, 2): frame and unit of each visual token; -1 elsewhere."""
    point: np.ndarray
    """Index of each token's keypoint, or -1."""
    positions: np.ndarray
    """(tokens, 3)."""
    points: np.ndarray
    """(points, 3) keypoints for the TVP."""
    point_trace: np.ndarray
    mask_frame: list[int] = dataclasses.field(default_factory=list)
    mask_target: list[np.ndarray] = dataclasses.field(default_factory=list)
    mask_slots: list[np.ndarray] = dataclasses.field(default_factory=list)
    extra_targets: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """(targets, 2) of tokens that are followed by none to learn: place among the tokens, and a word's first token, for
    visual tokens that are named (`UnitNamesPart`) and for slots of a mask (`slot_words`)."""
    next_position: int = 0
    """Rotary position of the token after the last."""


@dataclasses.dataclass
class Piece:
    """One sample with its conversations, ready to be placed in a row."""

    conversations: list[EncodedConversation]
    patches: np.ndarray
    """(frames, windows, slots, patch_dim)."""
    grid: np.ndarray
    """(frames, 2)."""
    frame_times: np.ndarray
    """(frames,) seconds."""

    @property
    def resources(self) -> tuple[int, int, int, int, int, int]:
        """What the piece takes of a `Bucket`, in the order of its fields."""
        return (
            sum(len(c.tokens) for c in self.conversations),
            len(self.grid),
            self.patches.shape[1],
            len(self.conversations),
            max((len(c.points) for c in self.conversations), default=0),
            sum(len(c.mask_slots) for c in self.conversations),
        )


@dataclasses.dataclass(frozen=True)
class Frames:
    """A sample's pictures as the vision tower takes them."""

    values: np.ndarray
    """Patches (frames, windows, slots, patch_dim)."""
    grid: np.ndarray
    """(frames, 2) rows and columns of patches."""
    times: np.ndarray
    """(frames,) seconds."""
    spans: list[VisualSpan]
    """The stills or the video in the order of the prompt."""
    sources: np.ndarray
    """Which of the sample's frames each stands for (the first of a temporal patch)."""


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

    def frames(self, sample: Sample) -> "Frames":
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
        self, conversation: Conversation, sample: Sample, frames: "Frames", answer: bool = True
    ) -> EncodedConversation:
        """Encode one conversation about the frames of a sample."""
        writer = _Writer(self, sample, frames, targets=answer)
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
            next_position=len(tokens) + offset,
        )

    def keypoints(self, trace: TracePart, size: tuple[int, int]) -> np.ndarray:
        """Check, simplify and, where still too long, thin a trace evenly to `max_points`; (points, 3)."""
        points = check_trace(trace.points)
        points = simplify_trace(points, trace.words, size, self.config.simplification, self.phrases)
        if len(points) > self.config.max_points:
            points = points[np.linspace(0, len(points) - 1, self.config.max_points).round().astype(int)]
        return np.concatenate([np.clip(points[:, :2], 0.0, 1.0), points[:, 2:]], 1)


class _Writer:
    """Collects the tokens of one conversation and what hangs on them.

    Text waits in `pending` until something else follows, so that adjacent texts are encoded as one.
    """

    def __init__(self, processor: Processor, sample: Sample, frames: Frames, targets: bool):
        self.processor, self.sample, self.shown, self.targets = processor, sample, frames, targets
        self.vocabulary = processor.vocabulary
        self.pending = ""
        self.tokens: list[int] = []
        self.learn: list[float] = []
        self.visual: list[tuple[int, int]] = []
        self.point: list[int] = []
        self.points: list[np.ndarray] = []
        self.mask_frame: list[int] = []
        self.mask_target: list[np.ndarray] = []
        self.mask_slots: list[np.ndarray] = []
        self.extra_targets: list[tuple[int, int]] = []
        self.learning = False
        self.phrase: list[int] = []
        """First tokens of the words that the parts after it belong to."""
        self.start = 0
        """Where the turn begins."""
        self.newline = self.vocabulary.encode("\n")

    def add(self, tokens: Sequence[int], learn: bool | None = None) -> None:
        """Append tokens that have no picture or point behind them."""
        self.flush()
        self.tokens += tokens
        self.learn += [float(self.learning if learn is None else learn)] * len(tokens)
        self.visual += [(-1, -1)] * len(tokens)
        self.point += [-1] * len(tokens)

    def text(self, text: str) -> None:
        self.pending += text

    def flush(self) -> None:
        """Encode the text that waits."""
        if self.pending:
            text, self.pending = self.pending, ""
            self.add(self.vocabulary.encode(text))

    def special(self, token: str, learn: bool | None = None) -> None:
        self.add([self.vocabulary.special(token)], learn)

    def role(self, role: str) -> None:
        """Open a turn; an answer's text starts a token of its own, since in generation it follows the prompt."""
        self.learning = False
        self.flush()
        self.start, self.phrase = len(self.tokens), []
        self.special("<|im_start|>")
        self.text(role + "\n")
        if role == "assistant":
            self.flush()

    def end(self) -> None:
        """Close a turn; its end token is learned with an assistant's text, the newline after it never."""
        self.special("<|im_end|>")
        answer = slice(self.start, None)
        count = sum(weight > 0 for weight in self.learn[answer])
        self.learn[answer] = [weight * self.processor.config.answer_weight(count) for weight in self.learn[answer]]
        self.add(self.newline, learn=False)

    def frames(self) -> None:
        """The sample's visual tokens: each still or video between its markers, frames in raster order of units."""
        config = self.processor.config.vision
        pad = "<|video_pad|>" if self.sample.frames_per_second > 0 else "<|image_pad|>"
        first = 0
        for span in self.shown.spans:
            self.special("<|vision_start|>")
            row, col = np.divmod(np.arange(span.tokens(config.merge) // span.frames), span.cols // config.merge)
            units = raster_units(row, col, span.cols, config.window_units, config.merge).tolist()
            for frame in range(first, first + span.frames):
                start = len(self.tokens)
                self.add([self.vocabulary.special(pad)] * len(units), learn=False)
                self.visual[start:] = [(frame, unit) for unit in units]
            first += span.frames
            self.special("<|vision_end|>")

    def part(self, part) -> None:
        """Append any part of a turn."""
        if isinstance(part, str):
            self.text(part)
        elif isinstance(part, PhrasePart):
            self.special("<|object_ref_start|>")
            self.phrase = self.first_tokens([word for word in part.text.split() if word not in ARTICLES])
            self.text(part.text)
            self.special("<|object_ref_end|>")
        elif isinstance(part, BoxPart):
            self.special("<|box_start|>")
            self.coordinates(np.asarray(part.box).reshape(2, 2))
            self.special("<|box_end|>")
        elif isinstance(part, TracePart):
            self.trace(part)
        elif isinstance(part, UnitNamesPart):
            self.name_units(part)
        elif isinstance(part, MaskPart):
            self.mask(part)
        else:
            raise TypeError(f"not a part of a conversation: {type(part).__name__}")

    def name_units(self, part: UnitNamesPart) -> None:
        """Note which word each visual token shall call to mind: the object that covers most of it, or the end token."""
        if not self.targets:
            return
        ids = self.first_tokens([word for word, _ in part.names])
        nothing, merge = self.vocabulary.special("<|endoftext|>"), self.processor.config.vision.merge
        places = [index for index, (frame, _) in enumerate(self.visual) if frame >= 0]
        for frame, source in enumerate(self.shown.sources):
            rows, cols = (self.shown.grid[frame] // merge).tolist()
            shares = np.stack([shrink_mask(mask[source], rows, cols).reshape(-1) for _, mask in part.names])
            best = shares.argmax(0)
            words = np.where(shares.max(0) >= NAMED_SHARE, np.asarray(ids)[best], nothing)
            self.extra_targets += zip(places[: rows * cols], words.tolist(), strict=True)
            places = places[rows * cols :]

    def first_tokens(self, words: Sequence[str]) -> list[int]:
        """The first token of each word, as it stands within a text."""
        return [self.vocabulary.encode(" " + word)[0] for word in words]

    def coordinates(self, points: np.ndarray) -> list[int]:
        """Append points (n, 2) as bin tokens or as the paper's text; which point each token belongs to."""
        if self.processor.config.coordinates == "bins":
            self.add(self.vocabulary.encode_coordinates(points))
            return np.repeat(np.arange(len(points)), 2).tolist()
        text = format_digits(points)
        tokens, ends = self.vocabulary.encode_with_ends(text)
        self.add(tokens)
        # A token that ends one pair and begins the next belongs to the next.
        return [text.count("(", 0, end) - 1 for end in ends]

    def trace(self, part: TracePart) -> None:
        """A trajectory; one that the user shows has its points behind its tokens."""
        points = self.processor.keypoints(part, self.sample.size)
        self.add([self.vocabulary.traj_open])
        start = len(self.tokens)
        owners = self.coordinates(points[:, :2])
        if not self.learning:
            first = sum(len(p) for p in self.points)
            self.point[start:] = [first + owner for owner in owners]
            self.points.append(points)
            most = self.processor.config.max_traces
            if len(self.points) > most:
                raise UserError(f"A conversation shows more than {most} traces, more than the model tells apart.")
        self.add([self.vocabulary.traj_close])

    def mask(self, part: MaskPart) -> None:
        """[SEG] and its six slots: [SEG] is learned, the slots are fed."""
        if not self.learning:
            raise UserError("A mask stands in a turn that is not the assistant's; the user can show traces and boxes.")
        self.add([self.vocabulary.seg])
        slots = np.arange(len(self.tokens), len(self.tokens) + SLOTS)
        self.add(self.vocabulary.slots, learn=False)
        if not self.targets:
            return
        if self.processor.config.slot_words and self.phrase:
            self.extra_targets += zip(slots.tolist(), itertools.cycle(self.phrase), strict=False)
        if len(part.mask) != len(self.sample.frames):
            raise UserError(f"A mask of {len(part.mask)} frames is given for {len(self.sample.frames)} frames.")
        side = self.processor.config.mask_size
        for frame, source in enumerate(self.shown.sources):
            self.mask_frame.append(frame)
            self.mask_slots.append(slots)
            self.mask_target.append(shrink_mask(part.mask[source], side, side))


def shrink_mask(mask: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """A boolean mask as area shares on a (rows, cols) grid stretched over the whole image, float32."""
    image = Image.fromarray(np.asarray(mask, np.uint8) * 255)
    return np.asarray(image.resize((cols, rows), Image.Resampling.BOX), np.float32) / 255.0
