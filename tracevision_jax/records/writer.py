"""Writes one conversation in Qwen2.5-VL's chat layout: its tokens, and what hangs on them.

    writer = Writer(vocabulary, config, keypoints, sample, frames, targets=True)
    writer.role("user"); writer.frames(); writer.text("What is here?"); writer.end()

The processor drives it and turns its lists into arrays.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from tracevision_jax.errors import UserError
from tracevision_jax.records.encoded import Frames
from tracevision_jax.records.processor_config import ProcessorConfig
from tracevision_jax.records.sample import BoxPart, MaskPart, PhrasePart, Sample, TracePart, UnitNamesPart
from tracevision_jax.records.vocabulary import SLOTS, Vocabulary
from tracevision_jax.trajectory.linking import Link
from tracevision_jax.trajectory.tokens import BINS, format_digits
from tracevision_jax.vision.windows import raster_units

ARTICLES = ("a", "an", "the")
NAMED_SHARE = 0.2
"""Least part of a visual token's area that an object covers for the token to be named after it."""


class Writer:
    """Collects the tokens of one conversation and what hangs on them.

    Text waits in `pending` until something else follows, so that adjacent texts are encoded as one.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        config: ProcessorConfig,
        keypoints: Callable[[TracePart, tuple[int, int]], np.ndarray],
        links: Callable[[TracePart, tuple[int, int]], list[Link]],
        sample: Sample,
        frames: Frames,
        targets: bool,
    ):
        """`keypoints` simplifies a shown trace on a picture of (height, width), `links` one of an answer.

        Without `targets` no mask is one.
        """
        self.vocabulary, self.config, self.keypoints, self.links = vocabulary, config, keypoints, links
        self.sample, self.shown, self.targets = sample, frames, targets
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
        self.sought: list[tuple[int, np.ndarray]] = []
        """Tokens with the places that they seek; of two for one token the later counts."""
        self.traced: list[np.ndarray] = []
        """The boxes around the traces of the user's last turn."""
        self.learning = False
        self.phrase: list[int] = []
        """First tokens of the words that the parts after it belong to."""
        self.start = 0
        """Where the turn begins."""
        self.newline = self.vocabulary.encode("\n")

    def add(self, tokens: Sequence[int], learn: bool | None = None) -> None:
        """Append tokens that have no picture or point behind them."""
        self.flush()
        learn = self.learning if learn is None else learn
        if learn and len(self.traced) == 1:
            self.sought += [(len(self.tokens) - 1 + index, self.traced[0]) for index in range(len(tokens))]
        self.tokens += tokens
        self.learn += [float(learn)] * len(tokens)
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
        self.traced = [] if role == "user" else self.traced
        self.special("<|im_start|>")
        self.text(role + "\n")
        if role == "assistant":
            self.flush()

    def end(self) -> None:
        """Close a turn; its end token is learned with an assistant's text, the newline after it never."""
        self.special("<|im_end|>")
        answer = slice(self.start, None)
        count = sum(weight > 0 for weight in self.learn[answer])
        self.learn[answer] = [weight * self.config.answer_weight(count) for weight in self.learn[answer]]
        self.add(self.newline, learn=False)

    def frames(self) -> None:
        """The sample's visual tokens: each still or video between its markers, frames in raster order of units."""
        config = self.config.vision
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
            self.phrase = self.first_tokens([word for word in part.text.split() if word not in ARTICLES])
            self.add(self.vocabulary.marked(part.text))
        elif isinstance(part, BoxPart):
            self.special("<|box_start|>")
            self.coordinates(np.asarray(part.box).reshape(2, 2), np.tile(part.box, (2, 1)))
            self.special("<|box_end|>")
        elif isinstance(part, TracePart):
            self.answered_trace(part) if self.learning else self.shown_trace(part)
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
        nothing, merge = self.vocabulary.special("<|endoftext|>"), self.config.vision.merge
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

    def coordinates(self, points: np.ndarray, places: np.ndarray) -> list[int]:
        """Append points (n, 2) as bin tokens or as the paper's text; which point each token belongs to.

        `places` (n, 4) are what the points are about: their box, or themselves.
        """
        self.flush()
        start = len(self.tokens)
        if self.config.coordinates == "bins":
            self.add(self.vocabulary.encode_coordinates(points))
            owners = np.repeat(np.arange(len(points)), 2).tolist()
        else:
            text = format_digits(points)
            tokens, ends = self.vocabulary.encode_with_ends(text)
            self.add(tokens)
            # A token that ends one pair and begins the next belongs to the next.
            owners = [text.count("(", 0, end) - 1 for end in ends]
        if self.learning:
            self.sought += [(start - 1 + index, places[owner]) for index, owner in enumerate(owners)]
        return owners

    def sought_boxes(self) -> np.ndarray:
        """The place that each token seeks, at least a bin wide and high, so that a point is one, too."""
        boxes = np.zeros((len(self.tokens), 4), np.float32)
        for token, box in self.sought:
            boxes[token] = box + np.array([-0.5, -0.5, 0.5, 0.5]) / BINS
        return boxes

    def shown_trace(self, part: TracePart) -> None:
        """A trajectory that the user shows: its points stand behind its tokens."""
        points = self.keypoints(part, self.sample.size)
        self.add([self.vocabulary.traj_open])
        start = len(self.tokens)
        owners = self.coordinates(points[:, :2], np.tile(points[:, :2], 2))
        first = sum(len(p) for p in self.points)
        self.point[start:] = [first + owner for owner in owners]
        self.points.append(points)
        self.traced.append(np.concatenate([points[:, :2].min(0), points[:, :2].max(0)]))
        most = self.config.max_traces
        if len(self.points) > most:
            raise UserError(f"A conversation shows more than {most} traces, more than the model tells apart.")
        self.add([self.vocabulary.traj_close])

    def answered_trace(self, part: TracePart) -> None:
        """A trajectory that is learned, which is only text, each part of it after its phrase where they are linked."""
        for phrase, points in self.links(part, self.sample.size):
            if phrase:
                self.part(PhrasePart(phrase))
            self.add([self.vocabulary.traj_open])
            itself = np.tile(points[:, :2], 2)
            self.coordinates(points[:, :2], np.tile(middle(points), (len(points), 1)) if phrase else itself)
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
        if self.config.slot_words and self.phrase:
            # The last slot already learns how the answer goes on.
            self.extra_targets += zip(slots[:-1].tolist(), itertools.cycle(self.phrase), strict=False)
        if len(part.mask) != len(self.sample.frames):
            raise UserError(f"A mask of {len(part.mask)} frames is given for {len(self.sample.frames)} frames.")
        if (box := bounding_box(np.any(part.mask, axis=0))) is not None:
            self.sought += [(slot, box) for slot in slots.tolist()]
        side = self.config.mask_size
        for frame, source in enumerate(self.shown.sources):
            self.mask_frame.append(frame)
            self.mask_slots.append(slots)
            self.mask_target.append(shrink_mask(part.mask[source], side, side))


def middle(points: np.ndarray) -> np.ndarray:
    """The box (x1, y1, x2, y2) of the middle halves of points (n, 2 or more), so without those on the way there."""
    return np.quantile(points[:, :2], (0.25, 0.75), axis=0).reshape(-1)


def bounding_box(mask: np.ndarray) -> np.ndarray | None:
    """The box (x1, y1, x2, y2) in [0, 1] around a boolean mask; None for an empty one."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    size = np.asarray(mask.shape[::-1])
    return np.concatenate([[cols[0], rows[0]] / size, [cols[-1] + 1, rows[-1] + 1] / size])


def shrink_mask(mask: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """A boolean mask as area shares on a (rows, cols) grid stretched over the whole image, float32."""
    image = Image.fromarray(np.asarray(mask, np.uint8) * 255)
    return np.asarray(image.resize((cols, rows), Image.Resampling.BOX), np.float32) / 255.0
