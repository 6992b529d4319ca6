"""Attention in C++ against fp64, and what happens where it can't be had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from litft.models import native
from litft.models.cpu_attention import cpu_attention

LENGTHS = [1, 5, 32, 33, 64, 200, 17]


def exact(q: Tensor, k: Tensor, v: Tensor, window: int, softcap: float, sinks: Tensor | None) -> Tensor:
    """Attention by the formula, document after document."""
    parts, start = [], 0
    groups = q.shape[1] // k.shape[1]
    for n in LENGTHS:
        a, b, c = (x[:, :, start : start + n] for x in (q, k, v))
        scores = a @ b.repeat_interleave(groups, 1).mT * q.shape[3] ** -0.5
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        seen = seen & torch.ones(n, n, dtype=torch.bool).triu(1 - window) if window else seen
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks[None, :, None, None].expand(1, -1, n, 1)], -1)
        weights = scores.softmax(-1)[..., :n]
        parts.append(weights @ c.repeat_interleave(groups, 1))
        start += n
    return torch.cat(parts, 2).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("window", "softcap", "sink"), [(0, 0.0, False), (8, 0.0, False), (0, 5.0, False), (40, 0.0, True)]
)
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (32, 96), (24, 24)])
def test_output_and_gradients_equal_the_formula_in_fp64(
    dtype: torch.dtype, window: int, softcap: float, sink: bool, dim: int, value_dim: int
) -> None:
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    q, k, v = (torch.randn(1, h, tokens, d, dtype=dtype) for h, d in ((4, dim), (2, dim), (2, value_dim)))
    sinks = torch.randn(4, dtype=dtype) if sink else None
    above = torch.randn(1, tokens, 4, value_dim, dtype=dtype)
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    inputs = [x.requires_grad_() for x in (q, k, v, *([sinks] if sinks is not None else []))]
    out = cpu_attention(q, k, v, bounds, sinks, dim**-0.5, softcap, window)[0]
    found = [out, *torch.autograd.grad(out, inputs, above)]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    wanted = exact(*doubles[:3], window, softcap, doubles[3] if sink else None)
    expected = [wanted, *torch.autograd.grad(wanted, doubles, above.double())]
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() < limit * other.norm()


def test_without_a_compiler_the_same_is_computed_otherwise_and_said(tmp_path: Path) -> None:
    script = (
        "import torch; from litft.models import native; from litft.models.cpu_attention import cpu_attention\n"
        "q = torch.randn(1, 2, 10, 32).bfloat16(); bounds = torch.tensor([0, 4, 10], dtype=torch.int32)\n"
        "out = cpu_attention(q, q, q, bounds, None, 0.2, 0.0, 0)[0]\n"
        "assert out.isfinite().all() and not native.use_arena()\n"
        "print(native.problem())\n"
    )
    environment = {"PATH": str(tmp_path), "PYTHONPATH": ":".join(sys.path), "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler" in done.stdout


@pytest.mark.skipif(native.compiler() is None, reason="needs a C++ compiler")
def test_what_cannot_be_compiled_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.cpp").write_text("this is not C++")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    monkeypatch.setattr(native, "_problems", [])
    monkeypatch.setenv("LITFT_CACHE", str(tmp_path / "cache"))
    assert native._load("broken") is None
    assert "broken.cpp can't be compiled" in native.problem()
