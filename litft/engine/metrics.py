"""What a logged step shows: one record over all micro-batches and ranks, to every logger and to metrics.csv."""

from __future__ import annotations

import contextlib
import csv
import math
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from litft.engine.run_folder import read_metrics
from litft.errors import Failed

COLUMNS = [
    "step",
    "epoch",
    "loss",
    "val_loss",
    "lr",
    "grad_norm",
    "tokens",
    "trained_tokens",
    "tokens_per_s",
    "trained_tokens_per_s",
    "step_s",
    "data_s",
    "memory_gb",
]
LOGGED_ROWS = 100  # about how many a run has where log_every_n_steps isn't said


class BadLoss(Failed):
    """The run stopped because too many optimizer steps had a non-finite loss or gradient."""


class StepMetrics(Callback):
    """Makes the record of each logged optimizer step; its loss is that of the whole step over all ranks.

    Between logged steps nothing is read from the device.

    Args:
        every: optimizer steps between records; about a hundred records a run by default.
    """

    def __init__(self, every: int | None = None) -> None:
        self.every = every
        self.record: dict[str, Any] = {}
        self.loss: float | None = None
        self.bad_steps = 0
        self.losses_before: dict[str, float] = {}
        self.losses_at: dict[int, dict[str, float]] = {}
        self._bad: torch.Tensor | None = None
        self._rows: list[tuple[int, torch.Tensor, list[int]]] = []
        self._whole: tuple[int, int, float] = (0, 0, 0.0)
        self._first: tuple[int, int, float] | None = None
        self._tokens = self._trained = 0
        self._counted_from = self._start = self._end = 0.0
        self._scaled = False

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Fix the interval."""
        if self.every is None:
            total = getattr(pl_module, "total_steps", None) or trainer.datamodule.total_steps  # type: ignore[attr-defined]
            self.every = min(50, max(1, total // LOGGED_ROWS))

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Start the clocks."""
        self._scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        self._end = self._counted_from = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_sanity_check_end(self, trainer: Trainer, pl_module: Any) -> None:
        """The losses before training, as the record of step 0."""
        whole = trainer.num_sanity_val_steps == float("inf")  # fewer batches than all are no loss worth keeping
        if whole and (losses := getattr(pl_module, "val_losses", None)):
            self.losses_before = dict(losses)
            self.record = {"step": 0, "epoch": 0.0, **losses}
            self._send(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Time the wait for data."""
        self._send(trainer)
        self._start = time.perf_counter()
        self._data_s = self._start - self._end

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count, and make the record where one is due."""
        step = trainer.global_step
        self._tokens += batch["tokens"]
        self._trained += batch["trained"]
        self._watch(outputs["loss"], pl_module.grad_norm, step, batch["rows"])
        total = pl_module.total_steps
        if step % self.every and step != total and step != 1:  # type: ignore[operator]
            self._end = time.perf_counter()
            return
        loss = float(trainer.strategy.reduce(outputs["loss"], reduce_op="mean"))
        now = time.perf_counter()
        elapsed = now - self._counted_from
        epoch, index = trainer.datamodule.plan.locate(step - 1)  # type: ignore[attr-defined]
        self.record = {
            "step": step,
            "epoch": round(epoch + (index + 1) / len(trainer.datamodule.plan.steps(epoch)), 4),  # type: ignore[attr-defined]
            "loss": loss,
            "lr": self._lr(trainer),
            "grad_norm": float(pl_module.grad_norm),
            "tokens": batch["tokens"],
            "trained_tokens": batch["trained"],
            "tokens_per_s": self._tokens / elapsed,
            "trained_tokens_per_s": self._trained / elapsed,
            "step_s": now - self._start,
            "data_s": self._data_s,
            "memory_gb": peak_memory_gb(),
            **pl_module.measures.means(trainer.strategy),
        }
        interval = self._tokens, self._trained, elapsed
        self._first = self._first or interval
        self._whole = self._whole[0] + interval[0], self._whole[1] + interval[1], self._whole[2] + interval[2]
        self._tokens = self._trained = 0
        self._counted_from = self._end = now
        self._judge(trainer, pl_module)
        self.loss = loss
        pl_module.log("loss", loss, logger=False)  # for callbacks; what is in a bar would be read back every step

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Put the losses into the step's record; the time validation took isn't training's."""
        if trainer.sanity_checking:
            return
        if self.record.get("step") != trainer.global_step:
            self._send(trainer)
            epoch, index = trainer.datamodule.plan.locate(trainer.global_step - 1)  # type: ignore[attr-defined]
            steps = len(trainer.datamodule.plan.steps(epoch))  # type: ignore[attr-defined]
            self.record = {"step": trainer.global_step, "epoch": round(epoch + (index + 1) / steps, 4)}
        self.losses_at[trainer.global_step] = dict(pl_module.val_losses)
        self.record |= pl_module.val_losses
        now = time.perf_counter()
        self._counted_from += now - self._end
        self._end = now

    @property
    def pace(self) -> tuple[int, int, float]:
        """Tokens, trained tokens and seconds of training, without what led to the first record: that is slower."""
        whole, first = self._whole, self._first
        if first is None or whole == first:
            return whole
        return whole[0] - first[0], whole[1] - first[1], whole[2] - first[2]

    def leave_out(self, seconds: float) -> None:
        """Take time that wasn't training's, such as a checkpoint's, out of the clocks."""
        self._start += seconds
        self._end += seconds
        self._counted_from += seconds

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Send the last record."""
        self._send(trainer)
        self._judge(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Send what is there."""
        self._send(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What the closing report says of the steps before a resume."""
        bad_steps = self.bad_steps if self._bad is None else int(self._bad)
        return {"losses_before": self.losses_before, "losses_at": self.losses_at, "bad_steps": bad_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self.losses_before, self.losses_at = state_dict["losses_before"], state_dict["losses_at"]
        self.bad_steps = state_dict["bad_steps"]
        self._bad = torch.tensor(self.bad_steps)

    def _lr(self, trainer: Trainer) -> float:
        """The learning rate that the step just done was made with: the schedule has moved on already."""
        schedule: Any = trainer.lr_scheduler_configs[0].scheduler
        return schedule.base_lrs[0] * schedule.factor(schedule.last_epoch - 1)

    def _send(self, trainer: Trainer) -> None:
        if self.record:
            record, self.record = self.record, {}
            for logger in trainer.loggers:
                logger.log_metrics(record, step=record["step"])

    def _watch(self, loss: torch.Tensor, norm: torch.Tensor, step: int, rows: list[int]) -> None:
        """Count bad steps on the device.

        Under loss scaling (fp16) gradients overflow now and then, which is how the scale is found: the scaler skips
        such a step and lowers the scale, so only the loss, which isn't scaled, tells of a bad step.
        """
        good = torch.isfinite(loss) if self._scaled else torch.isfinite(loss) & torch.isfinite(norm)
        bad = ~good
        self._bad = bad.long() if self._bad is None else self._bad + bad
        self._rows = [*self._rows, (step, bad, rows)][-64:]

    def _judge(self, trainer: Trainer, module: Any) -> None:
        if self._bad is None:
            return
        before, self.bad_steps = self.bad_steps, int(self._bad)
        if self.bad_steps > before:
            step, _, rows = next(entry for entry in reversed(self._rows) if bool(entry[1]))
            names = ", ".join(trainer.datamodule.selection.name(r) for r in rows[:8])  # type: ignore[attr-defined]
            skipped = "its weights left alone" if module.step_in_backward else "step skipped"
            text = f"step {step}: loss or gradient not finite, {skipped} ({self.bad_steps} so far); its rows: {names}"
            if self.bad_steps > module.max_bad_steps:
                raise BadLoss(f"{text}\nstopped: more than model.max_bad_steps {module.max_bad_steps} of them")
            if trainer.is_global_zero:
                print(text, file=sys.stderr)


def peak_memory_gb() -> float:
    """Peak memory of this process: on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin at that of the process that started this one
        line = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM")), "")
        if line:
            return int(line.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class MetricsCSV(Logger):
    """metrics.csv, a row a logged step, flushed as it is written.

    On resume the rows past the step gone on from are cut off, so no step stands in it twice.

    Args:
        folder: the run folder.
        resume_step: the step that the run goes on from; None begins a new file.
        measured: names of the figures that the method measures beside its loss.
    """

    def __init__(self, folder: Path, resume_step: int | None = None, measured: Sequence[str] = ()) -> None:
        super().__init__()
        self.columns = [*COLUMNS, *measured, *(f"val_{name}" for name in measured)]
        self.path = Path(folder) / "metrics.csv"
        self._file: Any = None
        self._last: dict[str, Any] = {}
        self._waiting: list[dict[str, Any]] = []
        self._last_at = self._end = 0
        self._said = False
        self._writer: Any = None
        self.resume_step = resume_step

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The csv writer, where the file can be opened."""
        with contextlib.suppress(OSError):
            self._open()
        return self._writer

    def _open(self) -> None:
        if self._file is None:
            kept: list[dict[str, Any]] = []
            if self.resume_step is not None and self.path.exists():
                kept = [r for r in read_metrics(self.path) if int(r["step"]) <= self.resume_step]
            beside = self.path.with_name(f".{self.path.name}.partial")  # rows of the past are never only in memory
            self._file = open(beside, "w", newline="")  # noqa: SIM115 - closed in finalize
            self._writer = csv.DictWriter(self._file, self.columns, extrasaction="ignore")
            self._writer.writeheader()
            self._end = self._file.tell()
            self._write(kept)
            beside.replace(self.path)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Write a record; anything else that is logged (no `step` in it) isn't a row.

        What is added to the last row's step, as a validation after a resume, goes into that row. Where the disk is full
        the rows wait for the next one; that doesn't end a run.
        """
        if "step" not in metrics:
            return
        row = {k: v for k, v in metrics.items() if k in self.columns}
        try:
            self._open()
            if str(self._last.get("step")) == str(row["step"]):
                row, self._end = self._last | row, self._last_at
            self._waiting.append(row)
            self._write(self._waiting)
            self._waiting = []
        except OSError as error:
            if not self._said:
                print(f"{self.path}: cannot be written: {error.strerror}; tried again with each row", file=sys.stderr)
            self._said = True

    def _write(self, rows: list[dict[str, Any]]) -> None:
        self._file.seek(self._end)  # behind the last row that is whole
        self._file.truncate()
        last_at = self._end
        for row in rows:
            last_at = self._file.tell()
            self._writer.writerow(row)
        self._file.flush()
        self._last_at, self._end = last_at, self._file.tell()
        self._last = rows[-1] if rows else self._last

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The run folder's config.yaml has them."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk, which has been said
                self._file.close()
            self._file = None
            self.resume_step = sys.maxsize  # a later fit of the same Trainer appends

    @property
    def name(self) -> str:
        """Of the logger."""
        return "metrics"

    @property
    def version(self) -> int:
        """Of the logger."""
        return 0


def eta(seconds: float) -> str:
    """A duration as a person reads it."""
    if not math.isfinite(seconds):
        return "?"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
