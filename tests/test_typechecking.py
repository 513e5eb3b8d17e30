"""Shapes in signatures are checked while the tests run; without that, annotations would be only comments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from tests.typechecking import CHECKED_CONSTRUCTORS, check
from tracevision_jax.records import batch, sample


def test_a_record_with_a_wrong_shape_is_refused():
    boxes, masks = np.zeros((2, 4)), np.zeros((3, 5, 5), bool)
    with pytest.raises(TypeCheckError):
        sample.Region(phrase="a dog", box=np.zeros((2, 5)))
    with pytest.raises(TypeCheckError):  # two frames of boxes, three of masks
        sample.Region(phrase="a dog", box=boxes, mask=masks)
    assert sample.Region(phrase="a dog", box=boxes, mask=masks[:2]).mask is not None


def test_the_constructors_named_for_checking_exist():
    assert sample.__name__ in CHECKED_CONSTRUCTORS


def test_a_function_with_a_wrong_argument_is_refused():
    def double(number: int) -> int:
        return 2 * number

    assert check(double)(2) == 4
    with pytest.raises(Exception, match="number"):
        check(double)("2")


def test_a_batch_passes_through_jax_untouched():
    """jax rebuilds the record with tracers, shapes and booleans in place of arrays."""
    fields = {
        name: np.zeros((1,) * len(annotation.dim_str.split()), np.float32)
        for name, annotation in _array_annotations(batch.Batch).items()
    }
    record = batch.Batch(**fields)
    shapes = jax.eval_shape(lambda tree: jax.tree.map(jnp.sum, tree), record)
    assert all(leaf.shape == () for leaf in jax.tree.leaves(shapes))
    assert all(jax.tree.leaves(jax.tree.map(lambda _: True, record)))


def _array_annotations(record: type) -> dict[str, type]:
    """The jaxtyping annotation of each field."""
    return dict(record.__annotations__)
