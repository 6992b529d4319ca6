"""Losses on pairs of answers against a reference, under TRL's names; each is a pure function of log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


@dataclass
class Pairs:
    """Log-probabilities of answers, summed over their tokens, all fp32 [pairs].

    Attributes:
        chosen: of the better answers.
        rejected: of the others.
        ref_chosen: of the better answers under the reference.
        ref_rejected: of the others under it.
        chosen_tokens: how many tokens the better answers have.
        rejected_tokens: how many the others have.
        divergence: what keeps the model near the reference; KL(model || reference) in DPO.
        alpha: of the alpha divergence.
        sorted_: of all pairs of a step, for the losses that compare distributions: what the pair is compared with, by
            name; see `partners`.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    divergence: Divergence = "reverse_kl"
    alpha: float = 0.5
    sorted_: dict[str, Tensor] | None = None

    @property
    def chosen_ratio(self) -> Tensor:
        """log(model / reference) of the better answers."""
        return self.chosen - self.ref_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        """log(model / reference) of the others."""
        return self.rejected - self.ref_rejected

    @property
    def scores(self) -> tuple[Tensor, Tensor]:
        """f'(model / reference) of both, by which an f-divergence takes the place of KL (Wang et al. 2024)."""
        return self._score(self.chosen_ratio), self._score(self.rejected_ratio)

    @property
    def delta(self) -> Tensor:
        """By how much the better answer's score is the greater."""
        chosen, rejected = self.scores
        return chosen - rejected

    @property
    def mean_delta(self) -> Tensor:
        """The same with scores a token."""
        chosen, rejected = self.scores
        return chosen / self.chosen_tokens.clamp(min=1) - rejected / self.rejected_tokens.clamp(min=1)

    def _score(self, ratio: Tensor) -> Tensor:
        if self.divergence == "forward_kl":
            return 1 - torch.exp(-ratio)
        if self.divergence == "js_divergence":
            return math.log(2) + logsigmoid(ratio)
        if self.divergence == "alpha_divergence" and abs(self.alpha - 1) > 1e-6:
            power = self.alpha - 1
            return (torch.exp((power * ratio).clamp(max=80.0)) - 1) / power
        return ratio


@dataclass(frozen=True)
class Settings:
    """Numbers of the losses.

    Attributes:
        beta: how strongly the model is kept near the reference.
        label_smoothing: probability that the two answers of a pair are swapped.
        discopop_tau: temperature of discopop's blend.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05


def sigmoid(p: Pairs, s: Settings) -> Tensor:
    """DPO (Rafailov et al. 2023, eq. 7); smoothed labels give conservative DPO."""
    return logistic(s.beta * p.delta, s.label_smoothing)


def sigmoid_norm(p: Pairs, s: Settings) -> Tensor:
    """DPO with scores a token (Tulu 3, eq. 6)."""
    return logistic(s.beta * p.mean_delta, s.label_smoothing)


def hinge(p: Pairs, s: Settings) -> Tensor:
    """SLiC's hinge (Zhao et al. 2023)."""
    return margin(s.beta * p.delta)


def ipo(p: Pairs, s: Settings) -> Tensor:
    """IPO (Azar et al. 2023, eq. 17), with scores a token as its authors computed it."""
    return identity(p.mean_delta, s.beta)


def robust(p: Pairs, s: Settings) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024): unbiased for labels that are swapped with that probability."""
    z, eps = s.beta * p.delta, s.label_smoothing
    return (-(1 - eps) * logsigmoid(z) + eps * logsigmoid(-z)) / (1 - 2 * eps)


def exo_pair(p: Pairs, s: Settings) -> Tensor:
    """EXO (Ji et al. 2024, eq. 16); label_smoothing is above 0."""
    z = s.beta * p.delta
    log_p, log_q = math.log1p(-s.label_smoothing), math.log(s.label_smoothing)
    return torch.sigmoid(z) * (logsigmoid(z) - log_p) + torch.sigmoid(-z) * (logsigmoid(-z) - log_q)


def nca_pair(p: Pairs, s: Settings) -> Tensor:
    """NCA (Chen et al. 2024)."""
    chosen, rejected = s.beta * p.chosen_ratio, s.beta * p.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def bco_pair(p: Pairs, s: Settings) -> Tensor:
    """BCO (Jung et al. 2024) without a shift of the rewards."""
    return -logsigmoid(s.beta * p.chosen_ratio) - logsigmoid(-s.beta * p.rejected_ratio)


def sppo_hard(p: Pairs, s: Settings) -> Tensor:
    """SPPO (Wu et al. 2024, eq. 4.7) with win rates of 1 and 0."""
    return (p.chosen_ratio - 0.5 / s.beta) ** 2 + (p.rejected_ratio + 0.5 / s.beta) ** 2


def apo_zero(p: Pairs, s: Settings) -> Tensor:
    """APO-zero (D'Oosterlinck et al. 2024, eq. 7): chosen up, rejected down."""
    return 1 - torch.sigmoid(s.beta * p.chosen_ratio) + torch.sigmoid(s.beta * p.rejected_ratio)


def apo_down(p: Pairs, s: Settings) -> Tensor:
    """APO-down (eq. 8): both down, rejected further."""
    return torch.sigmoid(s.beta * p.chosen_ratio) + 1 - torch.sigmoid(s.beta * (p.chosen_ratio - p.rejected_ratio))


def discopop(p: Pairs, s: Settings) -> Tensor:
    """DiscoPOP (Lu et al. 2024, eq. 5): a blend of the logistic and the exponential loss."""
    z = s.beta * p.delta
    share = torch.sigmoid(z / s.discopop_tau)
    return -logsigmoid(z) * (1 - share) + torch.exp(-z) * share


def aot(p: Pairs, s: Settings) -> Tensor:
    """AOT (Melnyk et al. 2024): the sorted log-ratios of a step's pairs against the reference's."""
    assert p.sorted_ is not None
    return logistic(s.beta * (p.chosen - p.rejected - p.sorted_["aot"]), s.label_smoothing)


def aot_unpaired(p: Pairs, s: Settings) -> Tensor:
    """AOT of all chosen answers of a step against all rejected ones, both sorted."""
    assert p.sorted_ is not None
    chosen = logistic(s.beta * (p.chosen_ratio - p.sorted_["chosen"]), s.label_smoothing)
    rejected = logistic(s.beta * (p.sorted_["rejected"] - p.rejected_ratio), s.label_smoothing)
    # each comparison is there twice, once with the gradient of either side: half of the value, all of the gradient
    return chosen + rejected - (chosen + rejected).detach() / 2


def logistic(z: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid of a difference of rewards, of labels that are swapped with some probability."""
    return -logsigmoid(z) * (1 - label_smoothing) - logsigmoid(-z) * label_smoothing


def margin(z: Tensor) -> Tensor:
    """By how much a difference of rewards falls short of 1."""
    return torch.relu(1 - z)


def identity(difference: Tensor, beta: float) -> Tensor:
    """IPO's squared distance of a difference of log-ratios from where beta would have it."""
    return (difference - 1 / (2 * beta)) ** 2


LOSSES: dict[str, Callable[[Pairs, Settings], Tensor]] = {
    loss.__name__: loss
    for loss in (
        *(sigmoid, sigmoid_norm, hinge, ipo, robust, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down),
        *(discopop, aot, aot_unpaired),
    )
}
SORTED = ("aot", "aot_unpaired")
"""Losses that look at all pairs of a step."""
SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair", *SORTED)
"""Losses that take `label_smoothing`."""
DIVERGENT = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "discopop")
"""Losses of a difference of scores alone, in which what an f-divergence leaves beside it cancels out."""


def partners(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What each pair of a step is compared with in the losses on sorted log-ratios.

    Args:
        values: of all pairs of the step, [pairs] each: `ratio` log(chosen / rejected) of the model and `ref_ratio` of
            the reference, `chosen` and `rejected` log(model / reference).

    Returns:
        `aot`: for each pair the reference's log-ratio of the same rank; `chosen` and `rejected`: for each chosen answer
        the rejected one of the same rank, and the other way round.
    """
    rank = {name: value.argsort().argsort() for name, value in values.items()}
    return {
        "aot": values["ref_ratio"].sort().values[rank["ratio"]],
        "chosen": values["rejected"].sort().values[rank["chosen"]],
        "rejected": values["chosen"].sort().values[rank["rejected"]],
    }


def log_odds(mean_log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) of log-probabilities a token; finite at 0 too.

    `log(1 - e^x)` is computed as Maechler (2012) has it, so that no digits are lost near 0 or far from it. A
    probability that rounds to 1 is taken for the next smaller number.
    """
    x = mean_log_p.float().clamp(max=-torch.finfo(torch.float32).eps / 2)
    near = x > -math.log(2)
    inside = torch.where(near, x, -1.0)
    outside = torch.where(near, -1.0, x)
    return x - torch.where(near, torch.log(-torch.expm1(inside)), torch.log1p(-torch.exp(outside)))


def odds_ratio(chosen: Tensor, rejected: Tensor) -> Tensor:
    """log-sigmoid of the log odds ratio of two answers (ORPO, Hong et al. 2024, eq. 4 and 7).

    Args:
        chosen: log-probabilities a token of the better answers, [pairs].
        rejected: of the others.
    """
    return logsigmoid(log_odds(chosen) - log_odds(rejected))


def kto(ratio: Tensor, good: Tensor, kl: Tensor, beta: float) -> Tensor:
    """KTO (Ethayarajh et al. 2024, eq. 7), before its weights.

    Args:
        ratio: log(model / reference) of the answers, [rows].
        good: whether each is a good one.
        kl: the estimate of KL(model || reference), at least 0, of the whole step.
        beta: how strongly the model is kept near the reference.
    """
    return 1 - torch.sigmoid(beta * torch.where(good, ratio - kl, kl - ratio))


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor, centring: float = 0.0) -> Tensor:
    """-log sigmoid(reward difference - margin), and a pull of the rewards' sum towards 0.

    Args:
        chosen: rewards of the better answers, [pairs].
        rejected: of the others.
        margin: that the difference should have (Llama 2, eq. 2).
        centring: weight of the squared sum (Eisenstein et al. 2023).
    """
    loss = -logsigmoid(chosen - rejected - margin)
    return loss + centring * (chosen + rejected) ** 2 if centring else loss
