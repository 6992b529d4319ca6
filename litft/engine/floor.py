"""How fast a step could be: the time that its matrix products alone take on this machine.

    floor = sum of products            of every linear layer: forward, and backward to its input; to its weight where
                                       that learns; of adapters 2 forward and 4 backward
          + head                       the same over the trained tokens only
          + 7/2 products a head        of attention, 2 forward and 5 backward, half of each causal

each timed by itself in 16 bits (in fp32 where the run is), in the shapes of the run. MFU counts the operations of the
same products, 2 a multiplication, and divides by the rate of one large product on the same machine.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

BLOCK = 2**28
"""Numbers of the largest output that is timed whole."""
REPEATS = 5
TURN = 2e-3
"""Seconds that a turn of timing takes at least."""
LONG = 0.1
"""Seconds of a product that is timed only twice."""
LARGE = 4096
"""Side of the product that stands for what the machine can do."""


@dataclass
class Floor:
    """The products of a micro-batch.

    Attributes:
        seconds: of each part: blocks, adapters, head, attention.
        operations: that they are made of, 2 a multiplication.
        peak: operations a second of one large product.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    operations: float = 0.0
    peak: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of a micro-batch that has nothing else to do."""
        return sum(self.seconds.values())

    def share(self, seconds: float) -> float:
        """What part of a micro-batch's real time is the floor."""
        return self.total / seconds

    def mfu(self, seconds: float) -> float:
        """The model's operations over what the machine could do in that time."""
        return self.operations / (self.peak * seconds)


class _Clock:
    """Times products by shape, each once."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.known: dict[tuple[Any, ...], float] = {}

    def __call__(self, m: int, k: int, n: int, kind: str = "plain", batch: int = 0) -> float:
        """Seconds of [m, k] times [k, n], the factors lying in memory as training has them.

        Args:
            m: rows.
            k: what is summed over.
            n: columns.
            kind: `forward`: the right factor is a weight's transpose; `weight`: the left one is a transpose; `plain`.
            batch: so many products at once; 0 for one.
        """
        key = (m, k, n, kind, batch)
        if key not in self.known:
            some = (batch,) if batch else ()
            make: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
            left = torch.randn(*some, k, m, **make).mT if kind == "weight" else torch.randn(*some, m, k, **make)
            right = torch.randn(*some, n, k, **make).mT if kind == "forward" else torch.randn(*some, k, n, **make)
            out = torch.empty(*some, m, n, **make)
            self.known[key] = self.time(lambda: torch.matmul(left, right, out=out))
        return self.known[key]

    def time(self, work: Callable[[], object]) -> float:
        """Seconds of one run: the median of some turns, each long enough for the clock."""
        runs = 1
        found: list[float] = []
        while len(found) < (REPEATS if not found or found[0] < LONG else 2):
            self._wait()
            start = time.perf_counter()
            for _ in range(runs):
                work()
            self._wait()
            took = time.perf_counter() - start
            if took < TURN and not found:
                runs *= 2
            else:
                found.append(took / runs)
        return statistics.median(found)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def linear_layers(model: Any) -> list[tuple[str, int, int, bool, int]]:
    """Of every linear layer: name, outputs, inputs, whether the weight learns, the rank of its adapter (0: none)."""
    from litft.tuners.layers import LoRALinear
    from litft.tuners.targets import is_linear

    found = []
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        rank, base = 0, module  # type: int, Any
        if isinstance(module, LoRALinear):
            rank, base = module.r, module.base_layer
            inside.add(base)
        if not is_linear(base):
            continue
        if isinstance(module, LoRALinear):
            outputs, inputs = module.lora_B.shape[0], module.lora_A.shape[1]
        elif hasattr(base, "out_features"):
            outputs, inputs = base.out_features, base.in_features
        else:
            inputs, outputs = base.weight.shape  # GPT-2's Conv1D
        weight: Any = base.weight
        found.append((name, int(outputs), int(inputs), bool(weight.requires_grad), rank))
    return found


def measure(
    model: Any, tokens: int, trained: int, attended: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Floor:
    """Time the products of a micro-batch.

    Args:
        model: a transformers model, its tuner applied. Fused experts are left out: a floor that is too low.
        tokens: real tokens of the micro-batch.
        trained: of them, in the loss.
        attended: length of the typical document as attention sees it, sum of squares over sum.
        device: where it runs.
        dtype: it computes in.
    """
    clock, floor = _Clock(device, dtype), Floor()
    seconds = dict.fromkeys(("blocks", "adapters", "head", "attention"), 0.0)
    head = model.get_output_embeddings()
    heads_layers = {head, getattr(head, "base_layer", None)}  # an adapted one has it inside
    for name, out, into, learns, rank in linear_layers(model):
        is_head = model.get_submodule(name) in heads_layers
        rows = trained if is_head else tokens
        if is_head and not rank and head is not None:
            learns = any(p.requires_grad for p in head.parameters())
        count = 2 + learns
        some = min(rows, max(1, BLOCK // out))  # a head's logits are never there all at once
        took = clock(some, into, out, "forward") + clock(some, out, into)
        took += clock(out, some, into, "weight") if learns else 0.0
        seconds["head" if is_head else "blocks"] += took * rows / some
        floor.operations += 2.0 * count * rows * out * into
        if rank:
            down, up = clock(rows, into, rank, "forward"), clock(rows, rank, out, "forward")
            back = clock(rows, out, rank) + clock(out, rows, rank, "weight")
            back += clock(rank, rows, into, "weight") + clock(rows, rank, into)
            seconds["adapters"] += down + up + back
            floor.operations += 2.0 * 3 * rows * rank * (out + into)
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)  # models without attention have none
    if heads:
        dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        length = max(32, attended // 32 * 32)
        documents = tokens / length
        batch = heads * max(1, round(documents)) if device.type == "cuda" else heads
        one = clock(length, dim, length, "forward", batch) * heads / batch
        layers = config.num_hidden_layers
        seconds["attention"] = layers * documents * 3.5 * one
        floor.operations += layers * tokens * 6.0 * heads * dim * attended
    floor.seconds = seconds
    side = LARGE if device.type == "cuda" else LARGE // 2
    floor.peak = 2.0 * side**3 / clock(side, side, side)
    return floor
