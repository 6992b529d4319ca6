"""The paired bootstrap against scipy's, and against what theory says of normal numbers."""

from __future__ import annotations

import numpy as np
import pytest

from litft.evaluate.bootstrap import paired_difference


def test_as_scipys_paired_bootstrap_of_a_ratio() -> None:
    from scipy.stats import bootstrap

    rng = np.random.default_rng(3)
    weights = rng.integers(1, 60, 80).astype(float)
    a, b = rng.gamma(2, weights), rng.gamma(2.2, weights)
    found, (low, high) = paired_difference(a, b, weights, resamples=20000)  # type: ignore[misc]
    assert found == pytest.approx((a.sum() - b.sum()) / weights.sum())

    def statistic(a: np.ndarray, b: np.ndarray, w: np.ndarray, axis: int) -> np.ndarray:
        return (a.sum(axis) - b.sum(axis)) / w.sum(axis)

    options = {"paired": True, "vectorized": True, "method": "percentile", "n_resamples": 20000, "batch": 2000}
    wanted = bootstrap((a, b, weights), statistic, rng=np.random.default_rng(0), **options).confidence_interval
    width = high - low
    assert low == pytest.approx(wanted.low, abs=0.03 * width) and high == pytest.approx(wanted.high, abs=0.03 * width)


def test_covers_the_truth_as_often_as_it_says() -> None:
    rng, hits = np.random.default_rng(0), 0
    for seed in range(400):
        shared = rng.normal(size=60)  # how hard each row is: pairing takes it out
        a, b = shared + rng.normal(0.3, 0.5, 60), shared + rng.normal(0, 0.5, 60)
        _, interval = paired_difference(a, b, resamples=500, seed=seed)
        assert interval is not None
        hits += interval[0] <= 0.3 <= interval[1]
        assert interval[1] - interval[0] < 2 * 1.96 * np.sqrt(0.5 / 60) * 1.5  # unpaired it would be twice as wide
    assert 0.90 <= hits / 400 <= 0.98


def test_seeded_and_drawn_in_parts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=50), rng.normal(size=50)
    assert paired_difference(a, b) == paired_difference(a, b) != paired_difference(a, b, seed=1)
    whole = paired_difference(a, b)
    monkeypatch.setattr("litft.evaluate.bootstrap._AT_ONCE", 999)
    assert paired_difference(a, b) == whole


def test_one_row_has_no_interval_and_equal_models_differ_by_nothing() -> None:
    assert paired_difference(np.array([2.0]), np.array([1.0])) == (1.0, None)
    same = np.arange(5.0)
    assert paired_difference(same, same) == (0.0, (0.0, 0.0))
