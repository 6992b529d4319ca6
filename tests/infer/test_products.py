"""Products by oneDNN, and what the engine's speed comes to with them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny
from torch import nn
from transformers import AutoModelForCausalLM

from extensions.benchmark.generation import by_litft, by_transformers, prompts
from litft.infer.load import load_for_inference
from litft.infer.products import Linear
from litft.models import cpu
from litft.models.resolve import resolve

DATA = Path(__file__).parents[2] / "tutorials/data/quickstart.jsonl"


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (0, 2)])
def test_the_product_is_that_of_64_bits(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    plain, x = nn.Linear(300, 65, bias=bias), torch.randn(*shape, 300)
    with torch.no_grad():
        exact = plain.double()(x.double())
        plain.float().__class__ = Linear
        torch.testing.assert_close(plain(x).double(), exact, atol=1e-5, rtol=1e-5)


def test_gradients_and_16_bits_are_torchs_own() -> None:
    layer, x = Linear(8, 4), torch.randn(2, 8)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(4, 8))
    with torch.no_grad():
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("amd", "dtype"), [(True, torch.float32), (False, torch.float32), (True, torch.bfloat16)])
def test_only_fp32_on_amd_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, amd: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(cpu, "is_amd", lambda: amd)
    model = load_for_inference(save_tiny(tmp_path / "tiny", "llama"), device="cpu", dtype=dtype).model
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {Linear if amd and dtype == torch.float32 else nn.Linear}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_64_prompts_take_less_than_transformers_batches_and_a_third_of_one_by_one(dtype: torch.dtype) -> None:
    """By the time of the processor, which other work on the machine hardly touches."""
    bundle = load_for_inference("smollm2-135m-instruct", device="cpu", dtype=dtype)
    plain: Any = AutoModelForCausalLM.from_pretrained(resolve("smollm2-135m-instruct").folder, dtype=dtype).eval()
    rows = [bundle.encode(messages) for messages in prompts(str(DATA), 64)]

    def rate(arm: Callable[..., list[list[int]]], *args: Any) -> float:
        began = time.process_time()
        answers = arm(bundle, *args)
        return sum(map(len, answers)) / (time.process_time() - began)

    one = rate(by_transformers, plain, rows[::16], 24, 1)
    batches = rate(by_transformers, plain, rows, 24, 16)
    litft = rate(by_litft, rows, 24, 16)
    assert litft > 3 * one
    assert litft > batches
