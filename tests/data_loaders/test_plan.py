"""The epoch plan: every record once, the same everywhere, addressed by step."""

import pickle
import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from data_loaders.plan import Lengths, Plan, pack, repetitions_of, rows_of_process
from tracevision_jax.errors import UserError
from tracevision_jax.records.batch import Bucket

SMALL = Bucket(tokens=16, frames=2, windows=1, conversations=3, points=4, masks=2)
LARGE = Bucket(tokens=64, frames=4, windows=4, conversations=6, points=8, masks=4)
FIELDS = ("tokens", "frames", "windows", "conversations", "points", "masks")


def lengths(records, seed=0, name="a", repetitions=1.0, longest=40):
    rng = np.random.default_rng(seed)
    high = [longest, 3, 5, 3, 9, 3]
    low = [1, 0, 0, 1, 0, 0]
    return Lengths(name, rng.integers(low, high, (records, 6)), repetitions)


def plan_of(*sources, seed=0, buckets=(SMALL, LARGE), rows=(4, 2)):
    return Plan(seed, list(sources), list(buckets), list(rows))


def records_of(plan, epoch):
    first, last = plan.start_of(epoch), plan.start_of(epoch + 1)
    return [record for step in range(first, last) for row in plan.step(step).rows for record in row]


@given(records=st.integers(1, 200), seed=st.integers(0, 5), rows=st.integers(1, 7))
def test_every_record_stands_in_an_epoch_exactly_once(records, seed, rows):
    plan = plan_of(lengths(records, seed), seed=seed, rows=(rows, 2))
    for epoch in (0, 1):
        assert sorted(records_of(plan, epoch)) == [(0, record) for record in range(records)]


@given(records=st.integers(1, 120), seed=st.integers(0, 9))
def test_no_row_holds_more_than_its_bucket(records, seed):
    source = lengths(records, seed)
    plan = plan_of(source, seed=seed)
    for number in range(plan.steps_in(1)):
        step = plan.step(number)
        limit = [getattr(step.bucket, name) for name in FIELDS]
        for row in step.rows:
            sizes = source.resources[[record for _, record in row]]
            if len(sizes):
                added, largest = sizes.sum(0), sizes.max(0)
                used = [added[0], added[1], largest[2], added[3], largest[4], added[5]]
                assert (np.array(used) <= limit).all(), (used, limit)


def test_a_batch_has_one_bucket_and_its_number_of_rows():
    plan = plan_of(lengths(100))
    seen = set()
    for number in range(plan.steps_in(1)):
        step = plan.step(number)
        seen.add(step.bucket)
        assert len(step.rows) == {SMALL: 4, LARGE: 2}[step.bucket]
    assert seen == {SMALL, LARGE}


def test_only_the_last_batch_of_a_bucket_has_empty_rows():
    plan = plan_of(lengths(101), rows=(4, 4))
    for bucket in (SMALL, LARGE):
        empty = [
            sum(not row for row in plan.step(number).rows)
            for number in range(plan.steps_in(1))
            if plan.step(number).bucket == bucket
        ]
        assert sum(count > 0 for count in empty) <= 1 and max(empty) < 4


def test_a_record_goes_to_the_smallest_bucket_that_holds_it():
    resources = np.array([[10, 1, 1, 1, 2, 1], [10, 1, 2, 1, 2, 1]])
    plan = plan_of(Lengths("a", resources), buckets=(LARGE, SMALL), rows=(1, 1))
    where = {plan.step(n).rows[0][0][1]: plan.step(n).bucket for n in range(2)}
    assert where == {0: SMALL, 1: LARGE}


def test_two_hosts_that_plan_apart_agree_and_any_step_can_be_asked_first():
    sources = [lengths(150, 1), lengths(60, 2, "b", 0.5)]
    ours, theirs = plan_of(*sources), plan_of(*sources)
    steps = ours.steps_in(3)
    assert [theirs.step(n) for n in reversed(range(steps))] == [ours.step(n) for n in range(steps)][::-1]
    assert ours.fingerprint == theirs.fingerprint


def test_epochs_differ_from_each_other_and_seeds_from_seeds():
    plan = plan_of(lengths(100))
    assert records_of(plan, 0) != records_of(plan, 1)
    other = plan_of(lengths(100), seed=1)
    assert records_of(other, 0) != records_of(plan, 0)
    assert other.fingerprint != plan.fingerprint


def test_a_changed_length_changes_the_fingerprint():
    source = lengths(50)
    before = plan_of(source).fingerprint
    source.resources[7, 0] += 1
    assert plan_of(source).fingerprint != before


@pytest.mark.parametrize("repetitions", [0.5, 1.25, 2.0, 1 / 3])
def test_repetitions_carry_their_fraction_from_epoch_to_epoch(repetitions):
    plan = plan_of(lengths(40), lengths(36, 3, "b", repetitions))
    epochs = 12
    counts = np.zeros(36, int)
    for epoch in range(epochs):
        mine = [record for source, record in records_of(plan, epoch) if source == 1]
        assert abs(len(mine) - 36 * repetitions) <= 1
        counts += np.bincount(mine, minlength=36)
    assert set(counts) == {round(epochs * repetitions)}


def test_proportions_become_repetitions():
    assert repetitions_of([3, 1], [100, 300]) == [3.0, 1 / 3]


def test_records_too_long_for_every_bucket_are_listed_and_left_out():
    source = lengths(30)
    source.resources[4, 0] = 65
    source.resources[9, 5] = 5
    plan = plan_of(source)
    assert plan.too_long == ((0, 4), (0, 9))
    assert {record for _, record in records_of(plan, 0)} == set(range(30)) - {4, 9}
    assert "too long for every bucket: 2 records (a[4], a[9])" in plan.describe()


def test_a_source_without_a_usable_record_is_refused_with_sizes():
    with pytest.raises(UserError, match=r"No record of source b fits any bucket: .*\[100, 1, 1, 1, 1, 1\]"):
        plan_of(lengths(30), Lengths("b", np.array([[100, 1, 1, 1, 1, 1]])))
    with pytest.raises(UserError, match="no records"):
        plan_of(Lengths("a", np.zeros((0, 6), int)))


def test_packing_fills_rows_well():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 60, (2000, 1))
    rows = pack(sizes, np.array([100]))
    used = np.bincount(rows, sizes[:, 0])
    assert used.max() <= 100 and used.mean() > 90
    assert sorted(set(rows)) == list(range(rows.max() + 1))


def test_records_that_cannot_share_a_row_get_one_each():
    np.testing.assert_array_equal(pack(np.full((4, 1), 60), np.array([100])), range(4))


def test_fractions_of_an_epoch_are_steps_of_it():
    plan = plan_of(lengths(100))
    whole = plan.steps_in(1)
    assert plan.steps_in(0.5) == -(-whole // 2)
    assert plan.steps_in(1.5) == whole + -(-len(plan.epoch(1)) // 2)


def test_processes_share_the_rows_of_a_batch_without_gap_or_overlap():
    rows = list(range(12))
    shares = [rows[rows_of_process(12, process, 3)] for process in range(3)]
    assert [row for share in shares for row in share] == rows and {len(share) for share in shares} == {4}
    with pytest.raises(UserError, match="12 rows a batch cannot be shared equally by 5"):
        rows_of_process(12, 0, 5)


def test_a_plan_travels_to_a_worker():
    plan = plan_of(lengths(60))
    expected = plan.step(5)
    assert pickle.loads(pickle.dumps(plan)).step(5) == expected


def test_steps_of_a_planned_epoch_are_looked_up_at_once():
    resources = np.ones((50_000, 6), int)
    resources[:, 0] = np.random.default_rng(0).integers(1, 40, len(resources))
    plan = plan_of(Lengths("a", resources), buckets=(LARGE,), rows=(64,))
    began = time.process_time()
    plan.step(0)
    planned = time.process_time()
    for step in range(200):
        plan.step(step)
    assert time.process_time() - planned < 0.2 * (planned - began)
