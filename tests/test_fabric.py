"""The Fabric loop gives the numbers of the command line."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from litft.cli.main import main
from tests.tiny import chat_rows, save_tiny

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "extensions" / "fabric" / "sft.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A command-line run, and the arguments for the same training by Fabric."""
    folder = tmp_path_factory.mktemp("fabric")
    save_tiny(folder / "model", "llama")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(40, 0)))
    common = ["--data", str(folder / "rows.jsonl"), "--model", str(folder / "model")]
    limits = [
        "--trainer.max_steps",
        "6",
        "--trainer.precision",
        "32-true",
        "--trainer.accelerator",
        "cpu",
        "--samples.count",
        "0",
    ]
    assert (
        main(["finetune", "lora", *common, "--out", str(folder / "cli"), *limits, "--data.tokens_per_step", "90"]) == 0
    )
    own = ["--max_steps", "6", "--precision", "32-true", "--accelerator", "cpu", "--tokens_per_step", "90"]
    return folder, [*common, *own]


def cli_losses(folder):
    with open(folder / "cli" / "metrics.csv") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]


def test_it_is_under_80_lines():
    assert len(SCRIPT.read_text().splitlines()) < 80


def test_losses_and_weights_equal_the_command_lines(run, monkeypatch):
    folder, words = run
    monkeypatch.setattr(sys, "argv", ["sft.py", *words, "--out", str(folder / "fabric")])
    source = SCRIPT.read_text()
    space: dict = {"__name__": "fabric_sft"}
    exec(compile(source, str(SCRIPT), "exec"), space)
    defaults = {"tuner": "lora", "lr": None, "devices": 1, "strategy": "auto", "seed": 42, "precision": "32-true"}
    losses = space["main"](
        argparse.Namespace(
            **defaults,
            data=[words[1]],
            model=words[3],
            out=str(folder / "fabric"),
            max_steps=6,
            accelerator="cpu",
            tokens_per_step=90,
        )
    )
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(cli_losses(folder)), rtol=1e-6, atol=0)
    ours, theirs = (load_file(folder / name / "adapter_model.safetensors") for name in ("fabric", "cli/final"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_devices_give_the_same_losses(run, strategy):
    folder, words = run
    out = folder / strategy
    command = [sys.executable, str(SCRIPT), *words, "--out", str(out), "--devices", "2", "--strategy", strategy]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [float(line.rpartition(" ")[2]) for line in done.stdout.splitlines() if line.startswith("step ")]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(cli_losses(folder)), rtol=1e-6, atol=1.1e-6)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (out, folder / "cli" / "final"))
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6)
