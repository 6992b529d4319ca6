"""Through the command line: the same run cut differently has the same losses and the same weights in `final/`."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import chat_rows, write_jsonl
from training import difference

from litft.cli.main import main

CUTS = {
    "whole": ["--data.tokens_per_batch", "4096"],
    "small": ["--data.tokens_per_batch", "260"],
    "padded": ["--data.tokens_per_batch", "300", "--data.packing", "false"],
    "two": ["--data.tokens_per_batch", "260", "--trainer.devices", "2", "--trainer.strategy", "ddp"],
}


def arguments(tuner: str, model: Path, rows: Path, out: Path, cut: str) -> list[str]:
    words = ["finetune", tuner, "--data", str(rows), "--model", str(model), "--out", str(out), *CUTS[cut]]
    fixed = {
        "data.tokens_per_step": 600,
        "data.val_fraction": 0.2,
        "trainer.max_epochs": 2,
        "trainer.precision": "32-true",
        "trainer.accelerator": "cpu",
        "trainer.log_every_n_steps": 1,
        "samples.count": 0,
        "checkpoint.final": "last",
        "model.lr": 1e-3,
    }
    if tuner == "lora":
        fixed["model.tuner.dropout"] = 0.0
    return words + [word for key, value in fixed.items() for word in (f"--{key}", str(value))]


def outcome(out: Path) -> tuple[list[dict[str, float]], dict]:
    with open(out / "metrics.csv") as file:
        table = [
            {
                key: float(row[key])
                for key in ("step", "loss", "val_loss", "lr", "grad_norm", "tokens", "trained_tokens")
                if row[key]
            }
            for row in csv.DictReader(file)
        ]
    (weights,) = (out / "final").glob("*.safetensors")
    return table, load_file(weights)


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_a6_cuts_of_a_command(tuner: str, tiny_llama: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(40))
    cuts = list(CUTS) if tuner == "full" else ["whole", "small", "padded"]
    found = {}
    for cut in cuts:
        words = arguments(tuner, tiny_llama, rows, tmp_path / cut, cut)
        if cut == "two":
            command = [sys.executable, "-m", "litft", *words]
            environment = dict(os.environ, OMP_NUM_THREADS="1")
            done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            assert main(words) == 0
        found[cut] = outcome(tmp_path / cut)
    table, weights = found["whole"]
    assert sum("loss" in row for row in table) >= 6 and sum("val_loss" in row for row in table) >= 3
    for cut in cuts[1:]:
        other, other_weights = found[cut]
        assert len(other) == len(table)
        for row, same in zip(other, table, strict=True):
            assert row == pytest.approx(same, rel=1e-4 if cut == "two" else 2e-5), cut
            assert row.get("loss", 0.0) == pytest.approx(same.get("loss", 0.0), rel=1e-5), cut
        assert difference(weights, other_weights) < 1e-5, cut
