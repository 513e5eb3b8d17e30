"""Answers from a language model: a jitted prefill, and a decode loop that stays on the device.

The prompt comes as embeddings, since visual and trajectory features are merged in before. A step of the loop
samples a token under the grammar (`grammar.py`, `sampling.py`), feeds it and keeps its hidden state, so every
token of an answer has one: the six slots after `[SEG]` are read there. Rows stop on their own; the loop stops
when all have.

    generator = Generator(LanguageModel(config), answer_grammar(vocabulary))
    result = generator.generate(language_params, embeddings, positions, lengths, max_new_tokens=128)
    for part in generator.stream(...):                  # the same answers, some tokens at a time

Shapes alone decide what is compiled: the rows, the width of the prompt (the caller's bucket), the bucket of
new tokens. Budgets, sampling settings and forced tokens are data. Streaming runs the same program with an
earlier stop, so its answers are bit for bit those of `generate`. Under a mesh the rows are split as
`rules["batch"]` says.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Bool, Float, Int

from tracevision_jax.errors import UserError
from tracevision_jax.hosts.grammar import Grammar, GrammarState, advance, allowed_tokens, check_prefix
from tracevision_jax.hosts.sampling import SamplingSettings, Scale, sample_tokens, sampling_settings
from tracevision_jax.language.cache import KVCache, init_cache
from tracevision_jax.language.model import LanguageModel
from tracevision_jax.layers.sharding import Rules, activation_sharding, constrain, gathered, layout
from tracevision_jax.records.vocabulary import GAP

Array = jax.Array | np.ndarray
Params = Any

FREE = -1
"""In forced tokens: from here on the model writes what it likes."""
RUNNING, ENDED, BUDGET_USED = 0, 1, 2
"""Why a row stopped: not yet, by an end token, because it had no tokens left."""
NEW_TOKEN_BUCKETS = (16, 32, 64, 128, 256, 512, 1024, 2048)
CACHE_STEP = 64
"""Cache sizes are multiples of this, so that prompts of similar width share the decode program."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Generated:
    """The answers of a batch; beyond a row's length all is 0, but for the end token and its probability."""

    tokens: Int[Array, "batch new"]
    lengths: Int[Array, "batch"]
    """Tokens of each answer, the end token not counted."""
    finish: Int[Array, "batch"]
    """ENDED or BUDGET_USED."""
    hidden: Float[Array, "batch new width"]
    """State after the final norm at each token of the answer, that is with this token as input."""
    log_probabilities: Float[Array, "batch new"]
    """Of each token under the model itself: temperature 1, grammar and sampling settings left out."""

    def answers(self) -> list[list[int]]:
        """Token ids of each row, without the end token."""
        tokens, lengths = gathered((self.tokens, self.lengths))
        return [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]


@dataclass(frozen=True)
class Part:
    """Tokens that have come since the last part."""

    tokens: list[list[int]]
    """A row's new tokens, without the end token."""
    result: Generated | None
    """The whole, with the last part."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """The loop's carry; all of it is donated from call to call."""

    cache: KVCache
    last: Float[Array, "batch width"]
    """Hidden state that predicts the next token."""
    next_position: Int[Array, "batch"]
    """Rotary position of a row's first new token."""
    grammar: GrammarState
    ahead: Int[Array, "batch"]
    """Which of a row's forced tokens is the next."""
    step: Int[Array, ""]
    result: Generated


def prefill(
    model: LanguageModel,
    cache_size: int,
    new_tokens: int,
    params: Params,
    grammar: Grammar,
    embeddings: Float[Array, "batch tokens width"],
    positions: Int[Array, "batch tokens 3"],
    lengths: Int[Array, "batch"],
    budgets: Int[Array, "batch"],
) -> DecodeState:
    """Run right-padded prompts; rows with a budget of 0 are finished at once."""
    rows, tokens, _ = embeddings.shape
    segments = (jnp.arange(tokens) < lengths[:, None]).astype(jnp.int32)
    cache = init_cache(model.config, rows, cache_size)
    run: Any = model.apply({"params": params}, embeddings, positions, segments, cache, True)
    hidden, cache = run
    last = jnp.take_along_axis(hidden, jnp.maximum(lengths - 1, 0)[:, None, None], axis=1)[:, 0]
    next_position = jnp.max(jnp.where(segments[..., None] > 0, positions, -1), axis=(1, 2)) + 1
    result = Generated(
        tokens=jnp.zeros((rows, new_tokens), jnp.int32),
        lengths=jnp.zeros(rows, jnp.int32),
        finish=jnp.where(budgets > 0, RUNNING, BUDGET_USED).astype(jnp.int32),
        hidden=jnp.zeros((rows, new_tokens, hidden.shape[-1]), hidden.dtype),
        log_probabilities=jnp.zeros((rows, new_tokens), jnp.float32),
    )
    nothing_yet = jnp.zeros(rows, jnp.int32)
    state = DecodeState(cache, last, next_position, grammar.start(rows), nothing_yet, jnp.int32(0), result)
    return _constrained(state)


def decode(
    model: LanguageModel,
    params: Params,
    state: DecodeState,
    grammar: Grammar,
    settings: SamplingSettings,
    forced: Int[Array, "batch forced"],
    budgets: Int[Array, "batch"],
    stop: Int[Array, ""],
    scale: Scale | None = None,
) -> DecodeState:
    """Write tokens until step `stop` or until every row is finished; `forced` ends with FREE and may hold GAP."""

    def unfinished(state: DecodeState) -> jax.Array:
        return jnp.asarray(state.step < stop) & jnp.any(state.result.finish == RUNNING)

    step = functools.partial(_decode_step, model, scale, params, grammar, settings, forced, budgets)
    return _constrained(lax.while_loop(unfinished, step, state))


def _decode_step(
    model: LanguageModel,
    scale: Scale | None,
    params: Params,
    grammar: Grammar,
    settings: SamplingSettings,
    forced: Int[Array, "batch forced"],
    budgets: Int[Array, "batch"],
    state: DecodeState,
) -> DecodeState:
    result, step = state.result, state.step
    running = result.finish == RUNNING
    logits = jnp.asarray(model.apply({"params": params}, state.last, method="logits"))
    allowed = allowed_tokens(grammar, state.grammar, budgets - step)
    given, ahead = _next_forced(forced, state.ahead, allowed, state.grammar.place == grammar.first_state)
    token = jnp.where(given >= 0, given, sample_tokens(logits, allowed, settings, step, scale))
    token = jnp.where(running, token, 0)
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    log_probability = jnp.where(running, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0)
    moved = advance(grammar, state.grammar, token)
    ended = running & (moved.place == grammar.end_state)
    written = running & ~ended

    embedding = model.apply({"params": params}, token[:, None], method="embed")
    positions = jnp.broadcast_to((state.next_position + step)[:, None, None], (*token.shape, 1, 3))
    segments = written[:, None].astype(jnp.int32)
    run: Any = model.apply({"params": params}, embedding, positions, segments, state.cache)
    hidden, cache = run
    last = hidden[:, 0]
    finish = jnp.where(running & (step + 1 >= budgets), BUDGET_USED, result.finish)
    result = Generated(
        tokens=_put(result.tokens, token, step),
        lengths=result.lengths + written.astype(jnp.int32),
        finish=jnp.where(ended, ENDED, finish).astype(jnp.int32),
        hidden=_put(result.hidden, jnp.where(written[:, None], last, 0), step),
        log_probabilities=_put(result.log_probabilities, log_probability, step),
    )
    return DecodeState(cache, last, state.next_position, moved, ahead, step + 1, result)


def _next_forced(
    forced: Int[Array, "batch forced"],
    ahead: Int[Array, "batch"],
    allowed: Bool[Array, "batch vocabulary"],
    closed: Bool[Array, "batch"],
) -> tuple[Int[Array, "batch"], Int[Array, "batch"]]:
    """(the token that a row is held to, negative for none; which one is the next after it).

    A gap ends where a row is `closed`. A token that is not allowed any more, since too few are left, frees the row.
    """

    def at(ahead: jax.Array) -> jax.Array:
        return jnp.take_along_axis(jnp.asarray(forced), ahead[:, None], axis=1)[:, 0]

    ahead = jnp.asarray(ahead) + ((at(jnp.asarray(ahead)) == GAP) & closed)
    given = at(ahead)
    fits = jnp.take_along_axis(jnp.asarray(allowed), jnp.maximum(given, 0)[:, None], axis=1)[:, 0]
    held = (given >= 0) & fits
    free = jnp.int32(forced.shape[1] - 1)
    return jnp.where(held, given, FREE), jnp.where(held, ahead + 1, jnp.where(given >= 0, free, ahead))


def _put(array: Array, column: jax.Array, step: Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(jnp.asarray(array), column.astype(array.dtype), step, axis=1)


def _constrained(state: DecodeState) -> DecodeState:
    """Pin the layout of the state, the same after a prefill and after every call of the loop."""

    def split_rows(tree):
        return jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), tree)

    def split_store(store: jax.Array) -> jax.Array:
        return constrain(store, None, "batch", "kv_heads", None, None)

    cache = state.cache
    return DecodeState(
        cache=KVCache(split_store(cache.keys), split_store(cache.values), split_rows(cache.lengths)),
        last=split_rows(state.last),
        next_position=split_rows(state.next_position),
        grammar=split_rows(state.grammar),
        ahead=split_rows(state.ahead),
        step=constrain(jnp.asarray(state.step)),
        result=split_rows(state.result),
    )


class Generator:
    """A language model with a grammar, compiled once for each shape that it meets."""

    def __init__(
        self,
        model: LanguageModel,
        grammar: Grammar,
        mesh: Mesh | None = None,
        rules: Rules | None = None,
        scale: Scale | None = None,
    ):
        """`mesh` and `rules` (logical axis -> mesh axes) split rows and heads; parameters come laid out.

        Tokens of `scale` are chosen with their neighbours (`sampling.pool_neighbours`).

        Raises ValueError when the grammar is about another vocabulary than the model's.
        """
        if len(grammar.token_class) != model.config.output_size:
            raise ValueError(
                f"the grammar knows {len(grammar.token_class)} tokens, the model {model.config.output_size}"
            )
        self.mesh, self.rules = mesh, rules or {}
        whole = None if mesh is None else NamedSharding(mesh, jax.sharding.PartitionSpec())
        self.grammar: Grammar = jax.device_put(grammar, whole)
        self._prefill = jax.jit(functools.partial(prefill, model), static_argnums=(0, 1))
        self._decode = jax.jit(functools.partial(decode, model, scale=scale), donate_argnums=1)

    def generate(
        self,
        params: Params,
        embeddings: Float[Array, "batch tokens width"],
        positions: Int[Array, "batch tokens 3"],
        lengths: Int[Array, "batch"],
        *,
        max_new_tokens: int | Sequence[int],
        settings: SamplingSettings | None = None,
        force: Sequence[int] | Sequence[Sequence[int]] = (),
    ) -> Generated:
        """Answer right-padded prompts of `lengths` tokens.

        Args:
            params: the language model's own ("embed", "layers", ...).
            embeddings: prompts with their visual and trajectory features merged in.
            positions: rotary positions (time, height, width).
            lengths: tokens of each prompt; 0 in rows that are padding.
            max_new_tokens: the budget, the end token included, of all rows or of each; 0 leaves a row out.
            settings: how tokens are chosen; greedily by default.
            force: tokens that all answers begin with, or those of each row. At a `GAP` among them the model writes
                on until what is open is closed; then come the tokens behind it, while the budget has room for them.

        Raises:
            UserError: a budget above the largest bucket, or tokens that the grammar or budget excludes.
        """
        call = _Call(self, params, embeddings, positions, lengths, max_new_tokens, settings, force)
        return call.advance(call.new_tokens).result

    def stream(
        self,
        params: Params,
        embeddings: Float[Array, "batch tokens width"],
        positions: Int[Array, "batch tokens 3"],
        lengths: Int[Array, "batch"],
        *,
        max_new_tokens: int | Sequence[int],
        settings: SamplingSettings | None = None,
        force: Sequence[int] | Sequence[Sequence[int]] = (),
        every: int = 16,
    ) -> Iterator[Part]:
        """`generate`, handing out the tokens after every so many steps; the loop rests only in between."""
        if every < 1:
            raise UserError(f"a part has at least one step, so every cannot be {every}")
        call = _Call(self, params, embeddings, positions, lengths, max_new_tokens, settings, force)
        before = [0] * len(embeddings)
        for stop in range(every, call.new_tokens + every, every):
            result = call.advance(min(stop, call.new_tokens)).result
            done = stop >= call.new_tokens or not (gathered(result.finish) == RUNNING).any()
            answers = result.answers()
            yield Part(
                [answer[start:] for answer, start in zip(answers, before, strict=True)],
                result if done else None,
            )
            if done:
                return
            before = [len(answer) for answer in answers]


class _Call:
    """One batch on its way through a generator: the loop's state, and what stays the same in all steps."""

    def __init__(self, generator: Generator, params, embeddings, positions, lengths, max_new_tokens, settings, force):
        rows, width = embeddings.shape[:2]
        if isinstance(lengths, np.ndarray) and lengths.max(initial=0) > width:
            raise ValueError(f"a prompt of {lengths.max()} tokens in a batch of width {width}")
        budgets = np.broadcast_to(np.asarray(max_new_tokens, np.int32), (rows,))
        self.generator, self.params = generator, params
        self.new_tokens = _bucket(int(budgets.max(initial=0)))
        forced = _forced(generator.grammar, force, budgets, self.new_tokens)
        settings = sampling_settings(rows) if settings is None else settings
        budgets, lengths, settings, forced = self._placed((budgets, lengths, settings, forced))
        self.per_row = (settings, forced, budgets)
        embeddings, positions = self._placed((embeddings, positions))
        cache_size = -(-(width + self.new_tokens) // CACHE_STEP) * CACHE_STEP
        with self._layouts():
            self.state = generator._prefill(
                cache_size,
                self.new_tokens,
                params,
                generator.grammar,
                embeddings,
                positions,
                lengths,
                budgets,
            )

    def advance(self, stop: int) -> DecodeState:
        """Run the loop up to a step; the state before is consumed."""
        generator = self.generator
        with self._layouts():
            self.state = generator._decode(self.params, self.state, generator.grammar, *self.per_row, np.int32(stop))
        return self.state

    def _placed(self, tree):
        """Rows over the mesh, where there is one."""
        mesh, rules = self.generator.mesh, self.generator.rules
        if mesh is None:
            return tree

        def place(x):
            names = ("batch", *(None,) * (x.ndim - 1))
            return jax.device_put(x, NamedSharding(mesh, layout(x.shape, names, mesh, rules)))

        return jax.tree.map(place, tree)

    def _layouts(self) -> contextlib.AbstractContextManager:
        mesh = self.generator.mesh
        return contextlib.nullcontext() if mesh is None else activation_sharding(mesh, self.generator.rules)


def _bucket(new_tokens: int) -> int:
    for size in NEW_TOKEN_BUCKETS:
        if new_tokens <= size:
            return size
    raise UserError(f"an answer has at most {NEW_TOKEN_BUCKETS[-1]} new tokens, not {new_tokens}")


def _forced(
    grammar: Grammar, force: Sequence[int] | Sequence[Sequence[int]], budgets: np.ndarray, new_tokens: int
) -> np.ndarray:
    """(rows, new tokens + 1): what each row is held to, checked, then FREE."""
    given = [tuple(np.atleast_1d(x).tolist()) for x in force]
    if not given or np.ndim(force[0]) == 0:
        given = [tuple(int(token[0]) for token in given)] * len(budgets)
    if len(given) != len(budgets):
        raise UserError(f"{len(given)} forced beginnings for {len(budgets)} rows")
    forced = np.full((len(budgets), new_tokens + 1), FREE, np.int32)
    tightest: dict[tuple[int, ...], int] = {}
    for row, (tokens, budget) in enumerate(zip(given, budgets.tolist(), strict=True)):
        if tokens and budget > 0:
            tightest[tokens] = min(budget, tightest.get(tokens, budget))
            forced[row, : min(len(tokens), new_tokens)] = tokens[:new_tokens]
    for tokens, budget in tightest.items():
        for stretch, before in _stretches(tokens):
            check_prefix(grammar, stretch, budget - before)
    return forced


def _stretches(tokens: Sequence[int]) -> Iterator[tuple[list[int], int]]:
    """Tokens between gaps, each with how many come before it at least."""
    before = 0
    for is_gap, stretch in itertools.groupby(tokens, GAP.__eq__):
        stretch = list(stretch)
        if not is_gap:
            yield stretch, before
        before += len(stretch)
