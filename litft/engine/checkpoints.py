"""Checkpoints of whole optimizer steps: complete or absent, resumable to the bit, `last` and `best` beside them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

FILE = "state.ckpt"


class Stopped(Exception):
    """A signal ended the run after its checkpoint was written."""

    def __init__(self, number: int, step: int, folder: Path | None) -> None:
        self.number, self.step, self.folder = number, step, folder
        super().__init__(f"stopped by {signal.Signals(number).name} after step {step}")


class Checkpoints(Checkpoint):
    """Saves what is trained, the optimizer, the schedule, the step and every random state.

    A checkpoint is made between two optimizer steps, with everything that belongs to the first (validation, early
    stopping) behind it. It is written beside its place and renamed.

    Args:
        every_steps: optimizer steps between checkpoints; only those below by default.
        every_minutes: minutes between checkpoints.
        keep_last: how many of the newest are kept; the best is kept besides.
        final: which weights become `final/`: the best by `val_loss` where there was validation, or the last.
    """

    def __init__(
        self,
        every_steps: int | None = None,
        every_minutes: float | None = 30.0,
        keep_last: int = 1,
        final: Literal["best", "last"] = "best",
    ) -> None:
        if keep_last < 1 or (every_steps is not None and every_steps < 1):
            from litft.errors import UserError

            raise UserError("--checkpoint.keep_last and --checkpoint.every_steps must be at least 1")
        self.every_steps, self.every_minutes, self.keep_last, self.final = every_steps, every_minutes, keep_last, final
        self.folder: Path | None = None
        self.best: tuple[float, int] | None = None  # val_loss and step
        self.signal: int | None = None
        self._saved_at = time.monotonic()
        self._saved_step = -1
        self._random_state: list[dict[str, Any]] | None = None
        self._loops: dict[str, Any] | None = None
        self._improved = False

    # ---- when

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder."""
        if self.folder is None:
            self.folder = Path(trainer.default_root_dir) / "checkpoints"

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Between two steps: the place where states are restored, saved, and signals obeyed."""
        if self._random_state is not None:
            _set_random_state(self._random_state[trainer.global_rank % len(self._random_state)])
            self._random_state = None
            self._saved_step = trainer.global_step
            return
        step = trainer.global_step
        self._loops = None
        stop = self._agreed_signal(trainer)
        due = bool(self.every_steps and step and step % self.every_steps == 0)
        if self.every_minutes and not due:
            late = time.monotonic() - self._saved_at > 60 * self.every_minutes
            due = bool(trainer.strategy.broadcast(late)) if trainer.world_size > 1 else late
        if step and (due or stop or self._improved):
            self.save(trainer)
        if stop:
            raise Stopped(stop, step, self.folder)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After the last step, ask for the validation that Trainer would leave out in mid-epoch."""
        if trainer.global_step >= pl_module.total_steps:
            self._loops = trainer.fit_loop.state_dict()
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the best."""
        losses = getattr(pl_module, "val_losses", None)
        if trainer.sanity_checking or not losses or not np.isfinite(losses["val_loss"]):
            return
        if self.best is None or losses["val_loss"] < self.best[0]:
            self.best = losses["val_loss"], trainer.global_step
            self._improved = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step."""
        if trainer.global_step > self._saved_step:
            self.save(trainer)

    def _agreed_signal(self, trainer: Trainer) -> int | None:
        """The signal to obey, if any process was given one; the same answer on every rank."""
        if trainer.world_size == 1:
            return self.signal
        flag = torch.tensor(self.signal or 0, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(flag, reduce_op="max")) or None

    # ---- what

    def save(self, trainer: Trainer) -> None:
        """Write `step-N/`, move `last` and `best`, remove what is no longer wanted."""
        assert self.folder is not None
        step = trainer.global_step
        place = self.folder / f"step-{step:06d}"
        beside = self.folder / f".{place.name}.partial"
        if trainer.is_global_zero:
            beside.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(beside / FILE)
        self._improved = False
        self._saved_at, self._saved_step = time.monotonic(), step
        if trainer.is_global_zero:
            with open(beside / FILE, "rb") as file:
                os.fsync(file.fileno())
            shutil.rmtree(place, ignore_errors=True)
            beside.rename(place)
            self._link("last", place.name)
            if self.best is not None and self.best[1] == step:
                self._link("best", place.name)
            self._prune()
        trainer.strategy.barrier("checkpoint")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random state of every rank."""
        own = _random_state()
        states: list[Any] = [own]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own)
        checkpoint["litft"] = {"random_state": states, "fingerprint": trainer.datamodule.fingerprint}  # type: ignore[attr-defined]
        if self._loops is not None:
            checkpoint["loops"]["fit_loop"] = self._loops

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the random states for the first step; refuse other data."""
        from litft.errors import UserError

        saved = checkpoint.get("litft")
        if saved is None:
            return
        if saved["fingerprint"] != trainer.datamodule.fingerprint:  # type: ignore[attr-defined]
            raise UserError(
                "the checkpoint was made with other data, order or budget of a step: "
                f"{saved['fingerprint']}, now {trainer.datamodule.fingerprint}\n"  # type: ignore[attr-defined]
                "go on with the data, seed and tokens_per_step it was made with, or start in another --out"
            )
        self._random_state = saved["random_state"]

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self.best = tuple(state_dict["best"]) if state_dict["best"] else None  # type: ignore[assignment]

    def _link(self, name: str, target: str) -> None:
        assert self.folder is not None
        fresh = self.folder / f".{name}.link"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        fresh.replace(self.folder / name)

    def _prune(self) -> None:
        assert self.folder is not None
        best = (self.folder / "best").resolve()
        for old in complete(self.folder)[: -self.keep_last]:
            if old.resolve() != best:
                shutil.rmtree(old, ignore_errors=True)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p for p in folder.glob("step-*") if (p / FILE).is_file())


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint's file."""
    found = complete(folder)
    return found[-1] / FILE if found else None


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint."""
    return int(checkpoint.parent.resolve().name.removeprefix("step-"))


def _random_state() -> dict[str, Any]:
    """All random states, in types that load without unpickling code."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, numbers, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [
            str(kind),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, list(numbers), gauss_next],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers), gauss_next))
