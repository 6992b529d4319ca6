"""The one module that a method owns: backbone and loss head together.

This is what DDP wraps and what FSDP2 takes as its root, so nobody calls the backbone or takes the head's weight outside
of its forward.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from litft.losses.router import load_balance
from litft.models import attention
from litft.models.collectives import gather
from litft.models.context_parallel import share_of
from litft.models.head import find_head
from litft.models.mesh import Parallel


class CausalLM(nn.Module):
    """Negative log-probabilities of the target tokens of a batch.

    Only the hidden states at target positions meet the vocabulary matrix.

    Args:
        model: a transformers causal language model.
        balance_experts: hand out the router's balance loss too, for mixtures of experts.
        fast_loss: never hold all logits; False, or a head that does more than `litft.models.head` knows, takes them
            from the model.
        alike: whether the loss will weigh all targets alike.

    Attributes:
        head: the model's head as the fast loss sees it, or None.
        compiled: whether the model's layers are compiled.
        parallel: the processes that share the tokens of a batch, where there are any.
    """

    def __init__(
        self, model: nn.Module, balance_experts: bool = False, fast_loss: bool = True, alike: bool = True
    ) -> None:
        super().__init__()
        self.alike = alike
        self.model: Any = model
        self.balance_experts = balance_experts
        self.head = find_head(model) if fast_loss else None
        self.compiled = False
        self.parallel: Parallel | None = None

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Run the model over a micro-batch.

        Args:
            batch: what `litft.data.batch` makes; a function under `with_head` is called with the head (or None) and
                what reaches it at the targets (or their logits), while the head's weights are whole, in the place of
                the negative log-probabilities.

        Returns:
            `with_head`: what that function returns; else `nll`: `-log p(target)` of each target, fp32
            [targets]; with `balance_experts`, `balance`: the balance loss of each document, fp32 [documents].

        Raises:
            RuntimeError: for a packed row where the model's attention wouldn't keep documents apart.
        """
        whole = batch
        if self.parallel and self.parallel.sizes.context > 1:
            batch = share_of(batch, self.parallel)
        if self.head is None:
            output = self.model(**self._inputs(batch))
            last = output.logits
        else:
            with self.head.held_back() as caught:
                output = self.model(**self._inputs(batch))
            last = caught[0]
        last = last[batch["target_rows"], batch["target_columns"]] if "attention_mask" in batch else last[0]
        if "with_head" in batch:
            found = {"with_head": batch["with_head"](self.head, last)}
        elif self.head is None:
            found = {"nll": F.cross_entropy(last.float(), batch["target_ids"], reduction="none")}
        else:
            found = {"nll": self.head.nll(last, batch["target_ids"], self.alike)}
        if batch is not whole and "nll" in found:
            found["nll"] = gather(found["nll"], batch["counts"], batch["context_group"])
        if self.balance_experts:
            router_logits = output.router_logits
            if "attention_mask" in batch:
                real = batch["real_positions"]
                router_logits = [logits.reshape(-1, logits.shape[-1])[real] for logits in router_logits]
            documents = batch["cu_seqlens"], batch["document_of_token"]
            found["balance"] = load_balance(router_logits, *documents, self._experts_per_token)
        return found

    def logits(self, input_ids: Tensor) -> Tensor:
        """Logits [rows, tokens, vocabulary] of ids [rows, tokens]; as `forward` the root's, so it gathers weights."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits

    @property
    def _experts_per_token(self) -> int:
        return self.model.config.num_experts_per_tok

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What the model is called with, so that it keeps documents apart and only the positions of targets."""
        inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
        if self.balance_experts:
            inputs["output_router_logits"] = True
        if "attention_mask" in batch:
            return inputs | {"attention_mask": batch["attention_mask"], "logits_to_keep": batch["kept_columns"]}
        implementation = self.model.config._attn_implementation
        bounds, longest = batch["cu_seqlens"], batch["max_seqlen"]
        inputs |= {"logits_to_keep": batch["target_positions"], "cu_seq_lens_q": bounds, "max_length_q": longest}
        if "context_group" in batch:
            inputs["context_group"] = batch["context_group"]
        if implementation in (attention.NAME, attention.PLAIN):
            if not self.compiled:  # to a compiled layer other bounds would be another graph, and it does without
                inputs["document_bounds"] = batch["document_bounds"]
        elif implementation in ("flash_attention_2", "flash_attention_3"):
            inputs |= {"cu_seq_lens_k": bounds, "max_length_k": longest}
        else:  # sdpa and eager go by restarting position_ids, which several models don't hand to their mask
            raise RuntimeError(f"documents in a packed row would see each other under {implementation} attention")
        return inputs
