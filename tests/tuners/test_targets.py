"""What all-linear, names, regexes and target_parameters reach, and what they may not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import FAMILIES, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM, DbrxConfig, Qwen2MoeConfig

from litft.errors import UserError
from litft.tuners import LoRA


@pytest.mark.parametrize("family", FAMILIES)
def test_d6_all_linear_is_what_peft_takes_for_it(family: str) -> None:
    config = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    peft = get_peft_model(tiny_model(family), config).targeted_module_names
    model = tiny_model(family)
    applied = LoRA(r=2).apply(model)
    assert sorted(applied.matched) == sorted(peft)
    assert not any("lm_head" in name or name.endswith(("gate", "router")) for name in applied.matched)
    x = torch.arange(10)[None]
    model(x, labels=x).loss.backward()
    for name, param in model.named_parameters():
        assert param.requires_grad == ("lora_" in name), name
        assert (param.grad is not None) == param.requires_grad, name


def test_d6_skipped_experts_are_counted() -> None:
    model = tiny_model("qwen3_moe")
    stacks = {n: p.numel() for n, p in model.named_parameters() if p.ndim == 3}
    applied = LoRA(r=2).apply(model)
    assert set(applied.skipped) == {"mlp.experts.gate_up_proj", "mlp.experts.down_proj"}
    assert sum(applied.skipped.values()) == sum(stacks.values())
    assert "mlp.experts.down_proj" in str(applied) and "target_parameters" in str(applied)
    applied = LoRA(r=2, target_parameters=["mlp.experts.down_proj"]).apply(tiny_model("qwen3_moe"))
    assert set(applied.skipped) == {"mlp.experts.gate_up_proj"}


def qwen2_moe() -> Any:
    """A family whose shared-expert gate is an `nn.Linear` named like a router."""
    config = Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=1,
        num_experts=4, shared_expert_intermediate_size=16, num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def test_d6_a_linear_router_is_never_adapted() -> None:
    model = qwen2_moe()
    gate = "model.layers.0.mlp.shared_expert_gate"
    assert isinstance(model.get_submodule(gate), nn.Linear)
    matched = LoRA(r=2).apply(model).matched
    assert gate not in matched and "model.layers.0.mlp.shared_expert.gate_proj" in matched
    for targets in (r".*mlp\..*gate", ["q_proj", "shared_expert_gate"]):
        with pytest.raises(UserError, match="router"):
            LoRA(r=2, targets=targets).apply(qwen2_moe())
    with pytest.raises(UserError, match="router"):
        LoRA(r=2, targets=r".*mlp\.gate").apply(tiny_model("qwen3_moe"))
    with pytest.raises(UserError, match="router"):
        LoRA(r=2, target_parameters=["mlp.gate.weight"]).apply(tiny_model("qwen3_moe"))


def test_d6_a_router_is_known_by_its_class_too() -> None:
    config = DbrxConfig(
        d_model=32, n_heads=4, n_layers=1, max_seq_len=32, vocab_size=64, pad_token_id=0,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4},
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    routers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "router" in n]
    assert routers and not routers[0].endswith(("router", "gate"))
    matched = LoRA(r=2).apply(model).matched
    assert matched and not set(routers) & set(matched)


@pytest.mark.parametrize("targets", [["q_proj", "v_prj"], r".*\.v_prj"])
def test_d6_nothing_matched_names_the_nearest(targets: Any) -> None:
    model = tiny_model("llama")
    with pytest.raises(UserError, match=r"v_prj[\s\S]*self_attn\.v_proj"):
        LoRA(targets=targets).apply(model)
    assert all(param.requires_grad for param in model.parameters())  # refused before anything was touched
    with pytest.raises(UserError, match=r"mlp\.experts\.down_proj"):
        LoRA(target_parameters=["experts.down_prj"]).apply(tiny_model("qwen3_moe"))


def test_names_and_regexes_match_as_in_peft() -> None:
    for targets in (["0.self_attn.q_proj", "v_proj"], r"model\.layers\.\d\.mlp\.(up|down)_proj", r".*_proj"):
        peft = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=targets)).targeted_module_names
        assert sorted(LoRA(targets=targets).apply(tiny_model("llama")).matched) == sorted(peft)
    with pytest.raises(UserError, match="regular expression"):
        LoRA(targets="*_proj").apply(tiny_model("llama"))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gpt2"])
def test_d1_head_or_embedding_of_a_tied_model_is_refused(family: str) -> None:
    for target in ("lm_head", "wte" if family == "gpt2" else "embed_tokens"):
        with pytest.raises(UserError, match="shares its weight"):
            LoRA(targets=[target]).apply(tiny_model(family))


def test_other_modules_are_refused_by_name() -> None:
    for target, word in (("embed_tokens", "embedding"), ("norm", "LlamaRMSNorm"), ("self_attn", "LlamaAttention")):
        with pytest.raises(UserError, match=word):
            LoRA(targets=[target]).apply(tiny_model("llama"))
    with pytest.raises(UserError, match="not \\(experts"):
        LoRA(target_parameters=["q_proj.weight"]).apply(tiny_model("qwen3_moe"))
    with pytest.raises(UserError, match="no module is called 'score'"):
        LoRA(modules_to_save=["score"]).apply(tiny_model("llama"))


def test_d6_only_the_transformers_model_itself_is_accepted() -> None:
    with pytest.raises(TypeError, match="Sequential"):
        LoRA().apply(nn.Sequential(tiny_model("llama")))


def test_a_second_adapter_is_refused() -> None:
    model = tiny_model("llama")
    LoRA().apply(model)
    with pytest.raises(UserError, match="already"):
        LoRA().apply(model)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"r": 0}, "rank"),
        ({"rank_pattern": {"q_proj": 0}}, "q_proj"),
        ({"dropout": 1.0}, "dropout"),
        ({"lora_plus_ratio": 0.0}, "lora_plus_ratio"),
        ({"dora": True, "init": "pissa"}, "pissa"),
        ({"target_parameters": ["x"], "dora": True}, "target_parameters"),
        ({"target_parameters": ["x"], "dropout": 0.1}, "target_parameters"),
    ],
)
def test_impossible_options_are_refused_at_once(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        LoRA(**options)


def test_d9_patterns_that_match_nothing_are_refused() -> None:
    for option in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(UserError, match="q_prj"):
            LoRA(**{option: {"q_prj": 2}}).apply(tiny_model("llama"))


def test_pissa_of_more_directions_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="r: 16"):
        LoRA(r=17, init="pissa").apply(tiny_model("llama"))  # its k_proj has 16 outputs


def test_d8_rows_that_the_vocabulary_lacks_are_refused() -> None:
    with pytest.raises(UserError, match="resize_token_embeddings"):
        LoRA(trainable_rows=[383, 384]).apply(tiny_model("llama"))
    with pytest.raises(UserError, match="modules_to_save"):
        LoRA(trainable_rows=[3], modules_to_save=["lm_head"]).apply(tiny_model("llama"))
