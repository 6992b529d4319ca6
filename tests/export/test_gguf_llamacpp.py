"""GGUF files in llama.cpp itself: logits, greedy answers and tokens, against transformers and PEFT."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from tiny import chat_rows, save_tiny, tiny_model
from tiny_tokenizers import BYTE_LEVEL, HARD, SPM, byte_level, spm
from transformers import AutoModelForCausalLM, AutoTokenizer

from litft.export.gguf import DTYPES, export_gguf
from litft.models.resolve import resolve

pytestmark = pytest.mark.llamacpp
llama_cpp = pytest.importorskip("llama_cpp")

PROMPTS = (
    "Why is the sky blue?",
    "Write a Python function that adds two numbers.",
    "Translate 'good morning' to French.",
    "What is 17 * 23? Think step by step.",
    "Tell me about the moon, in 3 sentences.",
)
TOKENS = 64


@contextmanager
def opened(file: Path, **options: Any) -> Iterator[Any]:
    """llama.cpp with everything in fp32: its cache is fp16 unless told."""
    model = llama_cpp.Llama(
        str(file),
        **{"n_ctx": 256, "type_k": 0, "type_v": 0, "n_threads": 2, "flash_attn": False, "verbose": False, **options},
    )
    try:
        yield model
    finally:
        model.close()


def exported(folder: Path | str, out: Path, dtype: str = "f32", **options: Any) -> Path:
    export_gguf(resolve(folder), out, dtype=dtype, **options)
    return next(out.glob("*.gguf"))


def logits_of(file: Path, ids: list[int], **options: Any) -> np.ndarray:
    with opened(file, logits_all=True, **options) as model:
        model.eval(ids)
        return np.array(model.scores[: len(ids)])


def reference(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].float().numpy()


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 256,
}
LOCAL = {"rope_type": "default", "rope_theta": 10000.0}
GEMMA1 = {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh"}
CASES = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("llama", {"head_dim": 16}),
    "llama 3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama linear rope": ("llama", {"rope_parameters": LINEAR}),
    "llama yarn": ("llama", {"rope_parameters": YARN}),
    "llama yarn factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {}),
    "gemma2 turned round": ("gemma2", {"layer_types": ["full_attention", "sliding_attention"]}),
    "gemma3": ("gemma3", {"num_hidden_layers": 7, "layer_types": None}),
    "gemma3 scaled": ("gemma3", {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": LOCAL}}),
    "phi3": ("phi3", {}),
    "phi3 longrope": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 256}),
}


@pytest.fixture
def gemma_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import tiny

    monkeypatch.setitem(tiny._FAMILY, "gemma", GEMMA1)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_every_family(case: str, tmp_path: Path, gemma_one: None) -> None:
    family, options = CASES[case]
    save_tiny(tmp_path / "model", family, **options)
    ids = torch.randint(3, 384, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    ours = logits_of(exported(tmp_path / "model", tmp_path / "gguf"), ids)
    theirs = reference(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), ids)
    # llama.cpp reads gelu from a table of fp16 numbers
    assert np.abs(ours - theirs).max() < (5e-3 if family.startswith("gemma") else 2e-5)
    assert np.abs(theirs).max() > 1


def test_phi3_long_factors(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "phi3", **CASES["phi3 longrope"][1])
    ids = torch.randint(3, 384, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    ours = logits_of(exported(tmp_path / "model", tmp_path / "gguf"), ids, n_ctx=512)
    assert np.abs(ours - reference(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), ids)).max() < 2e-5


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, *SPM])
def test_tokens_of_hard_strings(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_level(kind) if kind in BYTE_LEVEL else spm(kind)
    tiny_model("llama", vocab_size=len(tokenizer) + 5).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    rows = chat_rows(40, seed=9)
    chats = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    # llama.cpp says a blank before text at the start, or after special tokens as well: chats begin with one
    texts = chats if kind == "first" else [*HARD, *chats]
    if kind in ("tekken", "gpt-4o"):  # its own regex takes marks for no letters
        texts = [text.replace("हिन्दी", "") for text in texts]
    with opened(exported(tmp_path / "model", tmp_path / "gguf"), vocab_only=True) as model:
        for text in texts:
            ids = model.tokenize(text.encode(), add_bos=False, special=True)
            assert ids == tokenizer(text, add_special_tokens=False)["input_ids"], text
        assert model.tokenize(b"Hello", add_bos=True) == tokenizer("Hello")["input_ids"] or kind == "first"


@pytest.mark.parametrize(("dtype", "code"), [("q8_0", 7), ("q4_0", 2), ("q4_1", 3), ("q5_0", 8), ("q5_1", 9)])
def test_bytes_are_those_of_llama_cpps_own_quantizer(dtype: str, code: int, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "qwen2", tie_word_embeddings=False)
    whole = exported(tmp_path / "model", tmp_path / "f32")
    ours = exported(tmp_path / "model", tmp_path / dtype, dtype)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.pure, options.nthread, options.output_tensor_type = code, True, 1, 8
    theirs = tmp_path / "theirs.gguf"
    assert llama_cpp.llama_model_quantize(str(whole).encode(), str(theirs).encode(), ctypes.byref(options)) == 0
    expected = {t.name: (t.tensor_type, t.data.tobytes()) for t in GGUFReader(theirs).tensors}
    assert {t.name: (t.tensor_type, t.data.tobytes()) for t in GGUFReader(ours).tensors} == expected


def test_stops_on_a_trained_token_that_it_does_not_know_by_name(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|done|>"]})
    tokenizer.save_pretrained(tmp_path / "model")
    model = tiny_model("llama", vocab_size=len(tokenizer))
    done = tokenizer.convert_tokens_to_ids("<|done|>")
    model.generation_config.eos_token_id = [done, tokenizer.eos_token_id]
    model.save_pretrained(tmp_path / "model")
    with opened(exported(tmp_path / "model", tmp_path / "gguf"), vocab_only=True) as loaded:
        vocab = llama_cpp.llama_model_get_vocab(loaded._model.model)
        ends = [id for id in range(len(tokenizer)) if llama_cpp.llama_vocab_is_eog(vocab, id)]
    assert {done, tokenizer.eos_token_id} <= set(ends) <= {done, *tokenizer.all_special_ids}


# ---- a real model


@pytest.fixture(scope="module")
def adapter(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the default model whose answers differ from the base's, with the tokenizer as a run leaves it."""
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", use_rslora=True)
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-2)
    folder = tmp_path_factory.mktemp("adapter") / "final"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(default_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(default_model: Path, adapter: Path) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, greedy continuation by transformers and PEFT in fp32, and by the base without the adapter."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32)
    base.generation_config.eos_token_id = None
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = PeftModel.from_pretrained(base, adapter).eval()

    def go_on(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=ids.new_ones(ids.shape), do_sample=False, max_new_tokens=TOKENS
        )
        return out[0, len(prompt) :].tolist()

    found = []
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        ids = list(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
        with model.disable_adapter():
            plain = go_on(ids)
        found.append((ids, go_on(ids), plain))
    assert all(len(tuned) == TOKENS for _, tuned, _ in found)
    assert sum(tuned != plain for _, tuned, plain in found) >= 4, "the adapter says nothing"
    return found


def greedy(model: Any, prompt: list[int]) -> list[int]:
    model.reset()
    model.eval(prompt)
    out: list[int] = []
    while len(out) < TOKENS:
        out.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(out[-1:])
    return out


def test_real_model_answers_as_transformers_does(
    adapter: Path, answers: list[tuple[list[int], list[int], list[int]]], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    with opened(exported(adapter, tmp_path / "gguf"), logits_all=True) as model:
        for (prompt, expected, _), text in zip(answers, PROMPTS, strict=True):
            chat = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
            )
            assert model.tokenize(chat.encode(), add_bos=True, special=True) == prompt
            assert greedy(model, prompt) == expected


def test_adapter_file_is_the_merged_model(
    adapter: Path, answers: list[tuple[list[int], list[int], list[int]]], default_model: Path, tmp_path: Path
) -> None:
    base = exported(default_model, tmp_path / "base")
    lora = exported(adapter, tmp_path / "lora", adapter="keep")
    with opened(base, logits_all=True, lora_path=str(lora)) as model:
        assert [greedy(model, prompt) for prompt, _, _ in answers] == [tuned for _, tuned, _ in answers]
    with opened(base, logits_all=True) as model:
        assert [greedy(model, prompt) for prompt, _, _ in answers] == [plain for _, _, plain in answers]


# The base came in q4_1, whose grid that dtype meets again; the adapter is random, so that many tokens are close.
LEAST = {"f32": 1.0, "f16": 0.98, "bf16": 0.96, "q8_0": 0.93, "q5_1": 0.75, "q5_0": 0.75, "q4_1": 0.8, "q4_0": 0.6}


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_how_far_each_dtype_agrees(
    dtype: str,
    adapter: Path,
    answers: list[tuple[list[int], list[int], list[int]]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    """The share of 320 places at which the likeliest next token is the one that fp32 chose."""
    file = exported(adapter, tmp_path / "gguf", dtype)
    same = []
    with opened(file, logits_all=True) as model:
        for prompt, expected, _ in answers:
            model.reset()
            model.eval(prompt + expected)
            chosen = np.argmax(np.array(model.scores[: model.n_tokens]), axis=1)
            same += [a == b for a, b in zip(chosen[len(prompt) - 1 : -1], expected, strict=True)]
    share = sum(same) / len(same)
    record_property("agreement", share)
    print(json.dumps({"dtype": dtype, "agreement": round(share, 4), "MB": round(file.stat().st_size / 1e6)}))
    assert share >= LEAST[dtype]
