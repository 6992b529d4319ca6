"""Fine-tune language models on chat data, on Lightning. The public names are imported when first used."""

from __future__ import annotations

import importlib

TYPE_CHECKING = False  # not from typing: under `python -m litft` the current folder may still shadow it here
__version__ = "0.1.0"

_HOMES = {
    "SFT": "litft.methods.sft",
    "DPO": "litft.methods.dpo",
    "ORPO": "litft.methods.orpo",
    "CPO": "litft.methods.cpo",
    "SimPO": "litft.methods.cpo",
    "KTO": "litft.methods.kto",
    "Distill": "litft.methods.distill",
    "Reward": "litft.methods.reward",
    "Method": "litft.methods.base",
    "Preference": "litft.methods.preference",
    "Full": "litft.tuners",
    "LoRA": "litft.tuners",
    "QLoRA": "litft.tuners",
    "Tuner": "litft.tuners",
    "ChatData": "litft.data.chat",
    "PreferenceData": "litft.data.preference_data",
    "Checkpoints": "litft.engine.checkpoints",
    "FSDP": "litft.engine.fsdp",
    "StepMetrics": "litft.engine.metrics",
    "UserError": "litft.errors",
    "DataError": "litft.errors",
}
__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from typing import Any

    from litft.data.chat import ChatData as ChatData
    from litft.data.preference_data import PreferenceData as PreferenceData
    from litft.engine.checkpoints import Checkpoints as Checkpoints
    from litft.engine.fsdp import FSDP as FSDP
    from litft.engine.metrics import StepMetrics as StepMetrics
    from litft.errors import DataError as DataError
    from litft.errors import UserError as UserError
    from litft.methods.base import Method as Method
    from litft.methods.cpo import CPO as CPO
    from litft.methods.cpo import SimPO as SimPO
    from litft.methods.distill import Distill as Distill
    from litft.methods.dpo import DPO as DPO
    from litft.methods.kto import KTO as KTO
    from litft.methods.orpo import ORPO as ORPO
    from litft.methods.preference import Preference as Preference
    from litft.methods.reward import Reward as Reward
    from litft.methods.sft import SFT as SFT
    from litft.tuners import Full as Full
    from litft.tuners import LoRA as LoRA
    from litft.tuners import QLoRA as QLoRA
    from litft.tuners import Tuner as Tuner


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'litft' has no attribute '{name}'")
