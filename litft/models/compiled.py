"""Decoder layers compiled one by one: they share one graph, which is made once, for packs of any length."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from litft.models.recompute import Again

WORTH_FLOPS = {"cpu": 5e13, "cuda": 5e16}
"""Operations of a run from which compiling earns back what it costs. It takes 10 to 60 s and saves about a third of the
time on a CPU and a fifth on a GPU; uncompiled, a small CPU does some 4e11 operations a second, an H100 some 2e14."""


def layers_of(model: Any) -> list[nn.Module]:
    """The decoder layers of a transformers model, in order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer) and module not in inside:
            found.append(module)
            inside.update(module.modules())
    return found


def earns(parameters: int, tokens: int | None, device: torch.device, trains_base: bool) -> bool:
    """Whether a run is long enough for compiling to pay.

    Args:
        parameters: of the model.
        tokens: that the run reads; None where nobody knows.
        device: where it runs.
        trains_base: three products a weight, else two.
    """
    operations = (6 if trains_base else 4) * parameters * (tokens or 0)
    return operations > WORTH_FLOPS.get(device.type, float("inf"))


@dataclass
class Compiled:
    """How the layers of a model came to be compiled.

    Attributes:
        layers: how many are.
        seconds: that the first pass took, which compiles them.
        graphs: `recompilations()` after it: kinds of layers, and passes with and without gradients, have their own.
        failed: why they are not, where they should have been.
    """

    layers: int = 0
    seconds: float = 0.0
    graphs: int = 0
    failed: str = ""

    def __str__(self) -> str:
        """One line for the console; empty where nobody asked for anything."""
        if self.failed:
            return f"layers run uncompiled, which is slower: {self.failed}"
        return f"{self.layers} layers compiled in {self.seconds:.0f} s" if self.layers else ""


def compile_layers(model: Any, first_pass: Callable[[], object]) -> Compiled:
    """Compile every decoder layer; where that fails, leave them as they were.

    Args:
        model: a transformers model, its tuner applied, on its device.
        first_pass: a forward and backward pass, at which the compiling happens. The random state is put back after it.
    """
    torch._dynamo.config.optimize_ddp = False  # layers end before DDP's buckets do: there is no graph to cut
    # it warns of operations in place wherever layers run again selectively; tests hold the gradients to be the same
    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    layers = layers_of(model)
    start = time.perf_counter()
    plain: dict[nn.Module, Any] = {}
    for layer in layers:
        again: Any = layer.forward
        if isinstance(again, Again) and not again.selective:  # what runs again is the compiled pass
            plain[layer] = again.forward
            again.forward = torch.compile(again.forward, dynamic=True)
        elif isinstance(layer, FSDPModule):  # without the gathering before and after it
            plain[layer] = layer.forward
            layer.forward = torch.compile(layer.forward, dynamic=True)
        else:
            layer.compile(dynamic=True)
    try:
        # whole now, so that "compiled" is no half-truth; what only a later pass meets may still run uncompiled
        with torch.random.fork_rng(), torch._dynamo.error_on_graph_break(True):
            first_pass()
    except Exception as error:  # whatever dynamo, inductor or a C++ compiler may raise: the run goes on without
        for layer in layers:
            layer._compiled_call_impl = None
            if layer in plain:
                again = layer.forward
                if isinstance(again, Again):
                    again.forward = plain[layer]
                else:
                    layer.forward = plain[layer]
        text = (str(error).strip().splitlines() or [""])[0]
        return Compiled(failed=f"{type(error).__name__}: {text[:160]}")
    return Compiled(len(layers), time.perf_counter() - start, recompilations())


def recompilations() -> int:
    """Graphs that were made again in this process so far, because an input was not what those before were made for."""
    from torch._dynamo.utils import get_compilation_metrics

    return sum(1 for made in get_compilation_metrics() if made.recompile_reason)


def eager() -> Any:
    """A context in which nothing compiled runs: for generation, whose shapes are others at every token."""
    return torch.compiler.set_stance("force_eager")
