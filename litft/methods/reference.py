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
from litft.tuners.lora import replace
from litft.tuners.quant import quantise, storage_bytes
from litft.tuners.targets import is_linear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from litft.methods.base import Method


class _Frozen(Full):
    """Nothing learns; the weights are those that full tuning begins with.

    Args:
        quant: how linear layers are stored, nf4 or int8; as they are by default.
    """

    def __init__(self, quant: Any = None) -> None:
        self.quant = quant

    def apply(self, model: PreTrainedModel) -> Applied:
        """Freeze."""
        model.requires_grad_(False)
        total = sum(param.numel() for param in model.parameters())
        if self.quant is not None:
            head = model.get_output_embeddings()
            for name, module in list(model.named_modules()):
                if is_linear(module) and module is not head:
                    replace(model, name, quantise(module, self.quant))
        return Applied(trainable=0, total=total)


class _FrozenBase(_Frozen):
    """Nothing learns; the weights are those that adapters are put on."""

    trains_base = False


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
            self._net = [frozen(method, precision, None, offload, exact=moves).net]

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
            here = local(learning[name]).data  # its own pass backward may be still to come: they will be back by then
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


def frozen(
    method: Method,
    precision: str,
    path: str | None = None,
    offload: bool = False,
    exact: bool = False,
    quant: Any = None,
) -> Method:
    """A method with a model of which nothing learns, built for where another one runs.

    Args:
        method: the other one, built.
        precision: Lightning's name.
        path: of the model; that of the other one by default.
        offload: keep its layers in the host's memory, beside a GPU.
        exact: keep all weights in fp32 also where products round them.
        quant: of its linear layers' weights, nf4 or int8.
    """
    from litft.methods.sft import SFT

    twin = SFT(
        path or method.path,
        (_Frozen if method.tuner.trains_base else _FrozenBase)(quant),
        optimizer=method.optimizer_name,
        offload="parameters" if offload else "none",
        recompute="full" if offload else "none",
        memory_gb=method.memory_gb,
        balance_experts=0.0,
        fast_attention=method.fast_attention,
        fast_loss=method.fast_loss,
        liger=method.liger,
        revision=None if path else method.revision,
        trust_remote_code=method.trust_remote_code,
    )
    if path is None:
        twin.__dict__.update(tokenizer=method.tokenizer, source=method.source)
        twin.new_tokens = method.new_tokens
    twin.build(precision, method.run_device, method.parallel)
    twin.net.eval()
    if method.compute_dtype is not None and not method.parallel and not exact:
        embedding = twin.net.model.get_input_embeddings()
        for module in twin.net.modules():  # the products would round them on each pass
            weight: Any = getattr(module, "weight", None)
            if is_linear(module) and weight is not embedding.weight and weight.is_floating_point():
                weight.data = weight.data.to(method.compute_dtype)
    if not method.parallel and not twin.offloaded:
        twin.net.to(method.run_device)
    method.beside = 0 if twin.offloaded else storage_bytes(twin.net)
    return twin
