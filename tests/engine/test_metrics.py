"""Records of logged steps: what they count, metrics.csv, and what a resumed run keeps of it."""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.loggers.logger import Logger
from runs import metrics, start

from litft.engine.console import Console
from litft.engine.metrics import COLUMNS, MetricsCSV, StepMetrics, eta, read_metrics


class Losses(Callback):
    """Each step's summed cross-entropy and trained tokens, by transformers, before the step changes the weights."""

    def __init__(self) -> None:
        self.expected: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        data, model = trainer.datamodule, pl_module.net.model
        total = count = 0.0
        for row in batch["rows"]:
            ids, trained = data.selection.read(row)
            ids, trained = torch.from_numpy(ids.astype("int64"))[None], torch.from_numpy(trained.copy())
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[0].double()
            nll = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
            total, count = total + float(nll[trained[1:]].sum()), count + int(trained[1:].sum())
        self.expected.append(total / count)


def test_a_logged_loss_is_that_of_the_whole_step(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    oracle = Losses()
    options = {"steps": 4, "val_every": 0, "tokens_per_step": 400, "callbacks": (oracle,)}
    trace, _, trainer = start(tmp_path / "a", tiny_llama, chats, tuner="full", **options)
    rows = [r for r in metrics(tmp_path / "a") if r["loss"]]
    assert [float(r["loss"]) for r in rows] == pytest.approx(oracle.expected, rel=1e-5)
    plan = trainer.datamodule.plan
    for row in rows:
        members = trace.rows[int(row["step"]) - 1]
        assert int(row["tokens"]) == sum(int(plan.lengths[i]) for i in members)
        assert int(row["trained_tokens"]) == sum(int(plan.trained[i]) for i in members)


def test_records_have_every_column(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    start(tmp_path / "a", tiny_llama, chats, steps=5, val_every=2)
    with open(tmp_path / "a" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == COLUMNS
    assert [int(r["step"]) for r in rows] == list(range(6))
    assert [bool(r["val_loss"]) for r in rows] == [True, False, True, False, True, True]
    for row in rows[1:]:
        numbers = {k: float(v) for k, v in row.items() if k != "val_loss"}
        assert all(math.isfinite(v) for v in numbers.values())
        assert numbers["tokens_per_s"] >= numbers["trained_tokens_per_s"] > 0
        assert numbers["step_s"] > 0 and numbers["data_s"] >= 0 and 0.01 < numbers["memory_gb"] < 100


def test_a_checkpoints_time_is_not_a_steps(
    tmp_path: Path, tiny_llama: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from litft.engine import checkpoint_files

    to_disk = checkpoint_files.to_disk
    monkeypatch.setattr(checkpoint_files, "to_disk", lambda path: (time.sleep(0.5), to_disk(path)))  # a slow disk, 1 s
    start(tmp_path / "a", tiny_llama, chats, steps=4, val_every=0, checkpoints={"every_steps": 1})
    with open(tmp_path / "a" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["loss"]]
    assert len(rows) == 4
    for row in rows[1:]:
        assert 0 < float(row["step_s"]) < 1 and 0 <= float(row["data_s"]) < 1
        assert int(row["tokens"]) / float(row["tokens_per_s"]) < 1


def test_a_loss_scalers_overflows_are_no_bad_steps(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # overflows until it has come down
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    options = {"steps": 8, "val_every": 0, "max_bad_steps": 0, "trainer": {"plugins": [precision], "precision": None}}
    _, outcome, _ = start(tmp_path / "a", tiny_llama, chats, **options)
    assert outcome.final_step == 8 and scaler.get_scale() < 2.0**40
    assert not math.isfinite(float(metrics(tmp_path / "a")[1]["grad_norm"]))


class Collect(Logger):
    """A logger that a user might add."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.seen.append((step, metrics))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def name(self) -> str:
        return "collect"

    @property
    def version(self) -> int:
        return 0


def test_a_users_logger_is_given_the_same_records(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    from lightning import Trainer, seed_everything

    from litft import SFT, ChatData

    seed_everything(42, verbose=False)
    seen = Collect()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=seen,
        enable_checkpointing=False,
        enable_progress_bar=False,
        callbacks=[StepMetrics(1)],
        num_sanity_val_steps=-1,
    )
    trainer.fit(SFT(str(tiny_llama)), datamodule=ChatData(str(chats), tokens_per_step=160))
    records = [(step, m) for step, m in seen.seen if "loss" in m]
    assert [step for step, _ in records] == [1, 2, 3]
    assert all({"loss", "lr", "grad_norm", "tokens", "memory_gb"} <= set(m) for _, m in records)


def test_rows_after_the_resumed_step_are_cut(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    for step in range(6):
        logger.log_metrics({"step": step, "loss": float(step)}, step)
    logger.log_metrics({"epoch": 1.0})  # no record
    logger.finalize("success")
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("6,0.5,1.2")  # torn by a crash
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.csv")] == ["0", "1", "2", "3", "4", "5"]
    logger = MetricsCSV(tmp_path, resume_step=3)
    logger.log_metrics({"step": 4, "loss": 44.0}, 4)
    logger.finalize("success")
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [(r["step"], r["loss"]) for r in rows] == [*((str(i), f"{i}.0") for i in range(4)), ("4", "44.0")]


def test_the_console_prints_first_last_and_validated_steps() -> None:
    lines: list[str] = []
    console = Console(total_steps=9, write=lines.append)
    record = {"epoch": 0.5, "loss": 1.0, "lr": 1e-4, "grad_norm": 2.0, "tokens_per_s": 9.0, "trained_tokens_per_s": 3.0}
    record |= {"step_s": 0.1, "data_s": 0.01, "memory_gb": 1.5}
    for step in range(1, 10):
        console.log_metrics({"step": step, **record, **({"val_loss": 2.0} if step == 5 else {})})
    assert [line.split()[1] for line in lines] == ["1/9", "5/9", "9/9"]  # the others came too fast one after another
    assert "val_loss 2.0000" in lines[1] and "ETA 0s" in lines[2]


def test_eta() -> None:
    assert [eta(s) for s in (0.4, 59, 61, 3599, 7260, float("inf"))] == ["0s", "59s", "1m01s", "59m59s", "2h01m", "?"]
