"""QLoRA on the CPU: it trains, stores half a byte a weight, and its adapter goes into the 16-bit model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from adapters import EXPERTS, distance, ids, logits, perturb
from peft import PeftModel
from tiny import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from litft.errors import UserError
from litft.tuners import QLoRA, Tuner, merge_adapter
from litft.tuners.layers import LoRALinear
from litft.tuners.quant import is_quantised, quantise, storage_bytes, weight_matrix

QUANTS: tuple[Literal["nf4", "int8"], ...] = ("nf4", "int8")


def learn(model: nn.Module, tuner: Tuner, steps: int = 30) -> list[float]:
    """Losses of a toy batch."""
    optimizer = torch.optim.AdamW(tuner.param_groups(model, 1e-2, 0.0))
    losses = []
    for _ in range(steps):
        loss = model.train()(ids(), labels=ids()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """KL(p || q) a token, from logits."""
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_loss_falls_and_only_adapters_move(family: str, quant: Literal["nf4", "int8"], dtype: torch.dtype) -> None:
    model, tuner = tiny_model(family).to(dtype), QLoRA(quant, r=4)
    tuner.apply(model)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    losses = learn(model, tuner)
    assert losses[-1] < 0.5 * losses[0]
    for name, param in model.named_parameters():
        if name in frozen:
            assert torch.equal(param, frozen[name]), name
        else:
            assert param.dtype == torch.float32


@pytest.mark.parametrize(("quant", "per_weight"), [("nf4", 0.53), ("int8", 1.05)])
def test_bytes_a_weight_and_what_is_not_quantised(quant: Literal["nf4", "int8"], per_weight: float) -> None:
    model = tiny_model("llama", hidden_size=128, intermediate_size=256).to(torch.bfloat16)
    QLoRA(quant, r=2).apply(model)
    layers = [m.base_layer for m in model.modules() if isinstance(m, LoRALinear)]
    weights = sum(weight_matrix(layer).numel() for layer in layers)
    assert all(is_quantised(layer) for layer in layers)
    assert 0.5 <= sum(storage_bytes(layer) for layer in layers) / weights <= per_weight
    for module in (model.lm_head, model.model.embed_tokens, model.model.norm):
        assert module.weight.dtype == torch.bfloat16


def test_linears_that_are_not_adapted_are_quantised_too() -> None:
    model = tiny_model("llama")
    QLoRA(targets=["q_proj"], r=2).apply(model)
    assert is_quantised(model.model.layers[0].mlp.up_proj)
    assert isinstance(model.model.layers[0].self_attn.q_proj, LoRALinear)
    assert is_quantised(model.model.layers[0].self_attn.q_proj.base_layer)
    model = tiny_model("qwen3_moe")
    applied = QLoRA(r=2, target_parameters=EXPERTS).apply(model)
    experts = model.model.layers[0].mlp.experts.base_layer
    assert experts.down_proj.is_floating_point() and any(name.endswith("down_proj") for name in applied.matched)
    model = tiny_model("llama")
    QLoRA(r=2, modules_to_save=["lm_head", "layers.0.mlp.up_proj"]).apply(model)
    assert not is_quantised(model.model.layers[0].mlp.up_proj.base_layer)


@pytest.mark.parametrize("quant", QUANTS)
def test_quantised_weight_is_near_and_the_layer_computes_with_it(quant: Literal["nf4", "int8"]) -> None:
    torch.manual_seed(0)
    for layer in (nn.Linear(128, 64), Conv1D(64, 128), nn.Linear(128, 64, bias=False)):
        want = weight_matrix(layer).detach().clone()
        new = quantise(layer, quant)
        got = weight_matrix(new)
        assert got.shape == want.shape == (64, 128)
        assert (got - want).norm() / want.norm() < (0.12 if quant == "nf4" else 0.01)
        x = torch.randn(5, 128, requires_grad=True)
        bias = getattr(layer, "bias", None)
        for _ in range(2):  # the first forward may convert what is stored
            with torch.no_grad():
                new.eval()(x)
            torch.testing.assert_close(new(x), nn.functional.linear(x, got.float(), bias), atol=1e-4, rtol=1e-4)
            assert torch.equal(weight_matrix(new), got)
        new.train()(x).sum().backward()
        torch.testing.assert_close(x.grad, got.float().sum(0).expand(5, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("quant", QUANTS)
def test_training_and_inference_are_one_function(quant: Literal["nf4", "int8"]) -> None:
    model, tuner = tiny_model("llama"), QLoRA(quant, r=4)
    tuner.apply(model)
    perturb(model)
    with_grad = model.train()(ids()).logits.detach()
    torch.testing.assert_close(logits(model), with_grad, atol=2e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"init": "pissa"}, {"quant": "int8"}])
def test_d4_the_adapter_goes_into_the_16_bit_model(options: dict[str, Any], tmp_path: Path) -> None:
    """The export is near the trained model, far nearer than the quantised base is; it holds no quantisation."""

    def base() -> Any:
        shape = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.06}
        return tiny_model("llama", **shape).to(torch.bfloat16)

    model, tuner = base(), QLoRA(r=8, **options)
    tuner.apply(model)
    quantised = logits(model)
    learn(model, tuner)
    ours = logits(model)
    with pytest.raises(UserError, match="merge_adapter"):
        tuner.merge(model)
    tuner.save(model, tmp_path / "adapter", "some/base")

    merged = base()
    merge_adapter(merged, tmp_path / "adapter")
    merged.save_pretrained(tmp_path / "merged")
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert export.dtype == torch.bfloat16 and getattr(export.config, "quantization_config", None) is None
    near, far = divergence(ours, logits(export)), divergence(quantised, logits(export))
    assert near < 0.02 * far and far > 0.5, (near, far)
    peft = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    assert divergence(logits(peft), logits(export)) < 1e-2


@pytest.mark.parametrize("quant", QUANTS)
def test_pissa_splits_the_16_bit_weight_before_quantising(quant: Literal["nf4", "int8"], tmp_path: Path) -> None:
    """The start is nearer to the model than quantising all of it, and its adapter alone changes nothing yet."""
    whole, split = tiny_model("llama"), tiny_model("llama")
    QLoRA(quant, r=8).apply(whole)
    tuner = QLoRA(quant, r=8, init="pissa")
    tuner.apply(split)
    original = tiny_model("llama")
    weight = original.model.layers[0].mlp.up_proj.weight
    errors = [distance(model.model.layers[0].mlp.up_proj.full_weight(), weight) for model in (split, whole)]
    assert errors[0] < errors[1]
    tuner.save(split, tmp_path, "some/base")
    merge_adapter(original, tmp_path)
    torch.testing.assert_close(logits(original), logits(tiny_model("llama")), atol=2e-5, rtol=0)


def test_dora_over_4_bits_starts_as_the_quantised_model() -> None:
    plain, dora = tiny_model("llama"), tiny_model("llama")
    QLoRA(r=4).apply(plain)
    QLoRA(r=4, dora=True).apply(dora)
    torch.testing.assert_close(logits(dora), logits(plain), atol=1e-5, rtol=0)


def test_an_adapter_trained_over_4_bits_goes_on_over_4_bits(tmp_path: Path) -> None:
    model, tuner = tiny_model("llama"), QLoRA(r=4)
    tuner.apply(model)
    perturb(model)
    tuner.save(model, tmp_path, "some/base")
    again, tuner = tiny_model("llama"), QLoRA("nf4", lora_plus_ratio=4).continuing(tmp_path)
    assert (tuner.r, tuner.quant, tuner.lora_plus_ratio) == (4, "nf4", 4)
    tuner.apply(again)
    tuner.load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_missing_bitsandbytes_is_said_before_anything_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = tiny_model("llama")
    with pytest.raises(UserError, match="pip install"):
        QLoRA().apply(model)
    assert all(param.requires_grad for param in model.parameters())
    QLoRA("int8").apply(model)  # our own


def test_pissa_on_a_quantised_model_is_refused() -> None:
    model = tiny_model("llama")
    QLoRA(r=2, targets=["q_proj"]).apply(model)
    layer = model.model.layers[0].mlp.up_proj
    with pytest.raises(UserError, match="16 bits"):
        LoRALinear(layer, 2, 1.0, init="pissa")
