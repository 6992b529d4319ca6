"""The quickstart's adapter in every form and every program that takes it: the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from served import served
from transformers import AutoModelForCausalLM, AutoTokenizer

from litft.cli.main import main

ROOT = Path(__file__).parent.parent
TOKENS = 64
PROMPTS = (
    "Why is the sky blue?",
    "Write a Python function that adds two numbers.",
    "How do I get candle wax out of a carpet?",
    "What is 17 * 23? Think step by step.",
    "Tell me about the moon, in 3 sentences.",
)


@pytest.fixture(scope="module")
def adapter(default_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's first command, to its end."""
    out = tmp_path_factory.mktemp("quick") / "run"
    data = str(ROOT / "tutorials" / "data" / "quickstart.jsonl")
    words = ["finetune", "lora", "--data", data, "--model", str(default_model), "--samples.count", "0"]
    assert main([*words, "--out", str(out)]) == 0
    return out / "final"


@pytest.fixture(scope="module")
def expected(adapter: Path) -> list[str]:
    """transformers' answers with PEFT's adapter beside its base."""
    from peft import AutoPeftModelForCausalLM

    return by_transformers(AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32), adapter)


def prompts(tokenizer: Any) -> list[list[int]]:
    asked = [[{"role": "user", "content": text}] for text in PROMPTS]
    return [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in asked]


def by_transformers(model: Any, folder: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for ids in prompts(tokenizer):
        new = model.eval().generate(torch.tensor([ids]), max_new_tokens=TOKENS, do_sample=False)[0, len(ids) :]
        found.append(tokenizer.decode(new, skip_special_tokens=True))
    return found


@pytest.mark.slow
def test_the_answers_are_answers(expected: list[str]) -> None:
    assert all(len(text) > 40 for text in expected) and len(set(expected)) == len(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["merge", "export hf", "export vllm"])
def test_folders_in_transformers(how: str, adapter: Path, expected: list[str], tmp_path: Path) -> None:
    words = {
        "merge": ["merge", "--dtype", "fp32"],
        "export hf": ["export", "--to", "hf", "--dtype", "fp32"],
        "export vllm": ["export", "--to", "vllm", "--adapter", "merge", "--dtype", "fp32"],
    }[how]
    out = tmp_path / "out"
    assert main([words[0], str(adapter), *words[1:], "--out", str(out)]) == 0
    assert by_transformers(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), out) == expected


@pytest.mark.slow
def test_litft_generate(adapter: Path, expected: list[str]) -> None:
    from litft.infer.generate import generate
    from litft.infer.load import load_for_inference

    bundle = load_for_inference(adapter, dtype=torch.float32)
    found = generate(bundle, list(PROMPTS), max_new_tokens=TOKENS, temperature=0)
    assert found == [text.strip() for text in expected]


@pytest.mark.slow
def test_the_openai_client_against_litft_serve(adapter: Path, expected: list[str]) -> None:
    import openai

    from litft.infer.load import load_for_inference

    with served(load_for_inference(adapter, dtype=torch.float32)) as (_, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        for prompt, answer in zip(PROMPTS, expected, strict=True):
            asked: Any = [{"role": "user", "content": prompt}]
            told = client.chat.completions.create(model="tiny", messages=asked, max_tokens=TOKENS, temperature=0)
            assert told.choices[0].message.content == answer


@pytest.mark.slow
@pytest.mark.llamacpp
@pytest.mark.parametrize("form", ["gguf", "ollama", "adapter"])
def test_llama_cpp(form: str, adapter: Path, expected: list[str], default_model: Path, tmp_path: Path) -> None:
    """The merged model in one file, as for Ollama too, and the adapter as a file beside its base."""
    import llama_cpp

    to = "ollama" if form == "ollama" else "gguf"
    more = ["--adapter", "keep"] if form == "adapter" else []
    out = tmp_path / "out"
    assert main(["export", str(adapter), "--to", to, "--dtype", "f32", "--out", str(out), *more]) == 0
    file, options = str(next(out.glob("*.gguf"))), {}
    if form == "adapter":
        assert main(["export", str(default_model), "--to", to, "--dtype", "f32", "--out", str(tmp_path / "base")]) == 0
        file, options = str(next((tmp_path / "base").glob("*.gguf"))), {"lora_path": file}
    settings: dict[str, Any] = {"n_ctx": 512, "type_k": 0, "type_v": 0, "flash_attn": False, "verbose": False}
    model = llama_cpp.Llama(file, **settings, **options)
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    for ids, text in zip(prompts(tokenizer), expected, strict=True):
        model.reset()
        new: list[int] = []
        for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            if token == model.token_eos() or len(new) == TOKENS:
                break
            new.append(token)
        assert tokenizer.decode(new, skip_special_tokens=True) == text
    model.close()
