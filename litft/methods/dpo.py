"""Direct preference optimisation, and the losses of its kind."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from litft.data.batch import Batch
from litft.errors import UserError
from litft.losses.preference import DIVERGENT, LOSSES, SMOOTHED, SORTED, Divergence, Pairs, Settings, partners
from litft.methods.preference import Answers, Referenced
from litft.models.collectives import from_all_ranks


class DPO(Referenced):
    """Direct preference optimisation (Rafailov et al. 2023): the chosen answer above the rejected one.

    Args:
        loss_type: sigmoid, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero,
            apo_down, discopop, sigmoid_norm, or sft (cross-entropy of the chosen answers); several are added up.
        loss_weights: of each; 1 by default.
        beta: how strongly the model is kept near the reference.
        label_smoothing: probability that the two answers of a pair are swapped; with sigmoid it gives conservative DPO.
        f_divergence: what keeps the model near the reference; of losses of the two answers' difference.
        f_alpha: of the alpha divergence.
        discopop_tau: temperature of discopop.
        options: of `Referenced` and `Method`.
    """

    loss_settings: ClassVar[tuple[str, ...]] = (
        *Referenced.loss_settings,
        *("losses", "settings", "divergence", "f_alpha"),
    )

    def __init__(
        self,
        *args: Any,
        loss_type: list[str] | str = "sigmoid",
        loss_weights: list[float] | None = None,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        f_divergence: Divergence = "reverse_kl",
        f_alpha: float = 0.5,
        discopop_tau: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
        weights = loss_weights or [1.0] * len(names)
        if not names or len(set(names)) < len(names):
            raise UserError(
                f"--model.loss_type {' '.join(names)}: at least one, and each once (loss_weights weigh them)"
            )
        for name in names:
            if name not in LOSSES and name != "sft":
                raise UserError(f"--model.loss_type {name}: none of {', '.join([*LOSSES, 'sft'])}")
        if len(weights) != len(names):
            raise UserError(f"--model.loss_weights: {len(weights)} for {len(names)} losses; give one a loss")
        if min(weights) < 0 or not any(weights):
            raise UserError(f"--model.loss_weights {' '.join(map(str, weights))}: at least 0, and not all of them 0")
        if discopop_tau <= 0:
            raise UserError(f"--model.discopop_tau {discopop_tau}: must be above 0")
        if not 0 <= label_smoothing < 0.5:
            raise UserError(f"--model.label_smoothing {label_smoothing}: at least 0 and below 0.5")
        if "exo_pair" in names and not label_smoothing:
            raise UserError("--model.loss_type exo_pair: needs a --model.label_smoothing above 0, such as 0.001")
        if label_smoothing and not set(names) & set(SMOOTHED):
            raise UserError(f"--model.label_smoothing: {', '.join(names)} has none; it is for {', '.join(SMOOTHED)}")
        if f_divergence != "reverse_kl" and (others := set(names) - {*DIVERGENT, "sft"}):
            raise UserError(
                f"--model.f_divergence {f_divergence}: not with {', '.join(sorted(others))}\n"
                f"mend: reverse_kl, or a loss_type of {', '.join(DIVERGENT)}"
            )
        if beta <= 0:
            raise UserError(f"--model.beta {beta}: must be above 0")
        self.losses = dict(zip(names, weights, strict=True))
        self.settings = Settings(beta, label_smoothing, discopop_tau)
        self.divergence, self.f_alpha = f_divergence, f_alpha

    def terms(self, batch: Batch) -> tuple[Tensor, Tensor | float]:
        """The mix of losses of each pair; the chosen answers' cross-entropy is one over tokens."""
        reference = self.reference_log_p(batch)  # first, while nothing is kept for the backward pass
        found = self.answers(batch)
        pairs = self._pairs(found, reference, batch.get("ahead"))
        beta = self.settings.beta
        self.measure(beta * pairs.chosen_ratio.detach(), beta * pairs.rejected_ratio.detach(), found.log_p)
        losses, more = torch.zeros_like(pairs.chosen), torch.zeros(())
        for name, weight in self.losses.items():
            if name == "sft":
                more = weight * self.chosen_nll(batch, found.nll)
            else:
                losses = losses + weight * LOSSES[name](pairs, self.settings)
        return losses, more.to(losses.device)

    def _pairs(self, found: Answers, reference: Tensor, ahead: dict[str, Tensor] | None = None) -> Pairs:
        own = (found.log_p[0::2], found.log_p[1::2], reference[0::2], reference[1::2])
        tokens = found.tokens[0::2], found.tokens[1::2]
        return Pairs(*own, *tokens, self.divergence, self.f_alpha, ahead)

    def look_ahead(self, batches: Iterable[Batch]) -> list[Any] | None:
        """For losses on sorted log-ratios: what each pair is compared with, of all pairs of the step."""
        if not any(name in SORTED for name in self.losses):
            return None
        with torch.no_grad():
            each = [self._pairs(self.answers(batch), self.reference_log_p(batch)) for batch in batches]
        values = [
            {
                "ratio": p.chosen - p.rejected,
                "ref_ratio": p.ref_chosen - p.ref_rejected,
                "chosen": p.chosen_ratio,
                "rejected": p.rejected_ratio,
            }
            for p in each
        ]
        sizes = [len(p.chosen) for p in each]
        whole, first = {}, 0
        for name in values[0]:
            whole[name], first = from_all_ranks(torch.cat([value[name] for value in values]))
        compared = {name: v[first : first + sum(sizes)].split(sizes) for name, v in partners(whole).items()}
        return [{name: parts[i] for name, parts in compared.items()} for i in range(len(sizes))]
