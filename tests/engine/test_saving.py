"""Saving: in the background, one at a time, from a copy; what signals, errors, clocks and torn lines do to a run."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback
from runs import PowerCut, assert_same, assert_same_run, last, metrics, start

from litft import SFT
from litft.engine import background
from litft.engine.background import Background, size_of, to_host
from litft.engine.checkpoint_files import FILE, complete, is_whole
from litft.engine.signals import OBEYED, Stopped
from litft.errors import UserError


class Slow:
    """A disk that is slow until the run has made so many steps; watches how many write to it at a time."""

    def __init__(self, patch: pytest.MonkeyPatch, until: int) -> None:
        self.until, self.step, self.now, self.most = until, 0, 0, 0
        self.begun: list[int] = []
        self.write = background._write
        patch.setattr(background, "_write", self)

    def __call__(self, checkpoint: dict[str, Any], path: Path, then: Any) -> None:
        self.now += 1
        self.most = max(self.most, self.now)
        self.begun.append(self.step)
        patience = time.monotonic() + 20
        while self.step < self.until and time.monotonic() < patience:
            time.sleep(0.001)
        self.write(checkpoint, path, then)
        self.now -= 1

    def watch(self) -> Callback:
        slow = self

        class Steps(Callback):
            def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
                slow.step = trainer.global_step

        return Steps()


def test_training_goes_on_while_a_checkpoint_of_an_earlier_step_is_written(
    tmp_path: Path, tiny_llama: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"steps": 6, "val_every": 0, "checkpoints": {"every_steps": 2, "keep_last": 9}}
    monkeypatch.setattr(background, "host_memory_left", lambda: 0)
    start(tmp_path / "waited", tiny_llama, chats, **options)
    monkeypatch.setattr(background, "host_memory_left", lambda: 1e12)
    with monkeypatch.context() as patch:
        slow = Slow(patch, until=4)
        start(tmp_path / "a", tiny_llama, chats, callbacks=(slow.watch(),), **options)
    assert slow.begun[0] == 2 and slow.most == 1  # begun after step 2, ended after step 4; never two at a time
    for step in (2, 4, 6):
        one, two = (
            torch.load(tmp_path / f / "checkpoints" / f"step-{step:06d}" / FILE, weights_only=True)
            for f in ("waited", "a")
        )
        for key in ("state_dict", "optimizer_states", "litft", "loops"):
            assert_same(one[key], two[key], f"{step}: {key}")


def test_a_copy_is_one_and_on_the_host() -> None:
    shared = torch.arange(4.0)
    given = {"a": shared, "b": [shared, (1, "x")], 3: {"c": shared.view(2, 2)[:1]}}
    copy = to_host(given)
    shared.zero_()
    assert copy["a"] is copy["b"][0] and copy["a"].tolist() == [0, 1, 2, 3] and copy[3]["c"].tolist() == [[0, 1]]
    assert copy["b"][1] == (1, "x") and size_of(given) == 4 * (4 + 4 + 2)


def test_what_cannot_be_written_leaves_nothing_and_is_told_once(tmp_path: Path) -> None:
    writer = Background()
    writer.save_checkpoint(
        {"a": threading.Lock()}, tmp_path / "half" / FILE, {"then": None}
    )  # nothing that can be pickled
    path, error = writer.wait() or (None, None)
    assert path == tmp_path / "half" / FILE and isinstance(error, TypeError)
    assert writer.wait() is None and not list(tmp_path.iterdir())
    writer.save_checkpoint({"a": torch.ones(3)}, tmp_path / "half" / FILE, {"then": None})
    assert writer.wait() is None and is_whole(tmp_path / "half" / FILE)


# ---- signals


def test_sigusr1_is_obeyed_like_sigterm(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    assert signal.SIGUSR1 in OBEYED

    class Limit(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                signal.raise_signal(signal.SIGUSR1)

    start(tmp_path / "a", tiny_llama, chats, steps=6)
    _, outcome, _ = start(tmp_path / "b", tiny_llama, chats, steps=6, callbacks=(Limit(),), stop_at=99)
    assert outcome is None and [p.name for p in complete(tmp_path / "b" / "checkpoints")] == ["step-000002"]
    start(tmp_path / "b", tiny_llama, chats, steps=6, resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_second_ctrl_c_ends_at_once_and_keeps_the_steps_done(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    class Impatient(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step == 3:
                pl_module.net.register_forward_pre_hook(self.press)

        def press(self, *_: Any) -> None:
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(Stopped):
                signal.raise_signal(signal.SIGINT)
            raise Stopped(signal.SIGINT)

    start(tmp_path / "a", tiny_llama, chats, steps=6)
    start(tmp_path / "b", tiny_llama, chats, steps=6, callbacks=(Impatient(),), stop_at=99)
    assert [p.name for p in complete(tmp_path / "b" / "checkpoints")][-1] == "step-000003"
    start(tmp_path / "b", tiny_llama, chats, steps=6, resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_an_error_in_mid_update_saves_nothing(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    """Some weights have moved: that is no state of the run; the checkpoint before is."""

    class Breaks(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.optimizers[0].register_step_post_hook(self.fails)

        def fails(self, *_: Any) -> None:
            raise PowerCut

    start(tmp_path / "a", tiny_llama, chats, steps=6)
    options: dict[str, Any] = {"steps": 6, "checkpoints": {"every_steps": 3}}
    start(tmp_path / "b", tiny_llama, chats, callbacks=(Breaks(),), stop_at=99, **options)
    assert [p.name for p in complete(tmp_path / "b" / "checkpoints")] == ["step-000003"]


# ---- clocks and lines


def test_jumps_of_the_clock_change_nothing(
    tmp_path: Path, tiny_llama: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day back, then ten years on: no checkpoint is made for it, and no duration is wrong."""
    start(tmp_path / "a", tiny_llama, chats, steps=6, val_every=0)
    now, shift = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + shift[0])

    class Jumps(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            shift[0] = {1: -86400.0, 3: 3.2e8, 4: -1e9}.get(trainer.global_step, shift[0])

    start(tmp_path / "b", tiny_llama, chats, steps=6, val_every=0, callbacks=(Jumps(),))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert [p.name for p in complete(tmp_path / "b" / "checkpoints")] == ["step-000006"]
    assert 0 < json.loads((tmp_path / "b" / "run.json").read_text())["seconds"] < 600


@pytest.mark.parametrize(
    "torn", ["5,0.41", "5", '5,0.4,"', "\x00\x00\x00", "4,0.1,1,2,3,4,5,6,7,8,9,10,11,12,13,14", "\udcff\udcfe"]
)
def test_a_torn_line_of_metrics_is_mended(torn: str, tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    start(tmp_path / "a", tiny_llama, chats, steps=6)
    start(tmp_path / "b", tiny_llama, chats, steps=6, stop_at=4)
    with open(tmp_path / "b" / "metrics.csv", "a", errors="surrogateescape") as file:
        file.write(torn)
    start(tmp_path / "b", tiny_llama, chats, steps=6, resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert [int(row["step"]) for row in metrics(tmp_path / "b")] == list(range(7))


def test_a_kill_while_metrics_are_opened_again_costs_no_row(
    tmp_path: Path, tiny_llama: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from litft.engine.metrics import MetricsCSV

    start(tmp_path / "a", tiny_llama, chats, steps=4)
    before = (tmp_path / "a" / "metrics.csv").read_text()

    def killed(self: Any, rows: Any) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(MetricsCSV, "_write", killed)
        with pytest.raises(PowerCut):
            MetricsCSV(tmp_path / "a", resume_step=3).log_metrics({"step": 4})
    assert (tmp_path / "a" / "metrics.csv").read_text() == before


def test_too_many_bad_steps_leave_a_checkpoint_and_name_rows(
    tmp_path: Path, tiny_llama: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from litft.engine.metrics import BadLoss

    class Bad(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step >= 2:
                batch["micro_batches"][0]["denominator"] *= float("nan")

    with pytest.raises(BadLoss, match=r"(?s)step 5: .*its rows: .*chats.jsonl:\d+.*max_bad_steps 2"):
        start(tmp_path / "a", tiny_llama, chats, steps=9, val_every=0, max_bad_steps=2, callbacks=(Bad(),))
    state = last(tmp_path / "a")
    assert state["global_step"] == 5 and all(torch.isfinite(t).all() for t in state["state_dict"].values())
    assert capsys.readouterr().err.count("step skipped") == 2


def test_another_checkpoint_callback_finds_its_files_at_once(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    theirs = ModelCheckpoint(tmp_path / "theirs", every_n_train_steps=2, save_top_k=-1, filename="{step}")
    start(tmp_path / "a", tiny_llama, chats, steps=4, callbacks=(theirs,))
    files = sorted((tmp_path / "theirs").iterdir())
    assert [file.name for file in files] == ["step=2.ckpt", "step=4.ckpt"]
    assert [torch.load(file, weights_only=True)["global_step"] for file in files] == [2, 4]
    assert [p.name for p in complete(tmp_path / "a" / "checkpoints")][-1] == "step-000004"


@pytest.mark.parametrize(("lost", "best"), [(4, 2), (3, 4)])
def test_a_best_that_cannot_be_written_does_not_cost_the_one_before(
    lost: int, best: int, tmp_path: Path, tiny_llama: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = background._write

    def full(checkpoint: dict[str, Any], path: Path, then: Any) -> None:
        if f"step-{lost:06d}" in str(path):
            raise OSError(28, "No space left on device")
        write(checkpoint, path, then)

    class Losses(SFT):
        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            wanted = {0: 9.0, 2: 3.0, 4: 1.0, 6: 4.0, 8: 5.0, 10: 6.0}
            self.val_losses = {"val_loss": wanted[self.trainer.global_step]}

    monkeypatch.setattr(background, "_write", full)
    options: dict[str, Any] = {"steps": 10, "val_every": 2, "method": Losses, "checkpoints": {"every_steps": 1}}
    _, outcome, _ = start(tmp_path / "a", tiny_llama, chats, **options)
    assert outcome.final_step == best and outcome.losses_after == {"val_loss": {2: 3.0, 4: 1.0}[best]}
    assert (tmp_path / "a" / "checkpoints" / "best" / FILE).resolve().parent.name == f"step-{best:06d}"


@pytest.mark.parametrize("stop", [None, 6])
def test_patience_that_has_run_out_stays_so(stop: int | None, tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    options: dict[str, Any] = {"steps": 20, "val_every": 2, "patience": 2, "lr": 0.0}
    straight, outcome, _ = start(tmp_path / "a", tiny_llama, chats, **options)
    end = len(straight.rows)
    assert end < 20 and outcome.stopped
    start(tmp_path / "b", tiny_llama, chats, stop_at=stop and end, **options)
    trace, again, _ = start(tmp_path / "b", tiny_llama, chats, resume=True, **options)
    assert not trace.rows and again.stopped == outcome.stopped
    assert_same_run(tmp_path / "a", tmp_path / "b")
    more, *_ = start(tmp_path / "b", tiny_llama, chats, resume=True, **(options | {"patience": 9}))
    assert more.rows  # another patience is this command's


def test_a_copy_that_has_followed_the_links_goes_on(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    start(tmp_path / "a", tiny_llama, chats, steps=6)
    start(tmp_path / "b", tiny_llama, chats, steps=6, stop_at=4)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    assert (tmp_path / "c" / "checkpoints" / "last").is_dir()
    start(tmp_path / "c", tiny_llama, chats, steps=6, resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "c")
    with pytest.raises(UserError, match="has made 6 steps already, this command asks for 3"):
        start(tmp_path / "c", tiny_llama, chats, steps=3, resume=True)


class Odd(Callback):
    """A callback of somebody's, whose state is not all plain data."""

    def __init__(self, more: Any = None) -> None:
        self.seen: list[Any] = []
        self.state = {"loss": np.float64(0.5), "pair": Pair(1, 2)} | ({"more": more} if more else {})

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen.append(state_dict)


Pair = namedtuple("Pair", "a b")


def test_a_callbacks_numbers_are_kept_and_what_is_no_data_is_left_out_and_said(
    tmp_path: Path, tiny_llama: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"steps": 4, "checkpoints": {"every_steps": 1}}
    start(tmp_path / "a", tiny_llama, chats, stop_at=2, callbacks=(Odd(),), **options)
    again = Odd()
    start(tmp_path / "a", tiny_llama, chats, resume=True, callbacks=(again,), **options)
    assert again.seen == [{"loss": 0.5, "pair": (1, 2)}] and "leave its state out" not in capsys.readouterr().err
    start(tmp_path / "b", tiny_llama, chats, stop_at=2, callbacks=(Odd(threading.Lock()),), **options)
    assert capsys.readouterr().err.count("Odd: checkpoints leave its state out, which holds _thread.lock") == 1
    _, outcome, _ = start(tmp_path / "b", tiny_llama, chats, resume=True, callbacks=(again,), **options)
    assert outcome is not None and len(again.seen) == 1


def test_another_writer_of_checkpoints_is_refused(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    from lightning.pytorch.plugins.io import AsyncCheckpointIO

    with pytest.raises(UserError, match=r"--trainer.plugins AsyncCheckpointIO: .*\nmend: leave it out"):
        start(tmp_path / "a", tiny_llama, chats, steps=2, trainer={"plugins": [AsyncCheckpointIO()]})


def test_bad_steps_between_two_records_are_counted_over_a_resume(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    class Bad(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 2:
                batch["micro_batches"][0]["denominator"] *= float("nan")

    start(tmp_path / "a", tiny_llama, chats, steps=6, val_every=0, log_every=50, stop_at=4, callbacks=(Bad(),))
    start(tmp_path / "a", tiny_llama, chats, steps=6, val_every=0, resume=True)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["bad_steps"] == 1


def test_a_full_disk_masks_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from litft.engine.run_folder import RunFile

    file = RunFile(tmp_path, {})
    file.path.with_suffix(".json.partial").mkdir()  # nothing can be written there
    with pytest.raises(OSError):
        file.write()
    file.path.with_suffix(".json.partial").rmdir()
    before = file.path.read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
        )
        file.finish("Stopped")
    assert file.path.read_text() == before and not list(tmp_path.glob("*.partial"))
    assert "run.json: cannot be written: No space left on device" in capsys.readouterr().err
