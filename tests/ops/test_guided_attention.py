"""The loss that teaches a head where to look, against sums over single tokens, and that it teaches it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tracevision_jax.ops.guided_attention import guided_attention_loss, sought_tokens

QUARTERS = np.array([[0, 0, 0.5, 0.5], [0.5, 0, 1, 0.5], [0, 0.5, 0.5, 1], [0.5, 0.5, 1, 1]], np.float32)


def test_a_place_is_sought_where_it_covers_at_least_half_as_much_as_anywhere():
    places = np.array(
        [[0, 0, 0.4, 0.4], [0.4, 0, 0.6, 0.2], [0.1, 0, 0.55, 0.3], [0.7, 0.7, 0.701, 0.701], [0, 0, 0, 0]]
    )
    found = sought_tokens(jnp.asarray(places, jnp.float32)[None], jnp.asarray(QUARTERS)[None])[0]
    assert found.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [True, False, False, False],
        [False, False, False, True],
        [False, False, False, False],
    ]


def slow_loss(queries, keys, segments, wanted):
    """The same, one token at a time, in float64."""
    total, count = 0.0, 0
    for row, token in np.ndindex(segments.shape):
        seen = [k for k in range(token + 1) if segments[row, token] > 0 and segments[row, k] == segments[row, token]]
        there = [k for k in seen if wanted[row, token, k]]
        if not there:
            continue
        weights = {k: np.exp(queries[row, token].astype(float) @ keys[row, k] / np.sqrt(keys.shape[-1])) for k in seen}
        total -= np.log(sum(weights[k] for k in there) / sum(weights.values()))
        count += 1
    return total, count


@pytest.fixture
def given(rng):
    """Two rows: four visual tokens and three that seek a place; the second row holds two conversations and padding."""
    tokens = 12
    shown, sought = np.zeros((2, tokens, 4), np.float32), np.zeros((2, tokens, 4), np.float32)
    segments = np.ones((2, tokens), np.int32)
    segments[1] = [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 0, 0]
    shown[:, 1:5] = QUARTERS
    shown[1, 5:9] = QUARTERS
    sought[0, 6:9] = [[0, 0, 0.2, 0.2], [0.1, 0.2, 0.9, 0.3], [0.9, 0.9, 1.1, 1.1]]
    sought[1, 4:12] = QUARTERS[[0, 1, 1, 2, 3, 0, 1, 2]]
    queries, keys = rng.normal(size=(2, 2, tokens, 6)).astype(np.float32)
    return queries, keys, segments, np.asarray(sought_tokens(jnp.asarray(sought), jnp.asarray(shown)))


def test_the_loss_is_the_sum_over_tokens_that_see_what_they_seek(given):
    total, count = jax.jit(guided_attention_loss)(*given)
    expected, tokens = slow_loss(*given)
    assert int(count) == tokens == 8
    np.testing.assert_allclose(float(total), expected, rtol=1e-6)


def test_padding_and_other_conversations_change_nothing(given):
    queries, keys, segments, wanted = given
    before = guided_attention_loss(*map(jnp.asarray, given))
    keys, queries = keys.copy(), queries.copy()
    keys[1, 10:], queries[1, 10:] = 50.0, 50.0
    wider = [np.pad(x, ((0, 1), (0, 5), (0, 0))) for x in (queries, keys)]
    wider += [np.pad(segments, ((0, 1), (0, 5))), np.pad(wanted, ((0, 1), (0, 5), (0, 5)))]
    np.testing.assert_allclose(guided_attention_loss(*map(jnp.asarray, wider)), before, rtol=1e-6)


def test_following_the_gradient_brings_attention_to_the_place(given):
    queries, keys, *rest = map(jnp.asarray, given)

    def loss(pair):
        total, count = guided_attention_loss(*pair, *rest)
        return total / count

    pair = (queries, keys)
    step = jax.jit(lambda pair: jax.tree.map(lambda x, g: x - 2.0 * g, pair, jax.grad(loss)(pair)))
    start = float(loss(pair))
    for _ in range(200):
        pair = step(pair)
    assert start > 1.0 and float(loss(pair)) < 0.05
    assert all(np.isfinite(x).all() for x in jax.grad(loss)(pair))
