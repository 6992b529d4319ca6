"""The model as it was before training, which preference methods keep a model near."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from litft.models.parts import local
from litft.tuners import Full, LoRA
from litft.tuners.base import Applied
from litft.tuners.targets import is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from litft.methods.base import Method


class Frozen(Full):
    """Nothing learns; the weights are those that full tuning begins with."""

    def apply(self, model: PreTrainedModel) -> Applied:
        """Freeze."""
        model.requires_grad_(False)
        return Applied(trainable=0, total=sum(param.numel() for param in model.parameters()))


class Reference:
    """What a method's model is compared with.

    With adapters it is the same model: without them where they began as nothing, with what they began as where
    training goes on with a saved one. With full tuning it is a frozen copy.

    Args:
        method: its model built.
        precision: Lightning's name.
        offload: keep the frozen copy's layers in the host's memory, beside a GPU.
        moves: whether it is going to follow the model, so that a copy of what learns is needed.
    """

    def __init__(self, method: Method, precision: str, offload: bool = False, moves: bool = False) -> None:
        self.method = method
        self.copy: dict[str, Tensor] = {}
        self._net: list[nn.Module] = []  # no submodule: it is neither trained nor saved
        adapter = isinstance(method.tuner, LoRA)
        if adapter and (moves or method.source.adapter is not None):
            learning = method.tuner.trainable_state(method.net.model)
            self.copy = {name: local(value).clone() for name, value in learning.items()}
        elif not adapter:
            self._net = [_frozen_copy(method, precision, offload, exact=moves).net]

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Inside the context the reference's `CausalLM`, without gradients; the model is as before after it."""
        method, device = self.method, self.method.run_device.type
        half = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device)
        with (
            torch.no_grad(),
            # the casts of weights that autocast keeps would have no gradient in the model's own pass
            torch.autocast(device, dtype, enabled=half, cache_enabled=False),
            nullcontext() if self._net or self.copy else method.tuner.disabled(method.net.model),
            self._swapped(),
        ):
            yield self._net[0] if self._net else method.net

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        learning = self.method.tuner.trainable_state(self.method.net.model) if self.copy else {}
        for name, kept in self.copy.items():
            here = local(learning[name])
            before = here.clone()
            here.copy_(kept)
            kept.copy_(before)

    @torch.no_grad()
    def follow(self, share: float) -> None:
        """Move towards the model: `share` of it and the rest of what was (Gorbatovski et al. 2024, eq. 3)."""
        learning = self.method.tuner.trainable_state(self.method.net.model)
        for name, kept in self._weights().items():
            kept.lerp_(local(learning[name]).to(kept.dtype), share)

    def _weights(self) -> dict[str, Tensor]:
        if self.copy:
            return self.copy
        names: Any = self._net[0].model
        return {name: local(param) for name, param in names.named_parameters()}

    def state(self) -> dict[str, Tensor]:
        """The reference's weights, for a checkpoint of a run in which it moves."""
        return {name: kept.detach().clone() for name, kept in self._weights().items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Take them up again."""
        for name, kept in self._weights().items():
            kept.copy_(state[name])


def _frozen_copy(method: Method, precision: str, offload: bool, exact: bool) -> Method:
    """A method with the same model, of which nothing learns."""
    from litft.methods.sft import SFT

    twin = SFT(
        method.path,
        Frozen(),
        optimizer=method.optimizer_name,
        offload="parameters" if offload else "none",
        recompute="full" if offload else "none",
        memory_gb=method.memory_gb,
        balance_experts=0.0 if method.balance else None,
        fast_attention=method.fast_attention,
        fast_loss=method.fast_loss,
        liger=method.liger,
        revision=method.revision,
        trust_remote_code=method.trust_remote_code,
    )
    twin.__dict__.update(tokenizer=method.tokenizer, source=method.source)
    twin.new_tokens = method.new_tokens
    twin.build(precision, method.run_device, method.parallel)
    twin.net.eval()
    if method.compute_dtype is not None and not method.parallel and not exact:
        embedding = twin.net.model.get_input_embeddings()
        for module in twin.net.modules():  # the products would round them on each pass
            weight: Any = getattr(module, "weight", None)
            if is_linear(module) and weight is not embedding.weight:
                weight.data = weight.data.to(method.compute_dtype)
    if not method.parallel and not twin.offloaded:
        twin.net.to(method.run_device)
    return twin
