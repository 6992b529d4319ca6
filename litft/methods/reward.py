"""Reward models: a number for an answer, learnt from pairs."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from litft.data.batch import Batch
from litft.errors import UserError
from litft.losses.preference import bradley_terry
from litft.methods.preference import Preference


class Reward(Preference):
    """A reward model (Bradley and Terry 1952; Ouyang et al. 2022): the chosen answer's score above the rejected one's.

    The model's vocabulary head gives way to a score head, which is trained in full; the score is read at the last token
    of the conversation as the chat template writes it. A row's margin is asked of the difference.

    Args:
        centring: weight of the squared sum of the two scores, which keeps them near 0 (0.01 is usual).
        options: of `Method`.
    """

    loss_settings: ClassVar[tuple[str, ...]] = ("centring",)
    measured: ClassVar[tuple[str, ...]] = ("accuracy", "margin", "mean_reward")
    lrs: ClassVar[tuple[float, float] | None] = (1e-4, 1e-5)
    scores: ClassVar[bool] = True

    def __init__(self, *args: Any, centring: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        if centring < 0:
            raise UserError(f"--model.centring {centring}: must be at least 0")
        self.centring = centring

    def terms(self, batch: Batch) -> tuple[Tensor, float]:
        """The loss of each pair."""
        scores = self.net(batch)["scores"][: 2 * batch["rows"]]
        chosen, rejected = scores[0::2], scores[1::2]
        self.measures.add("accuracy", (chosen > rejected).float())
        self.measures.add("margin", chosen - rejected)
        self.measures.add("mean_reward", scores)
        return bradley_terry(chosen, rejected, batch["values"], self.centring), 0.0

    def probe(self, batch: Batch) -> Tensor:
        """The pass with scores of any documents."""
        total: Tensor = self.net(batch)["scores"].sum()
        return total / batch["denominator"]
