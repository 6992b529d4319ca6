"""How fast a run was, and how near that is to what the machine could do."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from litft.data.chat import ChatData
from litft.engine import floor
from litft.engine.metrics import StepMetrics
from litft.models.compiled import recompilations

if TYPE_CHECKING:
    from litft.methods.base import Method

WORTH_S = 30.0
"""Seconds of training from which the floor is measured; that takes about as long as four micro-batches."""


@dataclass
class Speed:
    """What run.json says of a run's speed and memory.

    Attributes:
        tokens_per_s: real tokens a second over all ranks, the first step and everything but training left out.
        trained_tokens_per_s: those in the loss.
        peak_memory_gb: of this process, on the GPU where there is one, else resident.
        recompilations: graphs made again because an input didn't fit those before.
        compiled_layers: decoder layers that ran compiled.
        floor_share: tokens_per_s over what the matrix products alone would allow (litft.engine.floor); None where the
            run was too short to measure it.
        mfu: operations of these products over the rate of one large product on the same machine.
    """

    tokens_per_s: float
    trained_tokens_per_s: float
    peak_memory_gb: float
    recompilations: int
    compiled_layers: int
    floor_share: float | None = None
    mfu: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Rounded, for run.json."""
        digits = {"tokens_per_s": 1, "trained_tokens_per_s": 1}
        return {k: round(v, digits.get(k, 4)) if isinstance(v, float) else v for k, v in asdict(self).items()}

    def __str__(self) -> str:
        """The line of the closing report."""
        text = f"speed: {self.tokens_per_s:,.0f} tokens/s, {self.trained_tokens_per_s:,.0f} trained"
        text += f"; peak memory {self.peak_memory_gb:.1f} GB"
        if self.floor_share is not None and self.mfu is not None:
            text += f"\n       {self.floor_share:.0%} of the floor (what its matrix products alone take here); MFU "
            text += f"{self.mfu:.0%} (their operations, of the rate of one large product here)"
        return text


def speed_of(method: Method, data: ChatData, metrics: StepMetrics, memory_gb: float, ranks: int) -> Speed | None:
    """What a run came to, its model still there and its result written; None where it made no step.

    Args:
        method: that was trained.
        data: on what.
        metrics: that watched it.
        memory_gb: the peak.
        ranks: processes of the run.
    """
    tokens, trained, spent = metrics.pace
    if not spent:
        return None
    compiled = method.compiled
    again = recompilations() - compiled.graphs if compiled.layers else 0
    found = Speed(tokens / spent, trained / spent, memory_gb, again, compiled.layers)
    device = method.run_device
    if spent < WORTH_S or method.micro_batch is None or method.offloaded or device.type not in ("cpu", "cuda"):
        return found
    lengths = data.selection.lengths.astype(float)
    batch, attended = method.micro_batch, round((lengths**2).sum() / lengths.sum())
    dtype = method.compute_dtype or torch.float32
    try:
        least = floor.measure(method.net.model, batch.slots, batch.targets, attended, device, dtype)
    except (MemoryError, RuntimeError) as error:  # the run is done; its result doesn't hang on this
        print(f"the floor was not measured: {str(error).strip().splitlines()[0][:120]}", file=sys.stderr)
        return found
    seconds = batch.slots * ranks / found.tokens_per_s  # of a micro-batch on each rank
    found.floor_share, found.mfu = least.share(seconds), least.mfu(seconds)
    return found
