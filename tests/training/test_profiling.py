"""Profiles of chosen steps."""

import pytest

from tracevision_jax.errors import UserError
from tracevision_jax.training.profiling import parse


def test_steps_are_asked_for_as_first_and_last():
    assert parse("") is None and parse("3:3") == (3, 3) and parse("10:12") == (10, 12)
    for wrong in ("3", "0:4", "5:4", "a:b", "1:2:3", "-1:2"):
        with pytest.raises(UserError, match="must be FIRST:LAST"):
            parse(wrong)
