"""Contrastive preference optimisation and SimPO, which need no reference."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from litft.data.batch import Batch
from litft.errors import UserError
from litft.methods.preference import REWARDS, Preference


class CPO(Preference):
    """Contrastive preference optimisation (Xu et al. 2024): DPO with a uniform reference, and cross-entropy.

    Args:
        loss_type: sigmoid, hinge, or ipo, of the difference of the two log-probabilities.
        beta: factor on that difference.
        label_smoothing: probability that the two answers of a pair are swapped.
        nll_weight: weight of the chosen answers' cross-entropy.
        nll_on: its tokens: those of the chosen answer, or its prompt's as well (as TRL has it).
        options: of `Method`.
    """

    measured: ClassVar[tuple[str, ...]] = (*REWARDS, "nll_loss")

    def __init__(
        self,
        *args: Any,
        loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        nll_weight: float = 1.0,
        nll_on: Literal["answer", "all"] = "answer",
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        if beta <= 0 or nll_weight < 0 or not 0 <= label_smoothing < 0.5:
            raise UserError("--model.beta above 0, nll_weight at least 0, label_smoothing at least 0 and below 0.5")
        self.loss_type, self.beta, self.label_smoothing = loss_type, beta, label_smoothing
        self.nll_weight, self.prompts_too = nll_weight, nll_on == "all" and nll_weight > 0

    mean: ClassVar[bool] = False
    """Whether log-probabilities are means over an answer's tokens."""
    gamma: float = 0.0

    def terms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of each pair, and the chosen answers' cross-entropy."""
        found = self.answers(batch)
        log_p = found.mean if self.mean or self.loss_type == "ipo" else found.log_p
        chosen, rejected = log_p[0::2], log_p[1::2]
        nll = self.chosen_nll(batch, found.nll)
        self.measure(self.beta * chosen.detach(), self.beta * rejected.detach(), log_p)
        self.measures.add("nll_loss", nll * batch["row_denominator"], batch["rows"])
        return self._losses(chosen - rejected), self.nll_weight * nll

    def _losses(self, difference: Tensor) -> Tensor:
        if self.loss_type == "hinge":
            return torch.relu(1 - self.beta * difference)
        if self.loss_type == "ipo":
            return (difference - 1 / (2 * self.beta)) ** 2
        z = self.beta * difference - self.gamma
        return -logsigmoid(z) * (1 - self.label_smoothing) - logsigmoid(-z) * self.label_smoothing


class SimPO(CPO):
    """SimPO (Meng et al. 2024, eq. 6): the log-probability a token is the reward, with a margin.

    Args:
        beta: factor on the difference of the two log-probabilities a token.
        gamma: the margin, already times beta.
        label_smoothing: probability that the two answers of a pair are swapped.
        nll_weight: weight of the chosen answers' cross-entropy; above 0 it is CPO-SimPO.
        nll_on: its tokens: those of the chosen answer, or its prompt's as well (as TRL has it).
        options: of `Method`.
    """

    mean: ClassVar[bool] = True

    def __init__(
        self,
        *args: Any,
        beta: float = 2.0,
        gamma: float = 1.0,
        label_smoothing: float = 0.0,
        nll_weight: float = 0.0,
        nll_on: Literal["answer", "all"] = "answer",
        **options: Any,
    ) -> None:
        own = {"beta": beta, "label_smoothing": label_smoothing, "nll_weight": nll_weight, "nll_on": nll_on}
        super().__init__(*args, loss_type="sigmoid", **own, **options)  # type: ignore[arg-type]
        self.gamma = gamma
