"""Adapter folders that are not taken, and why."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import logits, trained
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_model

from litft.errors import UserError
from litft.tuners import Full, LoRA


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, tuner = trained("llama")
    tuner.save(model, tmp_path / "adapter", "some/base")
    return tmp_path / "adapter"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class Canary:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_j1_a_pickled_adapter_is_refused_unread(folder: Path, tmp_path: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Canary(str(tmp_path / "canary"))))
    with pytest.raises(UserError, match="pickle"):
        LoRA.from_folder(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
        ({"something_new": True}, "something_new"),
        ({"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}, "trainable_token_indices"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(folder: Path, changes: dict[str, Any], word: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(UserError, match=word):
        LoRA.from_folder(folder)


def test_low_rank_embeddings_are_refused(tmp_path: Path) -> None:
    get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["embed_tokens"])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="embedding"):
        LoRA.from_folder(tmp_path)


def test_broken_and_empty_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json is missing"):
        LoRA.from_folder(tmp_path)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged"):
        LoRA.from_folder(folder)
    weights.unlink()
    with pytest.raises(UserError, match="is missing"):
        LoRA.from_folder(folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        LoRA.from_folder(folder)


def test_d5_missing_unexpected_or_misshapen_tensors_are_refused(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = {key: value.clone() for key, value in load_file(path).items()}  # off the file that is overwritten
    name = next(iter(tensors))
    rest = {key: value for key, value in tensors.items() if key != name}
    tuner, model = LoRA.from_folder(folder), tiny_model("llama")
    tuner.apply(model)
    before = logits(model)
    for broken in (rest, {**rest, name + "_": tensors[name]}, {**tensors, "x.lora_A.weight": tensors[name].clone()}):
        save_file(broken, path)
        with pytest.raises(UserError, match="does not fit"):
            tuner.load(model, folder)
    save_file({**tensors, name: torch.zeros(1, 1)}, path)
    with pytest.raises(UserError, match="other shape"):
        tuner.load(model, folder)
    assert torch.equal(logits(model), before)


def test_a_pissa_tuner_says_why_its_saved_adapter_does_not_fit_it(tmp_path: Path) -> None:
    model, tuner = trained("llama", init="pissa")
    tuner.save(model, tmp_path, "some/base")
    with pytest.raises(UserError, match="twice the rank"):
        tuner.load(model, tmp_path)


def test_full_has_no_adapter(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(TypeError, match="export"):
        Full().save(model, tmp_path, "some/base")
    with pytest.raises(UserError, match="lora"):
        Full().load(model, tmp_path)
    with pytest.raises(UserError, match="lora"):
        Full().continuing(tmp_path)
    before = logits(model)
    Full().merge(model)
    assert torch.equal(logits(model), before)
