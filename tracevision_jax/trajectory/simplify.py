"""Semantic-guided Douglas-Peucker simplification of traces (Sec. 3.2.3, App. E) and what it is compared with.

Each phrase of the caption owns the points of its closed time window; a point in several windows belongs to
the first phrase, one in none to a phrase of importance 1. Every run of points of one owner is simplified on
its own with the tolerance 5 px / w, w = importance / 5: its ends are kept, and the point farthest from the
chord (Eq. 2; from the point where the chord's ends coincide) is kept and splits the run while it is farther
than the tolerance. Where two runs meet in one place, the place is kept once.

Instead of recursing run by run, every step here splits all open runs of all traces at once.

    keypoints = simplify(points, words, caption, (height, width))
    many = simplify_many(traces, words, captions, sizes, phrases)
    evenly = to_count(points, "uniform", len(keypoints), (height, width))
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from tracevision_jax.errors import UserError
from tracevision_jax.trajectory.alignment import TimedText, align_words
from tracevision_jax.trajectory.checks import FARTHEST
from tracevision_jax.trajectory.phrases import Phrase, RubricPhrases, check_phrases, phrase_windows

BASE_EPSILON_PX = 5.0
PLAIN_EPSILON_PX = 8.0
"""The paper's tolerance without phrases, which leaves as many points on average (App. E.6)."""

_POINTS_AT_ONCE = 1 << 15
"""Traces are taken together up to so many points: more saves no calls, and leaves the processor's cache."""

Method = Literal["uniform", "plain", "semantic"]


class _Runs(NamedTuple):
    """Traces laid end to end: places in pixels, and the runs of points of one owner."""

    x_px: Float[np.ndarray, "points"]
    y_px: Float[np.ndarray, "points"]
    first: Int[np.ndarray, "runs"]
    last: Int[np.ndarray, "runs"]
    weight: Float[np.ndarray, "runs"]
    """w = importance / 5 of each run's owner."""
    repeats: Bool[np.ndarray, "points"]
    """Points that start a run of a trace in the place where the run before it ends."""


def simplify(
    points: Float[np.ndarray, "points 3"],
    words: Sequence[TimedText],
    caption: str,
    size: tuple[int, int],
    phrases: Sequence[Phrase] | None = None,
    base_epsilon_px: float = BASE_EPSILON_PX,
) -> Float[np.ndarray, "keypoints 3"]:
    """The keypoints of one trace, in order.

    Args:
        points: checked (x, y, t), in the order of time (`checks.check_trace`).
        words: the caption's words as spoken; without any there are no phrases, and the trace is simplified by
            `plain` with `PLAIN_EPSILON_PX`.
        caption: the text that the words were spoken for.
        size: (height, width) of the image in pixels.
        phrases: of the caption, from any provider; None takes the rule-based scorer's.
        base_epsilon_px: tolerance of a phrase of importance 5.

    Raises `UserError` for a bad size or tolerance, times that are not in order, phrases that do not fit the
    caption.
    """
    given = None if phrases is None else [phrases]
    return simplify_many([points], [words], [caption], [size], given, base_epsilon_px)[0]


def simplify_many(
    traces: Sequence[Float[np.ndarray, "_ 3"]],
    words: Sequence[Sequence[TimedText]],
    captions: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    phrases: Sequence[Sequence[Phrase]] | None = None,
    base_epsilon_px: float = BASE_EPSILON_PX,
) -> list[Float[np.ndarray, "_ 3"]]:
    """`simplify` of many traces at once, entry by entry of the arguments: faster than one by one."""
    _check_epsilon(base_epsilon_px)
    if len({len(traces), len(words), len(captions), len(sizes)}) > 1 or (phrases and len(phrases) != len(traces)):
        raise UserError("traces, words, captions, sizes and phrases must be equally many")
    result: list[np.ndarray] = []
    for group in _groups([len(trace) for trace in traces]):
        owners, weights = [], []
        for index in group:
            owner, weight = _owners(
                traces[index], words[index], captions[index], None if phrases is None else phrases[index]
            )
            owners.append(owner)
            weights.append(weight)
        chosen = [traces[index] for index in group]
        runs = _runs(chosen, [sizes[index] for index in group], owners, weights)
        critical = critical_epsilons(runs.x_px, runs.y_px, runs.first, runs.last, base_epsilon_px / runs.weight)
        keep = (critical > 0) & ~runs.repeats
        ends = np.cumsum([len(trace) for trace in chosen])[:-1]
        result += [trace[kept] for trace, kept in zip(chosen, np.split(keep, ends), strict=True)]
    return result


def plain(
    points: Float[np.ndarray, "points 3"], size: tuple[int, int], epsilon_px: float = PLAIN_EPSILON_PX
) -> Float[np.ndarray, "keypoints 3"]:
    """Douglas-Peucker over the whole trace with one tolerance, blind to the caption (App. E.6)."""
    _check_epsilon(epsilon_px)
    runs = _single_run(points, size)
    epsilon = np.full(len(runs.first), epsilon_px)
    return points[critical_epsilons(runs.x_px, runs.y_px, runs.first, runs.last, epsilon) > 0]


def uniform(points: Float[np.ndarray, "points 3"], count: int) -> Float[np.ndarray, "keypoints 3"]:
    """`count` of the trace's points, evenly spread, both ends among them; all where there are no more."""
    _check_count(count, 1)
    if count >= len(points):
        return points
    return points[np.round(np.linspace(0, len(points) - 1, count)).astype(np.int64)]


def to_count(
    points: Float[np.ndarray, "points 3"],
    method: Method,
    count: int,
    size: tuple[int, int],
    words: Sequence[TimedText] = (),
    caption: str = "",
    phrases: Sequence[Phrase] | None = None,
) -> Float[np.ndarray, "keypoints 3"]:
    """The trace at exactly `count` keypoints by any method, to compare methods at one compression (App. E.6).

    For "plain" and "semantic" this is the (base) tolerance that leaves `count` points. It needs no search: a
    point is kept just while the tolerance is under the least distance at which it or any split before it was
    made, so the `count` highest of these are kept, of equal ones those that split first. All points are
    returned where there are no more than `count`. Raises `UserError` where `count` is less than the ends of
    the runs, which are always kept.
    """
    if method == "uniform":
        return uniform(points, count)
    if method == "plain":
        runs = _single_run(points, size)
    else:
        owner, weight = _owners(points, words, caption, phrases)
        runs = _runs([points], [size], [owner], [weight])
    order = np.zeros(len(points), np.int64)
    critical = critical_epsilons(runs.x_px, runs.y_px, runs.first, runs.last, np.full(len(runs.first), -1.0), order)
    per_point = np.repeat(runs.weight, runs.last - runs.first + 1)
    base = np.where(runs.repeats, -1.0, critical * per_point)
    _check_count(count, int(np.isinf(base).sum()))
    ranked = np.lexsort((order, -base))[:count]
    keep = np.zeros(len(points), bool)
    keep[ranked] = True
    return points[keep & ~runs.repeats]


def phrase_of_points(
    times: Float[np.ndarray, "points"], windows: Float[np.ndarray, "phrases 2"]
) -> Int[np.ndarray, "points"]:
    """The first phrase whose closed window holds each of the sorted times, -1 where none does."""
    owner = np.full(len(times), -1, np.int64)
    first = np.searchsorted(times, windows[:, 0], side="left").tolist()
    after = np.searchsorted(times, windows[:, 1], side="right").tolist()
    for phrase in reversed(range(len(windows))):
        if windows[phrase, 0] <= windows[phrase, 1]:
            owner[first[phrase] : after[phrase]] = phrase
    return owner


def critical_epsilons(
    x_px: Float[np.ndarray, "points"],
    y_px: Float[np.ndarray, "points"],
    first: Int[np.ndarray, "runs"],
    last: Int[np.ndarray, "runs"],
    least: Float[np.ndarray, "runs"],
    order: Int[np.ndarray, "points"] | None = None,
) -> Float[np.ndarray, "points"]:
    """The tolerance under which Douglas-Peucker keeps each point: infinite at the ends of runs.

    Runs of points [first, last] are split at their farthest point (the first of equally far ones) while it is
    farther than the run's `least`; points that no split reached have 0. `order` receives the step at which
    each point was reached. One step takes about twenty array operations for all runs together; the number of
    steps is the depth of the deepest recursion.
    """
    critical = np.zeros(len(x_px))
    critical[first] = critical[last] = np.inf
    ceiling = np.full(len(first), np.inf)
    step = 0
    while True:
        inner = last - first - 1
        open_ = inner > 0
        if not open_.any():
            return critical
        if not open_.all():
            first, last, least, ceiling, inner = (values[open_] for values in (first, last, least, ceiling, inner))
        offset = np.cumsum(inner) - inner
        point = np.arange(offset[-1] + inner[-1]) + np.repeat(first + 1 - offset, inner)
        distance = _distances(x_px, y_px, first, last, inner, point)
        farthest = np.maximum.reduceat(distance, offset)
        at = np.flatnonzero(distance == np.repeat(farthest, inner))
        at = point[at[np.searchsorted(at, offset)]]
        split = farthest > least
        at, ceiling = at[split], np.minimum(ceiling, farthest)[split]
        critical[at] = ceiling
        step += 1
        if order is not None:
            order[at] = step
        first, last = np.concatenate([first[split], at]), np.concatenate([at, last[split]])
        least, ceiling = np.tile(least[split], 2), np.tile(ceiling, 2)


def _distances(
    x_px: np.ndarray,
    y_px: np.ndarray,
    first: np.ndarray,
    last: np.ndarray,
    inner: np.ndarray,
    point: np.ndarray,
) -> np.ndarray:
    """Distance of inner points from the line through their run's ends, or from ends that coincide."""
    start_x, start_y = x_px[first], y_px[first]
    chord_x, chord_y = x_px[last] - start_x, y_px[last] - start_y
    length = np.hypot(chord_x, chord_y)
    coincide = length == 0
    length[coincide] = 1.0
    from_x = x_px[point] - np.repeat(start_x, inner)
    from_y = y_px[point] - np.repeat(start_y, inner)
    distance = np.abs(np.repeat(chord_x / length, inner) * from_y - np.repeat(chord_y / length, inner) * from_x)
    if coincide.any():
        at_point = np.repeat(coincide, inner)
        distance[at_point] = np.hypot(from_x[at_point], from_y[at_point])
    return distance


def _owners(
    points: np.ndarray, words: Sequence[TimedText], caption: str, phrases: Sequence[Phrase] | None
) -> tuple[np.ndarray, np.ndarray]:
    """The owner of each point, 0 for none and else 1 + the phrase, and the weight of each owner."""
    if phrases is None:
        phrases = RubricPhrases().phrases(caption) if len(words) else ()
    else:
        check_phrases(caption, phrases)
    if not len(words):
        return np.zeros(len(points), np.int64), np.array([BASE_EPSILON_PX / PLAIN_EPSILON_PX])
    weight = np.array([1, *(phrase.importance for phrase in phrases)]) / 5.0
    windows = phrase_windows(phrases, align_words(caption, words))
    return phrase_of_points(points[:, 2], windows) + 1, weight


def _single_run(points: np.ndarray, size: tuple[int, int]) -> _Runs:
    return _runs([points], [size], [np.zeros(len(points), np.int64)], [np.ones(1)])


def _runs(
    traces: Sequence[np.ndarray],
    sizes: Sequence[tuple[int, int]],
    owners: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
) -> _Runs:
    """Lay traces end to end and cut them where the owner, or the trace, changes."""
    counts = [len(trace) for trace in traces]
    together = np.concatenate(traces) if traces else np.zeros((0, 3))
    _check_traces(together, counts, sizes)
    height, width = np.array(sizes, np.float64).reshape(-1, 2).T
    # Owners of different traces are different numbers, so that one comparison finds every cut.
    base = np.cumsum([0, *(len(weight) for weight in weights)])[:-1]
    owner = np.concatenate(owners) + np.repeat(base, counts)
    changes = np.ones(len(owner), bool)
    changes[1:] = owner[1:] != owner[:-1]
    first = np.flatnonzero(changes)
    last = np.append(first[1:], len(owner)) - 1 if len(first) else first
    repeats = np.zeros(len(owner), bool)
    inside = first[~np.isin(first, np.cumsum([0, *counts]))]
    repeats[inside] = (together[inside, :2] == together[inside - 1, :2]).all(axis=1)
    x_px = together[:, 0] * np.repeat(width, counts)
    y_px = together[:, 1] * np.repeat(height, counts)
    return _Runs(x_px, y_px, first, last, np.concatenate(weights)[owner[first]], repeats)


def _groups(counts: Sequence[int]) -> list[list[int]]:
    """Places of traces in groups of at most `_POINTS_AT_ONCE` points, or of one trace."""
    groups: list[list[int]] = []
    room = 0
    for index, count in enumerate(counts):
        if not groups or count > room:
            groups.append([])
            room = _POINTS_AT_ONCE
        groups[-1].append(index)
        room -= count
    return groups


def _check_traces(together: np.ndarray, counts: Sequence[int], sizes: Sequence[tuple[int, int]]) -> None:
    if not (np.isfinite(together[:, 2]).all() and (np.abs(together[:, :2]) <= FARTHEST).all()):
        raise UserError("a trace has points that are not finite or far outside the image; use check_trace first")
    backwards = np.diff(together[:, 2]) < 0
    ends = np.cumsum(counts)[:-1]
    backwards[ends[(ends > 0) & (ends < len(together))] - 1] = False
    if backwards.any():
        raise UserError("a trace is not in the order of time; use check_trace first")
    for size in sizes:
        if len(size) != 2 or not all(side >= 1 for side in size):
            raise UserError(f"the image size {size} must be (height, width), each at least 1 pixel")


def _check_epsilon(epsilon_px: float) -> None:
    if not (np.isfinite(epsilon_px) and epsilon_px > 0):
        raise UserError(f"the tolerance is {epsilon_px} px; it must be a number above 0")


def _check_count(count: int, least: int) -> None:
    if count < max(least, 1):
        raise UserError(f"{count} keypoints were asked for; this trace keeps at least {max(least, 1)}")
