"""Traces simplified a second beside recursive Python in the same run: `python -m benchmarks.simplification`.

Traces are hand-like (loops around places, jitter, travel between them, 60 Hz), 400 points long, each spoken
over with a narrative of 43 words whose phrases are given; both sides align words to the caption, keep the
same points (checked), run on one core, and take the best of three processor times.
"""

import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.trajectory.naive_simplification import simplify_naively
from tracevision_jax.records.sample import TimedWord
from tracevision_jax.trajectory.alignment import align_words
from tracevision_jax.trajectory.phrases import RubricPhrases, phrase_windows
from tracevision_jax.trajectory.simplify import simplify, simplify_many

CAPTION = (
    "In this image in the center there is a man standing and holding a red ball in his hand, on the right "
    "there is another man bending near a large wooden table and in the background there is a fence, trees "
    "and a tall building."
)
SIZE = (480, 640)
POINTS = 400


def hand_like_trace(rng: np.random.Generator) -> np.ndarray:
    """(x, y, t) of a pointer that circles around four to seven places and travels between them."""
    places = int(rng.integers(4, 8))
    centre, radius = rng.uniform(0.15, 0.85, (places, 2)), rng.uniform(0.02, 0.1, (places, 2))
    progress = np.linspace(0, places, POINTS, endpoint=False)
    place = progress.astype(int)
    within = progress - place
    travel = np.clip((within - 0.75) / 0.25, 0, 1)[:, None]
    angle = within * rng.uniform(8, 16)
    loop = np.stack([np.cos(angle), np.sin(angle)], 1) * radius[place] * (1 - travel)
    hand = centre[place] * (1 - travel) + centre[(place + 1) % places] * travel + loop
    jitter = rng.normal(0, 0.001, (POINTS, 2))
    return np.column_stack([hand + jitter, np.arange(POINTS) / 60])


def spoken_words(rng: np.random.Generator, duration: float) -> list[TimedWord]:
    """The caption's words one after another with short pauses, and a filler here and there."""
    texts = CAPTION.split()
    for place in sorted(rng.integers(0, len(texts), 2), reverse=True):
        texts.insert(int(place), "uh")
    starts = np.linspace(0, duration, len(texts), endpoint=False)
    length = 0.9 * duration / len(texts)
    return [TimedWord(text, float(start), float(start) + length) for text, start in zip(texts, starts, strict=True)]


def best_seconds(work: Callable[[], object], rounds: int = 3) -> float:
    """The least processor time of some runs, which other programs on the machine do not lengthen."""
    times = []
    for _ in range(rounds):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    rng = np.random.default_rng(0)
    traces = [hand_like_trace(rng) for _ in range(1000)]
    words = [spoken_words(rng, trace[-1, 2]) for trace in traces]
    phrases = RubricPhrases().phrases(CAPTION)
    importances = [phrase.importance for phrase in phrases]

    def recursive(count: int) -> list[np.ndarray]:
        result = []
        for trace, spoken in zip(traces[:count], words[:count], strict=True):
            windows = phrase_windows(phrases, align_words(CAPTION, spoken))
            result.append(simplify_naively(trace, windows.tolist(), importances, SIZE))
        return result

    def together(count: int) -> list[np.ndarray]:
        return simplify_many(traces[:count], words[:count], [CAPTION] * count, [SIZE] * count, [phrases] * count)

    def one_by_one(count: int) -> list[np.ndarray]:
        pairs = zip(traces[:count], words[:count], strict=True)
        return [simplify(trace, spoken, CAPTION, SIZE, phrases) for trace, spoken in pairs]

    kept = together(1000)
    for fast, slow in zip(kept, recursive(50), strict=False):
        np.testing.assert_array_equal(fast, slow)
    rates = {
        "recursive Python": 50 / best_seconds(lambda: recursive(50)),
        "simplify": 200 / best_seconds(lambda: one_by_one(200)),
        "simplify_many": 1000 / best_seconds(lambda: together(1000)),
    }
    table = Table("", "traces/s", "times the recursion", title=f"{POINTS} points, words aligned, one core")
    for name, rate in rates.items():
        table.add_row(name, f"{rate:.0f}", f"{rate / rates['recursive Python']:.1f}")
    console = Console()
    console.print(table)
    mean = np.mean([len(keypoints) for keypoints in kept])
    console.print(f"{POINTS} points become {mean:.0f} keypoints on average ({100 * (1 - mean / POINTS):.0f} % fewer).")


if __name__ == "__main__":
    main()
