"""Step times and MFU on numbers worked by hand."""

import pytest

from tracevision_jax.parallel.roofline import roofline

PEAKS = {"peak_flops": 100.0, "hbm_bandwidth": 10.0}


def test_collectives_hide_behind_compute_or_come_on_top():
    times = roofline(
        600.0, 800.0, 50.0, {"fsdp": 6.0, "tensor": 8.0}, link_bandwidths={"fsdp": 2.0, "tensor": 4.0}, **PEAKS
    )
    assert (times.compute, times.hbm, dict(times.collectives)) == (8.0, 5.0, {"fsdp": 3.0, "tensor": 2.0})
    assert (times.overlapped, times.not_overlapped) == (8.0, 13.0)
    # What is computed again is no use: 6 of the 8 seconds are the model's.
    assert times.mfu_overlapped == pytest.approx(6 / 8)
    assert times.mfu_not_overlapped == pytest.approx(6 / 13)
    assert times.bound == "compute"


def test_the_longest_term_bounds():
    by_memory = roofline(100.0, 100.0, 50.0, {}, link_bandwidths={}, **PEAKS)
    assert (by_memory.bound, by_memory.overlapped, by_memory.mfu_overlapped) == ("hbm", 5.0, pytest.approx(0.2))
    by_links = roofline(100.0, 100.0, 5.0, {"data": 9.0}, link_bandwidths={"data": 1.0}, **PEAKS)
    assert (by_links.bound, by_links.overlapped) == ("collectives over data", 9.0)


def test_axes_without_a_bandwidth_are_a_defect():
    with pytest.raises(KeyError):
        roofline(1.0, 1.0, 1.0, {"data": 1.0}, link_bandwidths={}, **PEAKS)


def test_an_empty_program_takes_no_time():
    times = roofline(0.0, 0.0, 0.0, {}, link_bandwidths={}, **PEAKS)
    assert (times.overlapped, times.mfu_overlapped, times.mfu_not_overlapped) == (0.0, 0.0, 0.0)
