"""What a model makes of hidden states at its end, found out so that the loss can do without its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from litft.losses.distillation import bend
from litft.losses.linear_cross_entropy import ROWS, linear_cross_entropy
from litft.models.parts import stored
from litft.models.quiet import quiet

LARGE = 60.0
"""Size of the logits that are looked at: a soft cap shows only in large ones."""


@dataclass
class Head:
    """A linear map to logits, followed by a factor and a soft cap.

    Args:
        module: the output embeddings, with a `weight` [vocabulary, width] and maybe a `bias`.
        scale: factor on the logits.
        softcap: logits become `softcap * tanh(logits / softcap)`; 0 leaves them.
    """

    module: nn.Module
    scale: float = 1.0
    softcap: float = 0.0

    def nll(self, hidden: Tensor, targets: Tensor, alike: bool = True) -> Tensor:
        """Negative log-probabilities of `targets` [rows], fp32, from what reaches the head [rows, width].

        Args:
            hidden: what reaches the head.
            targets: ids.
            alike: whether the loss will weigh all of them alike.
        """
        module: Any = self.module
        bias = getattr(module, "bias", None)
        bent = {"scale": self.scale, "softcap": self.softcap}
        return linear_cross_entropy(hidden, module.weight, targets, bias, **bent, ahead=alike)

    def logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """Logits fp32 [rows, vocabulary] of what reaches the head, the product in `dtype`."""
        module: Any = self.module
        filled = F.pad(hidden.to(dtype), (0, 0, 0, -len(hidden) % ROWS))  # as the loss's blocks are
        bias = getattr(module, "bias", None)
        logits = F.linear(filled, module.weight.to(dtype), None if bias is None else bias.to(dtype))
        return bend(logits[: len(hidden)].float(), self.scale, self.softcap)

    @contextmanager
    def held_back(self) -> Iterator[list[Tensor]]:
        """Inside the context the model computes no logits; what would have reached its head is put into the list."""
        caught: list[Tensor] = []

        def catch(hidden: Tensor) -> Tensor:
            caught.append(hidden)
            return hidden[..., :1]  # something for the model to scale and hand out

        self.module.forward = catch
        try:
            yield caught
        finally:
            del self.module.forward


def find_head(model: Any, run: Callable[[Tensor], Tensor] | None = None) -> Head | None:
    """The head of a causal language model, by looking at what its logits are made of.

    A forward pass over two tokens, with something random in the place of what reaches the head, is compared with the
    formulas that families have: plain, scaled, soft-capped, by the names these numbers have in configurations.

    Args:
        model: a transformers model, with its tuner applied.
        run: makes logits of ids; the model itself by default.

    Returns:
        None where no formula fits, or where the head has dropout of its own: its logits are then taken as they are.
    """
    module = model.get_output_embeddings()
    weight = stored(module)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return None
    if getattr(module, "dropout", 0.0):
        return None
    seen: dict[str, Tensor] = {}

    def substitute(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0)).to(args[0])
        return (hidden * (LARGE / F.linear(hidden, module.weight).float().std()).to(hidden),)

    def look(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen["raw"] = output.float()
        seen["linear"] = F.linear(args[0], module.weight, getattr(module, "bias", None)).float()

    handles = [module.register_forward_pre_hook(substitute), module.register_forward_hook(look)]
    try:
        with torch.no_grad(), quiet():
            ids = torch.zeros(1, 2, dtype=torch.long, device=weight.device)
            logits = (run(ids) if run else model(input_ids=ids, use_cache=False).logits).float()
    finally:
        for handle in handles:
            handle.remove()
    if not _same(seen["raw"], seen["linear"]):
        return None
    config = model.config.get_text_config()
    formulas = [Head(module)]
    for name, power in (("logit_scale", 1), ("logits_scaling", -1), ("lm_head_multiplier", 1)):
        if number := getattr(config, name, None):
            formulas.append(Head(module, scale=float(number) ** power))
    if number := getattr(config, "final_logit_softcapping", None):
        formulas.append(Head(module, softcap=float(number)))
    for head in formulas:
        expected = seen["raw"] * head.scale
        if head.softcap:
            expected = head.softcap * torch.tanh(expected / head.softcap)
        if _same(logits, expected):
            return head
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal up to what a few roundings to bf16 do."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 2**-6 * b.abs().max())
