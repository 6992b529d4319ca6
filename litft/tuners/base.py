"""What every tuner does: choose the weights that learn, hand their state over, group them for the optimizer."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from litft.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass
class Applied:
    """What a tuner did to a model.

    Attributes:
        trainable: number of weights that learn.
        total: number of weights in the model before it was touched.
        matched: names of the adapted modules and parameters, in model order.
        whole: names of the modules that learn as a whole beside them, and of embeddings with learning rows.
        skipped: weights that look adaptable and were left alone (fused experts), name pattern to count.
    """

    trainable: int
    total: int
    matched: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """One line for the log: shares, and what was left alone."""
        text = f"{self.trainable:,} of {self.total:,} weights learn ({self.trainable / max(self.total, 1):.2%})"
        if self.matched:
            text += f", {len(self.matched)} modules adapted"
        if self.whole:
            text += f", beside them {', '.join(self.whole)}"
        if self.skipped:
            left = ", ".join(f"{name} ({count:,} weights)" for name, count in self.skipped.items())
            text += f"; not adapted, reach them with target_parameters: {left}"
        return text


class Tuner(ABC):
    """Chooses which weights of a model learn and how the rest is stored. Applied in place, once per model.

    Attributes:
        name: what the user types.
        default_lr: the learning rate used when none is given.
        trains_base: True if the model's own weights learn, so they are loaded in fp32 rather than bf16.
    """

    name: ClassVar[str]
    default_lr: ClassVar[float]
    trains_base: ClassVar[bool]

    @abstractmethod
    def apply(self, model: PreTrainedModel) -> Applied:
        """Freeze, quantise and wrap `model` in place.

        Raises:
            UserError: the tuner does not fit this model.
        """

    def merge(self, model: PreTrainedModel) -> None:
        """Fold what was learnt into the model's own weights, in place. Nothing to do where they learnt themselves."""
        return None

    def save(self, model: PreTrainedModel, folder: str | Path | None, base: str, revision: str | None = None) -> None:
        """Write what was learnt as an adapter folder.

        Raises:
            TypeError: the tuner has no adapter; what leaves is the model itself (`litft.export`).
        """
        raise TypeError(f"{self.name} tuning has no adapter to save: export the model")

    def load(self, model: PreTrainedModel, folder: str | Path) -> None:
        """Copy a saved adapter into a model that this tuner was applied to.

        Raises:
            UserError: the tuner has no adapter.
        """
        raise UserError(f"{folder}: {self.name} tuning can't go on with an adapter: use lora, or merge it first")

    def continuing(self, folder: str | Path) -> Tuner:
        """The tuner to `apply` before `load`, so that training goes on with the adapter saved in `folder`.

        Raises:
            UserError: this tuner has no adapter, or the folder's is not supported.
        """
        raise UserError(f"{folder}: {self.name} tuning can't go on with an adapter: use lora, or merge it first")

    @contextmanager
    def disabled(self, model: nn.Module) -> Iterator[None]:
        """Inside the context the model answers as before training; restored on exit, exceptions included."""
        raise TypeError(f"{self.name} tuning changes the model itself: keep a frozen copy as the reference")
        yield

    def trainable_state(self, model: nn.Module) -> dict[str, Tensor]:
        """The learning weights by name, detached and not copied: all that a checkpoint has to hold."""
        return {name: param.detach() for name, param in trainable_parameters(model)}

    def load_trainable_state(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Copy a `trainable_state` back into the model.

        Raises:
            UserError: a weight is missing, unexpected or of another shape; nothing is copied then.
        """
        copy_exactly(dict(trainable_parameters(model)), state, "checkpoint")

    def param_groups(self, model: nn.Module, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups over the learning weights, in model order inside a group.

        Weight decay acts on matrices only: norms, biases and DoRA magnitudes (everything 1-D or named bias) go
        without, as is usual. Each group carries a `name` beside `params`, `lr` and `weight_decay`.
        """
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, param in trainable_parameters(model):
            decays = param.ndim > 1 and not name.endswith("bias")
            groups.setdefault((self.lr_ratio(name), decays), []).append(param)
        return [
            {
                "name": ("decay" if decays else "no_decay") + (f"_lr_x{ratio:g}" if ratio != 1 else ""),
                "params": params,
                "lr": lr * ratio,
                "weight_decay": weight_decay if decays else 0.0,
            }
            for (ratio, decays), params in sorted(groups.items(), key=lambda item: (item[0][0], not item[0][1]))
        ]

    def lr_ratio(self, name: str) -> float:
        """The factor on the learning rate of the weight called `name`."""
        return 1.0


def canonical(name: str) -> str:
    """A parameter's name without what torch.compile and activation checkpointing put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def trainable_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that require gradients, shared ones once, under their canonical names."""
    for name, param in model.named_parameters():
        if param.requires_grad:
            yield canonical(name), param


def copy_exactly(into: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], source: str) -> None:
    """Copy `state` into the parameters of the same names; every name and shape has to fit.

    Raises:
        UserError: they do not; says which.
    """
    import torch

    from litft.models.parts import part_of, put

    def whole(name: str) -> tuple[int, ...]:
        return part_of(into[name]).shape

    missing, unexpected = sorted(into.keys() - state.keys()), sorted(state.keys() - into.keys())
    shapes = [
        f"{name}: {tuple(state[name].shape)} in the {source}, {whole(name)} here"
        for name in sorted(into.keys() & state.keys())
        if tuple(state[name].shape) != whole(name)
    ]
    if missing or unexpected or shapes:
        lines = [f"the {source} does not fit this model and tuner:"]
        for what, names in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes)):
            if names:
                lines.append(f"  {len(names)} {what}: " + "; ".join(names[:2]) + ("; ..." if len(names) > 2 else ""))
        lines.append("use the model, the targets and the rank that it was made with")
        raise UserError("\n".join(lines))
    with torch.no_grad():
        for name, param in into.items():
            put(param, state[name])
