"""Odds-ratio preference optimisation, which needs no reference."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from litft.data.batch import Batch
from litft.errors import UserError
from litft.losses.preference import log_odds, odds_ratio
from litft.methods.preference import REWARDS, Preference


class ORPO(Preference):
    """Odds-ratio preference optimisation (Hong et al. 2024): fine-tuning on the chosen answer, away from the rejected.

    Args:
        beta: weight of the odds ratio (the paper's lambda).
        nll_on: the tokens of which cross-entropy is a part of the loss: those of the chosen answer, or its prompt's as
            well (as TRL has it).
        options: of `Method`.
    """

    loss_settings: ClassVar[tuple[str, ...]] = ("beta", "prompts_too")
    measured: ClassVar[tuple[str, ...]] = (*REWARDS, "nll_loss", "log_odds_chosen", "log_odds_ratio")
    lrs: ClassVar[tuple[float, float] | None] = (5e-5, 8e-6)

    def __init__(
        self, *args: Any, beta: float = 0.1, nll_on: Literal["answer", "all"] = "answer", **options: Any
    ) -> None:
        super().__init__(*args, **options)
        if beta <= 0:
            raise UserError(f"--model.beta {beta}: must be above 0")
        self.beta, self.prompts_too = beta, nll_on == "all"

    def terms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Minus the log odds ratio of each pair, and the chosen answers' cross-entropy."""
        found = self.answers(batch)
        chosen, rejected = found.mean[0::2], found.mean[1::2]
        ratio, nll = odds_ratio(chosen, rejected), self.chosen_nll(batch, found.nll)
        self.measure(self.beta * chosen.detach(), self.beta * rejected.detach(), found.mean)
        self.measures.add("nll_loss", nll * batch["row_denominator"], batch["rows"])
        self.measures.add("log_odds_chosen", log_odds(chosen) - log_odds(rejected))
        self.measures.add("log_odds_ratio", ratio)
        return -self.beta * ratio, nll
