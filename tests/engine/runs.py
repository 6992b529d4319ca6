"""Runs of tiny models for the tests of checkpoints: started, interrupted, resumed, compared to the bit."""

from __future__ import annotations

import csv
import signal
import threading
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything

from litft import SFT, ChatData, Full, LoRA, PreferenceData, QLoRA
from litft.engine.checkpoint_files import newest, sum_of
from litft.engine.checkpoints import Checkpoints
from litft.engine.run import run
from litft.engine.samples import Samples
from litft.engine.signals import Signals, Stopped

CLOCK = {"tokens_per_s", "trained_tokens_per_s", "step_s", "data_s", "memory_gb"}
"""Columns of metrics.csv that differ from run to run."""
DATA_KEYS = ("val", "val_fraction", "weights", "packing", "tokens_per_batch", "seed")


class PowerCut(Exception):
    pass


def cut_power(trainer: Any) -> None:
    """End the run as a process ends that has no time for last words."""
    for callback in trainer.callbacks:
        callback.on_exception = lambda *_: None
    raise PowerCut


class Trace(Callback):
    """Notes each step's rows and learning rate; ends the run at a step, in one of several ways.

    Args:
        stop_at: the optimizer step that is the last one done.
        how: `signal`, `ctrl-c` or `power cut` after it; `signal within` it, between two micro-batches; `error within`
            the step after it, between two micro-batches; `error in validation` after it.
    """

    def __init__(self, stop_at: int | None = None, how: str = "signal") -> None:
        self.stop_at, self.how = stop_at, how
        self.rows: dict[int, list[int]] = {}
        self.lrs: dict[int, float] = {}
        self.trainable: int = 0
        self._forwards = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rows[trainer.global_step] = batch["rows"]
        self.lrs[trainer.global_step] = trainer.optimizers[0].param_groups[0]["lr"]
        self.trainable = sum(p.numel() for p in pl_module.trainable_parameters())
        if self.stop_at is not None and self.how.endswith(" within"):
            step = self.stop_at - (self.how == "signal within")
            self._forwards = 0
            if trainer.global_step == step:
                assert len(batch["micro_batches"]) > 1
                pl_module.net.register_forward_pre_hook(self._within)

    def _within(self, *_: Any) -> None:
        self._forwards += 1
        if self._forwards == 2:
            if self.how == "error within":
                raise PowerCut
            signal.raise_signal(signal.SIGTERM)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self.how == "error in validation" and trainer.global_step == self.stop_at:
            raise PowerCut

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.stop_at and self.how in ("signal", "ctrl-c", "power cut"):
            if self.how == "power cut":
                cut_power(trainer)
            signal.raise_signal(signal.SIGINT if self.how == "ctrl-c" else signal.SIGTERM)


def tuner_of(name: str) -> Any:
    """A tuner with dropout, where it has any."""
    if name == "full":
        return Full()
    return LoRA(r=4, dropout=0.2) if name == "lora" else QLoRA(r=4, dropout=0.2)


def start(
    folder: Path,
    model: Path,
    data: Path | list[Path],
    *,
    tuner: str = "lora",
    epochs: int | None = None,
    steps: int | None = None,
    tokens_per_step: int | None = 160,
    resume: bool = False,
    stop_at: int | None = None,
    how: str = "signal",
    workers: int = 0,
    val_every: int | None = 3,
    log_every: int = 1,
    patience: int | None = None,
    checkpoints: dict[str, Any] | None = None,
    allow_changed: tuple[str, ...] = (),
    samples: int = 0,
    method: type = SFT,
    callbacks: tuple[Callback, ...] = (),
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Trace, Any, Any]:
    """One run as the command line makes it, fp32 on the CPU; how it ended is the trace's business.

    Returns:
        Trace, outcome (None where it was stopped), and the Trainer.
    """
    seed_everything(42, verbose=False)
    trace = Trace(stop_at, how)
    data_keys = {
        k: options.pop(k)
        for k in ("val", "val_fraction", "weights", "packing", "tokens_per_batch", "seed")
        if k in options
    }
    chats = (ChatData if method.rows == "chats" else PreferenceData)(
        [str(f) for f in data] if isinstance(data, list) else str(data),
        tokens_per_step=tokens_per_step,
        num_workers=workers,
        **data_keys,
    )
    lightning_trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs or (1 if steps is None else -1),
        max_steps=steps or -1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=-1,
        callbacks=[trace, *callbacks, Checkpoints(**(checkpoints or {})), Samples(count=samples, max_new_tokens=8)],
        **{"precision": "32-true", **(trainer or {})},
    )
    outcome = None
    with Signals() as signals:
        try:
            outcome = run(
                lightning_trainer,
                method(path=str(model), tuner=tuner_of(tuner), **options),
                chats,
                folder,
                resume=resume,
                val_every_n_steps=val_every,
                patience=patience,
                log_every_n_steps=log_every,
                signals=signals,
                allow_changed=allow_changed,
            )
        except (Stopped, PowerCut) as stop:
            assert stop_at is not None, stop
            for thread in threading.enumerate():  # a process that is gone would have taken it along
                if thread.name == "checkpoint":
                    thread.join()
    return trace, outcome, lightning_trainer


def metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what the clock decides."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]


def last(folder: Path) -> dict[str, Any]:
    """The newest checkpoint, loaded as untrusted files are."""
    file = newest(folder / "checkpoints")
    assert file is not None
    return torch.load(file, weights_only=True)


def resave(state: dict[str, Any], file: Path) -> None:
    """Put something else in a checkpoint's place, as somebody may who means to: without the checksum it had."""
    torch.save(state, file)
    sum_of(file).unlink()


def assert_same(a: Any, b: Any, where: str = "") -> None:
    """Two nests of containers and tensors are bitwise the same."""
    assert type(a) is type(b), f"{where}: {type(a)} {type(b)}"
    if isinstance(a, dict):
        assert a.keys() == b.keys(), f"{where}: {set(a) ^ set(b)}"
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{index}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, f"{where}: {a} != {b}"


def assert_same_run(a: Path, b: Path) -> None:
    """Two runs ended in the same state: weights, optimizer, schedule, best, records, result."""
    one, two = last(a), last(b)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "litft", "callbacks", "global_step", "loops"):
        assert_same(one[key], two[key], key)
    assert metrics(a) == metrics(b)
    ours, theirs = ({p.name: p.read_bytes() for p in (f / "final").glob("*.safetensors")} for f in (a, b))
    assert ours and ours == theirs
