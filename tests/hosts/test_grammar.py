"""Constrained decoding: whatever the logits and the budget, every answer is well formed and closed."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers

from tracevision_jax.errors import UserError
from tracevision_jax.hosts.grammar import (
    Grammar,
    GrammarState,
    advance,
    allowed_tokens,
    answer_grammar,
    check_prefix,
    text_grammar,
)
from tracevision_jax.hosts.sampling import sample_tokens, sampling_settings
from tracevision_jax.records.vocabulary import CHAT_TOKENS, Vocabulary, train_tokenizer
from tracevision_jax.trajectory.tokens import ids_to_bins, parse_digits

TEXTS = [
    "a red dog at (12,345), (678,9) beside the 101 cats",
    "the box (12,34), (99,100) of 2 3 12 123 45",
] * 20
STYLES = ["bins", "digits", "merged digits", "characters"]


@functools.cache
def vocabulary_of(style: str) -> Vocabulary:
    """Byte-level BPEs: numbers merged as training finds them, in single digits, or nothing merged at all."""
    tokenizer = train_tokenizer(TEXTS, 11 + 256 + (0 if style == "characters" else 120))
    if style in ("digits", "bins"):
        # The rule of Qwen's own pre-tokenizer that matters here: every digit stands alone.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"[0-9]| ?[^\s\w]+| ?\w+|\s+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    return Vocabulary(tokenizer, "bins" if style == "bins" else "digits")


@functools.cache
def grammar_of(style: str, max_points: int = 5) -> Grammar:
    return jax.tree.map(jnp.asarray, answer_grammar(vocabulary_of(style), max_points))


def draw_answers(
    vocabulary: Vocabulary, grammar: Grammar, budgets: np.ndarray, steps: int, seed: int, boost: float
) -> list[list[int]]:
    """Answers drawn at temperature 1 from random logits, opening tokens made likelier by `boost`."""
    rows = len(budgets)
    openers = [vocabulary.traj_open, vocabulary.seg]
    openers += [vocabulary.special("<|box_start|>"), vocabulary.special("<|object_ref_start|>")]
    logits = 2 * jax.random.normal(jax.random.key(seed), (rows, vocabulary.size))
    logits = logits.at[:, jnp.asarray(openers)].add(boost)
    settings = jax.tree.map(jnp.asarray, sampling_settings(rows, 1.0, seed=seed * 100_000))
    limits = jnp.asarray(budgets)

    @jax.jit
    def run(grammar: Grammar):
        def step(state: GrammarState, index):
            allowed = allowed_tokens(grammar, state, limits - index)
            running = (index < limits) & (state.place != grammar.end_state)
            tokens = sample_tokens(logits, allowed, settings, index)
            moved = advance(grammar, state, tokens)
            kept = jax.tree.map(
                lambda new, old: jnp.where(running.reshape(-1, *(1,) * (new.ndim - 1)), new, old),
                moved,
                state,
            )
            return kept, (jnp.where(running, tokens, -1), running & ~allowed.any(axis=1))

        return jax.lax.scan(step, grammar.start(rows), jnp.arange(steps))[1]

    tokens, stuck = run(grammar)
    assert not np.asarray(stuck).any(), "a row had no allowed token"
    return [[int(token) for token in row if token >= 0] for row in np.asarray(tokens).T]


def structures(vocabulary: Vocabulary, answer: list[int], max_points: int) -> list[str]:
    """Parse an answer's ids without the grammar; the kinds of what it holds. Malformed ids fail the test."""
    special = vocabulary.special
    ends = {special("<|im_end|>"), special("<|endoftext|>")}
    pairs = {
        vocabulary.traj_open: vocabulary.traj_close,
        special("<|box_start|>"): special("<|box_end|>"),
        special("<|object_ref_start|>"): special("<|object_ref_end|>"),
    }
    plain = set(range(vocabulary.first_added)) - {special(token) for token in CHAT_TOKENS}
    found, place = [], 0
    while place < len(answer):
        token = answer[place]
        if token in pairs:
            assert pairs[token] in answer[place:], "never closed"
            close = answer.index(pairs[token], place)
            inner, kind = answer[place + 1 : close], vocabulary.decode([token])
            if kind == "<|object_ref_start|>":
                assert inner and set(inner) <= plain
            else:
                if vocabulary.coordinates == "bins":
                    bins = ids_to_bins(
                        np.array([vocabulary.traj_open, *inner, vocabulary.traj_close]),
                        vocabulary.first_added,
                    )
                else:
                    text = vocabulary.decode(inner)
                    number = "(0|[1-9][0-9]{0,2})"
                    assert re.fullmatch(rf"\({number},{number}\)(, \({number},{number}\))*", text), text
                    bins = parse_digits(f"<traj>{text}</traj>")
                assert bins.min() >= 0 and bins.max() <= 999
                if kind == "<traj>":
                    assert 1 <= len(bins) <= max_points
                else:
                    assert len(bins) == 2
                    assert (bins[1] >= bins[0]).all(), bins
            found.append(kind)
            place = close + 1
        elif token == vocabulary.seg:
            assert answer[place + 1 : place + 7] == vocabulary.slots
            found.append("[SEG]")
            place += 7
        elif token in ends:
            assert place == len(answer) - 1
            place += 1
        else:
            assert token in plain
            place += 1
    return found


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("boost", [3.0, 9.0])
def test_every_answer_drawn_from_random_logits_parses_at_every_budget(style: str, boost: float) -> None:
    vocabulary, steps, rows = vocabulary_of(style), 48, 600
    budgets = np.arange(rows) % steps + 1
    answers = draw_answers(vocabulary, grammar_of(style), budgets, steps, seed=len(style), boost=boost)
    kinds: list[str] = []
    for answer, budget in zip(answers, budgets, strict=True):
        assert len(answer) <= budget
        kinds += structures(vocabulary, answer, max_points=5)
    counts = {kind: kinds.count(kind) for kind in ("<traj>", "<|box_start|>", "[SEG]", "<|object_ref_start|>")}
    assert min(counts.values()) > 50, counts


def allowed_at(grammar: Grammar, prefix: list[int], remaining: int) -> np.ndarray:
    """Which tokens may follow a prefix when so many tokens are left."""
    state = grammar.start(1)
    for token in prefix:
        state = advance(grammar, state, jnp.array([token]))
    return np.asarray(allowed_tokens(grammar, state, jnp.array([remaining])))[0]


def test_the_budget_rule_is_exact_for_bins() -> None:
    vocabulary, grammar = vocabulary_of("bins"), grammar_of("bins")
    bins = slice(vocabulary.first_bin, vocabulary.first_bin + 1000)
    least = {
        vocabulary.traj_open: 4,
        vocabulary.special("<|box_start|>"): 6,
        vocabulary.seg: 7,
        vocabulary.special("<|object_ref_start|>"): 3,
    }
    for token, tokens in least.items():
        for remaining in range(1, 9):
            assert allowed_at(grammar, [], remaining)[token] == (remaining >= tokens)
    point = [vocabulary.first_bin + 7, vocabulary.first_bin + 3]
    for remaining in range(1, 6):
        allowed = allowed_at(grammar, [vocabulary.traj_open, *point], remaining)
        assert allowed[vocabulary.traj_close]
        assert allowed[bins].all() == allowed[bins].any() == (remaining >= 3)
        assert allowed.sum() == 1 + 1000 * (remaining >= 3)
    full = allowed_at(grammar, [vocabulary.traj_open, *point * 5], 100)
    assert full.sum() == 1 and full[vocabulary.traj_close]


def test_the_budget_rule_is_exact_for_written_trajectories() -> None:
    vocabulary, grammar = vocabulary_of("characters"), grammar_of("characters")
    written = functools.partial(vocabulary.encode)
    # <traj> ( d , d ) </traj>
    for remaining in range(1, 10):
        assert allowed_at(grammar, [], remaining)[vocabulary.traj_open] == (remaining >= 7)
    prefix = [vocabulary.traj_open, *written("(12,3")]
    digit, bracket, comma = (written(text)[0] for text in "5),")
    for remaining in range(2, 12):
        allowed = allowed_at(grammar, prefix, remaining)
        assert allowed[bracket]
        assert allowed[digit] == (remaining >= 3)
        # after the bracket: comma, space, bracket, digit, comma, digit, bracket, tag
        assert allowed_at(grammar, [*prefix, bracket], remaining)[comma] == (remaining >= 8)


def test_written_numbers_have_at_most_three_digits_and_no_leading_zero() -> None:
    vocabulary, grammar = vocabulary_of("digits"), grammar_of("digits")
    digits = [vocabulary.encode(str(digit))[0] for digit in range(10)]
    for text, expected in [("(", 10), ("(1", 10), ("(12", 10), ("(123", 0), ("(0", 0)]:
        allowed = allowed_at(grammar, [vocabulary.traj_open, *vocabulary.encode(text)], 100)
        assert allowed[digits].sum() == expected
        assert allowed[vocabulary.encode(",")[0]] == (text != "(")


def test_text_between_numbers_is_cut_into_tokens_as_the_tokenizer_does() -> None:
    for style in STYLES[1:]:
        vocabulary, grammar = vocabulary_of(style), grammar_of(style)
        written = vocabulary.encode("(12,345), (7,8), (0,999)")
        check_prefix(grammar, [vocabulary.traj_open, *written, vocabulary.traj_close], budget=100)
    assert len(vocabulary_of("digits").encode("), (")) < len(vocabulary_of("characters").encode("), ("))


@pytest.mark.parametrize("style", STYLES)
def test_a_box_may_close_on_its_first_corner_but_never_before_it(style: str) -> None:
    vocabulary, grammar = vocabulary_of(style), grammar_of(style)

    def box(corners: list[int]) -> list[int]:
        if style == "bins":
            inner = [vocabulary.first_bin + value for value in corners]
        else:
            inner = vocabulary.encode("({},{}), ({},{})".format(*corners))
        return [vocabulary.special("<|box_start|>"), *inner, vocabulary.special("<|box_end|>")]

    for good in ([50, 7, 50, 7], [0, 0, 0, 0], [999, 999, 999, 999], [9, 100, 10, 100], [99, 0, 500, 1]):
        check_prefix(grammar, box(good), budget=100)
    for bad in (
        [50, 7, 49, 7],
        [50, 7, 50, 6],
        [1, 0, 0, 0],
        [100, 5, 99, 999],
        [999, 0, 998, 0],
        [5, 990, 6, 99],
    ):
        with pytest.raises(UserError, match="is not allowed there"):
            check_prefix(grammar, box(bad), budget=100)


def test_a_second_box_is_compared_with_its_own_corner() -> None:
    vocabulary, grammar = vocabulary_of("bins"), grammar_of("bins")
    start, end = vocabulary.special("<|box_start|>"), vocabulary.special("<|box_end|>")
    first = [start, *(vocabulary.first_bin + value for value in (900, 900, 950, 950)), end]
    second = [start, *(vocabulary.first_bin + value for value in (1, 2, 3, 4)), end]
    check_prefix(grammar, first + second, budget=12)


def test_free_text_has_no_loose_parts_and_ends_only_outside_structures() -> None:
    vocabulary, grammar = vocabulary_of("bins"), grammar_of("bins")
    special = vocabulary.special
    allowed = allowed_at(grammar, [], 100)
    loose = [vocabulary.traj_close, *vocabulary.slots, special("<|box_end|>"), special("<|object_ref_end|>")]
    loose += [special("<|im_start|>"), special("<|image_pad|>"), special("<|vision_start|>")]
    assert not allowed[loose].any() and not allowed[vocabulary.first_bin :].any()
    assert allowed[vocabulary.encode("a red dog")].all()
    ends = [special("<|im_end|>"), special("<|endoftext|>")]
    assert allowed[ends].all()
    for prefix in ([vocabulary.traj_open], [vocabulary.seg], [special("<|object_ref_start|>")]):
        assert not allowed_at(grammar, prefix, 100)[ends].any()


def test_a_forced_beginning_that_cannot_be_closed_in_time_is_refused() -> None:
    vocabulary, grammar = vocabulary_of("bins"), grammar_of("bins")
    check_prefix(grammar, [vocabulary.traj_open], budget=4)
    with pytest.raises(UserError, match="too few are left"):
        check_prefix(grammar, [vocabulary.traj_open], budget=3)
    with pytest.raises(UserError, match="not allowed there"):
        check_prefix(grammar, [vocabulary.traj_close], budget=100)
    with pytest.raises(UserError, match="not in the vocabulary"):
        check_prefix(grammar, [vocabulary.size], budget=100)


def test_plain_text_is_free_until_an_end_token() -> None:
    grammar = text_grammar(10, end=[8, 9], forbidden=[0, 9])
    np.testing.assert_array_equal(np.flatnonzero(allowed_at(grammar, [3, 4], 1)), range(1, 10))
    assert not allowed_at(grammar, [8], 5).any()


def test_a_trajectory_without_points_is_refused() -> None:
    with pytest.raises(UserError, match="at least one point"):
        answer_grammar(vocabulary_of("bins"), max_points=0)
