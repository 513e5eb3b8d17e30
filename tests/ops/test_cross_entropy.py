"""Chunked cross-entropy against the plain one and optax's, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tracevision_jax.ops.cross_entropy import learned_first, token_cross_entropy

ROWS, TOKENS, WIDTH, VOCABULARY = 2, 11, 5, 13


@pytest.fixture
def task(rng):
    hidden = jnp.asarray(rng.normal(size=(ROWS, TOKENS, WIDTH)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(WIDTH, VOCABULARY)), jnp.float32)
    # Every third target is the likeliest token.
    guessed = (hidden @ kernel).argmax(-1).astype(jnp.int32)
    drawn = jnp.asarray(rng.integers(0, VOCABULARY, (ROWS, TOKENS)), jnp.int32)
    targets = jnp.where(jnp.arange(TOKENS) % 3 == 0, guessed, drawn)
    weights = jnp.asarray((rng.random((ROWS, TOKENS)) > 0.4) * rng.random((ROWS, TOKENS)), jnp.float32)
    return hidden, kernel, targets, weights


def ours(hidden, kernel, targets, weights, chunk):
    return token_cross_entropy(hidden, targets, weights, lambda rows: ((0, rows @ kernel),), chunk)


def reference(hidden, kernel, targets, weights):
    logits = hidden @ kernel
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (loss * weights).sum(), ((logits.argmax(-1) == targets) * weights).sum()


@pytest.mark.parametrize("chunk", [0, 1, 4, 11, 100])
def test_chunks_give_the_loss_accuracy_and_gradients_of_optax(task, chunk):
    hidden, kernel, targets, weights = task
    loss, correct = ours(*task, chunk)
    expected, expected_correct = reference(*task)
    assert np.allclose(loss, expected, rtol=1e-6) and np.allclose(correct, expected_correct, rtol=1e-6)
    assert 0 < correct < weights.sum()
    gradients = jax.grad(lambda h, k: ours(h, k, targets, weights, chunk)[0], (0, 1))(hidden, kernel)
    others = jax.grad(lambda h, k: reference(h, k, targets, weights)[0], (0, 1))(hidden, kernel)
    for one, other in zip(gradients, others, strict=True):
        assert np.allclose(one, other, atol=1e-6)


def test_tokens_without_weight_count_for_nothing(task):
    hidden, kernel, targets, weights = task
    dropped = weights == 0
    assert dropped.any()
    other = jnp.where(dropped, (targets + 1) % VOCABULARY, targets)
    noise = jnp.where(dropped[..., None], 1e3, hidden)
    assert ours(noise, kernel, other, weights, 4)[0] == ours(hidden, kernel, targets, weights, 4)[0]


def test_large_logits_do_not_overflow(task):
    hidden, kernel, targets, weights = task
    loss, _ = ours(hidden * 1e4, kernel, targets, weights, 4)
    assert np.isfinite(loss) and np.allclose(loss, reference(hidden * 1e4, kernel, targets, weights)[0], rtol=1e-5)


def test_chunks_keep_only_their_own_logits(task):
    """The largest array of the chunked program, backward pass included, is a chunk's, not the row's."""
    hidden, kernel, targets, weights = task

    def largest(chunk):
        program = jax.make_jaxpr(jax.grad(lambda h: ours(h, kernel, targets, weights, chunk)[0]))(hidden)
        return max(
            (v.aval.size for equation in _equations(program.jaxpr) for v in equation.outvars
             if v.aval.shape and v.aval.shape[-1] == VOCABULARY),
            default=0,
        )  # fmt: skip

    assert largest(0) == ROWS * TOKENS * VOCABULARY
    assert largest(2) == ROWS * 2 * VOCABULARY


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def test_learned_tokens_come_first_and_only_those_without_weight_are_dropped(task):
    hidden, kernel, targets, weights = task
    most = int((weights > 0).sum(1).max())
    assert most < TOKENS
    kept = learned_first(most, hidden, targets, weights)
    assert [part.shape[1] for part in kept] == [most] * 3
    for row in range(ROWS):
        chosen = np.flatnonzero(weights[row] > 0)
        for part, whole in zip(kept, (hidden, targets, weights), strict=True):
            assert (part[row, : len(chosen)] == whole[row, chosen]).all()
        assert (kept[2][row, len(chosen) :] == 0).all()
    loss = token_cross_entropy(*kept, lambda rows: ((0, rows @ kernel),))
    assert np.allclose(loss, reference(*task), rtol=1e-6)


def test_a_row_as_short_as_the_limit_stays_as_it_is(task):
    hidden, _, targets, weights = task
    assert learned_first(TOKENS, hidden, targets, weights)[0] is hidden
