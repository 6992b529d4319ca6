"""The tutorials' commands, as printed but for the model (a tiny one) and the number of steps."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny import save_tiny

ROOT = Path(__file__).parent.parent


class Shell:
    """A folder in which `litft` is on the path and takes a tiny model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_tiny(folder / "model")
        shutil.copytree(ROOT / "tutorials", folder / "tutorials")
        self.bin = folder / "bin"
        self.script("litft", f'exec {sys.executable} -m litft "$@" --model {folder / "model"} $MORE')
        self.env = os.environ | {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "MORE": "--samples.count 0 --trainer.max_steps 6",
        }

    def script(self, name: str, text: str) -> None:
        self.bin.mkdir(exist_ok=True)
        (self.bin / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.bin / name).chmod(0o755)

    def start(self, command: str, **more: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.env | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str, **more: str) -> tuple[int, str]:
        process = self.start(command, **more)
        output, _ = process.communicate(timeout=240)
        return process.returncode, output

    def python(self, script: str) -> None:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    def steps(self, run: str) -> list[int]:
        with open(self.folder / "runs" / run / "metrics.csv", newline="") as file:
            return [int(row["step"]) for row in csv.DictReader(file)]

    def signal_in_training(self, run: str, number: signal.Signals) -> None:
        """Send a signal to the run's own process once it has made some steps."""
        rows = self.folder / "runs" / run / "metrics.csv"
        until = time.monotonic() + 120
        while not (rows.exists() and len(rows.read_text().splitlines()) > 4):
            assert time.monotonic() < until
            time.sleep(0.01)
        for status in Path("/proc").glob("[0-9]*/cmdline"):
            words = status.read_bytes().split(b"\0")
            if b"litft" in words and f"runs/{run}".encode() in words and words[0] == sys.executable.encode():
                os.kill(int(status.parent.name), number)
                return
        raise AssertionError("no such process")


def blocks(kind: str, page: str = "interruptions") -> list[str]:
    text = (ROOT / "tutorials" / f"{page}.md").read_text()
    return re.findall(rf"```{kind}\n(.*?)```", text, re.S)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    return Shell(tmp_path_factory.mktemp("shell"))


def test_interruptions_going_on(shell: Shell) -> None:
    first, *_, longer = blocks("bash")
    begin, go_on = first.strip().splitlines()
    code, said = shell.run(begin)
    assert code == 0 and shell.steps("mine") == list(range(7)), said
    code, said = shell.run(longer, MORE="")
    assert code == 0 and "schedule: steps 6 -> 8" in said, said
    assert shell.steps("mine") == list(range(9))
    code, said = shell.run(go_on, MORE="")
    assert code == 0 and "going on from step 8 of 8" in said, said


@pytest.mark.slow
def test_interruptions_spot_machine(shell: Shell) -> None:
    loop = blocks("bash")[1]
    process = shell.start(loop, MORE="--trainer.max_steps 60")
    for number in (signal.SIGTERM, signal.SIGKILL):
        shell.signal_in_training("spot", number)
        time.sleep(6)
    said, _ = process.communicate(timeout=240)
    assert said.count("going on from step") >= 1 and shell.steps("spot")[-1] == 60, said
    assert len(set(shell.steps("spot"))) == len(shell.steps("spot"))


@pytest.mark.slow
def test_interruptions_slurm(shell: Shell) -> None:
    (job,) = blocks("bash job.sh")
    shell.script("srun", 'exec "$@"')
    shell.script("scontrol", 'echo "$@" >> requeued')
    (shell.folder / "job.sh").write_text(job)
    more = {"SLURM_JOB_ID": "77", "MORE": "--trainer.max_steps 60"}
    process = shell.start("bash job.sh", **more)
    shell.signal_in_training("slurm", signal.SIGUSR1)
    said, _ = process.communicate(timeout=120)
    assert "stopped by SIGUSR1" in said and (shell.folder / "requeued").read_text() == "requeue 77\n", said
    code, said = shell.run("bash job.sh", **more)
    assert "going on from step" in said and shell.steps("slurm")[-1] == 60 and code == 0, said
    assert (shell.folder / "requeued").read_text() == "requeue 77\n"


@pytest.mark.slow
def test_interruptions_python(shell: Shell) -> None:
    (script,) = blocks("python")
    script = script.replace("SFT(tuner", f"SFT({str(shell.folder / 'model')!r}, tuner")
    again = script.replace('quickstart.jsonl")', 'quickstart.jsonl"), ckpt_path="out/checkpoints/last/state.ckpt"')
    again = again.replace("max_steps=10", "max_steps=12")
    shell.python(script)
    out = shell.folder / "out" / "checkpoints"
    assert sorted(p.name for p in out.glob("step-*")) == ["step-000005", "step-000010"]
    assert again.count("ckpt_path") == 1
    shell.python(again)
    assert (out / "last").resolve().name == "step-000012"


@pytest.mark.slow
def test_many_devices_one_machine(shell: Shell) -> None:
    one, plan = blocks("bash", "many-devices")[:2]
    copies, shared = one.strip().splitlines()
    more = "--samples.count 0 --trainer.max_steps 6 --trainer.accelerator cpu"
    for command, run in ((copies, "copies"), (shared, "shared")):
        code, said = shell.run(command.replace("--trainer.devices 8", "--trainer.devices 2"), MORE=more)
        assert code == 0 and shell.steps(run) == list(range(7)), said
        assert "rank 1 of 2" in (shell.folder / "runs" / run / "logs" / "rank-0001.log").read_text()
    code, said = shell.run(plan.replace("--model MODEL", ""), MORE="")
    assert code == 0 and "choose: " in said, said


@pytest.mark.slow
def test_many_devices_slurm(shell: Shell) -> None:
    """Slurm's own variables, and two tasks on this machine."""
    (job,) = blocks("bash job.sh", "many-devices")
    tasks = """shift
export SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2 SLURM_NNODES=1 SLURM_NODEID=0 SLURM_NODELIST=127.0.0.1 SLURM_JOB_NAME=job
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first; code=$?; wait $second; exit $code"""
    shell.script("srun", tasks)
    shell.script("scontrol", 'echo "$@" >> requeued')
    (shell.folder / "job.sh").write_text(job.replace("runs/slurm", "runs/slurm2"))
    more = "--samples.count 0 --trainer.max_steps 6 --trainer.accelerator cpu"
    for _ in range(2):  # the second finds it done
        code, said = shell.run("bash job.sh", SLURM_JOB_ID="77", MORE=more)
        assert code == 0 and said.count("the result:") == 1 and shell.steps("slurm2") == list(range(7)), said
    assert "going on from step 6 of 6" in said
