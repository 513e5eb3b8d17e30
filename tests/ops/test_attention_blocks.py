"""Attention in blocks of queries is attention, and values may be projected after it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tracevision_jax.ops.attention import attention
from tracevision_jax.ops.attention_blocks import attention_in_blocks

QUERIES, KEYS, HEADS, HEAD_DIM = 11, 7, 2, 4


def draw(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("value_dim", [HEAD_DIM, 3])
def test_blocks_of_queries_change_neither_result_nor_gradient(hidden, value_dim):
    given = (
        draw(2, QUERIES, HEADS, HEAD_DIM, seed=0),
        draw(2, KEYS, HEADS, HEAD_DIM, seed=1),
        draw(2, KEYS, HEADS, value_dim, seed=2),
    )
    visible = jnp.asarray(np.random.default_rng(3).uniform(size=(2, KEYS)) < 0.6) if hidden else None
    weights = draw(2, QUERIES, HEADS, value_dim, seed=4)

    def whole(q, k, v):
        v = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, HEAD_DIM - value_dim)))
        segments = {}
        if visible is not None:
            ones = jnp.ones((2, QUERIES), jnp.int32)
            segments = {"q_segments": ones, "kv_segments": visible.astype(jnp.int32)}
        return attention(q, k, v, **segments)[..., :value_dim]

    def results(attend):
        gradients = jax.grad(lambda *x: (attend(*x) * weights).sum(), argnums=(0, 1, 2))
        return jax.jit(lambda *x: (attend(*x), gradients(*x)))(*given)

    wanted = results(whole)
    for block in (4, 11):
        found = results(lambda q, k, v, block=block: attention_in_blocks(q, k, v, visible, block))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), found, wanted)


def test_where_no_key_is_visible_the_result_is_zero():
    q, k, v = draw(1, 5, 1, 4, seed=0), draw(1, 3, 1, 4, seed=1), draw(1, 3, 1, 2, seed=2)
    for values in (k, v):
        assert not np.any(attention_in_blocks(q, k, values, jnp.zeros((1, 3), bool), block=2))


def test_scores_are_never_whole():
    q, k = jnp.zeros((1, 64, 1, 8)), jnp.zeros((1, 1000, 1, 8))
    text = jax.jit(lambda q, k: attention_in_blocks(q, k, k, block=16)).lower(q, k).as_text()
    assert "16x1000x" in text and "64x1000x" not in text
