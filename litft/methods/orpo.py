"""Odds-ratio preference optimisation, which needs no reference."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from litft.losses.preference import log_odds, odds_ratio
from litft.methods.preference import ReferenceFree


class ORPO(ReferenceFree):
    """Odds-ratio preference optimisation (Hong et al. 2024): fine-tuning on the chosen answer, away from the rejected.

    `beta` is the weight of the odds ratio, the paper's lambda; answers are compared by their log-probability a token.

    Args:
        options: of `ReferenceFree` and `Method`.
    """

    measured: ClassVar[tuple[str, ...]] = (*ReferenceFree.measured, "log_odds_chosen", "log_odds_ratio")
    lrs: ClassVar[tuple[float, float] | None] = (5e-5, 8e-6)

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Minus the log odds ratio of each pair."""
        ratio = odds_ratio(chosen, rejected)
        self.measures.add("log_odds_chosen", log_odds(chosen) - log_odds(rejected))
        self.measures.add("log_odds_ratio", ratio)
        return -self.beta * ratio
