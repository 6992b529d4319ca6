"""Supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from litft.data.batch import Batch
from litft.errors import UserError
from litft.losses.distillation import linear_loss
from litft.methods.base import Method
from litft.models.head import Head


class SFT(Method):
    """Supervised fine-tuning: the cross-entropy of the trained tokens, each with the same weight.

    The loss of an optimizer step is `sum(CE) / (trained tokens of the step)` over all its micro-batches and ranks.

    Args:
        neftune: noise on the embeddings in training (Jain et al. 2023, where 5 is usual); 0 is none.
        label_smoothing: share of each target's probability that is spread over all tokens in training.
        options: of `Method`.
    """

    loss_settings: ClassVar[tuple[str, ...]] = ("neftune", "label_smoothing")

    def __init__(self, *args: Any, neftune: float = 0.0, label_smoothing: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        if neftune < 0:
            raise UserError(f"--model.neftune {neftune}: must be at least 0")
        if not 0 <= label_smoothing < 1:
            raise UserError(f"--model.label_smoothing {label_smoothing}: at least 0 and below 1")
        self.neftune, self.label_smoothing = neftune, label_smoothing

    @property
    def distributions(self) -> int:
        """Labels that are smoothed look at the model's."""
        return int(self.label_smoothing > 0)

    def loss(self, batch: Batch) -> Tensor:
        """Share of the step's loss; a rank's shares are averaged over the ranks (see `litft.data.loader`)."""
        with self.noise(batch):
            if self.label_smoothing:
                found = self.net(batch | {"with_head": self._smoothed(batch["target_ids"])})
                losses = found["with_head"]
            else:
                found = self.net(batch)
                losses = found["nll"]
        return losses.sum() / batch["denominator"] + self.balance_loss(found, batch)

    def probe(self, batch: Batch) -> Tensor:
        """The pass with plain cross-entropy."""
        found = self.net(batch)
        return found["nll"].sum() / batch["denominator"] + self.balance_loss(found, batch)

    def balance_loss(self, found: dict[str, Tensor], batch: Batch) -> Tensor | float:
        """Share of the step's balance loss, where the model has experts and that is asked for."""
        if not self.balance:
            return 0.0
        weight = batch["document_targets"] / batch["denominator"]
        return self.balance * (weight * found["balance"]).sum()

    def validation_sums(self, batch: Batch) -> Tensor:
        """Summed cross-entropy and the number of trained tokens."""
        nll = self.net(batch)["nll"]
        return torch.stack([nll.sum(), nll.new_tensor(batch["trained"])])

    def _smoothed(self, targets: Tensor) -> Any:
        def of_head(head: Head | None, last: Tensor) -> Tensor:
            def of_rows(rows: slice, logits: Tensor) -> Tensor:
                return F.cross_entropy(logits, targets[rows], reduction="none", label_smoothing=self.label_smoothing)

            if head is None:
                return of_rows(slice(None), last.float())
            module: Any = head.module
            bias = getattr(module, "bias", None)
            return linear_loss(last, module.weight, bias, of_rows, scale=head.scale, softcap=head.softcap)

        return of_head

    @contextmanager
    def noise(self, batch: Batch) -> Iterator[None]:
        """Inside the context the embeddings are noisy: uniform, of a size that falls with a document's length."""
        if not self.neftune:
            yield
            return

        def add(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            if "attention_mask" in batch:
                lengths = batch["attention_mask"].sum(1, keepdim=True).expand(output.shape[:2])
            else:
                lengths = batch["cu_seqlens"].diff()[batch["document_of_token"]][None]
            size = self.neftune / (lengths * output.shape[-1]).sqrt()
            return output + torch.empty_like(output).uniform_(-1, 1) * size[..., None].to(output.dtype)

        handle = self.net.model.get_input_embeddings().register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()
