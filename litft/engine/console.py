"""What a run prints: the plan before, a line a logged step, the outcome after."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from litft.data.selection import BAD_ROWS
from litft.engine.metrics import StepMetrics, eta

LISTED = 5  # skipped rows; run.json has more
QUIET_S = 2.0  # a line at most this often, except for validation, the first and the last step


class Bar(TQDMProgressBar):
    """The steps of an epoch as a bar, past which the console's lines are written."""

    def get_metrics(self, trainer: Any, *args: Any) -> dict[str, Any]:
        """The loss of the last record; a logger's version tells nobody anything."""
        shown = {name: value for name, value in super().get_metrics(trainer, *args).items() if name != "v_num"}
        losses = [callback.loss for callback in trainer.callbacks if isinstance(callback, StepMetrics)]
        return shown | ({"loss": losses[0]} if losses and losses[0] is not None else {})


class Console(Logger):
    """Prints the record of a logged step as a line.

    Args:
        total_steps: steps of the run.
        write: where lines go; stdout by default, past a progress bar.
    """

    def __init__(self, total_steps: int, write: Callable[[str], None] | None = None) -> None:
        super().__init__()
        self.total_steps = total_steps
        self.write = write or _write
        self._printed = 0.0
        self._clock: tuple[int, float] | None = None

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Print a record (what has no `step` isn't one); processes but the first print to their own log."""
        if "step" not in metrics:
            return
        now = time.monotonic()
        at = metrics["step"]
        if "loss" in metrics and self._clock is None:
            self._clock = (at, now)  # the first step is slower; the estimate counts from its end
        always = "val_loss" in metrics or at in (1, self.total_steps)
        if not always and now - self._printed < QUIET_S:
            return
        self._printed = now
        self.write(self._line(metrics, now))

    def _line(self, m: dict[str, Any], now: float) -> str:
        parts = [f"step {m['step']}/{self.total_steps}", f"epoch {m['epoch']:.2f}"]
        if "loss" in m:
            parts += [f"loss {m['loss']:.4f}"]
        parts += [f"{name} {value:.4f}" for name, value in m.items() if name.startswith("val_loss")]
        told = ("accuracies", "margins", "accuracy")
        parts += [f"{name.replace('rewards/', '')} {value:.3f}" for name, value in m.items() if name.endswith(told)]
        if "loss" in m:
            parts += [
                f"lr {m['lr']:.2e}",
                f"grad_norm {m['grad_norm']:.2f}",
                f"{m['tokens_per_s']:.0f} tok/s ({m['trained_tokens_per_s']:.0f} trained)",
                f"step {m['step_s']:.2f}s data {m['data_s']:.3f}s",
                f"mem {m['memory_gb']:.1f} GB",
            ]
            first, since = self._clock or (m["step"], now)
            if m["step"] > first:
                parts.append(f"ETA {eta((now - since) / (m['step'] - first) * (self.total_steps - m['step']))}")
        return "  ".join(parts)

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to print."""

    @property
    def name(self) -> str:
        """Of the logger."""
        return "console"

    @property
    def version(self) -> int:
        """Of the logger."""
        return 0


def _write(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """The plan (of `ChatData.summary` and the model's counts) as a person reads it."""
    counts = f"{plan['row_tokens']:,} tokens, {plan['row_trained_tokens']:,} trained"
    lines = [f"data   {plan['rows']} rows to train on ({counts})"]
    lines += _lost(plan["dropped"], plan["truncated"], plan["max_length"])
    for name, count in plan["val_rows"].items():
        lines.append(f"       {count} rows held out ({name})")
        lost = plan["val_dropped"].get(name, {}), plan["val_truncated"].get(name, 0)
        lines += _lost(*lost, plan["max_length"], f" ({name})")
    lines += _skipped(plan)
    if not plan["val_rows"]:
        lines.append(
            "       no rows held out: no validation, and final/ holds the last step (--data.val FILE names some)"
        )
    lines += [f"       note: {note} ({count} rows)" for note, count in plan["notes"].items()]
    if plan.get("cannot_pack"):
        lines.append(f"       rows are padded, not packed: {plan['cannot_pack']}")
    epochs = f"{plan['epochs']:g} epoch" + "s" * (plan["epochs"] != 1)
    lines.append(
        f"plan   {plan['steps']} steps of up to {plan['longest_step']:,} tokens, {epochs} "
        f"({plan['tokens']:,} tokens, {plan['trained_tokens']:,} trained); "
        f"{'' if plan['packs_exact'] else 'about '}{plan['packs']:,} micro-batches of up to "
        f"{plan['tokens_per_batch']:,}"
    )
    if "trainable" in plan:
        share = plan["trainable"] / max(plan["parameters"], 1)
        lines.append(
            f"model  {plan['model']}: {plan['trainable']:,} of {plan['parameters']:,} weights learn ({share:.2%})"
        )
    return lines


def _lost(dropped: dict[str, int], truncated: int, max_length: int, where: str = "") -> list[str]:
    lines = [f"       {count} rows left out{where}: {reason}" for reason, count in dropped.items()]
    return lines + ([f"       {truncated} rows cut at {max_length} tokens{where}"] if truncated else [])


def _skipped(plan: dict[str, Any]) -> list[str]:
    """The first of the bad rows, each by file and line."""
    bad = sum(dropped.get(BAD_ROWS, 0) for dropped in (plan["dropped"], *plan["val_dropped"].values()))
    lines = [f"       skipped {line}" for line in plan["skipped"][:LISTED]]
    return lines + ([f"       and {bad - len(lines)} more (run.json)"] if bad > len(lines) else [])
