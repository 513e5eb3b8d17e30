"""Moments in bfloat16: rounding by chance keeps the expectation, and so the small changes of a second moment."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.on_devices import printed_on
from tracevision_jax.training.low_precision import kept_in_bfloat16, random_bits, round_stochastically

KEY = jax.random.bits(jax.random.key(3), (2,), jnp.uint32)


def neighbours(x):
    """The bfloat16 at or below each value's size, and the one above, as float32."""
    bits = np.asarray(x, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32), (bits + np.uint32(0x10000)).view(np.float32)


def test_a_value_becomes_one_of_its_two_neighbours_and_on_average_itself(rng):
    draws = 20_000
    values = (rng.normal(size=256) * 10.0 ** rng.integers(-30, 30, 256)).astype(np.float32)
    rounded = np.asarray(round_stochastically(jnp.tile(values, (draws, 1)), KEY), np.float32)
    near, far = neighbours(values)
    assert ((rounded == near) | (rounded == far)).all()
    ulp = np.abs(far - near).astype(np.float64)
    share = np.abs(values.astype(np.float64) - near) / ulp
    error = (rounded.mean(0, dtype=np.float64) - values) / ulp
    deviation = np.sqrt(share * (1 - share) / draws)
    assert (np.abs(error) <= 5 * deviation + 1 / 2**16).all()
    assert abs(np.mean(error / np.maximum(deviation, 1e-3))) < 5 / 16  # 256 values together, to either side


def test_what_bfloat16_holds_stays_as_it_is(rng):
    values = (rng.normal(size=4096) * 10.0 ** rng.integers(-36, 38, 4096)).astype(jnp.bfloat16)
    values = np.append(values, np.array([0.0, -0.0, np.inf, -np.inf], jnp.bfloat16))
    rounded = np.asarray(round_stochastically(jnp.asarray(values, jnp.float32), KEY))
    np.testing.assert_array_equal(rounded.view(np.uint16), values.view(np.uint16))


@pytest.mark.parametrize("bits", [0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF])
def test_nan_stays_nan(bits):
    nan = jnp.full(100, np.uint32(bits).view(np.float32))
    assert np.isnan(np.asarray(round_stochastically(nan, KEY), np.float32)).all()


def test_what_is_finite_stays_finite():
    largest = np.finfo(np.float32).max
    rounded = np.asarray(round_stochastically(jnp.tile(jnp.array([largest, -largest]), 1000), KEY), np.float32)
    assert np.isfinite(rounded).all() and (np.abs(rounded) == float(jnp.finfo(jnp.bfloat16).max)).all()


def test_bits_are_even_and_know_nothing_of_their_neighbours_or_of_the_next_key():
    """Over 2^20 places: shares of ones, of agreement with the next row, column and key; 256 bins of the top bits."""
    bits = np.asarray(random_bits(KEY, (1024, 1024)))
    others = [np.roll(bits, 1, 0), np.roll(bits, 1, 1), np.asarray(random_bits(KEY + jnp.uint32(1), bits.shape))]
    for x in (bits, *(bits ^ other for other in others)):
        ones = np.array([((x >> bit) & 1).mean() for bit in range(16, 32)])
        np.testing.assert_allclose(ones, 0.5, atol=5 * 0.5 / 1024)
        counts = np.bincount((x >> 24).ravel(), minlength=256)
        spread = ((counts - 4096) ** 2 / 4096).sum()
        assert 255 - 6 * 22.6 < spread < 255 + 6 * 22.6  # chi squared of 255 degrees of freedom


def kept_by_nearest_rounding(inner):
    """What `kept_in_bfloat16` would be without chance."""

    def cast(state, dtype):
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf, state)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, jnp.bfloat16)

    return optax.GradientTransformation(lambda params: cast(inner.init(params), jnp.bfloat16), update)


def second_moments(optimizer, steps=2000):
    """Means over 4,096 parameters at every step, and the last values, for gradients of 1 or -1."""

    def step(carry, number):
        gradient = {"a": jax.random.rademacher(jax.random.fold_in(jax.random.key(5), number), (4096,), jnp.float32)}
        _, state = optimizer.update(gradient, carry)
        return state, optax.tree.get(state, "nu")["a"].astype(jnp.float32).mean()

    run = jax.jit(lambda: jax.lax.scan(step, optimizer.init({"a": jnp.zeros(4096)}), jnp.arange(steps)))
    state, means = run()
    return np.asarray(means), np.asarray(optax.tree.get(state, "nu")["a"], np.float32)


def test_a_second_moment_follows_that_of_float32_where_nearest_rounding_stalls():
    adam = optax.scale_by_adam(b2=0.999)
    exact, exact_last = second_moments(adam)
    ours, ours_last = second_moments(kept_in_bfloat16(adam))
    stalled, _ = second_moments(kept_by_nearest_rounding(adam))
    error = (ours_last - exact_last) / exact_last
    print(f"after 2,000 steps: float32 {exact[-1]:.4f}, by chance {ours[-1]:.4f}, nearest {stalled[-1]:.4f}")
    print(f"one value by chance: {100 * error.std():.1f} % off")
    np.testing.assert_allclose(ours[99:], exact[99:], rtol=5e-3)
    assert error.std() < 0.06
    assert stalled[-1] < 0.5 * exact[-1]


def test_a_run_repeats_its_bits_and_steps_and_arrays_draw_apart():
    optimizer = kept_in_bfloat16(optax.scale_by_adam())
    gradient = {"a": jnp.full(1000, 0.3), "b": jnp.full(1000, 0.3)}

    def states(steps):
        state = optimizer.init(gradient)
        for _ in range(steps):
            state = jax.jit(optimizer.update)(gradient, state)[1]
        return state

    once, again = states(2), states(2)
    jax.tree.map(np.testing.assert_array_equal, once, again)
    assert (once.inner.nu["a"] != once.inner.nu["b"]).mean() > 0.1
    steady = optimizer.init(gradient)._replace(inner=states(1).inner)
    first, second = (optimizer.update(gradient, steady._replace(count=jnp.int32(count)))[1] for count in (1, 2))
    assert (first.inner.nu["a"] != second.inner.nu["a"]).mean() > 0.1


def test_only_what_mirrors_a_parameter_is_kept_in_bfloat16():
    optimizer = kept_in_bfloat16(
        optax.contrib.muon(1.0, muon_weight_dimension_numbers={"m": optax.contrib.MuonDimensionNumbers(), "v": None})
    )
    params = {"m": jnp.ones((3, 3)), "v": jnp.ones(3)}
    state = optimizer.init(params)
    gradient = jax.tree.map(jnp.ones_like, params)
    updates, after = optimizer.update(gradient, state, params)
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [leaf.dtype for leaf in jax.tree.leaves(state)]
    low = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.bfloat16]
    assert sorted(low) == [(3,), (3,), (3, 3)]  # Adam's two of the vector, Muon's one of the matrix
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


@pytest.fixture(scope="module")
def on_four_devices():
    return printed_on(4, "tests.training.optimizer_on_mesh")


def test_each_device_rounds_its_own_slice_to_the_bits_of_one_device_without_a_word_to_others(on_four_devices):
    found = on_four_devices["bfloat16"]
    assert found["collectives"] == [] and found["error"] == 0 and found["state_error"] == 0
    assert found["share"] < 0.3  # of the state on one device


def test_adafactors_update_on_four_devices_is_that_of_one_and_no_statistic_is_gathered(on_four_devices):
    found = on_four_devices["adafactor"]
    assert found["error"] < 1e-5 and found["state_error"] < 1e-5
    assert set(found["collectives"]) == {"all-reduce"} and found["largest_collective"] < found["largest_parameter"] / 4
    assert found["share"] < 0.6
