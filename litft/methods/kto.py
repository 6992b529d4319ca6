"""Kahneman-Tversky optimisation, on answers that are each good or bad."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed

from litft.data.batch import Batch
from litft.errors import UserError
from litft.losses import preference
from litft.methods.preference import REWARDS, Referenced


class KTO(Referenced):
    """Kahneman-Tversky optimisation (Ethayarajh et al. 2024): good answers likelier, bad ones less likely.

    How far the model has moved from the reference is estimated on answers to other prompts of the same optimizer step
    (see `litft.data.preference_data`), over all of its micro-batches and ranks.

    Args:
        beta: how strongly the model is kept near the reference.
        desirable_weight: of the losses of good answers.
        undesirable_weight: of those of bad ones; the paper would have both sides weigh about the same in all.
        options: of `Referenced` and `Method`.
    """

    rows: ClassVar[str] = "labelled"
    loss_settings: ClassVar[tuple[str, ...]] = (*Referenced.loss_settings, "beta", "weights")
    measured: ClassVar[tuple[str, ...]] = (*(name for name in REWARDS if "accuracies" not in name), "kl")

    def __init__(
        self,
        *args: Any,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if beta <= 0 or min(desirable_weight, undesirable_weight) < 0:
            raise UserError("--model.beta above 0, --model.desirable_weight and undesirable_weight at least 0")
        if self.reference_kind == "cached":
            raise UserError("--model.reference cached: not with kto, which pairs other answers in each epoch")
        self.beta, self.weights = beta, (desirable_weight, undesirable_weight)

    def look_ahead(self, batches: Iterable[Batch]) -> list[Any]:
        """The estimate of KL(model || reference) for all micro-batches of the step."""
        sums: list[Tensor] = []
        with torch.no_grad():
            for batch in batches:
                other = batch["mismatched"]
                ratio = self.answers(other).log_p - self.reference_log_p(other)
                sums.append(torch.stack([ratio.sum(), ratio.new_full((), other["rows"])]))
        total = torch.stack(sums).sum(0)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(total)
        kl = (total[0] / total[1]).clamp(min=0)
        return [kl] * len(sums)

    def terms(self, batch: Batch) -> tuple[Tensor, float]:
        """The weighted loss of each row."""
        good, kl = batch["values"] > 0.5, batch["ahead"]
        reference = self.reference_log_p(batch)  # first, while nothing is kept for the backward pass
        found = self.answers(batch)
        ratio = found.log_p - reference
        losses = preference.kto(ratio, good, kl, self.beta)
        self._measure(self.beta * ratio.detach(), found.log_p, good, kl)
        return torch.where(good, self.weights[0], self.weights[1]) * losses, 0.0

    def _measure(self, rewards: Tensor, log_p: Tensor, good: Tensor, kl: Tensor) -> None:
        note = self.measures.add
        for side, which in (("chosen", good), ("rejected", ~good)):
            note(f"rewards/{side}", torch.where(which, rewards, 0.0), which.sum())
            note(f"logps/{side}", torch.where(which, log_p, 0.0), which.sum())
        self.measures.subtract("rewards/margins", "rewards/chosen", "rewards/rejected")
        note("kl", kl.expand(len(rewards)))
