"""Contrastive preference optimisation and SimPO, which need no reference."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from litft.data.batch import Batch
from litft.errors import UserError
from litft.methods.preference import REWARDS, Answers, Preference


class Contrastive(Preference):
    """What the two share: a loss of the difference of two log-probabilities, and cross-entropy.

    Args:
        beta: factor on the difference; 0.1 for cpo, 2 for simpo.
        label_smoothing: probability that the two answers of a pair are swapped.
        nll_weight: weight of the chosen answers' cross-entropy; 1 for cpo, 0 for simpo (above, it is CPO-SimPO).
        nll_on: its tokens: those of the chosen answer, or its prompt's as well.
        options: of `Method`.
    """

    loss_settings: ClassVar[tuple[str, ...]] = ("beta", "nll_weight", "label_smoothing", "prompts_too")
    measured: ClassVar[tuple[str, ...]] = (*REWARDS, "nll_loss")
    defaults: ClassVar[tuple[float, float]]
    """Of beta and nll_weight."""

    def __init__(
        self,
        *args: Any,
        beta: float | None = None,
        label_smoothing: float = 0.0,
        nll_weight: float | None = None,
        nll_on: Literal["answer", "all"] = "answer",
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.beta = self.defaults[0] if beta is None else beta
        self.nll_weight = self.defaults[1] if nll_weight is None else nll_weight
        if self.beta <= 0 or self.nll_weight < 0 or not 0 <= label_smoothing < 0.5:
            raise UserError("--model.beta above 0, nll_weight at least 0, label_smoothing at least 0 and below 0.5")
        self.label_smoothing, self.prompts_too = label_smoothing, nll_on == "all" and self.nll_weight > 0

    def rewarded(self, found: Answers) -> Tensor:
        """What stands for an answer's reward, before beta, [documents]."""
        return found.log_p

    def losses(self, difference: Tensor) -> Tensor:
        """Of the pairs, from the difference of what stands for their rewards, [pairs]."""
        return self.logistic(self.beta * difference)

    def logistic(self, z: Tensor) -> Tensor:
        """-log sigmoid, labels smoothed."""
        return -logsigmoid(z) * (1 - self.label_smoothing) - logsigmoid(-z) * self.label_smoothing

    def terms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of each pair, and the chosen answers' cross-entropy."""
        found = self.answers(batch)
        rewarded, nll = self.rewarded(found), self.chosen_nll(batch, found.nll)
        chosen, rejected = rewarded[0::2], rewarded[1::2]
        self.measure(self.beta * chosen.detach(), self.beta * rejected.detach(), rewarded)
        self.measures.add("nll_loss", nll * batch["row_denominator"], batch["rows"])
        return self.losses(chosen - rejected), self.nll_weight * nll


class CPO(Contrastive):
    """Contrastive preference optimisation (Xu et al. 2024): DPO with a uniform reference, and cross-entropy.

    Args:
        loss_type: sigmoid, hinge, or ipo (with log-probabilities a token).
        options: of `Contrastive` and `Method`.
    """

    defaults: ClassVar[tuple[float, float]] = (0.1, 1.0)

    loss_settings: ClassVar[tuple[str, ...]] = (*Contrastive.loss_settings, "loss_type")

    def __init__(self, *args: Any, loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid", **options: Any) -> None:
        super().__init__(*args, **options)
        if loss_type != "sigmoid" and self.label_smoothing:
            raise UserError(f"--model.label_smoothing: {loss_type} has none; it is for sigmoid")
        self.loss_type = loss_type

    def rewarded(self, found: Answers) -> Tensor:
        """Log-probabilities of the answers, a token in ipo."""
        return found.mean if self.loss_type == "ipo" else found.log_p

    def losses(self, difference: Tensor) -> Tensor:
        """Of the pairs."""
        if self.loss_type == "hinge":
            return torch.relu(1 - self.beta * difference)
        if self.loss_type == "ipo":
            return (difference - 1 / (2 * self.beta)) ** 2
        return super().losses(difference)


class SimPO(Contrastive):
    """SimPO (Meng et al. 2024, eq. 6): the log-probability a token is the reward, with a margin.

    Args:
        gamma: the margin, already times beta.
        options: of `Contrastive` and `Method`.
    """

    defaults: ClassVar[tuple[float, float]] = (2.0, 0.0)

    loss_settings: ClassVar[tuple[str, ...]] = (*Contrastive.loss_settings, "gamma")

    def __init__(self, *args: Any, gamma: float = 1.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gamma = gamma

    def rewarded(self, found: Answers) -> Tensor:
        """Log-probabilities a token."""
        return found.mean

    def losses(self, difference: Tensor) -> Tensor:
        """Of the pairs."""
        return self.logistic(self.beta * difference - self.gamma)
