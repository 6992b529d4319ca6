"""The one module that a method owns: backbone and loss head together.

This is what DDP wraps and what FSDP2 takes as its root, so nobody calls the backbone or takes the head's weight outside
of its forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from litft.losses.router import load_balance
from litft.models import attention


class CausalLM(nn.Module):
    """Negative log-probabilities of the target tokens of a batch.

    Args:
        model: a transformers causal language model; its own forward applies what the family does to logits (soft caps,
            scales), only the hidden states at target positions meet the vocabulary matrix.
        balance_experts: hand out the router's balance loss too, for mixtures of experts.
    """

    def __init__(self, model: nn.Module, balance_experts: bool = False) -> None:
        super().__init__()
        self.model: Any = model
        self.balance_experts = balance_experts

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run the model over a micro-batch.

        Args:
            batch: what `litft.data.batch` makes.

        Returns:
            `nll`: `-log p(target)` of each target, fp32 [targets]; with `balance_experts`, `balance`: the balance loss
            of each document, fp32 [documents].

        Raises:
            RuntimeError: for a packed row where the model's attention wouldn't keep documents apart.
        """
        output, logits = self._run(batch)
        found = {"nll": F.cross_entropy(logits.float(), batch["target_ids"], reduction="none")}
        if self.balance_experts:
            router_logits = output.router_logits
            if "attention_mask" in batch:
                real = batch["attention_mask"].flatten().bool()
                router_logits = [logits.reshape(len(real), -1)[real] for logits in router_logits]
            found["balance"] = load_balance(router_logits, batch["cu_seqlens"], self._experts_per_token)
        return found

    @property
    def _experts_per_token(self) -> int:
        return self.model.config.num_experts_per_tok

    def _run(self, batch: dict[str, Any]) -> tuple[Any, Tensor]:
        """The model's output, and its logits at the target positions [targets, vocabulary]."""
        positions = batch["target_positions"]
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        if self.balance_experts:
            inputs["output_router_logits"] = True
        if "attention_mask" in batch:  # padded rows: the columns in which any row has a target
            width = batch["input_ids"].shape[1]
            columns, inverse = torch.unique(positions % width, return_inverse=True)
            output = self.model(**inputs, attention_mask=batch["attention_mask"], logits_to_keep=columns)
            return output, output.logits[positions // width, inverse]
        implementation = self.model.config._attn_implementation
        if implementation == attention.NAME:
            inputs["document_bounds"] = batch["document_bounds"]
        elif implementation in ("flash_attention_2", "flash_attention_3"):
            bounds, longest = batch["cu_seqlens"], batch["max_seqlen"]
            inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
            inputs |= {"max_length_q": longest, "max_length_k": longest}
        else:  # sdpa and eager go by restarting position_ids, which several models don't hand to their mask
            raise RuntimeError(f"documents in a packed row would see each other under {implementation} attention")
        output = self.model(**inputs, logits_to_keep=positions)
        return output, output.logits[0]
