"""Checkpoints that processes write in parts: gone on with by any number of them, complete or passed over."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import chat_rows, save_tiny, write_jsonl

from litft.cli.main import main
from litft.engine import part_files
from litft.engine.background import load
from litft.engine.checkpoint_files import FILE, complete, is_whole, newest_whole

LIMITS = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--samples.count", "0"]
LIMITS += ["--data.tokens_per_step", "300", "--data.tokens_per_batch", "200", "--val_every_n_steps", "2"]
LIMITS += ["--model.schedule", "constant", "--model.warmup", "0", "--trainer.log_every_n_steps", "1"]
LIMITS += ["--checkpoint.every_steps", "2", "--checkpoint.final", "last"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("parts")
    rows = write_jsonl(folder / "rows.jsonl", chat_rows(60, 0))
    return ["--model", str(save_tiny(folder / "model", "llama")), "--data", str(rows)]


def command(*words: Any) -> subprocess.CompletedProcess[str]:
    """`litft finetune ...` in processes of its own."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    line = [sys.executable, "-m", "litft", "finetune", *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=200, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""
    return done


def result(out: Path) -> dict[str, torch.Tensor]:
    [file] = (out / "final").glob("*.safetensors")
    return load_file(file)


def losses(out: Path) -> list[float]:
    with open(out / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [str(i) for i in range(len(rows))]
    return [float(row[key]) for row in rows for key in ("loss", "val_loss", "grad_norm", "lr") if row[key]]


@pytest.fixture(scope="module")
def two(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four steps, by two processes."""
    folder = tmp_path_factory.mktemp("two")
    for tuner, strategy in {"full": ["fsdp"], "lora": ["fsdp", "--trainer.strategy.tensor_parallel_size", 2]}.items():
        words = [tuner, *inputs, *LIMITS, "--trainer.max_steps", 4, "--out", folder / tuner]
        done = command(*words, "--trainer.devices", 2, "--trainer.strategy", *strategy)
        assert done.stdout.count("rows to train on") == done.stdout.count("the result:") == 1
        assert "rank 1 of 2" in (folder / tuner / "logs" / "rank-0001.log").read_text()
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_saved_by_two_gone_on_with_by_one_and_by_four(
    tuner: str, two: dict[str, Path], inputs: list[str], tmp_path: Path
) -> None:
    more = ["--trainer.max_steps", "8", "--resume"]
    assert main(["finetune", tuner, *inputs, *LIMITS, "--trainer.max_steps", "8", "--out", str(tmp_path / "0")]) == 0
    for out in ("1", "4"):
        shutil.copytree(two[tuner], tmp_path / out, symlinks=True)
    assert main(["finetune", tuner, "--out", str(tmp_path / "1"), *more, "--trainer.strategy", "auto",
                 "--trainer.devices", "1"]) == 0  # fmt: skip
    command(tuner, "--out", tmp_path / "4", *more, "--trainer.devices", 4, "--trainer.strategy", "fsdp")
    straight = result(tmp_path / "0")
    for out in ("1", "4"):
        gone_on = result(tmp_path / out)
        assert gone_on.keys() == straight.keys()
        assert max(float((gone_on[name] - straight[name]).abs().max()) for name in straight) < 1e-5
        assert losses(tmp_path / out) == pytest.approx(losses(tmp_path / "0"), rel=1e-4)
    parts = [p.name for p in part_files.files_in(complete(tmp_path / "4" / "checkpoints")[-1])]
    assert parts == [part_files.name_of(rank, 4) for rank in range(4)]


@pytest.mark.slow
def test_saved_by_one_gone_on_with_by_two(inputs: list[str], two: dict[str, Path], tmp_path: Path) -> None:
    command("full", *inputs, *LIMITS, "--out", tmp_path / "a", "--trainer.max_steps", 2)
    more = ["--trainer.max_steps", 4, "--resume", "--trainer.devices", 2, "--trainer.strategy", "fsdp"]
    command("full", "--out", tmp_path / "a", *more)
    ours, theirs = result(tmp_path / "a"), result(two["full"])
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in theirs) < 1e-5


def test_torch_reads_the_parts_too(two: dict[str, Path]) -> None:
    """By torch.distributed.checkpoint, which puts a tensor of several files together on its own."""
    from torch.distributed import checkpoint as dcp

    folder = complete(two["full"] / "checkpoints")[-1]
    wanted = {f"model/{name}": torch.zeros(tensor.shape) for name, tensor in result(two["full"]).items()}
    dcp.load(wanted, storage_reader=dcp.HuggingFaceStorageReader(str(folder)))
    ours = load(folder / FILE, whole=True)["state_dict"]
    for name, tensor in result(two["full"]).items():
        assert torch.equal(wanted[f"model/{name}"], ours[name])
        torch.testing.assert_close(ours[name].to(tensor.dtype), tensor, rtol=0, atol=0)


def test_a_checkpoint_of_which_a_part_is_damaged_or_gone_is_passed_over(two: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(two["full"] / "checkpoints", tmp_path / "a", symlinks=True)
    before, newest = complete(tmp_path / "a")
    assert newest_whole(tmp_path / "a") == (newest / FILE, [])
    _, part = part_files.files_in(newest)
    whole = part.read_bytes()
    for at in (10, len(whole) // 2, len(whole) - 1):
        part.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert newest_whole(tmp_path / "a") == (before / FILE, [newest])
    part.write_bytes(whole)
    assert is_whole(newest / FILE)
    part.unlink()
    assert newest_whole(tmp_path / "a") == (before / FILE, [newest])


def test_parts_of_all_shapes_come_back(tmp_path: Path) -> None:
    """Cut as by any layout of processes, read by any other."""
    from litft.models.parts import Part

    torch.manual_seed(0)
    whole = {"a": torch.randn(7, 5), "b": torch.randn(3).bfloat16(), "c": torch.arange(4).reshape(2, 2)}
    cuts = [
        {"a": ((0, 0), (4, 2)), "b": ((0,), (3,))},
        {"a": ((0, 2), (4, 3))},
        {"a": ((4, 0), (3, 5)), "c": ((0, 0), (2, 2))},
    ]
    for rank, boxes in enumerate(cuts):
        tensors = {}
        for name, (offsets, sizes) in boxes.items():
            box = whole[name][tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))]
            tensors[name] = box, Part(tuple(whole[name].shape), offsets, sizes)
        with open(tmp_path / part_files.name_of(rank, 3), "wb") as file:
            part_files.write(file, tensors)
    read = part_files.read(tmp_path)
    for name, tensor in whole.items():
        assert torch.equal(read[name].whole(), tensor) and read[name].whole().dtype == tensor.dtype
    assert torch.equal(read["a"].read((2, 1), (4, 3)), whole["a"][2:6, 1:4])
    (tmp_path / part_files.name_of(1, 3)).unlink()
    assert not part_files.complete(tmp_path)
    with pytest.raises(ValueError, match="a part of it is missing"):
        part_files.read(tmp_path)["a"].read((0, 0), (7, 5))


FULL_DISK = """
import errno, os, sys
from litft.cli.main import main
from litft.engine import background
write = background._File.write
def limited(self, data):
    if os.environ["LOCAL_RANK"] == "1" and "step-000004" in str(self.name):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(self, data)
background._File.write = limited
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_part_that_cannot_be_written_costs_that_checkpoint_only(inputs: list[str], tmp_path: Path) -> None:
    """On the second process's disk alone; the run goes on, and its end doesn't need that checkpoint."""
    (tmp_path / "script.py").write_text(FULL_DISK)
    out = tmp_path / "a"
    words = ["finetune", "full", *inputs, *LIMITS, "--trainer.max_steps", "8", "--out", str(out)]
    words += ["--trainer.strategy", "fsdp", "--checkpoint.keep_last", "9"]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(Path(__file__).parents[2]))
    done = subprocess.run(
        [*line, str(tmp_path / "script.py"), *words], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [said] = [text for text in done.stderr.splitlines() if "could not be written" in text]
    assert "step-000004" in said and "another process" in said and said.endswith("training goes on")
    assert [path.name for path in complete(out / "checkpoints")] == ["step-000002", "step-000006", "step-000008"]
    assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_a_signal_to_any_process_ends_all_with_a_checkpoint(inputs: list[str], tmp_path: Path) -> None:
    import signal
    import time

    from litft.engine.checkpoint_files import newest, step_of

    out = tmp_path / "a"
    words = ["finetune", "lora", *inputs, *LIMITS, "--trainer.max_steps", "5000", "--out", str(out)]
    words += ["--trainer.devices", "2", "--trainer.strategy", "fsdp"]
    line = [sys.executable, "-m", "litft", *words]
    run = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    try:
        log = out / "logs" / "rank-0001.log"
        until = time.monotonic() + 100
        while not (log.exists() and "step 4/" in log.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        second = int(log.read_text().split("process ")[1].split()[0])
        os.kill(second, signal.SIGTERM)
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 143, said
    assert said.count("stopped by SIGTERM") == 1 and "--resume" in said
    kept = newest(out / "checkpoints")
    assert kept is not None and is_whole(kept) and step_of(kept) >= 4
    command("lora", "--out", out, "--resume", "--trainer.max_steps", step_of(kept) + 2)
