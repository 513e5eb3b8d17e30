"""Steps that would harm are rejected, and after many in a row the run goes back and on with other data."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_loop import RECIPE, Source, lines_of, params_of, run
from tests.training.test_step import start
from tests.training.tiny import random_batch
from tracevision_jax.errors import UserError
from tracevision_jax.training.parameters import flatten
from tracevision_jax.training.recipe import CheckpointConfig
from tracevision_jax.training.stability import StabilityConfig, healthy, judge
from tracevision_jax.training.step import make_train_step

STABLE = dataclasses.replace(
    RECIPE, checkpoint=CheckpointConfig(every=4), stability=StabilityConfig(spike=0.0, patience=2)
)


class Poisoned(Source):
    """Random batches, those of some steps with a coordinate that is not finite."""

    def __init__(self, at, steps=10, value=np.nan):
        super().__init__(steps)
        self.at, self.value = at, value

    def batches(self, start):
        for item in super().batches(start):
            if item.step in self.at:
                item.batch.points[:, 0, 0] = self.value
                item.batch.point_trace[:, 0, 0] = 1
            yield item


def test_a_step_that_is_not_finite_changes_only_the_step_number():
    state, frozen, step = start()
    state, metrics = step(state, frozen, random_batch(4))
    before = jax.tree.map(np.asarray, state)
    bad = random_batch(4, 1)
    bad.points[:, 0, 0] = np.inf
    after, metrics = step(state, frozen, bad)
    assert not np.isfinite(metrics["loss"]) and int(metrics["rejected"]) == 1
    assert int(after.step) == int(before.step) + 1
    for name in ("trained", "optimizer", "system"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    after, metrics = step(after, frozen, random_batch(4, 2))
    assert int(metrics["rejected"]) == 0 and np.isfinite(metrics["loss"])
    moved = flatten(after.trained)
    assert any((np.asarray(moved[name]) != old).any() for name, old in flatten(before.trained).items())


def test_a_spike_is_told_by_the_usual_norm_which_it_does_not_move():
    health, config = healthy(), StabilityConfig(spike=5.0)
    norms = [1.0, 2.0, 40.0, 5.0, np.nan, 1.0]
    accepted, rejected = [], []
    for norm in norms:
        ok, health = judge(health, jnp.float32(1.0), jnp.float32(norm), config)
        accepted.append(bool(ok))
        rejected.append(int(health.rejected))
    assert accepted == [True, True, False, True, False, True]
    assert rejected == [0, 0, 1, 0, 1, 0]
    assert float(health.usual_norm) == pytest.approx(0.98 * (0.98 * 1.02 + 0.02 * 5.0) + 0.02 * 1.0, rel=1e-6)
    assert bool(judge(health, jnp.float32(1.0), jnp.float32(1e6), StabilityConfig())[0])


def test_a_few_bad_steps_are_counted_and_the_run_goes_on(tmp_path):
    summary, text = run(tmp_path / "r", STABLE, Poisoned({5}))
    assert summary.finished and "rejected steps" in text and "back to" not in text
    assert [line["step"] for line in lines_of(tmp_path / "r", "rejected")] == [6]
    assert all(np.isfinite(value).all() for value in params_of(tmp_path / "r").values())


def test_bad_steps_in_a_row_take_the_run_back_to_a_checkpoint_and_past_the_data(tmp_path):
    summary, text = run(tmp_path / "r", STABLE, Poisoned({5, 6}))
    assert summary.finished and "back to the parameters of step 4" in text
    (line,) = lines_of(tmp_path / "r", "went_back")
    assert (line["checkpoint"], line["rejected"], line["step"]) == (4, 2, 7)
    steps = [line["step"] for line in lines_of(tmp_path / "r", "train")]
    assert steps == [1, 2, 3, 4, 5, 8, 9, 10], "every step's data are taken once"


def test_without_a_checkpoint_to_go_back_to_the_run_ends_with_advice(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint from before them.*learning_rate"):
        run(tmp_path / "r", STABLE, Poisoned({0, 1, 2}))


def test_a_run_that_stays_unstable_ends(tmp_path):
    recipe = dataclasses.replace(STABLE, checkpoint=CheckpointConfig(every=2))
    with pytest.raises(UserError, match="unstable again"):
        run(tmp_path / "r", recipe, Poisoned(set(range(4, 40)), steps=40))


@pytest.mark.parametrize("interrupt_at", [6, 7])
def test_an_interrupted_run_judges_as_one_that_was_not(tmp_path, interrupt_at):
    run(tmp_path / "whole", STABLE, Poisoned({5, 6}))
    source = Poisoned({5, 6})
    source.interrupt_at = interrupt_at
    stopped, _ = run(tmp_path / "parts", STABLE, source)
    assert stopped.interrupted
    run(tmp_path / "parts", STABLE, Poisoned({5, 6}))
    ours, theirs = params_of(tmp_path / "parts"), params_of(tmp_path / "whole")
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_the_judgement_costs_no_second_program():
    state, frozen, step = start()
    assert make_train_step is not None
    state, _ = step(state, frozen, random_batch(4))
    step(state, frozen, random_batch(4, 1))
    assert step._cache_size() == 1
