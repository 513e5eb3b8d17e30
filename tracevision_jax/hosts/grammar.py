"""Constrained decoding: a finite automaton over token classes that lives in the decode loop on the device.

With it every answer is well formed: `<traj>` is followed by points and `</traj>`, `<|box_start|>` by x1 y1
x2 y2 with x2 >= x1 and y2 >= y1 and `<|box_end|>`, `[SEG]` by its six slots, `<|object_ref_start|>` by text
and `<|object_ref_end|>`; coordinates are bins or written numbers (TraceVision, Sec. 3.2.3). What is opened is
always closed before the budget of new tokens is used up: `steps_to_close` holds the least number of tokens
that surely leads out of each state, and a token is allowed only if it leaves enough budget for that. So no
state is ever without a token.

    grammar = answer_grammar(vocabulary, max_points=64)
    state = grammar.start(rows)
    allowed = allowed_tokens(grammar, state, remaining)      # inside the loop
    state = advance(grammar, state, tokens)

A number that must not fall below an earlier one (x2, y2) is compared with a register. For written digits the
digits so far stand in `number`; a digit is allowed while the largest completion of at most three digits still
reaches the register.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from tracevision_jax.errors import UserError
from tracevision_jax.records.vocabulary import BINS, CHAT_TOKENS, Vocabulary

Array = jax.Array | np.ndarray
NEVER = np.int32(1 << 30)
"""A threshold that no token's value reaches, and the distance of a state that cannot be left."""
DIGITS = 3
"""Most digits of a written coordinate."""
PREFIX_STEP = 32
"""Forced beginnings are padded to multiples of so many tokens to be checked, one program each."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GrammarState:
    """Where each row is in the automaton."""

    place: Int[Array, "batch"]
    number: Int[Array, "batch"]
    """The coordinate being written, or the last one."""
    registers: Int[Array, "batch 2"]
    """x1 and y1 of the last box."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grammar:
    """The automaton's tables; an edge is (state, class of the token).

    Over an edge the number becomes number * scale + value of the token. Where `bound` names a register, the
    edge is open only to tokens with which (number + 1) * power - 1 reaches that register: power is 10 to the
    number of digits that may follow, so this is the largest number that can still come of it.
    """

    token_class: Int[Array, "vocabulary"]
    token_value: Int[Array, "vocabulary"]
    next_state: Int[Array, "states classes"]
    """-1 where the class is forbidden."""
    scale: Int[Array, "states classes"]
    power: Int[Array, "states classes"]
    bound: Int[Array, "states classes"]
    """Register that limits the number from below, or -1."""
    store: Int[Array, "states classes"]
    """Register that takes the number, or -1."""
    steps_to_close: Int[Array, "states"]
    """Tokens that surely suffice to come back to free text."""
    first_state: Int[Array, ""]
    end_state: Int[Array, ""]
    """Reached by an end token; the row is finished."""

    def start(self, rows: int) -> GrammarState:
        """The state of rows that have written nothing."""
        zeros = jnp.zeros(rows, jnp.int32)
        return GrammarState(zeros + self.first_state, zeros, jnp.zeros((rows, 2), jnp.int32))


def allowed_tokens(
    grammar: Grammar, state: GrammarState, remaining: Int[Array, "batch"]
) -> Bool[Array, "batch vocabulary"]:
    """Tokens that may come next; `remaining` counts the tokens still to be written, the next one included."""
    place = jnp.asarray(state.place)
    target = jnp.asarray(grammar.next_state)[place]
    closes = jnp.asarray(grammar.steps_to_close)[jnp.maximum(target, 0)] < remaining[:, None]
    bound, power = jnp.asarray(grammar.bound)[place], jnp.asarray(grammar.power)[place]
    lowest = jnp.take_along_axis(jnp.asarray(state.registers), jnp.maximum(bound, 0), axis=1)
    # (number * scale + value + 1) * power - 1 >= lowest, solved for the token's value
    before = state.number[:, None] * jnp.asarray(grammar.scale)[place]
    least = -(-(lowest + 1) // power) - 1 - before
    threshold = jnp.where(bound >= 0, least, 0)
    threshold = jnp.where((target >= 0) & closes, threshold, NEVER)
    return grammar.token_value[None] >= jnp.take(threshold, jnp.asarray(grammar.token_class), axis=1)


def advance(grammar: Grammar, state: GrammarState, tokens: Int[Array, "batch"]) -> GrammarState:
    """The state after an allowed token a row; a forbidden one leaves the row where it was."""
    edge = state.place, jnp.asarray(grammar.token_class)[tokens]
    target, store = jnp.asarray(grammar.next_state)[edge], jnp.asarray(grammar.store)[edge]
    value = jnp.asarray(grammar.token_value)[tokens]
    number = state.number * jnp.asarray(grammar.scale)[edge] + value
    kept = jnp.where(store[:, None] == jnp.arange(2), number[:, None], state.registers)
    return GrammarState(jnp.where(target >= 0, target, state.place), number, kept)


def check_prefix(grammar: Grammar, tokens: Sequence[int], budget: int) -> None:
    """Raise UserError unless an answer of at most `budget` tokens may begin with these."""
    unknown = [index for index, token in enumerate(tokens) if not 0 <= token < len(grammar.token_class)]
    if unknown:
        raise UserError(f"forced token {unknown[0] + 1} ({tokens[unknown[0]]}) is not in the vocabulary")
    padded = np.zeros(-(-len(tokens) // PREFIX_STEP) * PREFIX_STEP, np.int32)
    padded[: len(tokens)] = tokens
    allowed = np.asarray(_allowed_in_turn(grammar, padded, budget))[: len(tokens)]
    if not allowed.all():
        index = int(allowed.argmin())
        raise UserError(
            f"an answer of at most {budget} tokens cannot begin with {list(tokens)}: token {index + 1} "
            f"({tokens[index]}) is not allowed there, or too few are left to close what it opens"
        )


@jax.jit
def _allowed_in_turn(
    grammar: Grammar, tokens: Int[Array, "tokens"], budget: Int[Array, ""] | int
) -> Bool[Array, "tokens"]:
    """Whether each token may come after those before it; meaningless after the first that may not."""

    def step(carry: tuple[GrammarState, Array], token: Array) -> tuple[tuple[GrammarState, Array], Array]:
        state, remaining = carry
        allowed = allowed_tokens(grammar, state, remaining)[0, token]
        return (advance(grammar, state, token[None]), remaining - 1), allowed

    return jax.lax.scan(step, (grammar.start(1), jnp.full(1, budget, jnp.int32)), tokens)[1]


# Building


class _Edge(NamedTuple):
    target: int
    scale: int = 0
    power: int = 1
    bound: int = -1
    store: int = -1
    sure: bool = True
    """Whether some token of the class is allowed whatever the registers hold."""


class _End(NamedTuple):
    """A state in which a coordinate may end, and the edge's extras over which it is left."""

    state: int
    extras: Mapping[str, int | bool]


@dataclass
class _Builder:
    """Collects token classes, states and edges; state 0 is free text, state 1 the end."""

    vocab_size: int
    classes: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    values: dict[int, int] = dataclasses.field(default_factory=dict)
    edges: dict[tuple[int, str], _Edge] = dataclasses.field(default_factory=dict)
    states: int = 2
    FREE, END = 0, 1

    def state(self) -> int:
        self.states += 1
        return self.states - 1

    def token(self, token: int) -> str:
        """The class that holds just this token."""
        self.classes[f"token {token}"] = [token]
        return f"token {token}"

    def edge(self, source: int, kind: str, target: int, **extras) -> None:
        if (source, kind) in self.edges:
            raise ValueError(f"two rules for {kind} in state {source}")
        self.edges[source, kind] = _Edge(target, **extras)

    def literal(self, ends: Sequence[_End], tokens: Sequence[int], target: int) -> None:
        """Lead from all of `ends` over the tokens to `target`, along what earlier literals laid there."""
        for index, token in enumerate(tokens):
            kind = self.token(token)
            known = self.edges.get((ends[0].state, kind))
            if index == len(tokens) - 1:
                following = target
            elif known is not None:
                following = known.target
            else:
                following = self.state()
            if known is None:
                for end in ends:
                    self.edge(end.state, kind, following, **end.extras)
            elif known.target != following:
                raise ValueError(f"two rules for {kind} in state {ends[0].state}")
            ends = [_End(following, {})]

    def build(self, text_states: Mapping[int, int], text_classes: Iterable[str]) -> Grammar:
        """Finish: `text_states` are those where all text is allowed, with the state that it leads to."""
        names = ["text", *self.classes]
        token_class = np.zeros(self.vocab_size, np.int32)
        for number, name in enumerate(names[1:], 1):
            token_class[self.classes[name]] = number
        for state, target in text_states.items():
            for name in ("text", *text_classes):
                self.edge(state, name, target)
        tables = {
            field: np.full((self.states, len(names)), default, np.int32)
            for field, default in {"target": -1, **_Edge._field_defaults, "sure": 0}.items()
        }
        for (source, name), edge in self.edges.items():
            for field, value in edge._asdict().items():
                tables[field][source, names.index(name)] = value
        token_value = np.zeros(self.vocab_size, np.int32)
        token_value[list(self.values)] = list(self.values.values())
        populated = np.bincount(token_class, minlength=len(names)) > 0
        surely = np.where((tables["sure"] > 0) & populated, tables["target"], -1)
        return Grammar(
            token_class,
            token_value,
            next_state=tables["target"],
            steps_to_close=_steps_to_close(surely, (self.FREE, self.END)),
            first_state=np.array(self.FREE, np.int32),
            end_state=np.array(self.END, np.int32),
            **{field: tables[field] for field in ("scale", "power", "bound", "store")},
        )


def _steps_to_close(surely: np.ndarray, closed: Sequence[int]) -> np.ndarray:
    """Shortest way from each state to a closed one over edges that are surely open."""
    steps = np.full(len(surely), NEVER, np.int32)
    steps[list(closed)] = 0
    while True:
        onward = np.where(surely >= 0, steps[surely], NEVER).min(axis=1)
        shorter = np.minimum(steps, np.minimum(onward, NEVER - 1) + 1)
        if (shorter == steps).all():
            break
        steps = shorter
    if (steps == NEVER).any():
        raise ValueError(f"states {np.flatnonzero(steps == NEVER).tolist()} can never be left")
    return steps


def text_grammar(vocab_size: int, end: Sequence[int], forbidden: Sequence[int] = ()) -> Grammar:
    """Free text until an end token, for a host without added tokens."""
    builder = _Builder(vocab_size)
    builder.classes = {"end": list(end), "forbidden": [token for token in forbidden if token not in end]}
    builder.edge(builder.FREE, "end", builder.END)
    return builder.build({builder.FREE: builder.FREE}, ())


def answer_grammar(vocabulary: Vocabulary, max_points: int = 64) -> Grammar:
    """The grammar of TraceVision's answers: text, phrases, boxes, trajectories of 1 to `max_points`, masks.

    Raises UserError when coordinates are digits and the tokenizer joins those with other characters.
    """
    if max_points < 1:
        raise UserError(f"a trajectory has at least one point, so max_points cannot be {max_points}")
    builder = _Builder(vocabulary.size)
    special = vocabulary.special
    end = [special("<|im_end|>"), special("<|endoftext|>")]
    shown = [special(f"<|{name}_{side}|>") for name in ("object_ref", "box") for side in ("start", "end")]
    unwritten = {*(special(token) for token in CHAT_TOKENS), *vocabulary.tokenizer.all_special_ids}
    builder.classes["end"] = end
    builder.classes["forbidden"] = sorted(unwritten - {*end, *shown})
    builder.edge(builder.FREE, "end", builder.END)
    coordinates = _Bins(builder, vocabulary) if vocabulary.coordinates == "bins" else _Digits(builder, vocabulary)
    coordinates.trajectory(vocabulary.traj_open, vocabulary.traj_close, max_points)
    coordinates.box(special("<|box_start|>"), special("<|box_end|>"))
    slots = builder.state()
    builder.edge(builder.FREE, builder.token(vocabulary.seg), slots)
    builder.literal([_End(slots, {})], vocabulary.slots, builder.FREE)
    empty, phrase = builder.state(), builder.state()
    builder.edge(builder.FREE, builder.token(special("<|object_ref_start|>")), empty)
    builder.edge(phrase, builder.token(special("<|object_ref_end|>")), builder.FREE)
    return builder.build({builder.FREE: builder.FREE, empty: phrase, phrase: phrase}, coordinates.text_classes)


class _Bins:
    """Coordinates as one token each."""

    text_classes = ()

    def __init__(self, builder: _Builder, vocabulary: Vocabulary):
        self.builder = builder
        builder.classes["bin"] = [vocabulary.first_bin + value for value in range(BINS)]
        builder.values |= {vocabulary.first_bin + value: value for value in range(BINS)}

    def trajectory(self, opening: int, closing: int, max_points: int) -> None:
        builder, place = self.builder, self.builder.state()
        builder.edge(builder.FREE, builder.token(opening), place)
        for _ in range(max_points):
            half, whole = builder.state(), builder.state()
            builder.edge(place, "bin", half)
            builder.edge(half, "bin", whole)
            builder.edge(whole, builder.token(closing), builder.FREE)
            place = whole

    def box(self, opening: int, closing: int) -> None:
        builder = self.builder
        place = builder.state()
        builder.edge(builder.FREE, builder.token(opening), place)
        for extras in ({"store": 0}, {"store": 1}, {"bound": 0}, {"bound": 1}):
            following = builder.state()
            builder.edge(place, "bin", following, **extras)
            place = following
        builder.edge(place, builder.token(closing), builder.FREE)


class _Digits:
    """Coordinates as text, `(x,y), (x,y)`: whole numbers without leading zeros, in any cut into digit tokens.

    The characters between numbers are written with the tokens that the tokenizer itself uses there.
    """

    def __init__(self, builder: _Builder, vocabulary: Vocabulary):
        self.builder = builder
        pattern = re.compile(rf"[0-9]{{1,{DIGITS}}}")
        numbers = {token: text for text, token in vocabulary.tokenizer.get_vocab().items() if pattern.fullmatch(text)}
        builder.values |= {token: int(text) for token, text in numbers.items()}
        self.kinds: dict[tuple[int, bool], str] = {}
        for token, text in numbers.items():
            kind = (len(text), text[0] == "0")
            self.kinds[kind] = f"number {kind}"
            builder.classes.setdefault(self.kinds[kind], []).append(token)
        if not {str(digit) for digit in range(10)} <= set(numbers.values()):
            raise UserError("the tokenizer has no token of their own for the digits; use the coordinate format 'bins'")
        literals: list[list[int]] = [[]]
        for token in vocabulary.encode("(1,2), (3,4)"):
            if token in numbers:
                literals.append([])
            else:
                literals[-1].append(token)
        if len(literals) != 5 or not all(literals):
            raise UserError("the tokenizer joins digits with punctuation; use the coordinate format 'bins'")
        self.open, self.comma, self.between, _, self.close = literals
        characters = {token for literal in literals for token in literal}
        self.text_classes = (*self.kinds.values(), *(builder.token(token) for token in sorted(characters)))

    def number(self, source: int, bound: int = -1, store: int = -1) -> list[_End]:
        """A number of one to three digits from `source`; the register is written when the number is left."""
        builder = self.builder
        # whole: three digits, or a zero; either has been compared with the register already
        one, two, whole = (builder.state() for _ in range(3))
        reached = {1: one, 2: two, 3: whole}
        for so_far, state in enumerate((source, one, two)):
            for (digits, zero_first), kind in self.kinds.items():
                total = so_far + digits
                single_zero = so_far == 0 and digits == 1 and zero_first
                if total > DIGITS or (so_far == 0 and zero_first and not single_zero):
                    continue
                builder.edge(
                    state,
                    kind,
                    whole if single_zero else reached[total],
                    scale=10**digits if so_far else 0,
                    power=1 if single_zero else 10 ** (DIGITS - total),
                    bound=bound,
                    # A single 9 reaches every register; not every vocabulary has 99.
                    sure=bound < 0 or (digits == 1 and not zero_first),
                )
        leave = {"scale": 1, "store": store}
        early = {**leave, "bound": bound, "sure": bound < 0}
        return [_End(one, early), _End(two, early), _End(whole, leave)]

    def pair(self, source: int, bounds: tuple[int, int] = (-1, -1), stores: tuple[int, int] = (-1, -1)) -> list[_End]:
        """x, comma, y from `source`."""
        y = self.builder.state()
        self.builder.literal(self.number(source, bounds[0], stores[0]), self.comma, y)
        return self.number(y, bounds[1], stores[1])

    def opened(self, opening: int) -> int:
        """The state after the opening token and the first bracket."""
        tagged, first = self.builder.state(), self.builder.state()
        self.builder.edge(self.builder.FREE, self.builder.token(opening), tagged)
        self.builder.literal([_End(tagged, {})], self.open, first)
        return first

    def trajectory(self, opening: int, closing: int, max_points: int) -> None:
        place = self.opened(opening)
        for index in range(max_points):
            ends = self.pair(place)
            self.builder.literal(ends, [*self.close, closing], self.builder.FREE)
            if index < max_points - 1:
                place = self.builder.state()
                self.builder.literal(ends, self.between, place)

    def box(self, opening: int, closing: int) -> None:
        second = self.builder.state()
        self.builder.literal(self.pair(self.opened(opening), stores=(0, 1)), self.between, second)
        ends = self.pair(second, bounds=(0, 1))
        self.builder.literal(ends, [*self.close, closing], self.builder.FREE)
