"""`litft merge`: what is written is what PEFT computes with the adapter beside the base, read by plain transformers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import EXPERTS, distance, logits, perturb, run_of, with_peft
from safetensors.torch import load_file, save_file
from tiny import CHATML, IM_END, VOCAB, save_tiny, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from litft.cli.main import main
from litft.errors import Failed, UserError
from litft.export import verify
from litft.export.hf import describe, write_model
from litft.export.merge import merge
from litft.models.resolve import resolve
from litft.tuners import QLoRA

BF16 = torch.bfloat16


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {}),
    "rslora and patterns": (
        "qwen3",
        {"rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"0.mlp.up_proj": 5}},
    ),
    "dora": ("gemma3", {"dora": True}),
    "dora on Conv1D": ("gpt2", {"dora": True}),
    "pissa, saved with twice the rank": ("phi3", {"init": "pissa"}),
    "a trained head": ("llama", {"modules_to_save": ["lm_head"]}),
    "a trained head of a tied pair": ("qwen2", {"modules_to_save": ["lm_head"]}),
    "both of a tied pair": ("qwen2", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "added tokens, tied": ("qwen2", {"tokens": ["<|new|>", "<|newer|>"]}),
    "added tokens, untied": ("llama", {"tokens": ["<|new|>"]}),
    "stacked experts": ("gpt_oss", {"target_parameters": EXPERTS}),
    "experts stored one by one": ("qwen3_moe", {"target_parameters": EXPERTS}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_d1_d9_d10_every_kind_of_adapter_merges_to_what_peft_answers(tmp_path: Path, kind: str) -> None:
    family, options = KINDS[kind]
    run = run_of(tmp_path, family, **options)
    written = merge(resolve(run), tmp_path / "merged", dtype=torch.float32)
    again, report = AutoModelForCausalLM.from_pretrained(written.folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert distance(logits(again), with_peft(run)) < 1e-4
    assert (written.merged is None) is (family == "qwen3_moe")  # whose files name weights differently
    assert any("loaded whole" in line for line in describe(resolve(run), written)) is (written.merged is None)
    config, tied = again.config, "tied" in kind and "untied" not in kind
    assert config.tie_word_embeddings is (family in ("qwen3", "gemma3", "gpt2") or kind == "added tokens, tied") or tied
    assert config.vocab_size == VOCAB + len(options.get("tokens", []))
    assert config.use_cache is True and config.dtype == torch.float32


def test_d1_a_trained_half_of_a_tied_pair_unties_the_configuration(tmp_path: Path) -> None:
    run = run_of(tmp_path, "qwen2", modules_to_save=["lm_head"])
    out = merge(resolve(run), tmp_path / "merged").folder
    again = AutoModelForCausalLM.from_pretrained(out)
    assert again.config.tie_word_embeddings is False
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= load_file(out / "model.safetensors").keys()


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_d13_the_update_is_added_in_fp32_and_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    run = run_of(tmp_path, "llama")
    out = merge(resolve(run), tmp_path / "merged", dtype=dtype).folder
    base, adapter = (
        load_file(tmp_path / "base" / "model.safetensors"),
        load_file(run / "final/adapter_model.safetensors"),
    )
    written, changed = load_file(out / "model.safetensors"), 0
    assert written.keys() == base.keys()
    for name, weight in base.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in adapter:
            weight = weight.float() + 3.0 * adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]
            changed += 1
        assert torch.equal(written[name], weight.to(dtype)), name
    assert changed == 14


def test_f2_the_folder_is_a_whole_chat_model(tmp_path: Path) -> None:
    run = run_of(tmp_path, "llama", shape={"eos_token_id": 0})
    (tmp_path / "base" / "generation_config.json").unlink()
    out = merge(resolve(run), tmp_path / "merged").folder
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == CHATML
    assert GenerationConfig.from_pretrained(out).eos_token_id[0] == IM_END
    config = json.loads((out / "config.json").read_text())
    assert config["eos_token_id"][0] == IM_END and config["use_cache"] is True and config["dtype"] == "bfloat16"
    assert not {"adapter_config.json", "adapter_model.safetensors"} & {file.name for file in out.iterdir()}
    assert str(tmp_path) not in "".join(file.read_text() for file in out.glob("*.json"))


def test_d4_a_qlora_adapter_goes_into_the_base_before_quantisation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path, "llama", tuner=QLoRA, shape={"hidden_size": 64})
    (run / "config.yaml").write_text("model: {tuner: {class_path: litft.QLoRA, init_args: {quant: nf4}}}\n")
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    assert f"base: {tmp_path / 'base'} (bf16)" in said and "trained over that base in nf4" in said
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert "quantization_config" not in (tmp_path / "merged" / "config.json").read_text()
    assert distance(logits(again), with_peft(run)) < 0.3  # rounding to bf16


@pytest.mark.parametrize("stored", [torch.float32, BF16])
def test_a_pissa_adapter_of_pefts_that_needs_the_whole_weights(tmp_path: Path, stored: torch.dtype) -> None:
    from peft import LoraConfig, get_peft_model

    base = save_tiny(tmp_path / "base", dtype=stored)
    options: Any = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    perturb(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    written = merge(resolve(tmp_path / "adapter"), tmp_path / "merged")
    assert written.merged is None and written.dtype == stored
    again = AutoModelForCausalLM.from_pretrained(written.folder, dtype=torch.float32)
    assert distance(logits(again), expected) < (1e-4 if stored == torch.float32 else 0.3)  # rounding to bf16


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [VOCAB, VOCAB + 1]}},
    ],
    ids=["stored", "trained as a whole", "trained rows"],
)
def test_embeddings_that_peft_resized_and_stored_with_the_adapter(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    from peft import LoraConfig, get_peft_model

    base = save_tiny(tmp_path / "base", family)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<|new|>", "<|newer|>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], **options))
    perturb(model)
    x = torch.tensor([[5, VOCAB, 9, VOCAB + 1, 70]])
    expected = logits(model, x)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    written = merge(resolve(tmp_path / "adapter"), tmp_path / "merged")
    assert written.merged is not None
    assert distance(logits(AutoModelForCausalLM.from_pretrained(written.folder), x), expected) < 1e-4


def test_files_are_cut_at_the_size_that_is_asked_for(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    whole, cut = (tmp_path / name for name in ("whole", "cut"))
    merge(resolve(run), whole)
    merge(resolve(run), cut, shard_bytes=40_000)
    files = sorted(cut.glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 45_000 for file in files)
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    one = load_file(whole / "model.safetensors")
    assert all(torch.equal(tensors[name], tensor) for name, tensor in one.items())


class Wrong:
    """Merged weights, one of them not as it should be."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def read(self, name: str) -> torch.Tensor:
        tensor = self.real.read(name)
        return tensor + 0.02 if name.endswith("0.mlp.up_proj.weight") else tensor


@pytest.mark.parametrize("room", ["enough", "too little"])
def test_a_wrong_merge_leaves_no_folder_and_exits_1(
    tmp_path: Path, room: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from litft.export import merged

    run, real = run_of(tmp_path), merged.merged_weights
    monkeypatch.setattr(merged, "merged_weights", lambda *args, **options: Wrong(real(*args, **options)))
    if room == "too little":
        monkeypatch.setattr(verify, "host_memory_left", lambda: 1e6)
    before = sorted(path.name for path in tmp_path.iterdir())
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 1
    assert "differ by up to" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_broken_adapter_is_called_that(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    file = run / "final" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(Failed, match="infinities or NaN: training went wrong"):
        merge(resolve(run), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_without_room_for_logits_weights_and_layers_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "host_memory_left", lambda: 1e6)
    run = run_of(tmp_path, "llama", dora=True)
    check = merge(resolve(run), tmp_path / "merged").check
    assert (check.tokens, check.weights, check.modules) == (0, 21, 14)
    assert "logits were not compared" in check.lines()[0]
    file = tmp_path / "merged" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] += 1
    save_file(tensors, file)
    from litft.export.merged import merged_weights

    source = resolve(run)
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    with pytest.raises(Failed, match=r"model\.norm\.weight was not written"):
        verify.verify(source, tokenizer, tmp_path / "merged", BF16, weights=merged_weights(source, tokenizer))


def test_what_can_not_be_merged_or_written_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for words, said in (
        ([tmp_path / "base", "--out", tmp_path / "m"], "is a whole model: there is nothing to merge"),
        ([run, "--out", tmp_path / "full"], "is there already and not empty"),
        ([run, "--out", run / "final" / "merged"], "which is only read"),
        ([run, "--out", tmp_path / "base"], "which is only read"),
        ([run, "--out", tmp_path / "full" / "x"], "is a file"),
        ([run, "--out", tmp_path / "m", "--dtype", "int8"], "--dtype"),
        ([run, "--out", tmp_path / "m", "--shard_gb", "0"], "--shard_gb: '0': a number above 0"),
        ([run, "--out", tmp_path / "m", "--shard_gb", "nan"], "a number above 0"),
    ):
        assert main(["merge", *map(str, words)]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") <= 5
    assert not (tmp_path / "m").exists()


def test_a_link_is_followed(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    for name in ("disk", "empty"):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "elsewhere" / "empty").mkdir()
    for name in ("disk", "empty"):  # one that leads nowhere yet, and one to an empty folder
        assert main(["merge", str(run), "--out", str(tmp_path / name)]) == 0
        assert (tmp_path / name).is_symlink() and (tmp_path / "elsewhere" / name / "config.json").is_file()
    assert sorted(p.name for p in (tmp_path / "elsewhere").iterdir()) == ["disk", "empty"]


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    other = save_tiny(tmp_path / "other", hidden_size=48)
    config = run / "final" / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "base"), str(other)))
    with pytest.raises(UserError, match="does not fit"):
        merge(resolve(run), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


MEMORY = """
import sys, torch
from pathlib import Path
from litft.engine.room import resident
from litft.export import verify
from litft.export.merge import merge
from litft.models.resolve import resolve
verify.host_memory_left = lambda: 1e6  # as for a model too large to be loaded: compared one by one
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
merge(resolve(sys.argv[2]), Path(sys.argv[3] + "-small"))  # libraries loaded, threads started
Path("/proc/self/clear_refs").write_text("5")
before = peak()
merge(resolve(sys.argv[1]), Path(sys.argv[3]))
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak")
def test_memory_is_bounded_by_the_largest_weight_not_by_the_model(tmp_path: Path) -> None:
    wide = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 8}
    run, small = run_of(tmp_path / "a", shape=wide), run_of(tmp_path / "b")
    size = sum(file.stat().st_size for file in (tmp_path / "a" / "base").glob("*.safetensors"))
    command = [sys.executable, "-c", MEMORY, *map(str, (run, small, tmp_path / "out"))]
    # Weights as small as these would lie in malloc's heap and leave holes there; larger ones never do.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    grown, largest = int(done.stdout.split()[-1]), 768 * 2048 * 4
    assert size > 120e6
    assert grown < 8 * largest, (grown, size)


def test_a_full_model_is_written_in_another_dtype_bit_for_bit(tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", "gemma3")
    written = write_model(resolve(base), tmp_path / "half", dtype="bf16")
    assert written.merged == 0 and written.check.tokens > 100
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "half"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor.to(BF16)) for name, tensor in before.items())
    assert tiny_tokenizer().get_vocab() == AutoTokenizer.from_pretrained(tmp_path / "half").get_vocab()
