"""Checkpoints of whole optimizer steps: complete or absent, resumable to the bit, `last` and `best` beside them."""

from __future__ import annotations

import os
import random
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Checkpoint

from litft.engine.metrics import StepMetrics
from litft.engine.signals import Signals, Stopped
from litft.errors import UserError

FILE = "state.ckpt"


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
        if keep_last < 1:
            raise UserError(
                f"--checkpoint.keep_last {keep_last}: must be at least 1; a run keeps its newest checkpoint"
            )
        if every_steps is not None and every_steps < 1:
            raise UserError(
                f"--checkpoint.every_steps {every_steps}: must be at least 1; leave it out for none by steps"
            )
        if every_minutes is not None and not every_minutes >= 0:
            raise UserError(f"--checkpoint.every_minutes {every_minutes}: must be above 0; null for none by the clock")
        self.every_steps, self.every_minutes, self.keep_last, self.final = every_steps, every_minutes, keep_last, final
        self.folder: Path | None = None
        self.best: tuple[float, int] | None = None  # val_loss and step
        self.signals: Signals | None = None
        self._saved_at = time.monotonic()
        self._saved_step = -1
        self._random_state: list[dict[str, Any]] | None = None
        self._groups: list[list[dict[str, Any]]] = []
        self._improved = False

    # ---- when

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Find the folder."""
        if self.folder is None:
            self.folder = Path(trainer.default_root_dir) / "checkpoints"

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Note the optimizers' settings as this command has them; a checkpoint is about to bring its own."""
        self._groups = [[_settings(group) for group in o.param_groups] for o in trainer.optimizers]

    def on_sanity_check_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Take the signals back from Trainer."""
        if self.signals:
            self.signals.install()
            self.signals.check()

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """From here on there is something to lose: signals wait for the end of a step."""
        self._saved_at = time.monotonic()
        if self._random_state is not None:
            for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
                for group, settings in zip(optimizer.param_groups, groups, strict=True):
                    group.update(settings)
            self._find_best(trainer)
        if self.signals:
            self.signals.install()
            self.signals.deferred = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Between two steps: the place where states are restored, saved, and signals obeyed."""
        step = trainer.global_step
        if self._random_state is not None:
            _set_random_state(self._random_state[trainer.global_rank % len(self._random_state)])
            self._random_state = None
            self._saved_step = step
        stop = self._agreed_signal(trainer)
        due = bool(self.every_steps and step % self.every_steps == 0)
        if self.every_minutes and not due:
            late = time.monotonic() - self._saved_at > 60 * self.every_minutes
            due = bool(trainer.strategy.broadcast(late)) if trainer.world_size > 1 else late
        if step > max(0, self._saved_step) and (due or stop or self._improved):
            self.save(trainer)
        if stop:
            self._stop(stop, step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the last step, ask for the validation that Trainer would leave out in mid-epoch."""
        if trainer.global_step >= pl_module.total_steps:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Remember the best."""
        losses = getattr(pl_module, "val_losses", None)
        if trainer.sanity_checking or not losses or not np.isfinite(losses["val_loss"]):
            return
        if self.best is None or losses["val_loss"] < self.best[0]:
            self.best = losses["val_loss"], trainer.global_step
            self._improved = True

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the last step."""
        if trainer.global_step > self._saved_step:
            self.save(trainer)
        if self.signals:
            self.signals.deferred = False
        if stop := self._agreed_signal(trainer):
            self._stop(stop, trainer.global_step)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Nothing more to wait for."""
        if self.signals:
            self.signals.deferred = False

    def _stop(self, number: int, step: int) -> None:
        assert self.folder is not None
        raise Stopped(number, step, self.folder.parent if newest(self.folder) else None)

    def _agreed_signal(self, trainer: Trainer) -> int | None:
        """The signal to obey, if any process was given one; the same answer on every rank."""
        noted = self.signals.noted if self.signals else None
        if trainer.world_size == 1:
            return noted
        flag = torch.tensor(noted or 0, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(flag, reduce_op="max")) or None

    # ---- what

    def save(self, trainer: Trainer) -> None:
        """Write `step-N/`, move `last` and `best`, remove what is no longer wanted."""
        assert self.folder is not None
        began, step = time.perf_counter(), trainer.global_step
        place = self.folder / f"step-{step:06d}"
        beside = self.folder / f".{place.name}.partial"
        if trainer.is_global_zero:
            beside.mkdir(parents=True, exist_ok=True)
        trainer.save_checkpoint(beside / FILE, weights_only=False)  # the optimizer too
        self._improved = False
        self._saved_at, self._saved_step = time.monotonic(), step
        if trainer.is_global_zero:
            _to_disk(beside / FILE)
            shutil.rmtree(place, ignore_errors=True)
            beside.rename(place)
            _to_disk(self.folder)
            link(self.folder, "last", place.name)
            if self.best is not None and self.best[1] == step:
                link(self.folder, "best", place.name)
            self._prune()
        trainer.strategy.barrier("checkpoint")
        for metrics in (c for c in trainer.callbacks if isinstance(c, StepMetrics)):  # type: ignore[attr-defined]
            metrics.leave_out(time.perf_counter() - began)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the random state of every rank, and put the loops' counters between two steps of the plan."""
        own = _random_state()
        states: list[Any] = [own]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own)
        data, step = trainer.datamodule, trainer.global_step  # type: ignore[attr-defined]
        checkpoint["litft"] = {
            "random_state": states,
            "fingerprint": data.fingerprint,
            "optimizer": getattr(pl_module, "optimizer_name", None),
        }
        _between_steps(checkpoint["loops"]["fit_loop"], step, *data.plan.locate(step))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep the random states for the first step; refuse other data and another optimizer."""
        if "_instantiator" in checkpoint.get("hyper_parameters", {}):
            raise UserError("the checkpoint names code to run (_instantiator), as none that litft wrote does")
        checkpoint.get("callbacks", {}).pop("Timer", None)  # each command has its own --trainer.max_time
        saved = checkpoint.get("litft")
        if saved is None:
            return
        now = trainer.datamodule.fingerprint  # type: ignore[attr-defined]
        if saved["fingerprint"] != now:
            raise UserError(
                "the checkpoint was made with other rows, seed or tokens_per_step: its step numbers mean other rows\n"
                "mend: --resume with the data, seed and --data.tokens_per_step it was made with,\n"
                "or begin in another --out (--model OLD_OUT takes over what was learnt)"
            )
        if saved["optimizer"] != (name := getattr(pl_module, "optimizer_name", None)):
            raise UserError(
                f"the checkpoint holds the state of optimizer {saved['optimizer']}, not of {name}\n"
                f"mend: --model.optimizer {saved['optimizer']}, or begin in another --out"
            )
        self._random_state = saved["random_state"]

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self.best = tuple(state_dict["best"]) if state_dict["best"] else None

    def best_file(self) -> Path | None:
        """The checkpoint of the lowest validation loss, where it is there."""
        assert self.folder is not None
        file = self.folder / f"step-{self.best[1]:06d}" / FILE if self.best else None
        return file if file and file.is_file() else None

    def _find_best(self, trainer: Trainer) -> None:
        """Point `best` at what the checkpoint that was gone on from takes for it."""
        assert self.folder is not None
        if (file := self.best_file()) is None:
            self.best = None
        if trainer.is_global_zero:
            (self.folder / "best").unlink(missing_ok=True)
            if file:
                link(self.folder, "best", file.parent.name)

    def _prune(self) -> None:
        assert self.folder is not None
        best = self.best_file()
        for old in complete(self.folder)[: -self.keep_last]:
            if best is None or old != best.parent:
                shutil.rmtree(old, ignore_errors=True)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What a command sets of a parameter group; its learning rate is the schedule's."""
    return {key: value for key, value in group.items() if key not in ("params", "lr", "initial_lr")}


def _between_steps(loop: dict[str, Any], step: int, epoch: int, index: int) -> None:
    """Set Trainer's counters to where `step` optimizer steps end: `index` steps into `epoch`, all of them complete.

    Left alone they would say where in Trainer's loop the save happened, and Trainer's own way back to the middle of an
    epoch counts a batch twice or takes the next epoch for as long as the last.
    """
    batches = loop["epoch_loop.batch_progress"]
    batches |= {
        "total": _all(batches["total"], step),
        "current": _all(batches["current"], index),
        "is_last_batch": False,
    }
    epochs = loop["epoch_progress"]
    for part in ("total", "current"):
        epochs[part] = _all(epochs[part], epoch) | {"ready": epoch + 1, "started": epoch + 1}
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step


def _all(counters: dict[str, int], value: int) -> dict[str, int]:
    return dict.fromkeys(counters, value)


def link(folder: Path, name: str, target: str) -> None:
    """Point `folder/name` at its neighbour `target`; never absent in between, and valid after the folder is moved."""
    fresh = folder / f".{name}.link"
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target)
    fresh.replace(folder / name)


def complete(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("step-*") if (p / FILE).is_file()]
    return sorted(found, key=lambda p: step_of(p / FILE))


def newest(folder: Path) -> Path | None:
    """The newest checkpoint's file."""
    found = complete(folder)
    return found[-1] / FILE if found else None


def is_whole(file: Path) -> bool:
    """Whether a checkpoint's file is there to its end and its checksums hold."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def newest_whole(folder: Path, write: bool = True) -> tuple[Path | None, list[Path]]:
    """The checkpoint to go on from, and newer ones that are damaged.

    Args:
        folder: `checkpoints/` of a run.
        write: take the damaged and the half-written out of the way, and point `last` at the one found; for one process.
    """
    damaged = []
    for place in reversed(complete(folder)):
        if not is_whole(place / FILE):
            damaged.append(place)
            continue
        if write:
            for broken in damaged:
                broken.rename(broken.with_name(f"damaged-{broken.name}"))
            for half in folder.glob(".step-*.partial"):
                shutil.rmtree(half, ignore_errors=True)
            link(folder, "last", place.name)
        return place / FILE, damaged
    return None, damaged


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint's file."""
    return int(checkpoint.parent.resolve().name.removeprefix("step-"))


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
