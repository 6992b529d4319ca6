"""How sure a difference between two models is: the paired bootstrap over rows."""

from __future__ import annotations

import numpy as np

RESAMPLES = 5000
_AT_ONCE = 2**20  # drawn rows that are held at a time


def paired_difference(
    a: np.ndarray,
    b: np.ndarray,
    weights_a: np.ndarray | None = None,
    weights_b: np.ndarray | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, tuple[float, float] | None]:
    """`sum(a) / sum(weights_a) - sum(b) / sum(weights_b)`, and its 95 % interval.

    Rows are drawn with replacement, the same ones for both models, and the difference is formed anew: the percentile
    bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13). A loss is the ratio of two
    sums over rows, so its weights, the rows' tokens, are drawn with it.

    Args:
        a: what a row adds to the one model's sum (a score, a summed loss), [rows].
        b: to the other's, on the same rows.
        weights_a: what the rows count, [rows]; 1 by default, which makes means.
        weights_b: for the other; `weights_a` by default.
        resamples: how many times rows are drawn.
        seed: of the drawing.

    Returns:
        The difference and the interval; None in its place for fewer than two rows.
    """
    rows = len(a)
    weights_a = np.ones(rows) if weights_a is None else weights_a
    weights_b = weights_a if weights_b is None else weights_b
    values = np.stack([a, weights_a, b, weights_b], axis=1).astype(np.float64)
    difference = float(_difference(values.sum(0)))
    if rows < 2:
        return difference, None
    rng = np.random.default_rng(seed)
    chunk = max(1, _AT_ONCE // rows)
    drawn = [
        _difference(values[rng.integers(0, rows, (min(chunk, resamples - start), rows))].sum(1))
        for start in range(0, resamples, chunk)
    ]
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return difference, (float(low), float(high))


def _difference(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1] - sums[..., 2] / sums[..., 3]
