"""Which prompts are answered in one batch: shapes come from a short list, so that few programs are compiled.

    for plan in plan_batches(pieces):
        batch = collate([[pieces[number]] for number in plan.numbers], plan.bucket, config)

Sizes step by a quarter of an octave, so that padding takes at most a quarter of the work; small ones are not told
apart, since a program of their own would cost more than it saves.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from tracevision_jax.records.batch import Bucket
from tracevision_jax.records.encoded import Piece

LEAST_TOKENS, LEAST_POINTS = 128, 16
MAX_ROWS = 64


class BatchPlan(NamedTuple):
    """A batch to be made."""

    numbers: tuple[int, ...]
    """Of the prompts in it."""
    bucket: Bucket
    rows: int
    """At least as many as prompts; the others stay empty."""


def bucket_size(needed: int, least: int = 1) -> int:
    """The smallest allowed size that holds `needed`: four sizes an octave, from `least` up."""
    if needed <= least:
        return least
    step = max(1, power_of_two(needed) // 8)
    return -(-needed // step) * step


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


def bucket_of(piece: Piece, buckets: Sequence[Bucket] = ()) -> Bucket:
    """The first of `buckets` with room for a prompt, or else one made for it.

    Raises:
        ValueError: a piece of several conversations.
    """
    tokens, frames, windows, conversations, points, _ = piece.resources
    if conversations != 1:
        raise ValueError(f"a prompt holds one conversation, not {conversations}")
    for bucket in buckets:
        room = (bucket.tokens, bucket.frames, bucket.windows, bucket.points)
        if all(need <= has for need, has in zip((tokens, frames, windows, points), room, strict=True)):
            return dataclasses.replace(bucket, conversations=1, masks=0)
    return Bucket(
        tokens=bucket_size(tokens, LEAST_TOKENS),
        frames=bucket_size(frames),
        windows=bucket_size(windows),
        conversations=1,
        points=power_of_two(max(points, LEAST_POINTS)) if points else 0,
        masks=0,
    )


def plan_batches(
    pieces: Sequence[Piece], buckets: Sequence[Bucket] = (), rows: int | None = None, holders: int = 1
) -> list[BatchPlan]:
    """Sort prompts into batches of one bucket each, the largest first, where memory runs out if ever.

    Args:
        pieces: one conversation each.
        buckets: preferred ones.
        rows: of every batch; by default as many as there are prompts, up to `MAX_ROWS`, as a power of two.
        holders: devices that share the rows evenly.
    """
    members: dict[Bucket, list[int]] = {}
    for number, piece in enumerate(pieces):
        members.setdefault(bucket_of(piece, buckets), []).append(number)
    plans = []
    for bucket in sorted(members, reverse=True):
        numbers = members[bucket]
        size = rows or min(MAX_ROWS, power_of_two(len(numbers)))
        size = -(-size // holders) * holders
        plans += [BatchPlan(tuple(numbers[n : n + size]), bucket, size) for n in range(0, len(numbers), size)]
    return plans
