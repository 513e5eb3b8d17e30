"""The speaker's clock and hand: times of words, and a pointer trace that hovers over what is being named.

The trace is sampled at a fixed rate. Between objects the hand moves as hands do, along a minimum-jerk
profile with a slight bow; over an object it draws loops or scribbles of varying size, hesitates now and
then, and always trembles a little. It keeps to the words with a small lag or lead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from data_loaders.synthetic.language import Said
from tracevision_jax.records.sample import TimedWord

Times = Float[np.ndarray, "times"]
Trace = Float[np.ndarray, "points 3"]
CentreAt = Callable[[int, Times], Float[np.ndarray, "times 2"]]
"""Centre (x, y) in [0, 1] of an object at some times."""
DECIMALS = 6
"""Of coordinates and times, as a recorder would give them; keeps exported files short."""


@dataclass(frozen=True)
class Visit:
    """The hand is over an object from `start` to `end`, in seconds."""

    target: int
    start: float
    end: float


def time_words(
    said: Sequence[Said], words_per_second: float, duration: float | None, random: np.random.Generator
) -> list[TimedWord]:
    """Give every word a time: longer words take longer, and commas and full stops make pauses.

    The words end after `duration` seconds, or as many as the rate gives.
    """
    weights = np.array([2.5 + len(word.text) for word in said]) * random.uniform(0.8, 1.25, len(said))
    spoken = weights / weights.mean() * 0.3
    pauses = np.array([_pause(word) for word in said]) * random.uniform(0.5, 1.5, len(said))
    starts = 0.15 + np.concatenate([[0.0], np.cumsum(spoken + pauses)[:-1]])
    ends = starts + spoken
    scale = (len(said) / words_per_second if duration is None else duration) / ends[-1]
    starts, ends = starts * scale, ends * scale
    return [
        TimedWord(word.text, float(start), float(end))
        for word, start, end in zip(said, np.round(starts, 3), np.round(ends, 3), strict=True)
    ]


def _pause(word: Said) -> float:
    if word.filler:
        return 0.35
    return {".": 0.35, ",": 0.2}.get(word.text[-1], 0.02)


def visits_of(said: Sequence[Said], words: Sequence[TimedWord]) -> list[Visit]:
    """Join the words in a row that have the same target."""
    visits: list[Visit] = []
    for word, timed in zip(said, words, strict=True):
        if visits and visits[-1].target == word.target:
            visits[-1] = Visit(word.target, visits[-1].start, timed.end)
        else:
            visits.append(Visit(word.target, timed.start, timed.end))
    return visits


def _minimum_jerk(phase: np.ndarray) -> np.ndarray:
    p = np.clip(phase, 0, 1)
    return p * p * p * (10 + p * (6 * p - 15))


def hover(
    visits: Sequence[Visit],
    radii: Float[np.ndarray, "objects 2"],
    centre_at: CentreAt,
    points_per_second: float,
    random: np.random.Generator,
) -> tuple[Trace, Float[np.ndarray, "travels 2"]]:
    """Trace over the visits, and the (start, end) seconds of each travel between two of them.

    `radii` are the objects' half sizes along x and y, in units of the image's sides.
    """
    times = np.arange(0.0, visits[-1].end + 0.1, 1 / points_per_second)
    lag = random.uniform(-0.1, 0.15)
    starts = np.array([visit.start for visit in visits[1:]]) + lag
    lengths = np.array([visit.end - visit.start for visit in visits])
    travel = np.minimum(random.uniform(0.25, 0.6, len(starts)), 0.8 * np.minimum(lengths[:-1], lengths[1:]) + 0.1)
    begins = starts - travel / 2
    # Share of each visit in the hand's place: the differences of the blends from one visit to the next.
    blend = np.ones((len(visits) + 1, len(times)))
    blend[1:-1] = _minimum_jerk((times - begins[:, None]) / travel[:, None])
    blend[-1] = 0
    share = blend[:-1] - blend[1:]
    moving = np.clip(4 * share * (1 - share), 0, 1).max(axis=0)

    centres = np.stack([centre_at(visit.target, times) for visit in visits])
    amplitude = np.stack([radii[visit.target] for visit in visits]) * random.uniform(0.45, 0.9, (len(visits), 1))
    place = np.einsum("vt,vtc->tc", share, centres)
    reach = np.einsum("vt,vc->tc", share, amplitude) * (1 - 0.8 * moving)[:, None]
    for k in range(len(visits) - 1):
        step = centres[k + 1] - centres[k]
        bow = random.normal(0, 0.1) * 4 * blend[k + 1] * (1 - blend[k + 1])
        place += bow[:, None] * np.stack([-step[:, 1], step[:, 0]], axis=1)

    phase = _phase(times, points_per_second, random)
    swell = 1 + 0.25 * _tremble(len(times), 25, random)
    if random.random() < 0.7:
        tilt = random.uniform(0.2, 0.6)
        loop = np.stack([np.cos(phase), np.sin(phase + tilt)], axis=1)
    else:
        # A scribble: quick strokes to and fro along x while y drifts up and down.
        loop = np.stack([np.sin(1.6 * phase), 0.9 * np.sin(0.37 * phase)], axis=1)
    tremor = 0.003 * np.stack([_tremble(len(times), 5, random), _tremble(len(times), 5, random)], axis=1)
    drift = 0.25 * np.stack([_tremble(len(times), 40, random), _tremble(len(times), 40, random)], axis=1)
    place = place + reach * (loop * swell[:, None] + drift) + tremor
    trace = np.concatenate([place, times[:, None]], axis=1)
    return np.round(trace, DECIMALS), np.stack([begins, begins + travel], axis=1)


def _phase(times: Times, points_per_second: float, random) -> Times:
    """Angle of the loops over time: 0.8 to 1.6 turns a second, nearly stopping in short hesitations."""
    speed = np.full(len(times), 2 * np.pi * random.uniform(0.8, 1.6))
    speed *= 1 + 0.2 * _tremble(len(times), 20, random)
    for _ in range(int(random.poisson(times[-1] / 6))):
        middle, half = random.uniform(0, times[-1]), random.uniform(0.1, 0.3)
        speed *= 1 - 0.92 * np.exp(-(((times - middle) / half) ** 4))
    sign = 1 if random.random() < 0.5 else -1
    return random.uniform(0, 2 * np.pi) + sign * np.cumsum(speed) / points_per_second


@lru_cache
def _window(smooth: int) -> Float[np.ndarray, "width"]:
    kernel = np.hanning(2 * smooth + 1)
    return kernel / np.sqrt((kernel * kernel).sum())


def _tremble(count: int, smooth: int, random) -> Float[np.ndarray, "count"]:
    """Noise of unit spread that changes over about `smooth` points."""
    return np.convolve(random.standard_normal(count + 2 * smooth), _window(smooth), mode="valid")


def split_strokes(trace: Trace, gap: Float[np.ndarray, "2"]) -> tuple[Float[np.ndarray, "_ 3"], ...]:
    """Cut the points between the times `gap` out: the pointer left the image and came back."""
    before, after = trace[trace[:, 2] < gap[0]], trace[trace[:, 2] > gap[1]]
    return (before, after) if len(before) > 1 and len(after) > 1 else (trace,)


def leave_image(trace: Trace, points_per_second: float, random: np.random.Generator) -> Trace:
    """Let the last tenth of a second run out of the image by 1 to 4 hundredths at the nearest border."""
    count = max(2, int(0.12 * points_per_second))
    if len(trace) <= 2 * count:
        return trace
    trace = trace.copy()
    end = trace[-1, :2]
    axis = int(np.argmin(np.minimum(end, 1 - end)))
    goal = end.copy()
    goal[axis] = 1 + random.uniform(0.01, 0.04) if end[axis] > 0.5 else -random.uniform(0.01, 0.04)
    blend = _minimum_jerk(np.linspace(0, 1, count))[:, None]
    trace[-count:, :2] += blend * (goal - trace[-count:, :2])
    return np.round(trace, DECIMALS)
