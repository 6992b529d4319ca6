"""Checkpoints of whole optimizer steps: complete or absent, resumable to the bit, `last` and `best` beside them."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping

from litft.engine import checkpoint_files as files
from litft.engine import identity
from litft.engine.background import Background, Left
from litft.engine.metrics import StepMetrics
from litft.engine.plain import NotPlain, plain
from litft.engine.signals import Signals, Stopped
from litft.errors import Failed, UserError


class Elsewhere(OSError):
    """Another process could not write."""


class Checkpoints(Checkpoint):
    """Saves what is trained, the optimizer, the schedule, the step, and what callbacks remember.

    A checkpoint is made between two optimizer steps, with everything that belongs to the first (validation, early
    stopping) behind it, and written while training goes on. It holds no random state: a step's random numbers follow
    from the seed and the step (`litft.engine.randomness`). Another number of ranks can go on with it.

    Args:
        every_steps: optimizer steps between checkpoints; only those below by default.
        every_minutes: minutes between checkpoints. One is also made at the end, on Ctrl-C, SIGTERM and SIGUSR1, and
            before an error ends the run.
        keep_last: how many of the newest are kept; the best is kept besides.
        final: which weights become `final/`: the best by `val_loss` where there was validation, or the last.
    """

    def __init__(
        self,
        every_steps: int | None = None,
        every_minutes: float | None = 30.0,
        keep_last: int = 2,
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
        self.allowed: Collection[str] = ()  # what may have changed since a checkpoint that is gone on from
        self.owes_validation = False  # an error kept the step that is gone on from from being validated
        self._writer = Background()
        self._saved_at = time.monotonic()
        self._saved_step = -1
        self._validated = -1
        self._resumed = self._improved = False
        self._validates = False
        self._bests: list[tuple[float, int]] = []  # those before
        self._patience: list[tuple[EarlyStopping, int]] = []
        self._identity: dict[str, str] | None = None
        self._left_out: set[str] = set()  # callbacks whose state a checkpoint can't hold
        self._groups: list[list[dict[str, Any]]] = []

    # ---- when

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Find the folder; write to it in the background."""
        if self.folder is None:
            self.folder = Path(trainer.default_root_dir) / "checkpoints"
        theirs = trainer.strategy.checkpoint_io
        if type(theirs) not in (TorchCheckpointIO, Background):
            raise UserError(
                f"--trainer.plugins {type(theirs).__name__}: a run writes its checkpoints itself\nmend: leave it out"
            )
        trainer.strategy.checkpoint_io = self._writer

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
        self._validates = trainer.enable_validation
        self._identify(trainer, pl_module)
        if self._resumed:
            for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
                for group, settings in zip(optimizer.param_groups, groups, strict=True):
                    group.update(settings)
            self._find_best(trainer)
        if self.signals:
            self.signals.install()
            self.signals.deferred = True
        for early, patience in self._patience:  # this command's, not the checkpoint's
            early.patience = patience
            if early.wait_count >= patience:
                trainer.should_stop = True
        if self.owes_validation:
            self.owes_validation, trainer.validating = False, True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Between two steps: the place where states are saved and signals obeyed."""
        step = trainer.global_step
        stop, writing = self._agreed(trainer)
        if self._writer.pending and not writing:
            self._say_failure(trainer)
        due = bool(self.every_steps and step % self.every_steps == 0)
        if self.every_minutes and not due:
            late = time.monotonic() - self._saved_at > 60 * self.every_minutes
            due = bool(trainer.strategy.broadcast(late)) if trainer.world_size > 1 else late
        if step > max(0, self._saved_step) and (due or stop or self._improved):
            self.save(trainer, now=bool(stop))
        if stop:
            self._stop(trainer, stop)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the last step, ask for the validation that Trainer would leave out in mid-epoch."""
        if trainer.global_step >= pl_module.total_steps:
            trainer.should_stop = True

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Remember the best."""
        losses = getattr(pl_module, "val_losses", None)
        if trainer.sanity_checking or not losses:
            return
        self._validated = trainer.global_step
        if np.isfinite(losses["val_loss"]) and (self.best is None or losses["val_loss"] < self.best[0]):
            self._bests += [self.best] if self.best else []
            self.best = losses["val_loss"], trainer.global_step
            self._improved = True

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Save the last step."""
        if trainer.global_step > self._saved_step or self._improved:
            self.save(trainer, now=True)
        self._close(trainer)
        trainer.strategy.barrier("checkpoint")  # the others read what the first has written
        if self.signals:
            self.signals.deferred = False
        if stop := self._agreed(trainer)[0]:
            self._stop(trainer, stop)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save the steps done, if their state is still there."""
        if self.signals:
            self.signals.deferred = False
        step, whole = trainer.global_step, not getattr(pl_module, "mid_step", False)
        if step >= (pl_module.total_steps or sys.maxsize):  # its validation could not be made up for
            whole = whole and not self._owes_validation(trainer, pl_module)
        try:
            if whole and step > max(0, self._saved_step) and not in_parts(trainer):
                self.save(trainer, now=True, alone=True)
            self._close(trainer, alone=True)
        except Exception as error:  # must not stand before what ended the run
            print(f"no checkpoint of step {step}: {error}", file=sys.stderr)

    def _stop(self, trainer: Trainer, number: int) -> None:
        assert self.folder is not None
        self._close(trainer)
        raise Stopped(number, trainer.global_step, self.folder.parent if files.newest(self.folder) else None)

    def _agreed(self, trainer: Trainer) -> tuple[int | None, bool]:
        """The signal to obey, and whether a checkpoint is being written, in any process; the same on every rank."""
        noted = self.signals.noted if self.signals else None
        if trainer.world_size == 1:
            return noted, self._writer.busy
        signal, writing = _greatest(trainer, noted or 0, self._writer.busy)
        return signal or None, bool(writing)

    # ---- what

    def save(self, trainer: Trainer, now: bool = False, alone: bool = False) -> None:
        """Write `step-N/`, move `last` and `best`, remove what is no longer wanted.

        Args:
            trainer: between two steps.
            now: wait until it is done.
            alone: don't meet the other ranks, which may be gone.
        """
        assert self.folder is not None
        if alone and not trainer.is_global_zero:
            return
        began, step = time.perf_counter(), trainer.global_step
        self._say_failure(trainer)
        place = files.place_of(self.folder, step)
        best = files.place_of(self.folder, self.best[1]) if self.best else None
        finish = functools.partial(_finish, files.half_of(place), place, best, self.keep_last)
        options = {"then": finish, "now": now, "leave": alone and trainer.world_size > 1}
        with contextlib.suppress(Left):
            trainer.save_checkpoint(files.half_of(place) / files.FILE, weights_only=False, storage_options=options)
        self._improved = False
        self._saved_at, self._saved_step = time.monotonic(), step
        for metrics in (c for c in trainer.callbacks if isinstance(c, StepMetrics)):  # type: ignore[attr-defined]
            metrics.leave_out(time.perf_counter() - began)

    def _settled(self, trainer: Trainer, alone: bool = False) -> tuple[Path, Exception] | None:
        """Wait for the last checkpoint; one in parts gets its name once every process has written its own.

        Args:
            trainer: whose processes do so.
            alone: don't meet the others; what lies on the disk says whether they have.
        """
        error, then = self._writer.wait(), self._writer.pending
        if then is None:
            return error
        self._writer.pending = None
        half = then.args[0]
        if not alone and _greatest(trainer, error is not None)[0]:
            if trainer.is_global_zero:
                shutil.rmtree(half, ignore_errors=True)
            error = error or (
                half / files.FILE,
                Elsewhere("another process could not write its part of it; its log says why"),
            )
        elif trainer.is_global_zero and (not alone or files.is_written(half, trainer.world_size)):
            try:
                then()
            except OSError as failed:
                error = half / files.FILE, failed
        return error

    def _say_failure(self, trainer: Trainer) -> None:
        """Say of the last checkpoint that it isn't there, where that is so; training goes on."""
        if not (error := self._settled(trainer)):
            return
        if trainer.is_global_zero or not isinstance(error[1], Elsewhere):  # of the others each to its own log
            print(f"{self._why(*error)}; training goes on", file=sys.stderr)
        assert self.folder is not None
        lost, _ = error
        if self.best and lost.parent == files.half_of(files.place_of(self.folder, self.best[1])):
            while self.best and self.best_file() is None:  # the best before it is still there
                self.best = self._bests.pop() if self._bests else None

    def _close(self, trainer: Trainer, alone: bool = False) -> None:
        """Wait for the last checkpoint.

        Raises:
            Failed: it could not be written.
        """
        if error := self._settled(trainer, alone):
            raise Failed(f"{self._why(*error)}\nmend: make room there, then the same command with --resume")

    def _why(self, path: Path, error: Exception) -> str:
        assert self.folder is not None
        newest = files.newest(self.folder)
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        left = f"the newest checkpoint is that of step {files.step_of(newest)}" if newest else "there is no checkpoint"
        step = path.parent.name.removeprefix(".").removesuffix(".partial")
        return f"checkpoint {self.folder / step} could not be written: {reason}; {left}"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add what the run is made of, and put the loops' counters between two steps of the plan."""
        data, step = trainer.datamodule, trainer.global_step  # type: ignore[attr-defined]
        checkpoint["litft"] = {
            "identity": self._identify(trainer, pl_module),
            "schedule": identity.schedule_of(pl_module),
            "optimizer": getattr(pl_module, "optimizer_name", None),
            "owes_validation": self._owes_validation(trainer, pl_module),
        }
        _between_steps(checkpoint["loops"]["fit_loop"], step, *data.plan.locate(step))
        for name, state in list(checkpoint["callbacks"].items()):
            try:
                checkpoint["callbacks"][name] = plain(state)
            except NotPlain as error:
                del checkpoint["callbacks"][name]
                if name not in self._left_out and trainer.is_global_zero:
                    print(f"{name}: checkpoints leave its state out, which holds {error}", file=sys.stderr)
                self._left_out.add(name)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Refuse a run that isn't the one of the checkpoint; say what becomes of the schedule."""
        if "_instantiator" in checkpoint.get("hyper_parameters", {}):
            raise UserError("the checkpoint names code to run (_instantiator), as none that litft wrote does")
        early = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
        self._patience = [(callback, callback.patience) for callback in early]
        checkpoint.get("callbacks", {}).pop("Timer", None)  # each command has its own --trainer.max_time
        saved = checkpoint.get("litft")
        if saved is None:
            return
        if "identity" not in saved:
            raise UserError(
                "the checkpoint was made by an earlier version of litft, which goes on in another way\n"
                "mend: resume with that version (run.json names it), or begin in another --out"
            )
        step = int(checkpoint["global_step"])
        identity.check(saved["identity"], self._identify(trainer, pl_module), step, self.allowed)
        if saved["optimizer"] != (name := getattr(pl_module, "optimizer_name", None)):
            raise UserError(
                f"the checkpoint holds the state of optimizer {saved['optimizer']}, not of {name}\n"
                f"mend: --model.optimizer {saved['optimizer']}, or begin in another --out"
            )
        groups = [len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"]]
        if groups != (own := [len(g["params"]) for g in pl_module.tuner.param_groups(pl_module.net.model, 0.0, 0.0)]):
            raise UserError(
                f"the checkpoint's optimizer has groups of {groups} weights, this tuner's {own}\n"
                "mend: the tuner's options that it was made with, or begin in another --out"
            )
        changes = identity.schedule_changes(saved["schedule"], identity.schedule_of(pl_module), step)
        if changes and trainer.is_global_zero:
            print(changes)
        self._resumed, self.owes_validation, self._saved_step = True, saved["owes_validation"], step

    def _identify(self, trainer: Trainer, module: Any) -> dict[str, str]:
        """What the run is made of; found out once."""
        if self._identity is None:
            self._identity = identity.of(module, trainer.datamodule)  # type: ignore[attr-defined]
        return self._identity

    def _owes_validation(self, trainer: Trainer, module: Any) -> bool:
        """Whether Trainer validates after the step just done, and hasn't."""
        step, every, epochs = trainer.global_step, trainer.val_check_batch, trainer.check_val_every_n_epoch
        if not step or not self._validates or not every or self._validated == step:
            return False
        epoch, index = trainer.datamodule.plan.locate(step - 1)  # type: ignore[attr-defined]
        count = step if epochs is None else index + 1
        due = count % every == 0 and (epochs is None or (epoch + 1) % epochs == 0)
        return due or step >= (module.total_steps or sys.maxsize)

    def state_dict(self) -> dict[str, Any]:
        """The best so far."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self.best = tuple(state_dict["best"]) if state_dict["best"] else None

    def best_file(self) -> Path | None:
        """The checkpoint of the lowest validation loss, where it is there."""
        assert self.folder is not None
        file = files.place_of(self.folder, self.best[1]) / files.FILE if self.best else None
        return file if file and file.is_file() else None

    def _find_best(self, trainer: Trainer) -> None:
        """Point `best` at what the checkpoint that was gone on from takes for it."""
        assert self.folder is not None
        if (file := self.best_file()) is None:
            self.best = None
        if trainer.is_global_zero:
            files.unlink(self.folder, "best")
            if file:
                files.link(self.folder, "best", file.parent.name)


def _finish(half: Path, place: Path, best: Path | None, keep_last: int) -> None:
    """A checkpoint's file is on the disk: give it its name, point the links at it, let older ones go."""
    rows = place.parents[1] / "metrics.csv"
    if rows.exists():  # whose rows up to this step are not written again
        files.to_disk(rows)
    files.publish(half, place)
    files.link(place.parent, "last", place.name)
    if best is not None and best.is_dir():
        files.link(place.parent, "best", best.name)
    files.prune(place.parent, keep_last, best)


def in_parts(trainer: Trainer) -> bool:
    """Whether each process has a part of what is saved, so that none can save alone."""
    return getattr(trainer.strategy, "sizes", None) is not None


def _greatest(trainer: Trainer, *numbers: int) -> list[int]:
    """The greatest of each number that any process has."""
    flags = torch.tensor(numbers, dtype=torch.int64, device=trainer.strategy.root_device)
    return [int(flag) for flag in trainer.strategy.reduce(flags, reduce_op="max").tolist()]


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
    optimizer = loop["epoch_loop.manual_optimization.optim_step_progress"]
    for part in ("total", "current"):
        optimizer[part] = _all(optimizer[part], optimizer[part]["completed"])
    epochs = loop["epoch_progress"]
    for part in ("total", "current"):
        epochs[part] = _all(epochs[part], epoch) | {"ready": epoch + 1, "started": epoch + 1}
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = step


def _all(counters: dict[str, int], value: int) -> dict[str, int]:
    return dict.fromkeys(counters, value)
