"""Which weights learn, and how the rest is stored: full, LoRA, QLoRA."""

from litft.tuners.base import Applied, Tuner
from litft.tuners.full import Full
from litft.tuners.lora import LoRA, merge_adapter
from litft.tuners.qlora import QLoRA

__all__ = ["Applied", "Full", "LoRA", "QLoRA", "Tuner", "merge_adapter"]
