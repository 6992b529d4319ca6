"""LoRA, DoRA, rsLoRA, PiSSA, experts, rows and heads: logits, files and merges against PEFT and plain transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import EXPERTS, distance, ids, logits, perturb, trained
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tiny import VOCAB, save_tiny, tiny_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from litft.tuners import LoRA, merge_adapter

CASES = {
    "llama": ("llama", {}),
    "llama-rslora": ("llama", {"rslora": True}),
    "llama-dora": ("llama", {"dora": True}),
    "llama-head": ("llama", {"targets": ["q_proj", "lm_head"]}),
    "llama-regex": ("llama", {"targets": r".*layers\.1\..*(q|v)_proj"}),
    "llama-patterns": ("llama", {"rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"1.*up_proj": 5}}),
    "llama-pissa": ("llama", {"init": "pissa"}),
    "gpt2": ("gpt2", {}),
    "gpt2-dora": ("gpt2", {"dora": True, "rslora": True}),
    "gpt2-pissa": ("gpt2", {"init": "pissa", "rslora": True, "alpha_pattern": {"c_fc": 9}}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe-dora": ("qwen3_moe", {"dora": True}),
    "qwen3_moe-experts": ("qwen3_moe", {"rslora": True, "target_parameters": EXPERTS}),
    "qwen3_moe-down-only": ("qwen3_moe", {"targets": [], "target_parameters": EXPERTS[1:]}),
    "gpt_oss-experts": ("gpt_oss", {"target_parameters": EXPERTS, "rank_pattern": {"experts.down_proj": 2}}),
    "llama-rows": ("llama", {"trainable_rows": [5, 7]}),
    "qwen3-tied-rows": ("qwen3", {"trainable_rows": [5, 7]}),
    "gemma3-scaled-tied-rows": ("gemma3", {"trainable_rows": [5, 7]}),
    "qwen2-tied-pair": ("qwen2", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "qwen2-tied-head": ("qwen2", {"modules_to_save": ["lm_head"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_adapter_is_the_same_function_in_peft(case: str, tmp_path: Path) -> None:
    """Starts as the base, and after training: stock PEFT, our reload and the merged model all answer alike."""
    family, options = CASES[case]
    base = logits(tiny_model(family))
    model, tuner = tiny_model(family), LoRA(r=4, alpha=12, **options)
    tuner.apply(model)
    torch.testing.assert_close(logits(model), base, atol=2e-5, rtol=0)
    perturb(model)
    ours = logits(model)
    assert distance(ours, base) > 0.1

    tuner.save(model, tmp_path, "some/base")
    peft = PeftModel.from_pretrained(tiny_model(family), tmp_path)
    torch.testing.assert_close(logits(peft), ours, atol=3e-5, rtol=0)

    again = tiny_model(family)
    reloaded = LoRA.from_folder(tmp_path)
    reloaded.apply(again)
    reloaded.load(again, tmp_path)
    torch.testing.assert_close(logits(again), ours, atol=3e-5, rtol=0)

    tuner.merge(model)
    assert not any("lora" in name or "base_layer" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(logits(model), ours, atol=5e-5, rtol=0)
    plain = tiny_model(family)
    merge_adapter(plain, tmp_path)
    torch.testing.assert_close(logits(plain), ours, atol=5e-5, rtol=0)


PEFT_MADE = {
    "llama": ("llama", {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"k_proj": 2, "no": 3}}),
    "llama-dora": ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "llama-layers": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
    "llama-excluded": ("llama", {"target_modules": "all-linear", "exclude_modules": ["model.layers.0.mlp.up_proj"]}),
    "llama-head": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "llama-norms": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    "llama-input-rows": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]}),
    "qwen3-rows": ("qwen3", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 7]}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    "moe": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "alpha_pattern": {"q_proj": 3}}),
    "pissa": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
}


@pytest.mark.parametrize("case", PEFT_MADE)
@pytest.mark.filterwarnings("ignore")
def test_folder_made_by_peft_is_the_same_function_here(case: str, tmp_path: Path) -> None:
    family, options = PEFT_MADE[case]
    peft = get_peft_model(tiny_model(family), LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", **options))
    perturb(peft)
    peft.save_pretrained(tmp_path)
    model, tuner = tiny_model(family), LoRA.from_folder(tmp_path)
    tuner.apply(model)
    assert distance(logits(model), logits(peft)) > 0.01
    tuner.load(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(peft), atol=3e-5, rtol=0)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_those_of_peft(family: str, dora: bool, tmp_path: Path) -> None:
    model, tuner = trained(family, dora=dora)
    tuner.save(model, tmp_path, "some/base")
    peft = PeftModel.from_pretrained(tiny_model(family), tmp_path, is_trainable=True)
    x = ids()
    model.train()(x, labels=x).loss.backward()
    peft.train()(x, labels=x).loss.backward()
    theirs = {n.replace(".default", "").replace("base_model.model.", ""): p.grad for n, p in peft.named_parameters()}
    checked = 0
    for name, param in model.named_parameters():
        if param.requires_grad:
            torch.testing.assert_close(param.grad, theirs[f"{name}.weight"], atol=1e-5, rtol=1e-4)
            checked += 1
    assert checked == len([g for g in theirs.values() if g is not None]) > 0


def test_d9_scales_and_patterns_survive_merge_and_file(tmp_path: Path) -> None:
    options = {"r": 16, "alpha": 8, "rslora": True, "alpha_pattern": {"model.layers.0.mlp.up_proj": 40}}
    model, tuner = trained("llama", **options)
    ours = logits(model)
    one, other = (model.model.layers[i].mlp.up_proj.scale for i in (0, 1))
    assert (one, other) == (40 / 4, 8 / 4)
    tuner.save(model, tmp_path, "some/base")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path)), ours, atol=1e-5, rtol=0
    )
    tuner.merge(model)
    torch.testing.assert_close(logits(model), ours, atol=5e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_d10_dora_magnitude_reaches_the_merge(family: str, tmp_path: Path) -> None:
    model, tuner = trained(family, dora=True)
    for name, param in model.named_parameters():
        if "magnitude" in name:
            param.data.mul_(1.5)
    ours = logits(model)
    tuner.save(model, tmp_path, "some/base")
    merged_by_peft = PeftModel.from_pretrained(tiny_model(family), tmp_path).merge_and_unload()
    tuner.merge(model)
    torch.testing.assert_close(logits(model), ours, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits(merged_by_peft), ours, atol=1e-4, rtol=0)


def test_d10_norm_is_fp32_under_autocast_and_carries_no_gradient() -> None:
    model, _ = trained("llama", dora=True)
    layer = model.model.layers[0].mlp.up_proj
    want = (layer.base_layer.weight + layer.scale * layer.lora_B @ layer.lora_A).norm(dim=1)
    with torch.autocast("cpu", torch.bfloat16):
        norm = layer.weight_norm()
    assert norm.dtype == torch.float32 and not norm.requires_grad
    torch.testing.assert_close(norm, want)


@pytest.mark.parametrize("options", [{}, {"dora": True}, {"target_parameters": EXPERTS}])
def test_d13_merge_adds_in_fp32_and_rounds_once(options: dict[str, Any]) -> None:
    model = tiny_model("qwen3_moe").to(torch.bfloat16)
    tuner = LoRA(r=4, **options)
    tuner.apply(model)
    perturb(model)
    layer = model.model.layers[0].self_attn.q_proj
    want = layer.base_layer.weight.float() + layer.scale * layer.lora_B @ layer.lora_A
    if options.get("dora"):
        want = want * (layer.lora_magnitude_vector / want.norm(dim=1))[:, None]
    wants = {"self_attn.q_proj.weight": want}
    if "target_parameters" in options:
        experts = model.model.layers[0].mlp.experts
        A, B = experts.lora_A["down_proj"], experts.lora_B["down_proj"]
        W = experts.base_layer.down_proj
        A, B = A.view(W.shape[0], 4, W.shape[2]), B.view(W.shape[1], 4, W.shape[0])
        delta = torch.einsum("ore,eri->eoi", B, A)
        wants["mlp.experts.down_proj"] = W.float() + experts.scales["down_proj"] * delta
    with torch.autocast("cpu", torch.bfloat16):  # must not reach the merge
        tuner.merge(model)
    for name, value in wants.items():
        got = model.model.layers[0].get_parameter(name)
        assert got.dtype == torch.bfloat16
        # The order of summation may move an fp32 sum across a rounding boundary: a handful, by one step, no more.
        differs = got != value.to(torch.bfloat16)
        assert differs.float().mean() < 2e-3, name


def test_d1_tied_pair_trained_apart_is_untied_on_the_way_out(tmp_path: Path) -> None:
    model, tuner = trained("qwen2", modules_to_save=["embed_tokens", "lm_head"])
    ours = logits(model)
    tuner.merge(model)
    assert model.config.tie_word_embeddings is False
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert reloaded.lm_head.weight is not reloaded.model.embed_tokens.weight
    torch.testing.assert_close(logits(reloaded), ours, atol=5e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"trainable_rows": [5, 7]}])
def test_d1_tied_model_stays_tied_where_nothing_parted_it(options: dict[str, Any], tmp_path: Path) -> None:
    model, tuner = trained("qwen2", **options)
    ours = logits(model)
    tuner.merge(model)
    assert model.config.tie_word_embeddings is True and model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)), ours, atol=5e-5, rtol=0
    )


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_d8_new_tokens_learn_are_saved_and_reload(family: str, tmp_path: Path) -> None:
    def grown() -> Any:
        model = tiny_model(family)
        model.resize_token_embeddings(VOCAB + 2, mean_resizing=False)
        return model

    new = [VOCAB, VOCAB + 1]
    x = ids()
    x[:, 2], x[:, 6] = new[0], new[1]
    model, tuner = grown(), LoRA(r=4, trainable_rows=new)
    tuner.apply(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows, before = embedding.weight[new].detach().clone(), embedding.weight[:VOCAB].detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(3):
        model.train()(x, labels=x).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert distance(embedding.weight[new], rows) > 0.05
    assert torch.equal(embedding.weight[:VOCAB], before)
    assert torch.equal(embedding.weight, head.weight) == (family == "qwen3")
    tuner.save(model, tmp_path, "some/base")
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert size < 60_000  # rows, not the matrix
    ours = logits(model, x)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(grown(), tmp_path), x), ours, atol=2e-5, rtol=0)
    merged = grown()
    merge_adapter(merged, tmp_path)
    torch.testing.assert_close(logits(merged, x), ours, atol=5e-5, rtol=0)


def test_d12_adapter_names_its_base_and_loads_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Any
) -> None:
    base = tiny_folder("llama")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuner = LoRA(r=4)
    tuner.apply(model)
    perturb(model)
    tuner.save(model, tmp_path / "adapter", str(base), "v1.2")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(base), "v1.2")
    assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), atol=2e-5, rtol=0)


def test_d6_reward_head_learns_in_full_and_is_in_the_adapter(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_labels=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "base")

    def base() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")

    model, tuner = base(), LoRA(r=4)
    applied = tuner.apply(model)
    assert not any("score" in name for name in applied.matched) and applied.whole == ["score"]
    perturb(model)
    tuner.save(model, tmp_path / "adapter", "some/base")
    assert "base_model.model.score.weight" in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config_json = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config_json["task_type"] == "SEQ_CLS"
    fresh = base()
    fresh.score.weight.data.normal_()  # a base without this head starts from another one
    torch.testing.assert_close(logits(PeftModel.from_pretrained(fresh, tmp_path / "adapter")), logits(model))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_head_hands_out_the_weight_it_acts_with(family: str) -> None:
    """A fused loss multiplies hidden states with `head.weight`: it must be the trained one, and differentiable."""
    for options in ({"trainable_rows": [5, 7]}, {"modules_to_save": ["lm_head"]}, {"targets": ["q_proj", "lm_head"]}):
        if family == "qwen3" and "targets" in options:
            continue
        model, _ = trained(family, **options)
        hidden = torch.randn(3, 32)
        head = model.get_output_embeddings()
        torch.testing.assert_close(hidden @ head.weight.T, head(hidden), atol=1e-5, rtol=1e-4)
        (hidden @ head.weight.T).sum().backward()
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


def test_a_pissa_head_switched_off_hands_out_the_weight_before_training() -> None:
    model, tuner = trained("llama", targets=["lm_head"], init="pissa")
    with tuner.disabled(model):
        torch.testing.assert_close(model.lm_head.weight, tiny_model("llama").lm_head.weight, atol=1e-6, rtol=1e-5)


def test_saved_folder_is_deterministic(tmp_path: Path) -> None:
    model, tuner = trained("llama")
    for name in ("a", "b"):
        tuner.save(model, tmp_path / name, "some/base")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_merged_model_saves_and_reloads_as_a_plain_one(tmp_path: Path) -> None:
    """Merged models save and reload as plain models, experts and Conv1D included."""
    for family, options in (("gpt2", {}), ("qwen3_moe", {"target_parameters": EXPERTS})):
        save_tiny(tmp_path / family, family)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float32)
        tuner = LoRA(r=4, **options)
        tuner.apply(model)
        perturb(model)
        ours = logits(model)
        tuner.merge(model)
        model.save_pretrained(tmp_path / f"{family}-merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}-merged", dtype=torch.float32)
        torch.testing.assert_close(logits(again), ours, atol=5e-5, rtol=0)
