"""Faults of machines, in real processes: full and read-only disks, lost files, dead workers and ranks, clocks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runs import assert_same_run, metrics, start
from tiny import chat_rows, save_tiny, write_jsonl
from zygote import Zygote

from litft.engine.checkpoint_files import FILE, complete


class Place:
    """A folder with a model and data, in which commands run in processes of their own."""

    def __init__(self, folder: Path, zygote: Zygote) -> None:
        self.folder, self.zygote, self.log = folder, zygote, folder / "log.txt"
        self.model = save_tiny(folder / "model", hidden_size=256, intermediate_size=512)
        self.data = write_jsonl(folder / "chats.jsonl", chat_rows(60))
        os.environ["LITFT_CACHE"] = str(folder / "cache")

    def words(self, out: Path | str, *more: object, steps: int = 8, tuner: str = "full") -> list[str]:
        words = ["finetune", tuner, "--data", self.data, "--model", self.model, "--out", out]
        words += ["--trainer.max_steps", steps, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
        words += ["--trainer.log_every_n_steps", 1, "--samples.count", 0]
        words += [] if "--val_every_n_steps" in more else ["--val_every_n_steps", 3]
        return [str(word) for word in [*words, "--data.tokens_per_step", 160, *more]]

    def job(self, function: str, words: list[str], **arguments: Any) -> int:
        environment = {"environment": {"LITFT_CACHE": str(self.folder / "cache")}} if function == "command" else {}
        return self.zygote.start(function, self.log, words=words, folder=str(self.folder), **environment, **arguments)

    def run(self, *more: object, steps: int = 8) -> int:
        return self.zygote.wait(self.job("command", self.words(*more, steps=steps)))

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture
def place(tmp_path: Path, zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("LITFT_CACHE", str(tmp_path / "cache"))
    return Place(tmp_path, zygote)


def errors(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("error:", "litft failed"))]


# ---- disks


def test_a_full_disk_costs_checkpoints_and_never_a_good_one(place: Place) -> None:
    """A tmpfs with room for one checkpoint and a half, where one can be mounted; then room is made."""
    more = ("--checkpoint.every_steps", 2, "--checkpoint.keep_last", 1, "--val_every_n_steps", 0)
    assert place.run("straight", *more) == 0
    [kept] = complete(place.folder / "straight" / "checkpoints")
    size = (kept / FILE).stat().st_size
    place.log.unlink()
    disk, keep = place.folder / "disk", place.folder / "kept"
    disk.mkdir()
    arguments = {"disk": str(disk), "size": f"{size * 5 // 1024}k", "ballast": size * 7 // 2, "keep": str(keep)}
    code = place.zygote.wait(place.job("on_a_small_disk", place.words(disk / "a", *more), **arguments))
    if code == 100:
        pytest.skip("no tmpfs can be mounted here; the next test covers the same by a shim")
    said = place.said()
    assert code == 10, said[-3000:]
    before, after = said.split("-- ")[0], said.split("-- ")[1]
    assert "could not be written: No space left on device; the newest checkpoint is that of step 2" in before
    assert "training goes on" in before
    [error] = errors(before)
    assert "step-000008 could not be written" in error and "going on from step 2 of 8" in after
    assert_same_run(place.folder / "straight", keep / "a")


def test_a_disk_that_is_full_from_the_start_is_said_and_leaves_nothing(place: Place) -> None:
    disk, keep, size = place.folder / "disk", place.folder / "kept", 64 << 20
    disk.mkdir()
    arguments = {"disk": str(disk), "size": str(size), "ballast": size, "keep": str(keep)}
    code = place.zygote.wait(place.job("on_a_small_disk", place.words(disk / "a"), **arguments))
    if code == 100:
        pytest.skip("no tmpfs can be mounted here")
    before = place.said().split("-- ")[0]
    assert code == 10, place.said()[-3000:]
    assert errors(before) == [f"error: {disk / 'a'}: cannot be written: No space left on device"]
    assert (keep / "a" / "final").is_dir()  # of the second command, which found room and nothing in its way


@pytest.mark.parametrize("allowed", [0, 2])
def test_a_checkpoint_that_cannot_be_written(allowed: int, place: Place) -> None:
    """By a shim: writes of later checkpoints fail as on a full disk. Training goes on, the end says so, exit 1."""
    more = ("--checkpoint.every_steps", 2, "--checkpoint.keep_last", 2, "--val_every_n_steps", 0)
    assert place.run("straight", *more) == 0
    place.log.unlink()
    code = place.zygote.wait(place.job("full_after", place.words("a", *more), allowed=allowed))
    said = place.said()
    assert code == 1, said[-3000:]
    assert "could not be written: No space left on device" in said and "training goes on" in said
    [error] = errors(said)
    assert "step-000008 could not be written" in error
    out = place.folder / "a"
    assert [p.name for p in complete(out / "checkpoints")] == ["step-000002", "step-000004"][:allowed]
    assert not list((out / "checkpoints").glob(".*"))
    assert json.loads((out / "run.json").read_text())["outcome"].startswith("Failed")
    assert place.run("a", *more, "--resume") == 0
    assert_same_run(place.folder / "straight", out)


def test_a_read_only_out_is_said_before_anything_is_done(place: Place) -> None:
    disk = place.folder / "disk"
    disk.mkdir()
    code = place.zygote.wait(place.job("read_only", place.words(disk / "a"), disk=str(disk)))
    if code == 100:
        pytest.skip("nothing can be mounted here")
    assert code == 2, place.said()
    assert errors(place.said()) == [f"error: --out {disk / 'a'}: cannot be written: Read-only file system"]
    assert "weights learn" not in place.said()


# ---- files


def test_data_that_vanish_in_mid_run_do_not_matter(tmp_path: Path, tiny_llama: Path) -> None:
    """The tokens lie in the cache, mapped into memory: not even that has to be there still."""
    import shutil

    from lightning import Callback

    data = write_jsonl(tmp_path / "chats.jsonl", chat_rows(36))
    cache = Path(os.environ["LITFT_CACHE"])

    class Vanish(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                data.rename(tmp_path / "gone.jsonl")
                (cache / "tokens").rename(cache / "gone")

    _, straight, _ = start(tmp_path / "a", tiny_llama, data, steps=6)
    start(tmp_path / "b", tiny_llama, data, steps=6, callbacks=(Vanish(),))
    assert straight is not None
    shutil.move(tmp_path / "gone.jsonl", data)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_vanished_data_are_named_on_resume(place: Place) -> None:
    assert place.run("a", steps=3) == 0
    place.data.unlink()
    place.log.unlink()
    assert place.run("a", "--resume", steps=5) == 2
    [error] = errors(place.said())
    assert str(place.data) in error


# ---- processes


def test_a_dead_data_worker_ends_the_run_with_a_checkpoint(place: Place) -> None:
    assert place.run("straight", steps=40) == 0
    place.log.unlink()
    process = place.job("command", place.words("a", "--data.num_workers", 2, steps=40))
    worker = _child_of(process)
    rows = place.folder / "a" / "metrics.csv"
    while not (rows.exists() and len(rows.read_text().splitlines()) > 4):
        assert place.zygote.poll(process) is None, place.said()
        time.sleep(0.005)
    os.kill(worker, signal.SIGKILL)
    assert place.zygote.wait(process, 60) == 1
    said = place.said()
    [error] = errors(said)
    assert "a process that makes batches" in error and "--resume" in said
    assert complete(place.folder / "a" / "checkpoints")
    assert place.run("a", "--data.num_workers", 2, "--resume", steps=40) == 0
    assert_same_run(place.folder / "straight", place.folder / "a")


def _child_of(process: int) -> int:
    """A data worker: forked by the process, not one of torch's helpers."""
    for _ in range(6000):
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        if len(children) >= 2:
            return int(children[-1])
        time.sleep(0.005)
    raise AssertionError("no worker")


def processes_of(leader: int) -> list[int]:
    """The data-parallel processes that a command has started, by rank."""
    children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
    return [int(c) for c in children if b"finetune" in Path(f"/proc/{c}/cmdline").read_bytes()]


@pytest.mark.parametrize(
    ("victim", "strategy"),
    [
        pytest.param("first", "ddp", marks=pytest.mark.slow),
        ("second", "ddp"),
        pytest.param("first", "fsdp", marks=pytest.mark.slow),
        pytest.param("second", "fsdp", marks=pytest.mark.slow),
    ],
)
def test_a_dead_rank_ends_the_others_within_a_minute_with_one_line(victim: str, strategy: str, place: Place) -> None:
    """Two gloo processes of one command; the others end, in seconds, and what was done is gone on with."""
    more = ("--checkpoint.every_steps", 5) if strategy == "fsdp" else ()
    words = place.words("a", "--trainer.devices", 2, "--trainer.strategy", strategy, *more, steps=2000, tuner="lora")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with open(place.log, "w") as log:
        command = subprocess.Popen(
            [sys.executable, "-m", "litft", *words], cwd=place.folder, env=environment, stdout=log, stderr=log
        )
    rows, second = place.folder / "a" / "metrics.csv", 0
    try:
        until = time.monotonic() + 120
        while not (rows.exists() and len(rows.read_text().splitlines()) > 8):
            assert command.poll() is None and time.monotonic() < until, place.said()
            time.sleep(0.02)
        [second] = processes_of(command.pid)
        os.kill(command.pid if victim == "first" else second, signal.SIGKILL)
        killed = time.monotonic()
        command.wait(60)
        while victim == "first" and Path(f"/proc/{second}").exists():
            assert time.monotonic() < killed + 60
            time.sleep(0.05)
        took = time.monotonic() - killed
    finally:
        command.kill()
    said = place.said()
    print(f"{victim}: ended after {took:.1f} s: {errors(said)}")
    [error] = errors(said)
    assert took < 60 and "Traceback" not in said
    if victim == "first":
        assert "the first process of this run has died" in error
        return
    assert command.returncode == 1 and "the process of rank 1 was killed (SIGKILL)" in error
    step = int(complete(place.folder / "a" / "checkpoints")[-1].name.removeprefix("step-"))
    assert step >= 2 and f"{step} steps are kept" in said
    if strategy == "fsdp":  # the last that was saved: nobody has the dead process's part
        return
    assert step >= 7  # saved before the error left the first process
    rows_there = [int(row["step"]) for row in metrics(place.folder / "a")]
    # the last step's loss was maybe not yet summed over both, and nobody can any more
    assert rows_there in (list(range(step + 1)), list(range(step)))


def test_a_loss_that_is_lost_ends_with_the_rows_of_its_step(place: Place) -> None:
    more = ("--model.lr", "1e30", "--model.clip", 0, "--model.max_bad_steps", 2, "--model.warmup", 0)
    assert place.run("a", *more, steps=30) == 1
    [error] = errors(place.said())
    assert re.search(r"step \d+: loss or gradient not finite, step skipped \(3 so far\); its rows: .*jsonl:\d+", error)
    assert "stopped: more than model.max_bad_steps 2 of them" in place.said()
    assert place.said().count("step skipped") == 3 and "kept: " in place.said()


def test_two_commands_do_not_share_a_folder(place: Place) -> None:
    """As when a job is started again while the machine that was given up still runs it."""
    first = place.job("command", place.words("a", steps=2000))
    rows = place.folder / "a" / "metrics.csv"
    while not rows.exists():
        assert place.zygote.poll(first) is None, place.said()
        time.sleep(0.01)
    assert place.run("a", "--resume", steps=2000) == 2
    [error] = errors(place.said())
    assert error == "error: --out a: another process is writing there"
    os.killpg(first, signal.SIGKILL)
    assert place.zygote.wait(first) == -signal.SIGKILL
    assert place.run("a", "--resume", steps=1) == 2  # past that: the dead hold no lock
    assert "this command asks for 1" in place.said()
