"""Batched answers: prompts of any sizes go in, typed answers come out in the same order.

    engine = Engine(system.config, params, vocabulary)
    pieces = [processor.piece(sample, [conversation], answer=False) for ...]
    answers = engine.generate(pieces, max_new_tokens=64)

Prompts are sorted into buckets (`buckets.py`) and padded, so that a program is compiled once a bucket; padding changes
no answer. Of each batch the frames are encoded and fused with the traces (TVP) by one jitted program,
`hosts/generation.py` writes the answers, and the pixel decoder makes the masks from the hidden states at the slots that
follow each `[SEG]`. Under a mesh rows are split over `data` and `fsdp`.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from tracevision_jax.errors import UserError
from tracevision_jax.hosts import generation
from tracevision_jax.hosts.generation import ENDED, Generator
from tracevision_jax.hosts.grammar import Grammar, answer_grammar
from tracevision_jax.hosts.sampling import SamplingSettings, Scale, sampling_settings
from tracevision_jax.inference.answers import Answer, AnswerPart, Mask, MaskPlace, read_tokens, readable
from tracevision_jax.inference.attention import BlockAttention, block_attention
from tracevision_jax.inference.buckets import BatchPlan, plan_batches, power_of_two
from tracevision_jax.language.model import LanguageModel
from tracevision_jax.layers.sharding import activation_sharding, gathered
from tracevision_jax.parallel.mesh import BATCH_AXES, batch_sharding
from tracevision_jax.parallel.rules import ACTIVATIONS
from tracevision_jax.records.batch import Batch, Bucket
from tracevision_jax.records.collate import collate
from tracevision_jax.records.encoded import Piece
from tracevision_jax.records.vocabulary import BINS, SLOTS, Vocabulary
from tracevision_jax.systems.tracevision import TraceVisionConfig, TraceVisionModel

MASKS_AT_ONCE = 16
"""Masks of a row that the pixel decoder makes in one call; more come in several."""
STREAM_EVERY = 8
"""Tokens between two reports of a stream."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; greedily by default."""

    temperature: float = 0.0
    top_k: int = 0
    """0: no limit."""
    top_p: float = 1.0
    seed: int = 0
    """Answer number i of a call draws with seed + i, whatever batch it is in."""

    def of_rows(self, numbers: Sequence[int], rows: int) -> SamplingSettings:
        """Settings of a batch whose first rows are the answers of these numbers."""
        seeds = [self.seed + number for number in numbers] + [0] * (rows - len(numbers))
        return sampling_settings(rows, self.temperature, self.top_k, self.top_p, seeds)


GREEDY = Sampling()


class Encoded(NamedTuple):
    """What one batch keeps between its programs."""

    embeddings: Float[Array, "B T width"]
    shallow: Float[Array, "B F places visual"]
    deep: Float[Array, "B F places visual"]


class Engine:
    """A TraceVision model that answers; compiled once for each bucket that it meets."""

    def __init__(
        self,
        config: TraceVisionConfig,
        params: Any,
        vocabulary: Vocabulary,
        *,
        mesh: Mesh | None = None,
        grammar: Grammar | None = None,
        buckets: Sequence[Bucket] = (),
    ):
        """
        Args:
            config: the system's configuration.
            params: its parameters, laid out over the mesh where there is one.
            vocabulary: tokens of the host and of the system.
            mesh: devices to spread rows (and heads) over.
            grammar: what an answer may look like; by default TraceVision's, with trajectories of at most as
                many points as the processor makes.
            buckets: preferred sizes, smallest first (their conversations and masks count for nothing); what
                fits none gets a size of its own.

        Raises:
            UserError: the vocabulary is not the one that the configuration was made for.
        """
        language = config.host.language
        if vocabulary.size != language.output_size or vocabulary.first_added != language.first_added:
            raise UserError(
                f"This is another tokenizer than the model's: it has {vocabulary.first_added} tokens and "
                f"{vocabulary.size} with the added ones, the model has {language.first_added} and "
                f"{language.output_size}."
            )
        # Slots serve training on rows of many conversations; here a row holds one. Nor is anything learned: a history
        # may be as long as it likes.
        processor = dataclasses.replace(config.processor, slot_tokens=0, learned_share=1.0)
        self.config = dataclasses.replace(config, processor=processor)
        self.params, self.vocabulary, self.mesh, self.buckets = params, vocabulary, mesh, tuple(buckets)
        grammar = answer_grammar(vocabulary, processor.max_points) if grammar is None else grammar
        bins = Scale(vocabulary.first_bin, BINS, config.bin_reach) if config.bin_reach else None
        self.generator = Generator(LanguageModel(language), grammar, mesh, ACTIVATIONS, bins)
        model = TraceVisionModel(self.config)
        self._encode = jax.jit(functools.partial(_encode, model))
        self._maps = jax.jit(functools.partial(_maps, model))
        self._decode_masks = jax.jit(functools.partial(_masks, model))

    def generate(
        self,
        pieces: Sequence[Piece],
        *,
        max_new_tokens: int | Sequence[int] = 256,
        force: Sequence[int] | Sequence[Sequence[int]] = (),
        sampling: Sampling = GREEDY,
        rows: int | None = None,
    ) -> list[Answer]:
        """Answer prompts, in their order.

        Args:
            pieces: one conversation each, made with `answer=False`.
            max_new_tokens: budget of all answers or of each, the end token included.
            force: tokens that all answers begin with, or those of each.
            sampling: how tokens are chosen.
            rows: rows of every batch, the last one padded; by default as many as there are, up to `MAX_ROWS`.

        Raises:
            UserError: a budget that is too large, or a beginning that the grammar or budget excludes.
        """
        answers: dict[int, Answer] = {}
        for batch in self.batches(pieces, max_new_tokens=max_new_tokens, force=force, sampling=sampling, rows=rows):
            answers.update(batch)
        return [answers[number] for number in range(len(pieces))]

    def batches(
        self,
        pieces: Sequence[Piece],
        *,
        max_new_tokens: int | Sequence[int] = 256,
        force: Sequence[int] | Sequence[Sequence[int]] = (),
        sampling: Sampling = GREEDY,
        rows: int | None = None,
    ) -> Iterator[dict[int, Answer]]:
        """`generate`, batch by batch as they come: {number of the prompt: its answer}."""
        budgets = np.broadcast_to(np.asarray(max_new_tokens, np.int32), (len(pieces),))
        beginnings = _per_prompt(force, len(pieces))
        for plan in self.plan(pieces, rows):
            spare = plan.rows - len(plan.numbers)
            batch, encoded = self._encoded([pieces[number] for number in plan.numbers], plan)
            result = self.generator.generate(
                self.params["host"]["language"],
                encoded.embeddings,
                batch.positions,
                _lengths(pieces, plan),
                max_new_tokens=[*(int(budgets[number]) for number in plan.numbers), *[0] * spare],
                settings=sampling.of_rows(plan.numbers, plan.rows),
                force=[*(beginnings[number] for number in plan.numbers), *[()] * spare],
            )
            asked = [pieces[number] for number in plan.numbers]
            yield dict(zip(plan.numbers, self._answers(result, batch, encoded, asked), strict=True))

    def stream(
        self,
        piece: Piece,
        on_text: Callable[[str], None],
        *,
        max_new_tokens: int = 256,
        force: Sequence[int] = (),
        sampling: Sampling = GREEDY,
    ) -> Answer:
        """`generate` for one prompt; `on_text` is handed the readable text bit by bit as it comes."""
        plan = self.plan([piece], 1)[0]
        batch, encoded = self._encoded([piece], plan)
        parts = self.generator.stream(
            self.params["host"]["language"],
            encoded.embeddings,
            batch.positions,
            _lengths([piece], plan),
            max_new_tokens=max_new_tokens,
            settings=sampling.of_rows([0], plan.rows),
            force=force,
            every=STREAM_EVERY,
        )
        tokens: list[int] = []
        said = ""
        result = None
        for part in parts:
            tokens += part.tokens[0]
            # A character of several tokens that is not complete yet decodes to U+FFFD.
            text = readable(read_tokens(tokens, self.vocabulary)).lstrip()
            if part.result is None:
                text = text.rstrip("\ufffd")
            if len(text) > len(said):
                on_text(text[len(said) :])
                said = text
            result = part.result
        assert result is not None
        return self._answers(result, batch, encoded, [piece])[0]

    def attention(self, piece: Piece) -> list[BlockAttention]:
        """Attention maps of each TVP block for one prompt; none for a prompt without a trace."""
        plan = self.plan([piece], 1)[0]
        vision = self.config.processor.vision
        with self._layouts():
            maps = gathered(self._maps(self.params, self._placed([piece], plan)))
        return block_attention(maps, piece, plan.bucket.windows * vision.window_units**2, vision)

    def plan(self, pieces: Sequence[Piece], rows: int | None = None) -> list[BatchPlan]:
        """Which prompts are answered together, in which bucket; rows are shared evenly by the devices."""
        holders = 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)
        return plan_batches(pieces, self.buckets, rows, holders)

    def _encoded(self, pieces: Sequence[Piece], plan: BatchPlan) -> tuple[Batch, Encoded]:
        batch = self._placed(pieces, plan)
        with self._layouts():
            return batch, self._encode(self.params, batch)

    def _placed(self, pieces: Sequence[Piece], plan: BatchPlan) -> Batch:
        """The batch of a plan on the devices, rows without a prompt empty."""
        rows = [[piece] for piece in pieces] + [[]] * (plan.rows - len(pieces))
        batch = collate(rows, plan.bucket, self.config.processor)
        return jax.device_put(batch, None if self.mesh is None else batch_sharding(self.mesh))

    def _layouts(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self.mesh is None else activation_sharding(self.mesh, ACTIVATIONS)

    def _answers(
        self, result: generation.Generated, batch: Batch, encoded: Encoded, pieces: Sequence[Piece]
    ) -> list[Answer]:
        """Typed answers of the rows that have a prompt."""
        ids = result.answers()[: len(pieces)]
        read = [read_tokens(tokens, self.vocabulary) for tokens in ids]
        places = [[part.first_slot for part in parts if isinstance(part, MaskPlace)] for parts in read]
        masks = self._masks(result, batch, encoded, places, [len(piece.grid) for piece in pieces])
        finish, probabilities = gathered((result.finish, result.log_probabilities))
        answers = []
        for row, (tokens, parts) in enumerate(zip(ids, read, strict=True)):
            made = iter(masks[row])
            complete: list[AnswerPart] = [Mask(next(made)) if isinstance(part, MaskPlace) else part for part in parts]
            answers.append(
                Answer(
                    tokens=tuple(tokens),
                    parts=tuple(complete),
                    log_probabilities=tuple(probabilities[row, : len(tokens)].tolist()),
                    finished="end" if finish[row] == ENDED else "budget",
                    written=self.vocabulary.decode(tokens),
                    frame_times=tuple(pieces[row].frame_times.tolist()),
                )
            )
        return answers

    def _masks(
        self,
        result: generation.Generated,
        batch: Batch,
        encoded: Encoded,
        places: Sequence[Sequence[int]],
        frames: Sequence[int],
    ) -> list[list[Float[np.ndarray, "frames rows columns"]]]:
        """Mask logits of every `[SEG]` of every row, on each frame of the row."""
        wanted = [[(slot, frame) for slot in row for frame in range(n)] for row, n in zip(places, frames, strict=True)]
        most = max((len(row) for row in wanted), default=0)
        if not most:
            return [[] for _ in places]
        size = min(MASKS_AT_ONCE, power_of_two(most))
        rows = len(result.tokens)
        slots = np.zeros((rows, -(-most // size) * size), np.int32)
        frame = np.zeros_like(slots)
        for row, pairs in enumerate(wanted):
            for column, (slot, number) in enumerate(pairs):
                slots[row, column], frame[row, column] = slot, number
        chunks = []
        for first in range(0, slots.shape[1], size):
            here = slice(first, first + size)
            with self._layouts():
                made = self._decode_masks(
                    self.params,
                    encoded.shallow,
                    encoded.deep,
                    batch.grid,
                    result.hidden,
                    slots[:, here],
                    frame[:, here],
                )
            chunks.append(gathered(made).astype(np.float32))
        logits = np.concatenate(chunks, axis=1)
        return [
            [logits[row, n * frames[row] : (n + 1) * frames[row]] for n in range(len(places[row]))]
            for row in range(len(places))
        ]


def _encode(model: TraceVisionModel, params: Any, batch: Batch) -> Encoded:
    context: Any = model.apply({"params": params}, batch, method="context")
    return Encoded(context.embeddings, context.shallow, context.deep)


def _maps(model: TraceVisionModel, params: Any, batch: Batch) -> list[dict[str, Array]]:
    context: Any = model.apply({"params": params}, batch, method="context")
    return context.maps


def _masks(
    model: TraceVisionModel,
    params: Any,
    shallow: Float[Array, "B F places visual"],
    deep: Float[Array, "B F places visual"],
    grid: Int[Array, "B F 2"],
    hidden: Float[Array, "B new width"],
    first_slots: Int[Array, "B K"],
    frame: Int[Array, "B K"],
) -> Float[Array, "B K side side"]:
    """Mask logits from the hidden states at six slots each, from `first_slots` on."""
    rows, count = first_slots.shape
    index = (first_slots[..., None] + jnp.arange(SLOTS)).reshape(rows, count * SLOTS, 1)
    seg = jnp.take_along_axis(hidden, index, axis=1).reshape(rows, count, SLOTS, -1)
    return jnp.asarray(model.apply({"params": params}, shallow, deep, grid, seg, frame, method="masks"))


def _lengths(pieces: Sequence[Piece], plan: BatchPlan) -> np.ndarray:
    lengths = np.zeros(plan.rows, np.int32)
    for row, number in enumerate(plan.numbers):
        lengths[row] = len(pieces[number].conversations[0].tokens)
    return lengths


def _per_prompt(force: Sequence[int] | Sequence[Sequence[int]], prompts: int) -> list[tuple[int, ...]]:
    """The forced beginning of each prompt."""
    if not len(force) or np.ndim(force[0]) == 0:
        return [tuple(int(token) for token in force)] * prompts  # pyright: ignore
    if len(force) != prompts:
        raise UserError(f"{len(force)} forced beginnings were given for {prompts} prompts")
    return [tuple(beginning) for beginning in force]  # pyright: ignore
