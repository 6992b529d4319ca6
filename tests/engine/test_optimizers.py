"""Optimizers by name and by class path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import chat_rows, write_jsonl
from training import difference, train

from litft import UserError
from litft.engine.optimizers import build_optimizer


def groups() -> list[dict[str, Any]]:
    weights = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    return [{"params": weights[:1], "weight_decay": 0.1}, {"params": weights[1:], "lr": 0.5, "weight_decay": 0.0}]


def build(name: str) -> torch.optim.Optimizer:
    return build_optimizer(name, groups(), 0.01, (0.8, 0.9), 0.1)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("adamw", "AdamW"),
        ("adamw_8bit", "AdamW8bit"),
        ("paged_adamw_8bit", "PagedAdamW8bit"),
        ("sgd", "SGD"),
        ("torch.optim.Adafactor", "Adafactor"),
        ("torch.optim.NAdam", "NAdam"),
    ],
)
def test_groups_keep_their_options(name: str, cls: str) -> None:
    optimizer = build(name)
    assert type(optimizer).__name__ == cls
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.01, 0.1), (0.5, 0.0)]
    if "betas" in optimizer.defaults:
        assert all(tuple(g["betas"]) == (0.8, 0.9) for g in optimizer.param_groups)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adamv", "did you mean adamw"),
        ("torch.optim.Adamv", "cannot be imported"),
        ("nowhere.Adam", "cannot be imported"),
        ("torch.nn.Linear", "not a torch.optim.Optimizer"),
        ("torch.optim.LBFGS", "LBFGS"),
    ],
)
def test_what_is_no_optimizer_is_refused(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(name)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit", "torch.optim.AdamW"])
def test_other_adamws_train_alike(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(24))
    options: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.1, "clip": 1.0}
    runs = [
        train(tiny_llama, rows, method={"optimizer": optimizer, **options}, tokens_per_step=400)
        for optimizer in ("adamw", name)
    ]
    assert runs[1].losses == pytest.approx(runs[0].losses, rel=1e-3)
    assert difference(runs[1].weights, runs[0].weights) < (1e-6 if name.startswith("torch") else 2e-3)
