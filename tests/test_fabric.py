"""The Fabric loop gives the numbers of the command line."""

from __future__ import annotations

import csv
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from litft.cli.main import main
from tests.tiny import chat_rows, save_tiny

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "extensions" / "fabric" / "finetune.py"
SPACE = runpy.run_path(str(SCRIPT), run_name="fabric")


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


def test_it_is_under_100_lines():
    assert len(SCRIPT.read_text().splitlines()) < 100


def test_losses_and_weights_equal_the_command_lines(run):
    folder, words = run
    losses = SPACE["main"](SPACE["parse"]([*words, "--out", str(folder / "fabric")]))
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


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo", "simpo", "cpo", "reward", "distill"])
def test_preference_methods_equal_the_command_lines(run, tmp_path, method):
    folder, _ = run
    rows = []
    for index, row in enumerate(chat_rows(30, 1)):
        *prompt, answer = row["messages"]
        pair = {"prompt": prompt, "chosen": [answer], "rejected": [{"role": "assistant", "content": "no " * 3}]}
        plain = {"kto": row | {"label": index % 3 > 0}, "distill": row}
        rows.append(plain.get(method, pair))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, data = str(folder / "model"), str(tmp_path / "rows.jsonl")
    limits = ["--trainer.max_steps", "4", "--trainer.precision", "32-true", "--trainer.accelerator", "cpu"]
    limits += ["--samples.count", "0", "--data.tokens_per_step", "300", "--trainer.log_every_n_steps", "1"]
    common = ["--data", data, "--model", model]
    rate = "0.01"  # at which a step is more than rounding
    teacher = str(save_tiny(tmp_path / "teacher", "llama", seed=3)) if method == "distill" else ""
    limits += ["--model.teacher", teacher] if teacher else []
    assert main(["finetune", method, *common, *limits, "--model.lr", rate, "--out", str(tmp_path / "cli")]) == 0
    own = ["--max_steps", "4", "--precision", "32-true", "--accelerator", "cpu", "--tokens_per_step", "300"]
    args = [*common, *own, "--lr", rate, "--method", method, "--out", str(tmp_path / "fabric"), "--teacher", teacher]
    losses = SPACE["main"](SPACE["parse"](args))
    with open(tmp_path / "cli" / "metrics.csv") as file:
        theirs = [float(row["loss"]) for row in csv.DictReader(file) if row["loss"]]
    assert losses == pytest.approx(theirs, rel=1e-5) and losses[0] != pytest.approx(losses[-1], rel=1e-4)
