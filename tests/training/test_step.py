"""The training step: one number whatever the accumulation, nothing for what is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.training.tiny import Deterministic, TinySystem, random_batch
from tracevision_jax.errors import UserError
from tracevision_jax.training.optimizer import OptimizerConfig, learning_rate_schedule, make_optimizer
from tracevision_jax.training.parameters import flatten, merge, split
from tracevision_jax.training.step import create_state, fold_rows, make_train_step, total_loss

SYSTEM, DEFAULT = TinySystem(), OptimizerConfig()


def start(stage="all", config=DEFAULT, system=SYSTEM, accumulation=1, steps=100):
    optimizer = make_optimizer(config, steps)
    state, frozen = create_state(system, system.init(jax.random.key(0)), optimizer, stage, seed=0)
    step = make_train_step(system, optimizer, learning_rate_schedule(config, steps), accumulation=accumulation)
    return state, frozen, step


def test_loss_falls_when_a_batch_is_repeated():
    state, frozen, step = start(config=OptimizerConfig(learning_rate=1e-2))
    batch, losses = random_batch(4), []
    for _ in range(30):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("kind", [{"moments": "bfloat16"}, {"method": "adafactor"}])
def test_choices_for_memory_train_as_adamw_does(kind):
    last = {}
    for name, config in {
        "adamw": OptimizerConfig(learning_rate=1e-2),
        "chosen": OptimizerConfig(learning_rate=1e-2, **kind),
    }.items():
        state, frozen, step = start(config=config)
        losses = []
        for _ in range(60):
            state, metrics = step(state, frozen, random_batch(4))
            losses.append(float(metrics["loss"]))
        last[name] = np.mean(losses[-10:]) / losses[0]
    print(kind, last)
    assert last["chosen"] < 0.6 and last["chosen"] < 1.1 * last["adamw"]


@pytest.mark.parametrize("accumulation", [2, 4, 8])
def test_accumulation_gives_the_number_and_the_gradient_of_the_whole_batch(accumulation):
    # Rows of unequal lengths, one of them empty: averaging microbatch losses would give another number.
    system, batch = Deterministic(), random_batch(8)
    config = OptimizerConfig(clip_norm=0.0)
    whole_state, frozen, whole_step = start(config=config, system=system)
    part_state, _, part_step = start(config=config, system=system, accumulation=accumulation)
    whole_state, whole = whole_step(whole_state, frozen, batch)
    part_state, part = part_step(part_state, frozen, batch)
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(part[name], whole[name], rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), part["parts"], whole["parts"])
    moments = jax.tree.leaves(part_state.optimizer), jax.tree.leaves(whole_state.optimizer)
    for a, b in zip(*moments, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-9)
    assert int(part_state.system["seen"]) == int(whole_state.system["seen"]) == int(part["tokens"])


def test_weights_alone_cost_no_forward_pass():
    system, batch = TinySystem(), random_batch(4)
    params = system.init(jax.random.key(0))

    def weights(params, batch):
        return system.loss(params, system.init_state(), batch, jax.random.key(0))[1]

    program = jax.jit(weights).lower(params, batch).compile().as_text()
    assert program is not None and "dot(" not in program and "while(" not in program


def test_a_part_without_weight_contributes_nothing():
    state, frozen, step = start()
    state, metrics = step(state, frozen, random_batch(4, with_points=False))
    assert float(metrics["parts"]["points"]) == 0
    np.testing.assert_array_equal(metrics["loss"], metrics["parts"]["text"])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.trained))


def test_an_empty_batch_moves_no_parameter():
    batch = random_batch(2)
    empty = jax.tree.map(np.zeros_like, batch)
    state, frozen, step = start()
    before = jax.tree.map(np.array, state.trained)
    state, metrics = step(state, frozen, empty)
    assert float(metrics["loss"]) == 0 and float(metrics["gradient_norm"]) == 0
    jax.tree.map(np.testing.assert_array_equal, state.trained, before)


def test_parts_without_coefficient_are_only_reported():
    sums = {"text": jnp.float32(6), "accuracy": jnp.float32(4)}
    weights = {"text": jnp.float32(3), "accuracy": jnp.float32(4)}
    assert float(total_loss({"text": 0.5, "accuracy": 0.0}, sums, weights)) == 1.0


def test_frozen_parameters_have_no_optimizer_state_and_are_not_donated():
    state, frozen, step = start(stage="head")
    trained = flatten(state.trained)
    assert sorted(trained) == ["language/head/kernel", "tvp/points/bias", "tvp/points/kernel"]
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in trained.values())
    before = jax.tree.map(np.array, frozen)
    old = state
    state, _ = step(state, frozen, random_batch(4))
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    assert old.trained["language"]["head"]["kernel"].is_deleted()


def test_a_stage_that_trains_nothing_is_refused():
    with pytest.raises(UserError, match="Stage 'none' trains no parameter"):
        start(stage="none")


def test_parameters_stay_float32():
    state, frozen, step = start()
    state, _ = step(state, frozen, random_batch(4))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trained)} == {jnp.dtype("float32")}


def test_clipping_bounds_the_update_and_reports_the_norm_before_it():
    batch = random_batch(4)
    outcome = {}
    for clip in (0.0, 1e-3):
        state, frozen, step = start(config=OptimizerConfig(clip_norm=clip))
        state, metrics = step(state, frozen, batch)
        moment = optax.tree.get(state.optimizer, "mu")
        outcome[clip] = float(metrics["gradient_norm"]), float(optax.tree.norm(moment))
    assert outcome[0.0][0] == pytest.approx(outcome[1e-3][0])
    assert outcome[1e-3][1] == pytest.approx(0.1 * 1e-3, rel=1e-4)  # mu = (1 - beta1) * clipped gradient


def test_steps_draw_different_randomness_and_a_run_repeats_exactly():
    batch, runs = random_batch(4), []
    for _ in range(2):
        state, frozen, step = start(config=OptimizerConfig(learning_rate=0.0))
        losses = []
        for _ in range(3):
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["loss"]))
        runs.append(losses)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 3


def test_microbatches_take_every_nth_row():
    folded = fold_rows(jnp.arange(6)[:, None], 3)
    np.testing.assert_array_equal(folded[..., 0], [[0, 3], [1, 4], [2, 5]])


def test_rows_that_accumulation_does_not_divide_are_refused():
    with pytest.raises(ValueError, match="5 rows cannot be parted into 2"):
        fold_rows(jnp.zeros((5, 2)), 2)


def test_split_and_merge_are_inverse():
    params = SYSTEM.init(jax.random.key(1))
    joined = merge(*split(params, SYSTEM.trainable("head")))
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, joined, params)
