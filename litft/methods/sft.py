"""Supervised fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from litft.data.batch import Batch
from litft.methods.base import Method


class SFT(Method):
    """Supervised fine-tuning: the cross-entropy of the trained tokens, each with the same weight.

    The loss of an optimizer step is `sum(CE) / (trained tokens of the step)` over all its micro-batches and ranks.
    """

    def loss(self, batch: Batch) -> Tensor:
        """Share of the step's loss; a rank's shares are averaged over the ranks (see `litft.data.loader`)."""
        found = self.net(batch)
        loss = found["nll"].sum() / batch["denominator"]
        if self.balance:
            weight = batch["document_targets"] / batch["denominator"]
            loss = loss + self.balance * (weight * found["balance"]).sum()
        return loss

    def validation_sums(self, batch: Batch) -> Tensor:
        """Summed cross-entropy and the number of trained tokens."""
        nll = self.net(batch)["nll"]
        return torch.stack([nll.sum(), nll.new_tensor(batch["trained"])])
