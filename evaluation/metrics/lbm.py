"""LBM, the local bipartite matching distance between two traces (lower is better; 0 is a perfect match).

Follows Meng et al., "Connecting What to Say With Where to Look by Modeling Human Attention Traces" (MITR,
CVPR 2021) as its public code computes it; TraceVision Table 1 reports it for k = 0 and k = 1. In numpy:

    trace_lbm(predicted_points, true_word_boxes, window=0)
    mean_over_traces(np.array([trace_lbm(p, t, window=1) for p, t in pairs]))

Definition, for a predicted and a true list of boxes:
1. True boxes whose fifth number is exactly 1 stand for "word without a trace" and are dropped.
2. The shorter list T1 (length P; the prediction when equally long) is matched into the longer T2 (length M).
3. T1 is cut into segments of 20; segment s gets T2[floor(20 s M/P) : ceil(20 (s+1) M/P)], clipped at M.
4. In a segment of p and m boxes, row i may take column j if (i-k) m/p <= j < (i+1+k) m/p; every row takes
   exactly one column, no column is taken twice, and the sum of mean absolute coordinate differences is least.
5. A segment's cost is that sum over p; the trace's is the plain mean over segments, however short the last.

The linear program has an integral optimum, so an assignment gives its value; and at k = 0 the windows of a
segment are disjoint, so each row simply takes its cheapest column. No segment is ever infeasible: P <= M
makes m >= p, so the windows of k = 0 hold a column each, and a larger k only adds choices (which is also why
the value never grows with k). Bounds are computed in integers: floating point would shift a segment by one
box for about one pair of lengths in 4,000.
"""

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

SEGMENT_LENGTH = 20
MITR_BATCH_SIZE = 30
PLACEHOLDER_AREA = 1.0
_QUARTERS = np.full(4, 0.25)  # a mean over four coordinates as a product: several times faster than `mean`


def as_boxes(trace: ArrayLike) -> Float[np.ndarray, "length 4"]:
    """Boxes (x1, y1, x2, y2) of a list of points (x, y), boxes, or boxes with their area as fifth number.

    A point becomes the box of zero area at its place.

    Raises:
        ValueError: the rows have another number of columns, or a number is NaN or infinite.
    """
    rows = np.asarray(trace, dtype=np.float64)
    if rows.size == 0:
        return np.zeros((0, 4))
    if rows.ndim != 2 or rows.shape[1] not in (2, 4, 5):
        raise ValueError(f"a trace has rows of 2, 4 or 5 numbers, not the shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise ValueError("a trace holds a number that is not finite")
    return np.concatenate([rows, rows], axis=1) if rows.shape[1] == 2 else rows[:, :4]


def without_placeholders(truth: ArrayLike) -> np.ndarray:
    """The true boxes less those that stand for a word without a trace: fifth number exactly 1."""
    rows = np.asarray(truth, dtype=np.float64)
    return rows[rows[:, 4] != PLACEHOLDER_AREA] if rows.ndim == 2 and rows.shape[1] == 5 else rows


def row_windows(
    shorter: int, longer: int, window: int
) -> tuple[Int[np.ndarray, "shorter"], Int[np.ndarray, "shorter"]]:
    """For each box of the shorter list, the half-open range of boxes of the longer list that it may take."""
    row = np.arange(shorter)
    first_row = row // SEGMENT_LENGTH * SEGMENT_LENGTH
    rows_in_segment = np.minimum(SEGMENT_LENGTH, shorter - first_row)
    first_column = first_row * longer // shorter
    end_column = np.minimum(longer, -(-(first_row + SEGMENT_LENGTH) * longer // shorter))
    columns = end_column - first_column
    window = min(window, SEGMENT_LENGTH)  # reaches every column of a segment: more changes nothing
    # For whole j, j >= x is j >= ceil(x) and j < x is j < ceil(x); -(-a // b) is the ceiling of a / b.
    start = np.maximum(0, -(-(row - first_row - window) * columns // rows_in_segment))
    stop = np.minimum(columns, -(-(row - first_row + 1 + window) * columns // rows_in_segment))
    return first_column + start, first_column + stop


def trace_lbm(prediction: ArrayLike, truth: ArrayLike, window: int = 0) -> float:
    """LBM of one trace at k = `window`; NaN where the truth holds no traced word, which a dataset mean skips.

    Both are lists of points or boxes as `as_boxes` takes them, in units of the picture's width and height.

    Raises:
        ValueError: `window` is negative, the prediction is empty, or `as_boxes` refuses one of the two.
    """
    if window < 0:
        raise ValueError(f"the window k must not be negative, but is {window}")
    predicted, true = as_boxes(prediction), as_boxes(without_placeholders(truth))
    if len(true) == 0:
        return float("nan")
    if len(predicted) == 0:
        raise ValueError("LBM is undefined for an empty prediction")
    shorter, longer = (predicted, true) if len(predicted) <= len(true) else (true, predicted)
    start, stop = row_windows(len(shorter), len(longer), window)
    matched = _cheapest(shorter, longer, start, stop) if window == 0 else _assigned(shorter, longer, start, stop)
    segment_starts = np.arange(0, len(shorter), SEGMENT_LENGTH)
    segment_lengths = np.minimum(SEGMENT_LENGTH, len(shorter) - segment_starts)
    return float(np.mean(np.add.reduceat(matched, segment_starts) / segment_lengths))


def _cheapest(shorter, longer, start, stop) -> Float[np.ndarray, "shorter"]:
    """Cost of each row's cheapest column in its own window: all rows at once, one entry an allowed cell."""
    widths = stop - start
    offsets = np.cumsum(widths) - widths
    columns = np.arange(widths.sum()) + np.repeat(start - offsets, widths)
    costs = np.abs(np.repeat(shorter, widths, axis=0) - longer[columns]) @ _QUARTERS
    return np.minimum.reduceat(costs, offsets)


def _assigned(shorter, longer, start, stop) -> Float[np.ndarray, "shorter"]:
    """Cost of each row's column in its segment's cheapest assignment, cells outside the windows forbidden."""
    matched = np.empty(len(shorter))
    for first in range(0, len(shorter), SEGMENT_LENGTH):
        rows = slice(first, first + SEGMENT_LENGTH)
        left, right = start[first], stop[rows][-1]
        column = np.arange(left, right)
        allowed = (column >= start[rows, None]) & (column < stop[rows, None])
        costs = np.abs(shorter[rows, None] - longer[None, left:right]) @ _QUARTERS
        costs[~allowed] = np.inf
        # There are at least as many columns as rows: the rows come back complete and in order.
        assigned_rows, assigned_columns = linear_sum_assignment(costs)
        matched[rows] = costs[assigned_rows, assigned_columns]
    return matched


def mean_over_traces(values: Float[np.ndarray, "traces"]) -> float:
    """Mean over the traces that have a value: how MITR's joint evaluation averages, and what we report.

    Raises:
        ValueError: no trace has a value.
    """
    present = values[~np.isnan(values)]
    if present.size == 0:
        raise ValueError("no trace has a value: every ground truth is empty")
    return float(present.mean())


def mean_over_batches(values: Float[np.ndarray, "traces"], batch_size: int = MITR_BATCH_SIZE) -> float:
    """Mean of the means of batches of consecutive traces: how MITR's trace-generation evaluation averages.

    The last, smaller batch weighs as much as a full one, so the number depends on the order of the traces.

    Raises:
        ValueError: no trace has a value.
    """
    batches = [values[first : first + batch_size] for first in range(0, len(values), batch_size)]
    means = [mean_over_traces(batch) for batch in batches if not np.isnan(batch).all()]
    return mean_over_traces(np.array(means))
