"""What `save_final` writes, read back by transformers alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny import ENDOFTEXT, FAMILIES, IM_END, VOCAB, chat_rows, save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from litft.errors import UserError
from litft.export.final import generation_settings, new_folder, save_final
from litft.tuners import Full, LoRA

IDS = torch.tensor([[1, 50, 77, 200, 9, 31, 120, 2, 64, 5]])
CHAT = chat_rows(8)[5]["messages"]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def stored_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as tensors:
        return set(tensors.keys())


def export(model: Any, folder: Path, base: str = "nowhere/at-all", **options: Any) -> Path:
    tokenizer = options.pop("tokenizer", None) or tiny_tokenizer()
    options = {"stop_ids": {IM_END}, "dtype": torch.float32, **options}
    return save_final(model, options.pop("tuner", None) or Full(), tokenizer, folder, base=base, **options)


def elsewhere(script: str, *arguments: Any) -> str:
    """Run a script in a process of its own, in which litft cannot be imported."""
    guard = "import sys; sys.modules['litft'] = None\n"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", guard + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


RELOAD = """
import os, torch
from transformers import AutoModelForCausalLM
from peft import AutoPeftModelForCausalLM
ids = torch.tensor([[1, 50, 77, 200, 9, 31, 120, 2, 64, 5]])
found = {}
for folder in sys.argv[2:]:
    if os.path.exists(folder + "/adapter_config.json"):
        model = AutoPeftModelForCausalLM.from_pretrained(folder)
    else:
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        found[folder] = model(ids).logits
torch.save(found, sys.argv[1])
"""


def test_f5_full_models_and_adapters_reload_without_litft(tmp_path: Path) -> None:
    """Twelve families under the names they are published with, and a LoRA, in one process that has no litft."""
    models = {family: tiny_model(family) for family in FAMILIES}
    for family, model in models.items():
        model.save_pretrained(tmp_path / "published" / family)
        export(model, tmp_path / family)
        assert stored_names(tmp_path / family) == stored_names(tmp_path / "published" / family)

    base = save_tiny(tmp_path / "base", "llama")
    models["lora"], tuner = AutoModelForCausalLM.from_pretrained(base), LoRA(r=4)
    tuner.apply(models["lora"])
    with torch.no_grad():
        for parameter in models["lora"].parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
    export(models["lora"], tmp_path / "lora", base=str(base), tuner=tuner, tokenizer=tiny_tokenizer())
    assert (logits(models["lora"]) - logits(models["llama"])).abs().max() > 0.1

    elsewhere(RELOAD, tmp_path / "logits.pt", *[tmp_path / name for name in models])
    found = torch.load(tmp_path / "logits.pt", weights_only=True)
    for name, model in models.items():
        torch.testing.assert_close(found[str(tmp_path / name)], logits(model), atol=1e-5, rtol=0)


def test_f2_b12_an_adapter_folder_brings_tokenizer_template_and_stop_token(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "llama", eos_token_id=ENDOFTEXT)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), tiny_tokenizer(eos_token="<|endoftext|>")
    tokenizer(["a b c"], truncation=True, max_length=2)
    (tuner := LoRA(r=2)).apply(model)
    final = export(model, tmp_path / "final", base=str(base), tuner=tuner, tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(final)
    assert again.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert again.eos_token_id == IM_END
    assert json.loads((final / "tokenizer.json").read_text())["truncation"] is None
    assert GenerationConfig.from_pretrained(final).eos_token_id[0] == IM_END
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert not (final / "config.json").exists()  # a config.json beside an adapter passes for a whole model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("compiled", ["no", "model", "layers"])
def test_f5_tied_and_compiled_weights_are_stored_once_under_plain_names(
    tmp_path: Path, tied: bool, compiled: str
) -> None:
    base = save_tiny(tmp_path / "base", "llama", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(base)
    expected = logits(model)
    wrapped: Any = model
    if compiled == "model":
        wrapped = torch.compile(model, backend="eager")
    if compiled == "layers":
        for i, layer in enumerate(model.model.layers):
            model.model.layers[i] = torch.compile(layer, backend="eager")
    final = export(wrapped, tmp_path / "final")
    assert stored_names(final) == stored_names(base)
    assert ("lm_head.weight" in stored_names(final)) is not tied
    size, base_size = ((folder / "model.safetensors").stat().st_size for folder in (final, base))
    assert abs(size - base_size) < 1024
    reloaded = AutoModelForCausalLM.from_pretrained(final)
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) is tied
    torch.testing.assert_close(logits(reloaded), expected, atol=0, rtol=0)


def test_f5_weights_that_training_untied_both_survive(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    head = model.lm_head.weight.detach().clone() + 0.5 * torch.randn_like(model.lm_head.weight)
    model.lm_head.weight = torch.nn.Parameter(head)
    final = export(model, tmp_path / "final")
    assert json.loads((final / "config.json").read_text())["tie_word_embeddings"] is False
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(final)), logits(model), atol=0, rtol=0)


def test_f2_the_folder_is_complete_and_free_of_training_settings(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "qwen2", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.config.use_cache = False  # as training sets it
    model.generation_config.use_cache = False
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer([CHAT[0]["content"]], truncation=True, max_length=4, padding="max_length")
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-2)

    final = export(model, tmp_path / "final", base=str(base), dtype=None, tokenizer=tokenizer)

    config = json.loads((final / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["dtype"] == "bfloat16"
    assert config["architectures"] == ["Qwen2ForCausalLM"]
    assert str(tmp_path) not in (final / "config.json").read_text() + (final / "tokenizer_config.json").read_text()
    state = json.loads((final / "tokenizer.json").read_text())
    assert state["truncation"] is None
    assert state["padding"] is None
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count * 2 < (final / "model.safetensors").stat().st_size < count * 2 + 8192
    again = AutoTokenizer.from_pretrained(final)
    assert again.apply_chat_template(CHAT, tokenize=False) == rendered
    assert again.pad_token_id == ENDOFTEXT
    settings = GenerationConfig.from_pretrained(final)
    assert (settings.use_cache, settings.eos_token_id, settings.pad_token_id) == (True, [IM_END], ENDOFTEXT)
    reloaded = AutoModelForCausalLM.from_pretrained(final)
    assert reloaded.dtype == torch.bfloat16
    expected = {name: value.detach().to(torch.bfloat16) for name, value in model.named_parameters()}
    for name, value in reloaded.named_parameters():
        assert torch.equal(value, expected[name]), name


def test_f2_the_live_model_and_tokenizer_stay_as_they_were(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer(eos_token="<|endoftext|>")
    model.config.use_cache = False
    model.set_attn_implementation("eager")
    tokenizer(["a b c"], truncation=True, max_length=4)
    settings, weights = model.generation_config, {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    final = export(model, tmp_path / "final", tokenizer=tokenizer, dtype=torch.bfloat16)
    assert "eager" not in (final / "config.json").read_text()  # the attention of training
    assert model.config._attn_implementation == "eager"
    assert model.training
    assert model.config.to_dict() == config
    assert model.generation_config is settings
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.backend_tokenizer.truncation is not None
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(value.dtype == torch.float32 for value in model.parameters())


def overfit(model: Any, ids: list[int], steps: int = 60) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = torch.tensor([ids])
    for _ in range(steps):
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


def test_b12_the_trained_stop_token_stops_plain_transformers(tmp_path: Path) -> None:
    """A base model whose own end is <|endoftext|>, taught ChatML: it has to stop on <|im_end|>."""
    base = save_tiny(tmp_path / "base", "llama", eos_token_id=ENDOFTEXT)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), tiny_tokenizer(eos_token="<|endoftext|>")
    model.generation_config = GenerationConfig(eos_token_id=ENDOFTEXT, temperature=0.6)  # inconsistent, as some are
    chat = [{"role": "user", "content": "what sings?"}, {"role": "assistant", "content": "the river sings"}]
    overfit(model, tokenizer.apply_chat_template(chat, return_dict=False))

    final = export(model.eval(), tmp_path / "final", tokenizer=tokenizer)

    reloaded, again = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert reloaded.generation_config.eos_token_id == [IM_END, ENDOFTEXT]
    assert reloaded.config.eos_token_id == [IM_END, ENDOFTEXT]
    assert again.eos_token_id == IM_END
    assert reloaded.generation_config.temperature == 0.6
    answer = pipeline("text-generation", model=str(final), device="cpu")
    out = answer(chat[:1], max_new_tokens=40, do_sample=False)
    assert out[0]["generated_text"][-1]["content"] == "the river sings"
    # The same weights with the base's settings run on: the stop token is what makes the difference.
    prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, return_tensors="pt")
    reloaded.generation_config.eos_token_id = ENDOFTEXT
    endless = reloaded.generate(**prompt, max_new_tokens=40, do_sample=False)
    assert endless.shape[1] == prompt["input_ids"].shape[1] + 40


def test_b12_the_tokenizers_end_stays_where_the_template_writes_it(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}{{ eos_token }}"
    tokenizer = tiny_tokenizer(template, eos_token="<|endoftext|>")
    final = export(tiny_model("llama"), tmp_path / "final", tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(final)
    assert again.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert again.eos_token == "<|endoftext|>"
    assert GenerationConfig.from_pretrained(final).eos_token_id[0] == IM_END


def test_b12_other_stop_tokens_and_sampling_settings_of_the_base_are_kept() -> None:
    base = GenerationConfig(eos_token_id=[7, 8], pad_token_id=9, do_sample=True, temperature=0.6, top_k=20)
    settings = generation_settings(base, tiny_tokenizer(pad_token=None, eos_token="<|endoftext|>"), {IM_END})
    assert settings.eos_token_id == [IM_END, 7, 8, ENDOFTEXT]
    assert (settings.pad_token_id, settings.temperature, settings.top_k, settings.do_sample) == (9, 0.6, 20, True)
    assert base.eos_token_id == [7, 8]
    nothing = generation_settings(GenerationConfig(), tiny_tokenizer(eos_token=None, pad_token=None), set())
    assert nothing.eos_token_id is None
    assert nothing.pad_token_id is None


def test_b12_a_turn_that_ends_in_plain_text_gives_no_stop_token(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`</s>`, which this tokenizer has no token for: its last piece `>` would end every answer that holds one."""
    piece = tiny_tokenizer()("</s>")["input_ids"][-1]
    final = export(tiny_model("llama"), tmp_path / "final", stop_ids={piece})
    assert GenerationConfig.from_pretrained(final).eos_token_id == [IM_END]
    assert "closes an answer with plain text" in caplog.text


def test_added_tokens_are_counted_in_the_configuration(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|new|>", "<|newer|>"]})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.vocab_size = VOCAB  # as after a resize that forgot it
    final = export(model, tmp_path / "final", tokenizer=tokenizer)
    reloaded, again = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    assert reloaded.config.vocab_size == VOCAB + 2
    assert again("<|newer|>")["input_ids"] == [VOCAB + 1]
    torch.testing.assert_close(logits(reloaded), logits(model), atol=0, rtol=0)


def test_no_quantisation_is_claimed_for_weights_that_have_none(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gguf"}
    final = export(model, tmp_path / "final")
    assert "quantization_config" not in json.loads((final / "config.json").read_text())


class Broken(Full):
    """Fails after a part of the folder is written, as a full disk would."""

    trains_base = False

    def save(self, model: Any, folder: Path, base: str, revision: str | None) -> None:
        (folder / "adapter_config.json").write_text("{")
        raise OSError(28, "No space left on device")


def test_a_failed_export_leaves_the_older_one_whole(tmp_path: Path) -> None:
    model = tiny_model("llama")
    final = export(model, tmp_path / "run" / "final")
    before = {path.name: path.read_bytes() for path in final.iterdir()}
    with pytest.raises(OSError, match="No space"):
        save_final(model, Broken(), tiny_tokenizer(), final, base="x", stop_ids={IM_END})
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before
    assert [path.name for path in final.parent.iterdir()] == ["final"]


def test_sigterm_leaves_nothing_half_done(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended, new_folder(tmp_path / "out") as folder:
        (folder / "weights").write_text("half")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)  # the handler runs before this ends
    assert ended.value.code == 143 and not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_new_export_replaces_the_whole_of_an_older_one(tmp_path: Path) -> None:
    final = export(tiny_model("llama"), tmp_path / "final")
    (final / "left_over.txt").write_text("of an older run")
    export(tiny_model("llama", seed=1), final)
    assert not (final / "left_over.txt").exists()
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(final)), logits(tiny_model("llama", seed=1)), atol=0, rtol=0
    )
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


def test_the_model_trained_from_is_never_overwritten(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base")
    with pytest.raises(UserError, match="will not be overwritten"):
        export(tiny_model("llama"), tmp_path / "x" / ".." / "base", base=str(base))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        export(tiny_model("llama"), tmp_path / "file" / "final")
