"""Loading: weights exactly as stored, in train mode, in the dtype asked for, or an error; tokens; fingerprints."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, VOCAB, save_tiny, tiny_config, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from litft.errors import UserError
from litft.models import attention
from litft.models.load import (
    add_tokens,
    can_pack,
    fingerprint,
    load_config,
    load_model,
    load_tokenizer,
    tokenizer_fingerprint,
)
from litft.models.resolve import ModelSource, resolve


def source(folder: Path) -> ModelSource:
    return resolve(folder)


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_with_the_weights_that_were_saved(family: str, tiny_folder: Callable[..., Path]) -> None:
    model = load_model(source(tiny_folder(family)), dtype=torch.float32)
    wanted = tiny_model(family).eval()
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        assert torch.equal(model.eval()(ids, use_cache=False).logits, wanted(ids, use_cache=False).logits)
    assert list(dict(model.named_parameters())) == list(dict(wanted.named_parameters()))


def test_h1_model_is_in_train_mode_everywhere(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "gpt2", embd_pdrop=0.5)
    assert not AutoModelForCausalLM.from_pretrained(folder).training  # what would happen if nobody cared
    model = load_model(source(folder), dtype=torch.float32)
    assert all(module.training for module in model.modules())
    ids = torch.arange(3, 23)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)  # dropout really is on

    model.gradient_checkpointing_enable()
    calls = []
    hook = torch.autograd.graph.saved_tensors_hooks(lambda tensor: calls.append(tensor.shape) or tensor, lambda t: t)
    with hook:
        model(ids, use_cache=False)
    recomputed = len(calls)
    model.gradient_checkpointing_disable()
    calls.clear()
    with hook:
        model(ids, use_cache=False)
    assert recomputed < len(calls) / 2  # recompute keeps far fewer activations


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_h3_parameters_have_the_dtype_and_rotary_frequencies_stay_fp32(
    family: str, dtype: torch.dtype, tiny_folder: Callable[..., Path]
) -> None:
    model = load_model(source(tiny_folder(family)), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    fresh = dict(tiny_model(family).named_buffers())
    rotary = {name: buffer for name, buffer in model.named_buffers() if "inv_freq" in name}
    assert rotary
    for name, buffer in rotary.items():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, fresh[name])


def test_h3_phase_at_position_4000(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama", dtype=torch.bfloat16, head_dim=64, max_position_embeddings=8192)
    model = load_model(source(folder), dtype=torch.bfloat16)
    cos, _ = model.model.rotary_emb(torch.zeros(1, dtype=torch.float32), torch.tensor([[4000]]))
    exact = torch.cos(4000 / 10000 ** (torch.arange(0, 64, 2, dtype=torch.float64) / 64)).repeat(2)
    assert (cos[0, 0].double() - exact).abs().max() < 1e-2


def test_f2_cache_is_off_for_training_and_the_stored_config_untouched(tiny_llama: Path) -> None:
    model = load_model(source(tiny_llama), dtype=torch.float32)
    assert model.config.use_cache is False
    assert model(torch.arange(3, 9)[None]).past_key_values is None
    assert load_config(source(tiny_llama)).use_cache is True
    assert AutoConfig.from_pretrained(tiny_llama).use_cache is True


@pytest.mark.parametrize("tied", [True, False])
def test_f5_tied_and_untied_embeddings(tied: bool, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "a", "llama", tie_word_embeddings=tied)
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    model = load_model(source(folder), dtype=torch.float32)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    model.save_pretrained(tmp_path / "b")
    again = load_file(tmp_path / "b" / "model.safetensors")
    before = load_file(folder / "model.safetensors")
    assert again.keys() == before.keys()
    assert all(torch.equal(again[name], before[name]) for name in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_storage_is_unpacked_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    # as gpt-oss is published: 4-bit floats (two a byte, the low half first) with a power of two for each 32
    folder, wanted = save_tiny(tmp_path, "gpt_oss"), {}
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

    def pack(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, inputs, outputs = tensors.pop(name).shape
            blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, blocks.shape[:3], dtype=torch.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            numbers = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1).flatten(3)
            numbers = numbers * torch.exp2(scales.float() - 127)[..., None]
            wanted[name] = numbers.reshape(experts, outputs, inputs).transpose(1, 2)

    edit_weights(folder, pack)
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    model = load_model(source(folder), dtype=dtype)
    assert len(wanted) == 4
    for name, weight in wanted.items():
        assert torch.equal(model.get_parameter(name), weight.to(dtype))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    model.save_pretrained(tmp_path / "out")  # as an ordinary model
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_missing_weights_are_an_error_not_random_numbers(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    edit_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"lacks 1 weights .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(source(folder), dtype=torch.float32)


def test_weights_left_over_are_an_error(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)  # a bias that config.json (attention_bias false) has no place for
    edit_weights(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}))
    with pytest.raises(UserError, match=r"no place for: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_model(source(folder), dtype=torch.float32)


def test_weights_of_another_shape_are_an_error(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    edit_json(folder / "config.json", intermediate_size=128)
    with pytest.raises(UserError) as error:
        load_model(source(folder), dtype=torch.float32)
    assert len(str(error.value).splitlines()) <= 5


def test_a_cut_off_file_is_an_error(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="cannot load the model"):
        load_model(source(folder), dtype=torch.float32)


class _Canary:
    """Unpickling makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.path}",)


def test_j1_pickled_weights_are_never_read(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = save_tiny(tmp_path / "model")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Canary(canary)))
    load_model(source(folder), dtype=torch.float32)  # safetensors lie beside it
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"pytorch_model\.bin, a pickle"):
        source(folder)
    with pytest.raises(UserError):  # and not by the loader either, if nobody resolved
        load_model(ModelSource(str(folder), folder), dtype=torch.float32)
    assert not canary.exists()
    pickle.loads((folder / "pytorch_model.bin").read_bytes())
    assert canary.exists()  # it would have sung


def test_tokenizer_state_of_truncation_and_padding_is_dropped(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    edit_json(
        folder / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 9},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
    )
    tokenizer = load_tokenizer(source(folder))
    assert len(tokenizer.backend_tokenizer.encode("one two three four five six").ids) > 9
    tokenizer.save_pretrained(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert stored["truncation"] is None
    assert stored["padding"] is None


def test_tokenizer_missing_is_an_error(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="cannot read a tokenizer"):
        load_tokenizer(source(folder))


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_d8_added_tokens_get_rows_at_the_mean(family: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(family), tiny_tokenizer()
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before = model.get_input_embeddings().weight.detach().clone()
    ids = add_tokens(model, tokenizer, ["<think>", "<|im_end|>", "</think>", "<think>"])
    assert ids == [VOCAB, VOCAB + 1]
    assert tokenizer.encode("a<think>b") == [*tokenizer.encode("a"), VOCAB, *tokenizer.encode("b")]
    assert tokenizer.decode([VOCAB], skip_special_tokens=True) == ""
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] == model.config.vocab_size == VOCAB + 2
    assert torch.equal(rows[:VOCAB], before)
    torch.testing.assert_close(rows[ids], before.mean(0).expand(2, -1))
    assert (model.get_output_embeddings().weight is rows) is tied
    torch.testing.assert_close(
        model.get_output_embeddings().weight[ids], model.get_output_embeddings().weight[:VOCAB].mean(0).expand(2, -1)
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with torch.no_grad():
        here = torch.tensor([[5, *ids]])
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(reloaded(here).logits, model.eval()(here).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(["<think>", "</think>"]) == ids


def test_d8_spare_rows_are_used_before_the_matrix_grows() -> None:
    model, tokenizer = tiny_model("llama", vocab_size=VOCAB + 8), tiny_tokenizer()
    old = model.get_input_embeddings().weight
    assert add_tokens(model, tokenizer, ["<tool>"]) == [VOCAB]
    assert model.get_input_embeddings().weight is old
    torch.testing.assert_close(old[VOCAB], old[:VOCAB].mean(0))
    assert add_tokens(model, tokenizer, ["<tool>"]) == []


def test_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    one = save_tiny(tmp_path / "one")
    shutil.copytree(one, tmp_path / "copy")
    first = fingerprint(source(one))
    edit_json(tmp_path / "copy" / "config.json", transformers_version="5.0.0")
    assert fingerprint(source(tmp_path / "copy")) == first
    assert fingerprint(source(save_tiny(tmp_path / "seed", seed=1))) != first
    assert fingerprint(source(save_tiny(tmp_path / "theta", rms_norm_eps=1e-3))) != first
    edit_weights(one, lambda tensors: tensors["model.layers.1.self_attn.q_proj.weight"].mul_(1.01))
    assert fingerprint(source(one)) != first


def test_tokenizer_fingerprint_is_that_of_its_ids() -> None:
    first = tokenizer_fingerprint(tiny_tokenizer())
    used = tiny_tokenizer()
    used(["one two three", "four"], max_length=3, truncation=True, padding=True)
    assert tokenizer_fingerprint(used) == first
    used.add_tokens(["<think>"])
    assert tokenizer_fingerprint(used) != first
    assert tokenizer_fingerprint(tiny_tokenizer(template=None)) != first
    assert tokenizer_fingerprint(tiny_tokenizer(pad_token="<|im_end|>")) != first


@pytest.mark.parametrize("family", FAMILIES)
def test_c1_what_can_pack_says_yes_to_is_packed_exactly(family: str) -> None:
    assert can_pack(tiny_config(family)) is None
    config = tiny_config(family)
    attention.register()
    packed = tiny_model(family, attn_implementation=attention.NAME).eval()
    assert can_pack(packed) is None
    alone = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    alone.load_state_dict(packed.state_dict())
    a, b = torch.arange(3, 16)[None], torch.arange(40, 60)[None]
    bounds = torch.tensor([0, 13, 33], dtype=torch.int32)
    with torch.no_grad():
        rows = packed(
            input_ids=torch.cat([a, b], 1),
            position_ids=torch.cat([torch.arange(13), torch.arange(20)])[None],
            use_cache=False,
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=20,
            max_length_k=20,
        ).logits
        wanted = torch.cat([alone(a, use_cache=False).logits, alone(b, use_cache=False).logits], 1)
    torch.testing.assert_close(rows, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mamba", "state"),
        ("jamba", "state"),
        ("rwkv", "state"),
        ("qwen3_next", "state"),
        ("recurrent_gemma", "state"),
        ("bloom", "interface"),
        ("mpt", "interface"),
        ("falcon", "interface"),
        ("bert", "looks ahead"),
        ("llama4_text", "chunked_attention"),
    ],
)
def test_can_pack_refuses_by_structure(kind: str, reason: str) -> None:
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    known = AutoConfig.for_model(kind).to_dict()
    config = AutoConfig.for_model(kind, **{key: value for key, value in sizes.items() if key in known})
    said = can_pack(config)
    assert said is not None
    assert reason in said


def test_can_pack_refuses_a_convolution_between_attention_layers() -> None:
    layers = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "vocab_size": 128, "hidden_size": 64}
    said = can_pack(AutoConfig.for_model("lfm2", **layers, num_attention_heads=4, num_key_value_heads=2))
    assert said is not None
    assert "conv" in said
