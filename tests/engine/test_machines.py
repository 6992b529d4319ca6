"""Two machines: network namespaces of this one with a line between them, which is cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny import chat_rows, save_tiny, write_jsonl

from litft.cli.main import main
from litft.engine.checkpoint_files import complete, newest
from litft.engine.heartbeat import SILENT_S

pytestmark = pytest.mark.slow
ADDRESSES = ("10.77.0.1", "10.77.0.2")
TUTORIAL = Path(__file__).parents[2] / "tutorials" / "many-devices.md"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Names of two namespaces, `litft0` and `litft1`, whose devices `line0` and `line1` are one line."""
    if shutil.which("ip") is None or os.getuid():
        pytest.skip("needs iproute2 and the right to make network namespaces")
    names = ["litft0", "litft1"]
    try:
        for name in names:
            ip("netns", "add", name)
    except subprocess.CalledProcessError:
        pytest.skip("no network namespaces can be made here")
    try:
        ip("link", "add", "line0", "type", "veth", "peer", "name", "line1")
        for i, (name, address) in enumerate(zip(names, ADDRESSES, strict=True)):
            ip("link", "set", f"line{i}", "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", f"line{i}")
            ip("-n", name, "link", "set", f"line{i}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def line_of(word: str) -> str:
    """The tutorial's command that has this word, its continued lines joined."""
    text = TUTORIAL.read_text().replace("\\\n", " ")
    return next(" ".join(line.split()) for line in text.splitlines() if word in line and line.startswith("torchrun"))


class Job:
    """The tutorial's command on both machines."""

    def __init__(self, machines: list[str], folder: Path, port: int, words: list[Any]) -> None:
        self.logs = [folder / f"machine{i}.log" for i in range(2)]
        self.started = []
        for i, (machine, log) in enumerate(zip(machines, self.logs, strict=True)):
            line = line_of("--nnodes").replace("$MACHINE", str(i)).replace("$FIRST_MACHINE", ADDRESSES[0])
            command = line.replace("--nproc_per_node 8", "--nproc_per_node 1").replace("29500", str(port)).split()
            command = command[: command.index("lora") + 1]  # the data, model and strategy are the test's
            command[0:1] = [sys.executable, "-m", "torch.distributed.run"]
            environment = dict(os.environ, GLOO_SOCKET_IFNAME=f"line{i}", OMP_NUM_THREADS="1")
            with open(log, "w") as file:
                words = [str(word) for word in words]
                self.started.append(
                    subprocess.Popen(
                        ["ip", "netns", "exec", machine, *command, *words],
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=environment,
                        start_new_session=True,
                    )
                )

    def wait(self, seconds: float) -> list[int]:
        until = time.monotonic() + seconds
        try:
            return [process.wait(max(1.0, until - time.monotonic())) for process in self.started]
        finally:
            for process in self.started:
                if process.poll() is None:
                    os.killpg(process.pid, 9)

    def said(self, machine: int) -> list[str]:
        return [line for line in self.logs[machine].read_text().splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_a_cut_line_ends_both_sides_and_the_job_goes_on(strategy: str, machines: list[str], tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(60, 0))
    words = ["--model", save_tiny(tmp_path / "model", "llama"), "--data", rows, "--trainer.accelerator", "cpu"]
    words += ["--trainer.precision", "32-true", "--samples.count", 0, "--val_every_n_steps", 0, "--model.lr", "1e-3"]
    words += ["--data.tokens_per_step", 200, "--trainer.log_every_n_steps", 1, "--checkpoint.every_steps", 5]
    words += ["--model.schedule", "constant", "--model.warmup", 0, "--checkpoint.final", "last"]
    out = tmp_path / "out"
    several = [*words, "--trainer.strategy", strategy, "--out", out]
    job = Job(machines, tmp_path, 29621, [*several, "--trainer.max_steps", 100000])
    until = time.monotonic() + 120
    while (newest(out / "checkpoints") is None or len(complete(out / "checkpoints")) < 2) and time.monotonic() < until:
        time.sleep(0.2)
    assert newest(out / "checkpoints"), job.logs[0].read_text()[-3000:]
    ip("-n", machines[0], "link", "set", "line0", "down")
    cut = time.monotonic()
    codes = job.wait(90)
    assert all(codes) and time.monotonic() - cut < 60
    for machine in (0, 1):
        [line] = job.said(machine)
        assert "machine 1 of this run" in line and ("silent" in line or "cut off from" in line), line
    assert SILENT_S < 60

    ip("-n", machines[0], "link", "set", "line0", "up")
    steps = int(complete(out / "checkpoints")[-1].name.removeprefix("step-")) + 5
    again = Job(machines, tmp_path, 29622, [*several, "--trainer.max_steps", steps, "--resume"])
    assert again.wait(150) == [0, 0], again.logs[0].read_text()[-3000:]
    assert "the result:" in again.logs[0].read_text() and "the result:" not in again.logs[1].read_text()
    one = [*map(str, words), "--out", str(tmp_path / "one"), "--trainer.max_steps", str(steps)]
    assert main(["finetune", "lora", *one]) == 0
    ours, theirs = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (out, tmp_path / "one"))
    # AdamW, over some hundred steps
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-3
