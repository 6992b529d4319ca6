"""The plan: which rows make up a step, and how a step is cut."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litft.data.layout import balance, cost, lay_out, pack, squeeze
from litft.data.plan import MIN_STEPS, Plan, default_tokens_per_step, epoch_order, run_counts, step_rows

lengths = st.lists(st.integers(1, 120), min_size=1, max_size=60).map(np.array)
quick = settings(max_examples=60, deadline=None)


def plan_of(sizes: np.ndarray, **changed: Any) -> Plan:
    files = changed.pop("file_of_row", np.zeros(len(sizes), int))
    options: dict[str, Any] = {"weights": [1.0], "seed": 3, "tokens_per_step": 300, "tokens_per_batch": 150} | changed
    return Plan(sizes, np.maximum(1, sizes // 2), files, **options)


# ---- stage 1


@quick
@given(lengths, st.integers(1, 400), st.integers(0, 9))
def test_every_row_once_an_epoch(sizes: np.ndarray, budget: int, seed: int) -> None:
    order = epoch_order(np.zeros(len(sizes), int), [1.0], seed, 0)
    steps = step_rows(order, sizes, budget)
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(sizes)))
    for rows in steps:
        assert sizes[rows].sum() <= budget or len(rows) == 1


@quick
@given(st.lists(st.integers(0, 3), min_size=1, max_size=80), st.lists(st.floats(0, 3), min_size=4, max_size=4))
def test_weights_say_how_often_a_row_is_used(files: list[int], weights: list[float]) -> None:
    of_row = np.array(files)
    order = epoch_order(of_row, weights, 1, 0)
    used = np.bincount(order, minlength=len(files)) if len(order) else np.zeros(len(files), int)
    for file, weight in enumerate(weights):
        mine = used[of_row == file]
        assert set(mine) <= {int(np.floor(weight)), int(np.ceil(weight))}
        assert mine.sum() == int(weight) * len(mine) + round((weight - int(weight)) * len(mine))


def test_the_fraction_of_a_file_is_drawn_anew_each_epoch() -> None:
    files = np.zeros(40, int)
    drawn = [frozenset(epoch_order(files, [0.5], 1, epoch).tolist()) for epoch in range(4)]
    assert [len(rows) for rows in drawn] == [20] * 4 and len(set(drawn)) == 4
    assert drawn[0] == frozenset(epoch_order(files, [0.5], 1, 0).tolist())
    assert drawn[0] != frozenset(epoch_order(files, [0.5], 2, 0).tolist())


def test_i4_the_order_is_new_each_epoch_and_the_same_for_a_seed() -> None:
    files = np.zeros(50, int)
    orders = [tuple(epoch_order(files, [1.0], 7, epoch)) for epoch in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != tuple(epoch_order(files, [1.0], 8, 0)) and orders[0] != tuple(range(50))


@quick
@given(lengths, st.sampled_from([1, 2, 3]), st.sampled_from([120, 150, 1000]), st.booleans())
def test_steps_do_not_depend_on_how_they_are_cut(sizes: np.ndarray, ranks: int, batch: int, packing: bool) -> None:
    one = plan_of(sizes)
    other = plan_of(sizes, ranks=ranks, tokens_per_batch=batch, packing=packing)
    for epoch in (0, 1):
        assert [r.tolist() for r in one.steps(epoch)] == [r.tolist() for r in other.steps(epoch)]


def test_steps_are_nearly_full() -> None:
    sizes = np.random.default_rng(0).normal(300, 100, 5000).clip(20, 900).astype(int)
    steps = plan_of(sizes, tokens_per_step=8192).steps(0)
    fill = np.array([sizes[rows].sum() for rows in steps[:-1]]) / 8192
    assert fill.mean() > 0.99 and fill.min() > 0.9


def test_a_long_row_does_not_wait_until_the_end() -> None:
    sizes = np.full(400, 10)
    sizes[:20] = 90
    order = epoch_order(np.zeros(400, int), [1.0], 0, 0)
    place = {row: i for i, row in enumerate(np.concatenate(step_rows(order, sizes, 100)).tolist())}
    assert np.mean([place[row] for row in range(20)]) == pytest.approx(200, abs=80)


# ---- stage 2


@quick
@given(lengths, st.integers(120, 400), st.sampled_from([1, 2, 3, 8]), st.booleans())
def test_a_layout_keeps_rows_budgets_and_ranks(sizes: np.ndarray, budget: int, ranks: int, packing: bool) -> None:
    rows = np.arange(len(sizes))[::-1].copy()
    shares = lay_out(rows, sizes, budget, ranks, packing)
    assert len(shares) == ranks
    assert len({len(share) for share in shares}) == 1, "i5: a rank with fewer micro-batches would hang the others"
    packs = [p for share in shares for p in share]
    assert sorted(np.concatenate(packs).tolist()) == list(range(len(sizes)))
    for p in packs:
        if len(p):
            assert (sizes[p].sum() if packing else sizes[p].max() * len(p)) <= budget
    least = -(-sizes.sum() // budget)
    if packing and len(sizes) >= ranks:
        assert len(packs) <= np.ceil((11 / 9 * least * 2 + 1) / ranks) * ranks


@quick
@given(lengths, st.integers(120, 400))
def test_packs_hold_whole_documents(sizes: np.ndarray, capacity: int) -> None:
    packs = pack(sizes, capacity)
    assert sorted(i for p in packs for i in p) == list(range(len(sizes)))
    assert all(sizes[p].sum() <= capacity for p in packs)
    for i, p in enumerate(packs):  # no two packs fit in one
        for q in packs[i + 1 :]:
            assert sizes[p].sum() + sizes[q].sum() > capacity


@pytest.mark.parametrize("capacity", [1000, 1024, 1025, 4097])
def test_c6_packing_works_at_every_length(capacity: int) -> None:
    sizes = np.random.default_rng(0).normal(512, 64, 4000).clip(1, capacity).astype(int)
    packs = pack(sizes, capacity)
    # two documents of 512 fill a pack of 1000 to 1025 only where one is short enough: the best matching is the measure
    ordered = np.sort(sizes)
    pairs, low, high = 0, 0, len(ordered) - 1
    while low < high:  # the most pairs that fit: shortest with longest
        if ordered[low] + ordered[high] <= capacity:
            pairs += 1
            low += 1
        high -= 1
    possible = sizes.sum() / capacity / (len(sizes) - pairs) if capacity < 1500 else 1.0
    efficiency = sizes.sum() / capacity / len(packs)
    assert efficiency > 0.9 * possible
    if capacity > 1500:
        assert efficiency > 0.9


def test_c2_nothing_is_cut_or_left_over() -> None:
    sizes = np.array([13, 11, 3])
    for budget in (15, 5):  # of a step; under 5 each document is over the budget, and a step of its own
        plan = plan_of(sizes, tokens_per_step=budget, tokens_per_batch=13)
        laid = [p.tolist() for i in range(len(plan.steps(0))) for share in plan.layout(0, i) for p in share]
        assert sorted(row for p in laid for row in p) == [0, 1, 2]
        assert all(sizes[p].sum() <= 13 for p in laid)
        assert run_counts(plan, len(plan.steps(0)))["tokens"] == 27


@quick
@given(lengths, st.integers(1, 8))
def test_parts_of_nearly_the_same_sum(sizes: np.ndarray, count: int) -> None:
    parts = balance(sizes, count)
    assert sorted(i for part in parts for i in part) == list(range(len(sizes))) and len(parts) == count
    sums = [int(sizes[part].sum()) for part in parts]
    assert max(sums) - min(sums) <= int(sizes.max())
    before = max(sums)
    limit = -(-int(sizes.sum()) // count)
    fits = squeeze(sizes, parts, limit)
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))
    after = max(int(sizes[part].sum()) for part in parts)
    assert after <= before and fits == (after <= limit)


@pytest.mark.parametrize(("step", "batch"), [(16384, 4096), (8192, 2048), (4096, 4096), (65536, 4096)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_no_pack_is_one_too_many(step: int, batch: int, ranks: int) -> None:
    """Steps are full, and cut into as few packs as their tokens fill: 99.8% of the slots hold a real token."""
    sizes = np.clip(np.random.default_rng(1).lognormal(5.3, 0.35, 4000).astype(int), 60, 700)
    plan = plan_of(sizes, tokens_per_step=step, tokens_per_batch=batch, ranks=ranks)
    steps = plan.steps(0)
    filled = [int(sizes[rows].sum()) for rows in steps[:-1]]
    assert np.mean(filled) >= 0.998 * step and max(filled) <= step
    for index, tokens in enumerate(filled):
        packs = [pack for share in plan.layout(0, index) for pack in share]
        assert len(packs) == -(-tokens // batch // ranks) * ranks


def test_ranks_are_balanced_by_the_cost_of_attention() -> None:
    rng = np.random.default_rng(1)
    sizes = rng.choice([50, 100, 4000], 300, p=[0.5, 0.45, 0.05])
    shares = lay_out(np.arange(300), sizes, 4096, 4)
    loads = [sum(cost(sizes[p]) for p in share if len(p)) for share in shares]
    assert max(loads) < 1.15 * np.mean(loads)
    for micro in zip(*shares, strict=True):  # ranks wait for each other at the end of a step only, but stay close
        assert len(micro) == 4


def test_more_ranks_than_rows() -> None:
    shares = lay_out(np.arange(2), np.array([5, 7]), 16, 4)
    assert [len(share) for share in shares] == [1] * 4
    assert sorted(len(share[0]) for share in shares) == [0, 0, 1, 1]


# ---- the run


@quick
@given(lengths, st.integers(1, 5))
def test_locate_is_the_inverse_of_first_step(sizes: np.ndarray, epochs: int) -> None:
    plan = plan_of(sizes, weights=[1.5])
    total = plan.total_steps(epochs, None)
    assert total == sum(len(plan.steps(e)) for e in range(epochs))
    places = [plan.locate(step) for step in range(total)]
    assert places == [(e, i) for e in range(epochs) for i in range(len(plan.steps(e)))]


@pytest.mark.parametrize(
    ("epochs", "steps", "expected"),
    [
        (None, None, 1.0),
        (-1, -1, 1.0),
        (2, None, 2.0),
        (2, -1, 2.0),
        (None, 7, 7),
        (-1, 500, 500),
        (3, 7, 7),
        (1, 500, 1.0),
        (0, 7, 0),
        (3, 0, 0),
    ],
)
def test_e3_total_steps(epochs: int | None, steps: int | None, expected: float) -> None:
    plan = plan_of(np.full(100, 30))
    assert len(plan.steps(0)) == 10
    total = plan.total_steps(epochs, steps)
    assert total == (expected * 10 if isinstance(expected, float) else expected)


def test_weights_that_use_no_row_make_no_steps() -> None:
    plan = plan_of(np.full(10, 30), weights=[0.01])
    assert plan.total_steps(None, 5) == plan.total_steps(3, None) == plan.total_steps(None, None) == 0


def test_default_step_budget_for_much_data_and_little() -> None:
    much, little = np.full(5000, 400), np.full(10, 400)
    assert default_tokens_per_step(np.arange(5000), much) == 16384
    assert default_tokens_per_step(np.arange(10), little) == 400  # a step a row: there are no more
    assert default_tokens_per_step(np.arange(10), little, max_epochs=50) == 5 * 400  # 2 steps an epoch
    assert default_tokens_per_step(np.arange(10), little, max_epochs=200) == 10 * 400


@quick
@given(st.lists(st.integers(1, 900), min_size=1, max_size=120).map(np.array), st.integers(1, 60))
def test_a_run_has_100_steps_where_it_has_the_rows(sizes: np.ndarray, epochs: int) -> None:
    order = epoch_order(np.zeros(len(sizes), int), [1.0], 3, 0)
    budget = default_tokens_per_step(order, sizes, epochs)
    steps = len(step_rows(order, sizes, budget))
    assert steps >= min(len(sizes), -(-MIN_STEPS // epochs))
    assert steps * epochs >= min(MIN_STEPS, len(sizes) * epochs)


# ---- what the run amounts to


@pytest.mark.parametrize("weights", [[1.0], [1.5]])
@pytest.mark.parametrize("total", [1, 30, 77])
def test_counts_of_a_run_are_those_of_its_steps(weights: list[float], total: int) -> None:
    sizes = np.random.default_rng(4).integers(5, 140, 80)
    plan = plan_of(sizes, weights=weights, ranks=2)
    steps = [(e, i) for e in range(20) for i in range(len(plan.steps(e)))][:total]
    rows = [plan.steps(e)[i] for e, i in steps]
    counts = run_counts(plan_of(sizes, weights=weights, ranks=2), total)
    assert counts == {
        "tokens": sum(sizes[r].sum() for r in rows),
        "trained_tokens": sum(plan.trained[r].sum() for r in rows),
        "longest_step": max(sizes[r].sum() for r in rows),
        "packs": sum(len(share) for e, i in steps for share in plan.layout(e, i)),
        "packs_exact": True,
    }


def test_a_step_of_one_long_row_is_the_longest() -> None:
    assert (
        run_counts(plan_of(np.array([10, 500, 20]), tokens_per_step=30, tokens_per_batch=512), 2)["longest_step"] == 500
    )


def test_packs_of_a_long_run_are_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    from litft.data import plan as module

    sizes = np.random.default_rng(4).integers(5, 140, 3000)
    exact = run_counts(plan_of(sizes), 1500)
    monkeypatch.setattr(module, "COUNTED", 10**9)
    counted = run_counts(plan_of(sizes), 1500)
    assert not exact["packs_exact"] and counted["packs_exact"]
    assert abs(exact["packs"] - counted["packs"]) < 0.05 * counted["packs"]
    assert {k: v for k, v in exact.items() if "packs" not in k} == {
        k: v for k, v in counted.items() if "packs" not in k
    }


def test_a_large_plan_is_quick() -> None:
    import time

    sizes = np.random.default_rng(0).integers(100, 900, 200_000)
    start = time.process_time()
    plan = plan_of(sizes, tokens_per_step=16384, tokens_per_batch=4096, ranks=8)
    steps = len(plan.steps(0))
    for index in range(0, steps, steps // 50):
        plan.layout(0, index)
    planned = time.process_time()
    assert not run_counts(plan, steps)["packs_exact"]
    assert time.process_time() - planned < 2
    assert time.process_time() - start < 20
    assert all(a < b for a, b in pairwise([plan.first_step(e) for e in range(2)]))
