"""The language model on its own: packing, the cache, added tokens, remat."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tracevision_jax.language.cache import init_cache, write_rows
from tracevision_jax.language.config import LanguageConfig
from tracevision_jax.language.model import LanguageModel

CONFIG = LanguageConfig(40, 32, 2, 4, 2, 8, 48, mrope_sections=(1, 1, 2), added_tokens=5, first_added=37)


@cache
def model(config=CONFIG):
    """A module, its drawn parameters, and compiled `embed`, layers and `logits`."""
    module = LanguageModel(config)
    params = jax.jit(lambda: module.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32), method="initialise"))()
    run = jax.jit(module.apply, static_argnums=5)
    return module, params, run


def tokens_and_positions(seed, rows, length):
    """Random tokens, and positions that differ between the three axes."""
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(rng.integers(0, CONFIG.output_size, (rows, length)))
    positions = jnp.asarray(np.sort(rng.integers(0, 50, (rows, length, 3)), axis=1))
    return tokens, positions


def test_packed_conversations_equal_separate_rows():
    module, params, run = model()
    tokens, positions = tokens_and_positions(0, 2, 6)
    embeddings = module.apply(params, tokens, method="embed")
    separate, _ = run(params, embeddings, positions, jnp.ones((2, 6), jnp.int32))
    packed = [x.reshape(1, 12, -1) for x in (embeddings, positions)]
    padded = [jnp.pad(x, ((0, 0), (0, 4), (0, 0)), constant_values=7) for x in packed]
    segments = jnp.asarray([[1] * 6 + [2] * 6 + [0] * 4])
    together, _ = run(params, *padded, segments)
    np.testing.assert_allclose(together[:, :12].reshape(separate.shape), separate, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("fresh", [False, True])
def test_cached_decoding_of_uneven_rows_equals_the_whole_sequence(fresh):
    module, params, run = model()
    tokens, positions = tokens_and_positions(1, 2, 10)
    embeddings = module.apply(params, tokens, method="embed")
    whole, _ = run(params, embeddings, positions, jnp.ones((2, 10), jnp.int32))
    lengths = np.array([5, 3])
    segments = jnp.asarray(np.arange(6) < lengths[:, None]).astype(jnp.int32)
    cache = init_cache(CONFIG, 2, 12)
    hidden, cache = run(params, embeddings[:, :6], positions[:, :6], segments, cache, fresh)
    for row in range(2):
        np.testing.assert_allclose(hidden[row, : lengths[row]], whole[row, : lengths[row]], rtol=2e-5, atol=2e-6)
    rows = np.arange(2)[:, None]
    for step in (2, 1, 2):  # several tokens in one call, and single ones
        places = lengths[:, None] + np.arange(step)
        hidden, cache = run(
            params,
            embeddings[rows, places],
            positions[rows, places],
            jnp.ones((2, step), jnp.int32),
            cache,
            False,
        )
        np.testing.assert_allclose(hidden, whole[rows, places], rtol=2e-5, atol=2e-6)
        lengths = lengths + step
    np.testing.assert_array_equal(cache.lengths, lengths)


def test_writes_past_the_end_of_the_cache_are_dropped():
    store = jnp.zeros((2, 2, 1, 4, 1))
    rows = jnp.arange(1.0, 7.0).reshape(2, 3, 1, 1)
    written = write_rows(store, jnp.int32(1), rows, jnp.array([0, 2]))
    np.testing.assert_array_equal(written[1, :, 0, :, 0], [[1, 2, 3, 0], [0, 0, 4, 5]])
    assert not written[0].any()


def test_added_tokens_have_rows_of_their_own_in_and_out():
    module, params, _ = model()
    tree = params["params"]
    assert tree["added"]["embedding"].shape == tree["added"]["head"].shape == (5, 32)
    embedded = module.apply(params, jnp.array([[3, 36, 37, 41]]), method="embed")
    np.testing.assert_array_equal(embedded[0, :2], tree["embed"]["embedding"][jnp.array([3, 36])])
    np.testing.assert_array_equal(embedded[0, 2:], tree["added"]["embedding"][jnp.array([0, 4])])
    hidden = jax.random.normal(jax.random.key(1), (3, 32))
    logits = module.apply(params, hidden, method="logits")
    assert logits.shape == (3, 42) and logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[:, :37], hidden @ tree["head"]["kernel"][:, :37], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(logits[:, 37:], hidden @ tree["added"]["head"].T, rtol=1e-5, atol=1e-6)


def test_without_added_tokens_the_whole_vocabulary_has_logits_and_a_tied_head_is_the_embedding():
    module, params, _ = model(replace(CONFIG, added_tokens=0, first_added=0, tied=True))
    tree = params["params"]
    assert "head" not in tree and "added" not in tree
    hidden = jax.random.normal(jax.random.key(1), (3, 32))
    logits = module.apply(params, hidden, method="logits")
    np.testing.assert_allclose(logits, hidden @ tree["embed"]["embedding"].T, rtol=1e-5, atol=1e-6)


def test_a_frozen_base_vocabulary_gets_no_gradient_from_added_tokens():
    module, params, _ = model()
    table = jax.grad(lambda p: module.apply(p, jnp.array([[38, 40]]), method="embed").sum())(params)["params"]
    assert not table["embed"]["embedding"].any()
    assert table["added"]["embedding"][jnp.array([1, 3])].all()


def test_every_remat_policy_gives_the_same_gradients():
    _, params, _ = model()
    tokens, _ = tokens_and_positions(2, 1, 5)

    def gradients(remat):
        other = LanguageModel(replace(CONFIG, remat=remat))
        return jax.jit(jax.grad(lambda p: jnp.square(other.apply(p, tokens, method="initialise")).mean()))(params)

    plain = gradients("none")
    for remat in ("full", "dots"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients(remat), plain)
