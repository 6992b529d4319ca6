"""How a method is validated: sums over each validation set, and what is logged of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from litft.data.batch import Batch
from litft.methods.measures import Measures


class Validated(LightningModule):
    """Trainer's validation hooks; a subclass writes `validation_sums`, and `look_ahead` if need be.

    Attributes:
        measures: of the step or the validation that was last.
        val_losses: of the last validation: `val_loss` over all sets, `val_loss/NAME` where there are several, and the
            means of what was measured.
    """

    val_losses: dict[str, float]

    def __init__(self) -> None:
        super().__init__()
        self.measures = Measures()
        self._sums: dict[int, Tensor] = {}
        self._ahead: dict[int, list[Any]] = {}

    def validation_sums(self, batch: Batch) -> Tensor:
        """What validation adds up: the summed loss and the number of things it is summed over, [2]."""
        raise TypeError(f"{type(self).__name__} needs validation_sums(batch)")

    def look_ahead(self, batches: Iterable[Batch]) -> list[Any] | None:
        """What the losses of a step's micro-batches have to know of each other, for methods where they do.

        Args:
            batches: all of this rank's, of an optimizer step or a validation set.

        Returns:
            For each of them what its loss finds under `ahead`; None where that is nothing.
        """
        return None

    def on_validation_epoch_start(self) -> None:
        """Begin to count."""
        self._sums, self.measures = {}, Measures()
        if type(self).look_ahead is not Validated.look_ahead:
            with torch.no_grad(), self.trainer.precision_plugin.forward_context():
                for index, loader in enumerate(self.trainer.datamodule.val_dataloader()):  # type: ignore[attr-defined]
                    batches = (self.trainer.strategy.batch_to_device(batch) for batch in loader)
                    if (ahead := self.look_ahead(batches)) is not None:
                        self._ahead[index] = ahead

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a micro-batch to its set's sums."""
        if self._ahead:
            batch["ahead"] = self._ahead[dataloader_idx][batch_idx]
        sums = self.validation_sums(batch)
        sums = sums if sums.device.type == "mps" else sums.double()  # Apple's GPUs have no float64
        self._sums[dataloader_idx] = self._sums.get(dataloader_idx, torch.zeros_like(sums)) + sums

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss` (over all sets), and `val_loss/NAME` where there are several."""
        trainer: Any = self.trainer
        names = trainer.datamodule.val_names
        totals = {i: self.trainer.strategy.reduce(s, reduce_op="sum") for i, s in sorted(self._sums.items())}
        if not totals:
            return
        whole = torch.stack(list(totals.values())).sum(0)
        values = {"val_loss": whole[0] / whole[1]}
        if len(totals) > 1:
            values |= {f"val_loss/{names[i]}": total[0] / total[1] for i, total in totals.items()}
        self.val_losses = {name: float(value) for name, value in values.items()}
        self.val_losses |= {f"val_{name}": value for name, value in self.measures.means(trainer.strategy).items()}
        if not self.trainer.sanity_checking:
            alone = trainer.state.fn == "validate"  # then Trainer hands them back; a fit's records have them
            self.log_dict({name: value.float() for name, value in values.items()}, logger=alone)
