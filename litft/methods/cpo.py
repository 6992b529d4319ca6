"""Contrastive preference optimisation and SimPO, which need no reference."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from litft.errors import UserError
from litft.losses.preference import identity, logistic, margin
from litft.methods.preference import Answers, ReferenceFree


class Contrastive(ReferenceFree):
    """What the two share: labels that are smoothed, and cross-entropy of some weight.

    Args:
        beta: factor on the rewards; 0.1 for cpo, 2 for simpo.
        label_smoothing: probability that the two answers of a pair are swapped.
        nll_weight: weight of the chosen answers' cross-entropy; 1 for cpo, 0 for simpo (above, it is CPO-SimPO).
        options: of `ReferenceFree` and `Method`.
    """

    loss_settings: ClassVar[tuple[str, ...]] = (*ReferenceFree.loss_settings, "nll_weight", "label_smoothing")
    defaults: ClassVar[tuple[float, float]]
    """Of beta and nll_weight."""

    def __init__(
        self,
        *args: Any,
        beta: float | None = None,
        label_smoothing: float = 0.0,
        nll_weight: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, beta=self.defaults[0] if beta is None else beta, **options)
        self.nll_weight = self.defaults[1] if nll_weight is None else nll_weight
        if self.nll_weight < 0 or not 0 <= label_smoothing < 0.5:
            raise UserError("--model.nll_weight at least 0, label_smoothing at least 0 and below 0.5")
        self.label_smoothing, self.prompts_too = label_smoothing, self.prompts_too and self.nll_weight > 0


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

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Of the pairs."""
        if self.loss_type == "ipo":
            return identity(chosen - rejected, self.beta)
        z = self.beta * (chosen - rejected)
        return margin(z) if self.loss_type == "hinge" else logistic(z, self.label_smoothing)


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

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Of the pairs."""
        return logistic(self.beta * (chosen - rejected) - self.gamma, self.label_smoothing)
