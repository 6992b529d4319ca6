"""A run that is killed again and again, at any moment, ends bitwise where the one that wasn't ends."""

from __future__ import annotations

import csv
import os
import random
import signal
import time
from pathlib import Path

import pytest
from runs import assert_same_run
from tiny import chat_rows, save_tiny, write_jsonl
from zygote import Zygote


def half_written(out: Path) -> list[Path]:
    return list((out / "checkpoints").glob(".step-*.partial"))


@pytest.mark.parametrize(
    ("kills", "while_saving", "workers"), [(2, 1, 0), pytest.param(20, 10, 0, marks=pytest.mark.slow)]
)
def test_f3_killed_at_any_moment(
    kills: int, while_saving: int, workers: int, tmp_path: Path, zygote: Zygote, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tmp_path / "model", hidden_size=256, intermediate_size=512)
    data = write_jsonl(tmp_path / "chats.jsonl", chat_rows(60))
    words = ["finetune", "full", "--data", str(data), "--model", str(model), "--trainer.max_steps", "24"]
    words += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.log_every_n_steps", "1"]
    words += ["--val_every_n_steps", "5", "--checkpoint.every_steps", "1", "--samples.count", "0"]
    words += ["--data.tokens_per_step", "160", "--data.num_workers", str(workers)]
    cache = {"LITFT_CACHE": str(tmp_path / "cache")}
    log = tmp_path / "log.txt"

    def run(out: Path) -> int:
        more = ["--out", str(out), *(["--resume"] if out.exists() and any(out.iterdir()) else [])]
        return zygote.start("command", log, words=[*words, *more], folder=str(tmp_path), environment=cache)

    straight, began = tmp_path / "straight", time.monotonic()
    assert zygote.wait(run(straight)) == 0, log.read_text()[-3000:]
    duration = time.monotonic() - began

    dice, done, inside, finished = random.Random(kills), 0, 0, []
    out = tmp_path / "killed-0"
    while done < kills:
        process = run(out)
        if done < while_saving:  # wait for a save to begin, after a while of training
            wake, pause = time.monotonic() + dice.uniform(0, duration / 4), dice.uniform(0, 0.004)
            while zygote.poll(process) is None and not (time.monotonic() > wake and half_written(out)):
                time.sleep(0.0002)
            time.sleep(pause)
        else:
            time.sleep(dice.uniform(0, duration))
        if zygote.poll(process) is None:
            os.killpg(process, signal.SIGKILL)
        code = zygote.wait(process)
        if code == -signal.SIGKILL:
            done, inside = done + 1, inside + bool(half_written(out))
        else:
            assert code == 0, log.read_text()[-3000:]
            finished.append(out)
            out = tmp_path / f"killed-{len(finished)}"
    if out.exists():
        assert zygote.wait(run(out)) == 0, log.read_text()[-3000:]
        finished.append(out)

    print(f"{done} kills, {inside} of them inside a save, {len(finished)} runs")
    assert inside >= (5 if kills == 20 else 1)
    for out in finished:
        with open(out / "metrics.csv", newline="") as file:
            assert [int(row["step"]) for row in csv.DictReader(file)] == list(range(25))
        assert_same_run(straight, out)
        assert not half_written(out)
