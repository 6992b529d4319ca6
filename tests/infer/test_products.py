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
from litft.infer import products
from litft.infer.load import load_for_inference
from litft.models import cpu
from litft.models.resolve import resolve

DATA = Path(__file__).parents[2] / "tutorials/data/quickstart.jsonl"


@pytest.fixture(autouse=True)
def amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "is_amd", lambda: True)


@pytest.mark.parametrize("free", [float("inf"), 0.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 7), (1, 1), (0, 2)])
def test_the_product_is_that_of_64_bits(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], bias: bool, free: float
) -> None:
    monkeypatch.setattr(products, "host_memory_left", lambda: free)
    torch.manual_seed(0)
    layer, x = nn.Linear(300, 65, bias=bias), torch.randn(*shape, 300)
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
    products.by_onednn(layer)
    assert type(layer) is products.Linear
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), exact, atol=1e-5, rtol=1e-5)


def test_gradients_other_dtypes_and_changed_weights_are_torchs_own() -> None:
    layer, x = nn.Linear(8, 4), torch.randn(2, 8)
    products.by_onednn(layer)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(4, 8))
    with torch.no_grad():
        layer.weight.zero_()
        torch.testing.assert_close(layer(x), layer.bias.expand(2, 4))
        assert layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_only_amd_is_changed_and_16_bits_only_with_room_for_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "tiny", "llama")
    monkeypatch.setattr(cpu, "fast_bf16", lambda: True)

    def kinds(dtype: torch.dtype) -> set[type]:
        model = load_for_inference(folder, device="cpu", dtype=dtype).model
        return {type(module) for module in model.modules() if isinstance(module, nn.Linear)}

    assert kinds(torch.float32) == kinds(torch.bfloat16) == {products.Linear}
    monkeypatch.setattr(products, "host_memory_left", lambda: 0.0)
    assert kinds(torch.float32) == {products.Linear} and kinds(torch.bfloat16) == {nn.Linear}
    monkeypatch.setattr(cpu, "is_amd", lambda: False)
    assert kinds(torch.float32) == {nn.Linear}


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
