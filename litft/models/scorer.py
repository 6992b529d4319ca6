"""The one module that a reward method owns: backbone and score head together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from litft.models.causal_lm import CausalLM


class Scorer(CausalLM):
    """A number for each document of a batch, from the hidden state of its last token.

    Args:
        model: a transformers model for sequence classification with one label and a head called `score`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model, fast_loss=False)

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run the model over a micro-batch.

        Args:
            batch: what `litft.data.batch` makes.

        Returns:
            `scores`: fp32 [documents]; what only fills the batch up has one, too.
        """
        inputs = self._inputs(batch)
        inputs.pop("logits_to_keep")
        backbone = getattr(self.model, self.model.base_model_prefix)
        hidden = backbone(**inputs).last_hidden_state
        if "attention_mask" in batch:
            last = batch["attention_mask"].sum(1) - 1
            ends = hidden[torch.arange(len(last), device=last.device), last]
        else:
            ends = hidden[0, batch["cu_seqlens"][1:].long() - 1]
        return {"scores": self.model.score(ends)[:, 0].float()}

    def logits(self, input_ids: Tensor) -> Tensor:
        """Scores of ids [rows, tokens]; as `forward` the root's, so it gathers weights."""
        backbone = getattr(self.model, self.model.base_model_prefix)
        scores: Tensor = self.model.score(backbone(input_ids=input_ids, use_cache=False).last_hidden_state)
        return scores
