"""Full fine-tuning: every weight learns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from litft.tuners.base import Applied, Tuner, logger

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Full(Tuner):
    """Every weight of the model learns. There is no adapter: what leaves is the model itself."""

    name = "full"
    default_lr = 2e-5
    trains_base = True

    def apply(self, model: PreTrainedModel) -> Applied:
        """Let every weight learn. Keeps their dtype: the caller loads fp32, or handles bf16 rounding itself."""
        model.requires_grad_(True)
        total = sum(param.numel() for param in model.parameters())
        applied = Applied(trainable=total, total=total)
        logger.info("%s: %s", self.name, applied)
        return applied
