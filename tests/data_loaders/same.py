"""Equality of samples with all that they hold."""

import numpy as np

from tracevision_jax.records.sample import BoxPart, MaskPart, Part, Sample, TracePart


def assert_same_part(left: Part, right: Part) -> None:
    """The same kind of part with the same contents, bit for bit."""
    assert type(left) is type(right)
    if isinstance(left, BoxPart):
        np.testing.assert_array_equal(left.box, right.box)
    elif isinstance(left, MaskPart):
        np.testing.assert_array_equal(left.mask, right.mask)
    elif isinstance(left, TracePart):
        np.testing.assert_array_equal(left.points, right.points)
        assert left.words == right.words
    else:
        assert left == right


def assert_same_sample(left: Sample, right: Sample, but: tuple[str, ...] = ()) -> None:
    """Every field but those named is the same, bit for bit."""
    for name in ("id", "source", "frames_per_second", "caption", "words", "tasks"):
        if name not in but:
            assert getattr(left, name) == getattr(right, name), name
    if "frames" not in but:
        np.testing.assert_array_equal(left.frames, right.frames)
    assert len(left.strokes) == len(right.strokes)
    for one, other in zip(left.strokes, right.strokes, strict=True):
        np.testing.assert_array_equal(one, other)
    assert [region.phrase for region in left.regions] == [region.phrase for region in right.regions]
    for one, other in zip(left.regions, right.regions, strict=True):
        np.testing.assert_array_equal(one.box, other.box)
        np.testing.assert_array_equal(one.mask, other.mask)
        assert one.attributes == other.attributes
    assert [question.kind for question in left.questions] == [question.kind for question in right.questions]
    for one, other in zip(left.questions, right.questions, strict=True):
        assert [turn.role for turn in one.turns] == [turn.role for turn in other.turns]
        for turn, twin in zip(one.turns, other.turns, strict=True):
            assert len(turn.parts) == len(twin.parts)
            for part, copy in zip(turn.parts, twin.parts, strict=True):
                assert_same_part(part, copy)
