"""What methods on preference rows share: log-probabilities of whole answers, a reference, and what is measured."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from litft.data.batch import Batch
from litft.errors import UserError
from litft.methods.base import Method
from litft.methods.reference import Reference

REWARDS = (
    *("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"),
    *("logps/chosen", "logps/rejected"),
)


@dataclass
class Answers:
    """Of the documents of a micro-batch's rows.

    Attributes:
        log_p: log-probability of each answer, summed over its tokens, fp32 [documents].
        tokens: how many it has, fp32 [documents].
        nll: -log p of each target of the batch, fp32 [targets].
    """

    log_p: Tensor
    tokens: Tensor
    nll: Tensor

    @property
    def mean(self) -> Tensor:
        """Log-probability a token, [documents]."""
        return self.log_p / self.tokens.clamp(min=1)


def answers(net: Any, batch: Batch, documents: int) -> Answers:
    """Run a model over a micro-batch.

    Args:
        net: a `CausalLM`.
        batch: of `litft.data.preference_data`.
        documents: of its rows; what only fills it up follows them.
    """
    nll = net(batch)["nll"]
    own, tokens = nll, batch["document_targets"]
    if "answers" in batch:  # of targets that are prompts' too
        own = torch.where(batch["answers"], nll, 0.0)
        tokens = torch.zeros_like(tokens).index_add(0, batch["document_ids"], batch["answers"].to(tokens.dtype))
    log_p = nll.new_zeros(len(tokens)).index_add(0, batch["document_ids"], -own)
    return Answers(log_p[:documents], tokens[:documents].float(), nll)


class Preference(Method):
    """A method on preference rows: subclass it and write `terms`.

    A micro-batch has `rows` rows; of pairs the chosen answers are its even documents, the rejected ones the odd.
    """

    rows: ClassVar[str] = "pairs"
    dropout: ClassVar[bool] = False
    alike: ClassVar[bool] = False
    lrs: ClassVar[tuple[float, float] | None] = (5e-6, 1e-6)
    measured: ClassVar[tuple[str, ...]] = REWARDS
    prompts_too: bool = False
    """Whether the tokens of prompts are targets as well; `answers` says which are an answer's."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.balance_experts:
            raise UserError(f"--model.balance_experts: {type(self).__name__} has no balance loss\nmend: leave it out")
        self.balance_experts = 0.0  # nor is the one that a model's configuration asks for

    @abstractmethod
    def terms(self, batch: Batch) -> tuple[Tensor, Tensor | float]:
        """What the loss is made of.

        Returns:
            The loss of each row, [rows], whose mean over the whole step counts; and what is added to that mean, already
            divided by counts of the whole step.
        """

    def answers(self, batch: Batch, net: Any = None) -> Answers:
        """Log-probabilities of the answers of a micro-batch, under the model or another `CausalLM`."""
        return answers(net or self.net, batch, batch["rows"] * (2 if self.rows == "pairs" else 1))

    def loss(self, batch: Batch) -> Tensor:
        """Share of the step's loss."""
        losses, more = self.terms(batch)
        return losses.sum() / batch["row_denominator"] + more

    def validation_sums(self, batch: Batch) -> Tensor:
        """Summed loss and the number of rows."""
        losses, more = self.terms(batch)
        return torch.stack([losses.sum() + more * batch["row_denominator"], losses.new_full((), batch["rows"])])

    def probe(self, batch: Batch) -> Tensor:
        """The pass that keeps most: the model's own."""
        total: Tensor = self.net(batch)["nll"].sum()
        return total / batch["denominator"]

    def chosen_nll(self, batch: Batch, nll: Tensor) -> Tensor:
        """Share of the step's mean -log p of the tokens of chosen answers."""
        chosen = batch["document_ids"] % 2 == 0
        return torch.where(chosen, nll, 0.0).sum() / batch["chosen_denominator"]

    def measure(self, chosen: Tensor, rejected: Tensor, log_p: Tensor) -> None:
        """Note the rewards of the two answers of each pair, [pairs], and the answers' log-probabilities."""
        note = self.measures.add
        note("rewards/chosen", chosen)
        note("rewards/rejected", rejected)
        note("rewards/margins", chosen - rejected)
        note("rewards/accuracies", (chosen > rejected).float())
        note("logps/chosen", log_p[0::2])
        note("logps/rejected", log_p[1::2])


class ReferenceFree(Preference):
    """A preference method without a reference: a loss of the two answers' rewards, and the chosen one's cross-entropy.

    Subclass it and write `losses`.

    Args:
        beta: factor on the rewards.
        nll_on: the tokens of that cross-entropy: those of the chosen answer, or its prompt's as well (as TRL has it).
        options: of `Method`.
    """

    loss_settings: ClassVar[tuple[str, ...]] = ("beta", "prompts_too")
    measured: ClassVar[tuple[str, ...]] = (*REWARDS, "nll_loss")
    nll_weight = 1.0

    def __init__(
        self, *args: Any, beta: float = 0.1, nll_on: Literal["answer", "all"] = "answer", **options: Any
    ) -> None:
        super().__init__(*args, **options)
        if beta <= 0:
            raise UserError(f"--model.beta {beta}: must be above 0")
        self.beta, self.prompts_too = beta, nll_on == "all"

    def rewarded(self, found: Answers) -> Tensor:
        """What stands for an answer's reward, before beta, [documents]."""
        return found.mean

    @abstractmethod
    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Of the pairs, from what stands for their rewards, [pairs] each."""

    def terms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of each pair, and the chosen answers' cross-entropy."""
        found = self.answers(batch)
        rewarded, nll = self.rewarded(found), self.chosen_nll(batch, found.nll)
        chosen, rejected = rewarded[0::2], rewarded[1::2]
        self.measure(self.beta * chosen.detach(), self.beta * rejected.detach(), rewarded)
        self.measures.add("nll_loss", nll * batch["row_denominator"], batch["rows"])
        return self.losses(chosen, rejected), self.nll_weight * nll


class Referenced(Preference):
    """A preference method that keeps the model near what it was.

    Args:
        reference: how the reference's log-probabilities come about: `live`, in each step, or `cached`, once for all
            rows before training, and kept on disk.
        offload_reference: keep the frozen copy that full tuning needs in the host's memory, beside a GPU.
        sync_reference: let the reference follow the model every so many optimizer steps; 0 never.
        sync_share: by how much of the way it does.
        options: of `Method`.
    """

    loss_settings: ClassVar[tuple[str, ...]] = ("sync_reference", "sync_share")

    def __init__(
        self,
        *args: Any,
        reference: Literal["live", "cached"] = "live",
        offload_reference: bool = False,
        sync_reference: int = 0,
        sync_share: float = 0.6,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.reference_kind, self.offload_reference = reference, offload_reference
        self.sync_reference, self.sync_share = sync_reference, sync_share
        if sync_reference < 0 or not 0 < sync_share <= 1:
            raise UserError("--model.sync_reference: at least 0, and --model.sync_share above 0, at most 1")
        if sync_reference and reference == "cached":
            raise UserError("--model.reference cached: a reference that moves can't be\nmend: leave one of them out")
        if offload_reference and not self.tuner.trains_base:
            raise UserError(
                "--model.offload_reference: with adapters there is no copy, the model without them is the reference\n"
                "mend: leave it out"
            )

    reference: Reference | None = None

    def build(self, precision: str = "32-true", device: Any = "cpu", parallel: Any = None) -> Method:
        """Load the model and apply the tuner, and take note of what the model is before training."""
        if self.offload_reference and torch.device(device).type == "cpu":
            raise UserError(
                "--model.offload_reference: the run is on the CPU, there is nowhere else to go\nmend: leave it out"
            )
        super().build(precision, device, parallel)
        self._precision = str(precision)
        continued = self.source.adapter is not None and not self.tuner.trains_base
        if self.reference_kind == "live" or continued:  # a checkpoint would take the adapter's beginning away
            self.reference = self.make_reference()
        return self

    @property
    def frozen_beside(self) -> list[str]:
        """With full tuning the reference is a copy."""
        copied = self.tuner.trains_base and self.reference_kind == "live" and not self.offload_reference
        return [self.path] if copied else []

    def make_reference(self) -> Reference:
        """The model before training."""
        return Reference(self, self._precision, self.offload_reference, moves=bool(self.sync_reference))

    def reference_log_p(self, batch: Batch) -> Tensor:
        """Log-probabilities of the answers of a micro-batch under the reference, [documents]."""
        if "reference" in batch:
            found: Tensor = batch["reference"]
            return found
        if self.reference is None:
            raise RuntimeError("reference: cached, but nothing was computed ahead (cache_reference)")
        with self.reference.active() as net:
            return self.answers(batch, net).log_p

    def on_fit_start(self) -> None:
        """Compile the layers, and compute ahead what is to be known ahead; Trainer's hook."""
        super().on_fit_start()
        if self.reference_kind == "cached":
            with self.trainer.precision_plugin.forward_context():
                self.cache_reference(self.trainer.datamodule)  # type: ignore[attr-defined]

    def cache_reference(self, data: Any) -> None:
        """Compute the reference's log-probabilities of all of the data's rows, or read them where they are on disk."""
        from litft.methods.cached import attach, settings_of
        from litft.models.load import fingerprint

        def compute() -> Any:
            self.reference = self.reference or self.make_reference()
            return lambda batch: {"reference": self.reference_log_p(batch)}

        key = [fingerprint(self.source), *settings_of(self, data), self.prompts_too]
        attach(data, self.run_device, key, lambda rows: np.full(len(rows), 2), compute, "reference")
        self.reference = None  # a frozen copy is memory that nothing needs any more

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let the reference follow; Trainer's hook."""
        if self.sync_reference and self.trainer.global_step % self.sync_reference == 0:
            assert self.reference is not None
            self.reference.follow(self.sync_share)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep a reference that moves."""
        super().on_save_checkpoint(checkpoint)
        if self.sync_reference and self.reference is not None:
            checkpoint["reference"] = self.reference.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it up again."""
        super().on_load_checkpoint(checkpoint)
        if self.sync_reference and self.reference is not None:
            self.reference.load(checkpoint["reference"])
