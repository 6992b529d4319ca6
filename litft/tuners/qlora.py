"""QLoRA: LoRA over a base whose linear layers are stored in 4 or 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from litft.tuners.base import Applied
from litft.tuners.lora import LoRA, replace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class QLoRA(LoRA):
    """LoRA over a quantised base (Dettmers et al. 2023, arXiv:2305.14314): its weights take a quarter of the memory.

    Every linear layer of the backbone is quantised, adapted or not; embeddings, heads, routers, fused experts and
    norms keep their dtype. What is saved is an ordinary LoRA adapter. With init: pissa the singular directions are
    those of the 16-bit weight and what is left of it is quantised; the saved adapter fits the 16-bit model.

    Args:
        quant: nf4 (bitsandbytes: 4-bit, blocks of 64, double quantisation) or int8 (a scale a row).
        lora: the arguments of `LoRA`.
    """

    name = "qlora"

    def __init__(self, quant: Literal["nf4", "int8"] = "nf4", **lora: Any) -> None:
        super().__init__(**lora)
        self.quant: Literal["nf4", "int8"] = quant

    def apply(self, model: PreTrainedModel) -> Applied:
        """Put the adapters in place, then quantise the backbone's linear layers one by one.

        Raises:
            UserError: as `LoRA.apply`, or bitsandbytes is missing.
        """
        from litft.tuners import targets
        from litft.tuners.layers import Adapter, LoRALinear
        from litft.tuners.quant import bitsandbytes, is_quantised, quantise

        if self.quant == "nf4":
            bitsandbytes()  # missing? say so before anything is touched
        applied = super().apply(model)
        modules, outside = dict(model.named_modules()), targets.heads(model)
        kept = {name for name, module in modules.items() if isinstance(module, Adapter)}
        kept -= {name for name, module in modules.items() if isinstance(module, LoRALinear)}
        for name, module in modules.items():
            if isinstance(module, LoRALinear):
                continue
            plain = name.removesuffix(".base_layer")
            if not targets.is_linear(module) or is_quantised(module) or targets.is_router(modules, plain):
                continue
            if plain in outside or any(name.startswith(f"{adapter}.") for adapter in kept):
                continue
            replace(model, name, quantise(module, self.quant))
            parent = modules.get(plain)
            if isinstance(parent, LoRALinear):
                parent.reset_magnitude()
        return applied

    def _storage(self) -> dict[str, Any]:
        return {"quant": self.quant}
