"""Learning rates: the right factor at every optimizer step of a real run, over the exact number of steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import chat_rows, write_jsonl
from training import train

from litft import UserError
from litft.engine.schedules import StepSchedule, schedule, warmup_steps

NAMES = ["cosine", "linear", "constant", "wsd"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", chat_rows(24))


@pytest.mark.parametrize(
    ("cut", "trainer"),
    [
        ({"tokens_per_batch": 4096}, {"max_epochs": 2}),
        ({"tokens_per_batch": 250}, {"max_epochs": 2}),
        ({"tokens_per_batch": 250, "packing": False}, {"max_epochs": 2}),
        ({"tokens_per_batch": 250}, {"max_steps": 9}),
    ],
    ids=str,
)
def test_e1_e2_the_rate_follows_optimizer_steps(
    cut: dict[str, Any], trainer: dict[str, Any], tiny_llama: Path, rows: Path
) -> None:
    method = {"lr": 0.02, "min_lr": 0.002, "schedule": "cosine", "warmup": 3}
    trace = train(tiny_llama, rows, method=method, trainer=trainer, tokens_per_step=380, **cut)
    total = len(trace.lrs)
    assert total == trace.data.total_steps >= 8
    rise = [0.02 * k / 4 for k in (1, 2, 3)]
    fall = [0.011 + 0.009 * math.cos(math.pi * k / (total - 3)) for k in range(total - 3)]
    assert trace.lrs == pytest.approx(rise + fall, rel=1e-9)
    assert min(trace.lrs) > 0.002 and trace.lrs[-1] < 0.004


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(
    "limits", [{"max_epochs": 2}, {"max_steps": 3}, {"max_steps": 11}, {"max_epochs": 2, "max_steps": 5}]
)
@pytest.mark.parametrize("batch", [250, 4096])
def test_e3_planned_steps_are_made(
    packing: bool, limits: dict[str, int], batch: int, tiny_llama: Path, rows: Path
) -> None:
    trace = train(
        tiny_llama,
        [str(rows), str(rows)],
        weights=[0.5, 0.3],
        trainer=limits,
        packing=packing,
        tokens_per_step=400,
        tokens_per_batch=batch,
    )
    assert len(trace.losses) == trace.trainer.global_step == trace.data.total_steps
    steps = limits.get("max_steps")
    if steps:
        assert len(trace.losses) == steps
    else:
        assert len(trace.losses) == sum(len(trace.data.plan.steps(epoch)) for epoch in (0, 1))


def test_e3_epochs_of_unequal_length_are_made_whole(tiny_llama: Path, rows: Path) -> None:
    for seed in range(20):
        trace = train(
            tiny_llama,
            rows,
            seed=seed,
            method={"lr": 0.0},
            weights=[0.4],
            trainer={"max_epochs": 4},
            tokens_per_step=240,
        )
        per_epoch = [len(trace.data.plan.steps(epoch)) for epoch in range(4)]
        assert len(trace.losses) == sum(per_epoch)
        if len(set(per_epoch)) > 1 and per_epoch[0] < max(per_epoch):
            return
    pytest.fail("no seed gave epochs of unequal length")


@pytest.mark.parametrize(("total", "share", "steps"), [(100, 0.07, 7), (101, 0.03, 4), (10, 0.0, 0), (5, 0.5, 3)])
def test_e3_a_share_of_warmup_is_rounded_up(total: int, share: float, steps: int) -> None:
    assert warmup_steps(share, total) == steps
    assert warmup_steps(7, 100) == 7 and warmup_steps(1, 100) == 1 and warmup_steps(7, 3) == 3


def test_e5_a_script_without_limits_is_asked_for_one(tiny_llama: Path, rows: Path) -> None:
    with pytest.raises(UserError, match="max_epochs"):
        train(tiny_llama, rows, trainer={"max_epochs": None})


@pytest.mark.parametrize("limit", [{"limit_train_batches": 2}, {"limit_train_batches": 0.5}, {"overfit_batches": 1}])
def test_e3_limits_that_cut_the_plan_are_refused(limit: dict[str, Any], tiny_llama: Path, rows: Path) -> None:
    with pytest.raises(UserError, match="max_steps"):
        train(tiny_llama, rows, trainer={**limit, "max_epochs": 1})


def test_validation_by_itself_and_after_training(tiny_llama: Path, rows: Path) -> None:
    from lightning import Trainer

    from litft import SFT, ChatData, Full

    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
    }
    alone = ChatData(str(rows), val_fraction=0.2)
    (found,) = Trainer(**quiet).validate(SFT(str(tiny_llama), Full()), datamodule=alone, verbose=False)
    options: dict[str, Any] = {
        "val_fraction": 0.2,
        "trainer": {"max_epochs": 2, "num_sanity_val_steps": -1},
        "method": {"lr": 0.0},
    }
    trace = train(tiny_llama, rows, **options)
    assert trace.val_losses[0]["val_loss"] == pytest.approx(found["val_loss"], rel=1e-6)
    steps = trace.data.total_steps
    (again,) = trace.trainer.validate(trace.method, datamodule=trace.data, verbose=False)
    assert again["val_loss"] == pytest.approx(found["val_loss"], rel=1e-6) and trace.data.total_steps == steps


def test_e5_more_steps_than_an_epoch(tiny_llama: Path, tmp_path: Path) -> None:
    four = write_jsonl(tmp_path / "four.jsonl", chat_rows(4))
    trace = train(tiny_llama, four, trainer={"max_steps": 10}, tokens_per_step=4096)
    assert len(trace.losses) == 10 and all(sorted(rows) == [0, 1, 2, 3] for rows in trace.rows)
    assert trace.losses[-1] < trace.losses[0]


@given(
    st.sampled_from(NAMES),
    st.integers(1, 300),
    st.one_of(st.floats(0, 0.99), st.integers(1, 400).map(float)),
    st.floats(0, 1),
)
def test_a_schedule_rises_once_and_falls_to_its_floor(name: Any, total: int, warmup: float, floor: float) -> None:
    factor = schedule(name, total, warmup, floor)
    values = [factor(step) for step in range(total)]
    rise = warmup_steps(warmup, total)
    assert all(0 < v <= 1 for v in values)
    assert values[:rise] == sorted(values[:rise])
    assert all(a >= b - 1e-12 for a, b in zip(values[rise:], values[rise + 1 :], strict=False))
    if rise < total:
        assert values[rise] == pytest.approx(1.0)
        assert min(values[rise:]) >= floor - 1e-12
        assert factor(total) == pytest.approx(1.0 if name == "constant" else floor)
        assert factor(total) == factor(total + 5)


def test_cosine_equals_torchs_own() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    mine, theirs = (torch.optim.SGD([weight], lr=0.3) for _ in range(2))
    a = StepSchedule(mine, schedule("cosine", 20, 0, 0.1))
    b = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 20, eta_min=0.03)
    for _ in range(20):
        assert mine.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9)
        for optimizer, scheduler in ((mine, a), (theirs, b)):
            optimizer.step()
            scheduler.step()


def test_wsd_is_flat_and_falls_over_the_last_fifth() -> None:
    values = [schedule("wsd", 100, 0, 0.0)(step) for step in range(101)]
    assert (
        values[:81] == pytest.approx([1.0] * 81)
        and values[90] == pytest.approx(0.5)
        and values[100] == pytest.approx(0)
    )


def test_groups_keep_their_own_rates() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "lr": 1.6}], lr=0.1)
    scheduler = StepSchedule(optimizer, schedule("linear", 4, 0))
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.075, 1.2])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": -1.0}, "model.lr"),
        ({"warmup": -1}, "model.warmup"),
        ({"min_lr": 1.0, "lr": 0.1}, "model.min_lr"),
        ({"clip": -1.0}, "model.clip"),
    ],
)
def test_rates_that_cannot_be_are_refused(options: dict[str, Any], named: str) -> None:
    from litft import SFT

    with pytest.raises(UserError, match=named):
        SFT(**options)
