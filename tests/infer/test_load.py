"""From a folder to a model that answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ENDOFTEXT, IM_END, save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM

from litft.errors import UserError
from litft.export.final import save_final
from litft.infer.load import find_device, load_for_inference
from litft.tuners import Full, LoRA, QLoRA

IDS = torch.tensor([[1, 50, 77, 200, 9, 31, 120, 2, 64, 5]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits.float()


def trained(base: Path, tuner: Any, dtype: torch.dtype) -> Any:
    """The base with adapters that say something."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    tuner.apply(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def test_a_run_an_adapter_and_a_full_model_are_all_taken(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    for name, tuner in (("full", Full()), ("lora", LoRA(r=4)), ("dora", LoRA(r=4, dora=True))):
        model = trained(base, tuner, torch.float32)
        save_final(model, tuner, tiny_tokenizer(), tmp_path / name / "final", base=str(base), stop_ids={IM_END})
        for folder in (tmp_path / name, tmp_path / name / "final"):
            bundle = load_for_inference(folder, device="cpu")
            assert bundle.stop_ids == {IM_END}
            assert bundle.name == str(folder)
            assert not bundle.model.training
            assert bundle.model.config.use_cache
            assert not any(parameter.requires_grad for parameter in bundle.model.parameters())
            torch.testing.assert_close(logits(bundle.model), logits(model), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        logits(load_for_inference(base).model), logits(AutoModelForCausalLM.from_pretrained(base)), atol=1e-5, rtol=0
    )


def test_d4_a_qlora_adapter_is_merged_into_the_16_bit_base(tmp_path: Path) -> None:
    """W + BA in fp32 from the stored bf16 weights, rounded once: nothing of nf4 is left."""
    base = save_tiny(tmp_path / "base", "llama", dtype=torch.bfloat16)
    tuner = QLoRA(r=4)
    quantised = trained(base, tuner, torch.bfloat16)
    save_final(quantised, tuner, tiny_tokenizer(), tmp_path / "final", base=str(base), stop_ids={IM_END})
    model = load_for_inference(tmp_path / "final", dtype=torch.bfloat16).model
    assert "Linear4bit" not in str(model)
    assert "lora" not in str(model).lower()
    weight = AutoModelForCausalLM.from_pretrained(base).model.layers[0].mlp.up_proj.weight.float()
    adapter = quantised.model.layers[0].mlp.up_proj
    a, b = (parameter.detach() for name, parameter in sorted(adapter.named_parameters()) if "lora" in name)
    expected = (weight + tuner.scale_of("model.layers.0.mlp.up_proj") * (b @ a)).to(torch.bfloat16)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, expected)


def test_settings_beside_an_adapter_go_before_those_of_its_base(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama", eos_token_id=ENDOFTEXT)
    model, tuner = trained(base, LoRA(r=2), torch.float32), LoRA(r=2)
    final = tmp_path / "final"
    save_final(model, tuner, tiny_tokenizer(eos_token="<|endoftext|>"), final, base=str(base), stop_ids={IM_END})
    settings = json.loads((final / "generation_config.json").read_text())
    (final / "generation_config.json").write_text(json.dumps({**settings, "do_sample": True, "temperature": 0.25}))
    bundle = load_for_inference(final)
    assert bundle.settings.temperature == 0.25
    assert bundle.settings.do_sample is True
    assert bundle.stop_ids == {IM_END, ENDOFTEXT}


def test_b12_the_templates_own_end_of_turn_stops_a_model_that_does_not_list_it(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama", eos_token_id=ENDOFTEXT)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": ENDOFTEXT}))
    tiny_tokenizer(eos_token="<|endoftext|>").save_pretrained(base)
    assert load_for_inference(base).stop_ids == {IM_END, ENDOFTEXT}


def test_tokens_added_in_training_have_their_rows(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "qwen2")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|new|>"]})
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    tuner = LoRA(r=2, trainable_rows=[len(tokenizer) - 1])
    tuner.apply(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    save_final(model, tuner, tokenizer, tmp_path / "final", base=str(base), stop_ids={IM_END})
    bundle = load_for_inference(tmp_path / "final")
    ids = torch.tensor([bundle.tokenizer("a<|new|>b")["input_ids"]])
    assert len(tokenizer) - 1 in ids
    with torch.no_grad():
        torch.testing.assert_close(
            bundle.model(ids).logits, model.eval()(ids, use_cache=False).logits, atol=1e-5, rtol=0
        )


def test_the_dtype_is_the_stored_one_unless_asked(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    assert load_for_inference(base).model.dtype == torch.float32
    assert load_for_inference(base, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_a_device_that_is_not_there_is_named() -> None:
    assert find_device("cpu") == torch.device("cpu")
    for device in ("cuda:99", "warp"):
        with pytest.raises(UserError, match=f"--device {device}: not available here"):
            find_device(device)


def test_special_tokens_that_carry_meaning_stay_in_the_answer(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    tokenizer = tiny_tokenizer(extra_special_tokens=["<|im_start|>", "[CALL]"])
    tokenizer.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(base)
    bundle = load_for_inference(base)
    ids = tokenizer("<|im_start|>[CALL]{}<|im_end|>after")["input_ids"]
    assert bundle.decode(ids) == "[CALL]{}"


def test_an_adapter_of_a_kind_that_cannot_be_merged_is_named(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama")
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "PREFIX_TUNING", "base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(UserError):
        load_for_inference(tmp_path / "adapter")
