"""How much faster LBM is here than by a linear program a segment, its definition: `python -m benchmarks.lbm`.

The baseline hands scipy's HiGHS only the cells inside the windows, as sparse matrices: the definition, not a
straw man. Both sides run on the same random traces, alternating, best of three each, and must agree to 1e-9.
"""

import math
import time
from collections.abc import Callable

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import linprog
from scipy.sparse import csr_array

from evaluation.metrics.lbm import trace_lbm


def lbm_by_linear_programs(prediction: np.ndarray, truth: np.ndarray, window: int) -> float:
    """LBM of two (n, 4) arrays of boxes without placeholders, one linear program after another."""
    shorter, longer = (prediction, truth) if len(prediction) <= len(truth) else (truth, prediction)
    ratio = 20 * len(longer) / len(shorter)
    costs = []
    for segment in range(math.ceil(len(shorter) / 20)):
        rows = shorter[20 * segment : 20 * segment + 20]
        columns = longer[math.floor(segment * ratio) : math.ceil((segment + 1) * ratio)]
        costs.append(_least_cost(rows, columns, window) / len(rows))
    return float(np.mean(costs))


def _least_cost(rows: np.ndarray, columns: np.ndarray, window: int) -> float:
    """Least sum of distances when every row takes one column and no column is taken twice."""
    p, m = len(rows), len(columns)
    distances = np.abs(rows[:, None] - columns[None]).mean(axis=-1)
    cells = [(i, j) for i in range(p) for j in range(m) if (i - window) * m / p <= j < (i + 1 + window) * m / p]
    row_of, column_of = np.array(cells).T
    ones, variables = np.ones(len(cells)), np.arange(len(cells))
    solution = linprog(
        distances[row_of, column_of],
        A_eq=csr_array((ones, (row_of, variables)), shape=(p, len(cells))),
        b_eq=np.ones(p),
        A_ub=csr_array((ones, (column_of, variables)), shape=(m, len(cells))),
        b_ub=np.ones(m),
        bounds=(0, 1),
        method="highs",
    )
    if solution.status != 0:
        raise ArithmeticError(f"the linear program has no solution: {solution.message}")
    return solution.fun


def random_pairs(rng: np.random.Generator, count: int, longest: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of lists of boxes, each of 1 to `longest`."""

    def boxes() -> np.ndarray:
        corners = np.sort(rng.random((int(rng.integers(1, longest + 1)), 2, 2)), axis=1)
        return corners.reshape(-1, 4)

    return [(boxes(), boxes()) for _ in range(count)]


def _seconds(work: Callable[[], float], repeats: int = 3) -> tuple[float, float]:
    """Shortest time of a few repeats, since a busy machine only ever adds, and the value."""
    shortest, value = math.inf, math.nan
    for _ in range(repeats):
        start = time.perf_counter()
        value = work()
        shortest = min(shortest, time.perf_counter() - start)
    return shortest, value


def measure(traces: int = 100, longest: int = 120, windows: tuple[int, ...] = (0, 1), seed: int = 0) -> list[dict]:
    """One record a window: milliseconds a trace on both sides, their ratio, the largest difference of values.

    Traces of at most 120 boxes: a narrative has about as many words.
    """
    pairs = random_pairs(np.random.default_rng(seed), traces, longest)
    records = []
    for window in windows:
        trace_lbm(*pairs[0], window=window)  # imports and first calls are nobody's speed
        lbm_by_linear_programs(*pairs[0], window=window)
        ours, programs, difference = 0.0, 0.0, 0.0
        for prediction, truth in pairs:
            seconds, value = _seconds(lambda p=prediction, t=truth, k=window: trace_lbm(p, t, k))
            baseline_seconds, baseline = _seconds(
                lambda p=prediction, t=truth, k=window: lbm_by_linear_programs(p, t, k)
            )
            ours, programs = ours + seconds, programs + baseline_seconds
            difference = max(difference, abs(value - baseline))
        records.append(
            {
                "k": window,
                "traces": traces,
                "milliseconds_a_trace": 1e3 * ours / traces,
                "linear_program_milliseconds_a_trace": 1e3 * programs / traces,
                "times_faster": programs / ours,
                "largest_difference": difference,
            }
        )
    return records


def main() -> None:
    """Measure and print the table."""
    table = Table(title="LBM: ours against one linear program a segment")
    for heading in (
        "k",
        "traces",
        "ours, ms a trace",
        "linear programs, ms a trace",
        "times faster",
        "differ by",
    ):
        table.add_column(heading, justify="right")
    for record in measure():
        table.add_row(
            str(record["k"]),
            str(record["traces"]),
            f"{record['milliseconds_a_trace']:.3f}",
            f"{record['linear_program_milliseconds_a_trace']:.2f}",
            f"{record['times_faster']:.0f}",
            f"{record['largest_difference']:.1e}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
