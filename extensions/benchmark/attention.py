"""Attention over packed documents on a CPU: our C++ kernels against dense blocks of torch's products, in turns.

python -m extensions.benchmark.attention
"""

from __future__ import annotations

import statistics
import time
from unittest import mock

import torch

from litft.models import cpu_attention

SHAPES = [([100] * 20, 9, 3, 64), ([310] * 7, 9, 3, 64), ([1000] * 2, 9, 3, 64), ([4096], 9, 3, 64)]
SHAPES += [([300] * 7, 32, 8, 128)]
TURNS = 11


def measure(lengths: list[int], heads: int, kv_heads: int, dim: int) -> dict[tuple[str, str], float]:
    """Median milliseconds by arm and pass; the first turn of each arm is left out."""
    tokens = sum(lengths)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    sizes = heads, kv_heads, kv_heads
    q, k, v = (torch.randn(1, tokens, n, dim).bfloat16().transpose(1, 2).requires_grad_() for n in sizes)
    above = torch.randn(1, tokens, heads, dim).bfloat16()
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(TURNS):
        for arm in ("native", "blocks"):
            with mock.patch.object(cpu_attention, "_native", cpu_attention._native if arm == "native" else _never):
                began = time.perf_counter()
                out = cpu_attention.cpu_attention(q, k, v, bounds, None, dim**-0.5, 0.0, 0)[0]
                between = time.perf_counter()
                out.backward(above)
                ended = time.perf_counter()
            seconds.setdefault((arm, "forward"), []).append(between - began)
            seconds.setdefault((arm, "backward"), []).append(ended - between)
    return {key: 1e3 * statistics.median(times[1:]) for key, times in seconds.items()}


def _never(*args: object) -> bool:
    return False


def main() -> None:
    """Print a table."""
    print(f"{torch.get_num_threads()} threads\n")
    print("| documents | heads | forward, ms | blocks | | backward, ms | blocks | |\n|---|---|---|---|---|---|---|---|")
    for lengths, heads, kv_heads, dim in SHAPES:
        ms = measure(lengths, heads, kv_heads, dim)
        cells = [f"{len(lengths)} of {lengths[0]}", f"{heads} and {kv_heads} of {dim}"]
        for way in ("forward", "backward"):
            mine, other = ms["native", way], ms["blocks", way]
            cells += [f"{mine:.1f}", f"{other:.1f}", f"{other / mine:.1f}x"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
