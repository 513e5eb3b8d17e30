"""Sampling against a plain numpy reference that sorts, and against the numbers it must draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tracevision_jax.errors import UserError
from tracevision_jax.hosts.sampling import Scale, filter_logits, pool_neighbours, sample_tokens, sampling_settings


def reference_probabilities(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Temperature, then top-k, then top-p, in float64 by sorting."""
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    if top_k:
        scaled[order[top_k:]] = -np.inf
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    if top_p < 1:
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= top_p]] = 0
        probabilities /= probabilities.sum()
    return probabilities


CASES = [
    (1.0, 0, 1.0),
    (0.7, 0, 1.0),
    (1.3, 5, 1.0),
    (1.0, 0, 0.6),
    (0.5, 0, 0.95),
    (2.0, 40, 0.8),
    (1.0, 1, 1.0),
]


@pytest.mark.parametrize("vocabulary", [50, 3000])
def test_each_row_follows_its_own_settings_as_the_sorting_reference_does(vocabulary: int) -> None:
    logits = np.random.default_rng(0).normal(0, 3, (len(CASES), vocabulary)).astype(np.float32)
    temperature, top_k, top_p = (list(column) for column in zip(*CASES, strict=True))
    settings = sampling_settings(len(CASES), temperature, top_k, top_p)
    found = np.asarray(jax.nn.softmax(jax.jit(filter_logits)(jnp.asarray(logits), settings), axis=-1))
    for row, case in enumerate(CASES):
        expected = reference_probabilities(logits[row], *case)
        np.testing.assert_array_equal(found[row] > 0, expected > 0)
        np.testing.assert_allclose(found[row], expected, rtol=2e-5, atol=1e-9)


def test_drawn_tokens_have_the_reference_distribution() -> None:
    vocabulary, draws = 12, 20_000
    logits = np.random.default_rng(1).normal(0, 1.5, vocabulary).astype(np.float32)
    allowed = np.ones(vocabulary, bool)
    allowed[int(np.argmax(logits))] = False
    expected = reference_probabilities(np.where(allowed, logits, -np.inf), 0.8, 6, 0.9)
    tokens = jax.jit(sample_tokens)(
        jnp.broadcast_to(jnp.asarray(logits), (draws, vocabulary)),
        jnp.broadcast_to(jnp.asarray(allowed), (draws, vocabulary)),
        sampling_settings(draws, 0.8, 6, 0.9, seed=3),
        jnp.int32(5),
    )
    counts = np.bincount(np.asarray(tokens), minlength=vocabulary)
    assert (counts[expected == 0] == 0).all()
    kept = expected > 0
    chi_squared = np.sum((counts[kept] - draws * expected[kept]) ** 2 / (draws * expected[kept]))
    assert kept.sum() >= 3
    assert chi_squared < 30, "a fair draw exceeds this less than once in ten thousand times"


def test_temperature_zero_is_the_argmax_in_rows_beside_sampled_ones() -> None:
    logits = jnp.asarray(np.random.default_rng(2).normal(0, 0.1, (64, 100)), jnp.float32)
    allowed = jnp.ones(logits.shape, bool)
    temperature = [0.0, 1.0] * 32
    tokens = np.asarray(sample_tokens(logits, allowed, sampling_settings(64, temperature), 0))
    best = np.argmax(np.asarray(logits), -1)
    np.testing.assert_array_equal(tokens[::2], best[::2])
    assert (tokens[1::2] != best[1::2]).mean() > 0.5


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 1.0, 1e6])
@pytest.mark.parametrize("hostile", ["large", "infinite", "equal"])
def test_a_forbidden_token_is_never_sampled_whatever_the_logits(temperature: float, hostile: str) -> None:
    generator = np.random.default_rng(3)
    rows, vocabulary = 500, 40
    allowed = generator.random((rows, vocabulary)) < 0.1
    allowed[np.arange(rows), generator.integers(vocabulary, size=rows)] = True
    logits = {
        "large": np.where(allowed, -3e38, 3e38),
        "infinite": np.where(allowed, -np.inf, np.inf),
        "equal": np.zeros((rows, vocabulary)),
    }[hostile].astype(np.float32)
    for top_k, top_p in [(0, 1.0), (30, 1.0), (0, 0.99)]:
        settings = sampling_settings(rows, temperature, top_k, top_p)
        tokens = np.asarray(sample_tokens(jnp.asarray(logits), jnp.asarray(allowed), settings, 7))
        assert allowed[np.arange(rows), tokens].all()


def test_a_value_counts_with_its_neighbours_and_other_tokens_alone() -> None:
    scale = Scale(first=3, count=50, reach=4)
    logits = np.random.default_rng(5).normal(0, 2, (20, 60)).astype(np.float32)
    pooled = np.asarray(pool_neighbours(jnp.asarray(logits), scale))
    for value in range(scale.count):
        near = range(max(0, value - scale.reach), min(scale.count, value + scale.reach + 1))
        expected = np.log(np.exp(logits[:, [scale.first + other for other in near]].astype(np.float64)).sum(-1))
        np.testing.assert_allclose(pooled[:, scale.first + value], expected, rtol=1e-5, atol=1e-5)
    others = np.r_[0:3, 53:60]
    np.testing.assert_array_equal(pooled[:, others], logits[:, others])


@pytest.mark.parametrize("reach, expected", [(0, 0), (3, 40)])
def test_a_greedy_number_is_where_most_probability_lies_and_forbidden_values_say_nothing(
    reach: int, expected: int
) -> None:
    probability = np.full(100, 1e-4)
    probability[0] = 0.1  # the largest alone, as clipped values make the ends of a scale
    probability[37:44] = [0.04, 0.05, 0.06, 0.07, 0.06, 0.05, 0.04]
    probability[70:75] = 0.09  # forbidden
    allowed = np.ones((1, 100), bool)
    allowed[:, 70:75] = False
    scale = Scale(0, 100, reach)
    logits = jnp.log(jnp.asarray(probability, jnp.float32))[None]
    assert sample_tokens(logits, jnp.asarray(allowed), sampling_settings(1), 0, scale)[0] == expected


def test_tokens_that_tie_at_the_edge_are_kept_together() -> None:
    logits = jnp.asarray([[2.0, 1.0, 1.0, 0.0]])
    kept = np.isfinite(np.asarray(filter_logits(logits, sampling_settings(1, 1.0, top_k=2))))
    np.testing.assert_array_equal(kept[0], [True, True, True, False])


def test_a_row_draws_the_same_in_any_batch_and_otherwise_at_another_step() -> None:
    logits = jnp.asarray(np.random.default_rng(4).normal(0, 1, (6, 1000)), jnp.float32)
    allowed = jnp.ones(logits.shape, bool)
    together = sample_tokens(logits, allowed, sampling_settings(6, 1.0, seed=10), 2)
    alone = sample_tokens(logits[4:5], allowed[4:5], sampling_settings(1, 1.0, seed=14), 2)
    later = sample_tokens(logits, allowed, sampling_settings(6, 1.0, seed=10), 3)
    assert together[4] == alone[0]
    assert (np.asarray(together) != np.asarray(later)).any()


def test_new_settings_never_recompile() -> None:
    compiled = jax.jit(lambda *arguments: sample_tokens(*arguments))  # a function, so a cache, of its own
    logits, allowed = jnp.zeros((3, 20)), jnp.ones((3, 20), bool)
    for case in [*CASES, (0.0, 0, 1.0)]:
        compiled(logits, allowed, sampling_settings(3, *case), jnp.int32(0))
    assert compiled._cache_size() == 1


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}],
)
def test_a_setting_outside_its_range_is_refused_by_name(wrong: dict) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        sampling_settings(2, **wrong)
    with pytest.raises(UserError, match="2 rows"):
        sampling_settings(2, temperature=[1.0, 1.0, 1.0])
