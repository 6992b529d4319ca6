"""From a name to a folder: what is found, what is refused, and that refused code never runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from tiny import save_tiny, tiny_model

from litft.errors import UserError
from litft.models import alias
from litft.models import resolve as resolve_module
from litft.models.alias import DEFAULT_MODEL, cache_dir
from litft.models.load import load_config, load_model, load_tokenizer
from litft.models.resolve import resolve


def refused(name: str | Path, match: str, **options: object) -> str:
    """The message with which `name` is refused: 2 to 5 lines, the last of them the mend."""
    with pytest.raises(UserError, match=match) as error:
        resolve(name, **options)
    said = str(error.value)
    assert 2 <= len(said.splitlines()) <= 5, said
    return said


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def save_adapter(folder: Path, base: str, **settings: object) -> Path:
    """An adapter as PEFT itself writes it, on a tiny Llama."""
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.save_pretrained(folder)
    edit_json(folder / "adapter_config.json", base_model_name_or_path=base, **settings)
    return folder


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama to break."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def test_folder(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    for name in (str(model), "./model", "model", "model/", model):
        source = resolve(name)
        assert source.folder == model
        assert (source.name, source.adapter, source.hub_id) == (str(name), None, None)
        assert source.base_name == str(model)


def test_run_folder_means_its_final(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    assert "--resume" in refused(tmp_path / "run", "has no final/")
    save_tiny(tmp_path / "run" / "final")
    assert resolve(tmp_path / "run").folder == tmp_path / "run" / "final"


def test_hub_cache_folder_means_its_snapshot(model: Path, tmp_path: Path) -> None:
    cached, old, new = tmp_path / "models--org--name", "a" * 40, "b" * 40
    shutil.copytree(model, cached / "snapshots" / old)
    shutil.copytree(model, cached / "snapshots" / new)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(old)
    source = resolve(cached)
    assert source.folder == cached / "snapshots" / old
    assert (source.hub_id, source.revision, source.base_name) == ("org/name", old, "org/name")


def test_adapter_folder_and_its_base(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = save_adapter(tmp_path / "adapter", str(model))
    source = resolve(adapter)
    assert (source.folder, source.adapter) == (model, adapter)
    assert source.tokenizer_folder == model
    (adapter / "tokenizer_config.json").write_text("{}")
    assert resolve(adapter).tokenizer_folder == adapter
    (adapter / "tokenizer_config.json").unlink()
    # a base named relative to the adapter, from whatever folder litft is run
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="../model")
    monkeypatch.chdir("/")
    assert resolve(adapter).folder == model
    # a run folder whose final/ is an adapter
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=str(model))
    (tmp_path / "run").mkdir()
    adapter.rename(tmp_path / "run" / "final")
    assert resolve(tmp_path / "run").adapter == tmp_path / "run" / "final"


def test_adapter_made_with_somebody_elses_cache(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the default model's cache folder, elsewhere
    monkeypatch.setenv("LITFT_CACHE", str(tmp_path / "cache"))
    mine = Path(shutil.copytree(model, cache_dir() / "models" / DEFAULT_MODEL))
    for base in (f"/home/other/.cache/litft/models/{DEFAULT_MODEL}", DEFAULT_MODEL, str(mine)):
        source = resolve(save_adapter(tmp_path / "adapter", base))
        assert source.folder == mine
        assert source.base_name == str(mine)
    # a snapshot in the hub's cache, elsewhere: becomes the hub id at that commit
    asked = []
    sha = "c" * 40
    monkeypatch.setattr("litft.models.hub.download", lambda name, **options: asked.append((name, options)) or model)
    source = resolve(save_adapter(tmp_path / "adapter", f"/home/other/hub/models--org--name/snapshots/{sha}"))
    assert (source.hub_id, source.revision, source.folder) == ("org/name", sha, model)
    resolve(save_adapter(tmp_path / "adapter", "org/name", revision="v2"))
    assert [(name, options["revision"]) for name, options in asked] == [("org/name", sha), ("org/name", "v2")]


def test_adapters_that_cannot_be_used(model: Path, tmp_path: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", str(tmp_path / "gone"))
    assert "base_model_name_or_path" in refused(adapter, "needs its base model .*gone")
    save_adapter(tmp_path / "second", str(save_adapter(adapter, str(model))))
    refused(tmp_path / "second", "has another adapter")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=None)
    refused(adapter, "does not say which model it adapts")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(adapter, r"adapter_model\.bin is a pickle")


def test_names_that_lead_nowhere(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "holds: model/" in refused(tmp_path / "modle", "there is no folder")
    assert "holds: model/" in refused("./modle", "there is no folder")
    assert "model holds: " in refused("model/final", "there is no folder")  # hardly a hub id: model/ is a folder here
    refused(model / "config.json", "is a file")
    refused("  ", "empty")
    refused("no spaces/please", "neither a folder here nor the id")
    (tmp_path / "empty").mkdir()
    assert "it holds: nothing" in refused(tmp_path / "empty", "holds no model")


def test_a_folder_here_does_not_hide_the_hubs_organisation(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    monkeypatch.setattr("litft.models.hub.download", lambda name, **options: model)
    assert resolve("org/name").hub_id == "org/name"


def test_hub_that_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "litft download org/name" in refused("org/name", "HF_HUB_OFFLINE")  # conftest.py switches it off
    refused("org/name", "cache", offline=True)


def test_weights_that_are_not_there(model: Path, tmp_path: Path) -> None:
    weights = model / "model.safetensors"
    weights.rename(model / "pytorch_model.bin")
    assert "use_safetensors=False" in refused(model, r"pytorch_model\.bin, a pickle")
    (model / "pytorch_model.bin").unlink()
    assert "it holds: " in refused(model, "no weights")
    assert resolve(model, weights=False).folder == model  # enough for a tokenizer
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (model / shards["a"]).touch()
    refused(model, r"1 of 2 weight files are missing, first model-00002")


def test_architectures_that_are_refused(model: Path) -> None:
    edit_json(model / "config.json", architectures=["LlamaForSequenceClassification"])
    refused(model, "LlamaForSequenceClassification, which is not a causal")
    edit_json(model / "config.json", id2label={"0": "LABEL_0"})
    assert "litft score" in refused(model, "is a reward model, which gives numbers")
    assert resolve(model, scores=True).folder == model
    edit_json(model / "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])
    refused(model, "T5ForConditionalGeneration, which is not a causal")
    edit_json(model / "config.json", model_type="notllama", architectures=["NotLlamaForCausalLM"])
    refused(model, "does not know the model type 'notllama'")
    edit_json(model / "config.json", model_type="llama", architectures=["LlamaForCausalLM"])
    edit_json(model / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert "qlora" in refused(model, r"stored quantised \(bitsandbytes\)")
    (model / "config.json").write_text("{")
    refused(model, r"cannot read .*config\.json")


def remote_code(model: Path, canary: Path, model_type: str) -> Path:
    """Let the model bring code which leaves a file behind when it is imported."""
    (model / "own.py").write_text(
        f"open({str(canary)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"class OwnConfig(LlamaConfig):\n    model_type = {model_type!r}\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit_json(model / "config.json", model_type=model_type, auto_map=auto_map, architectures=["OwnForCausalLM"])
    return model


def test_j3_a_models_own_code_runs_only_when_told_to(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    canary = tmp_path / "canary"
    remote_code(model, canary, "own")
    assert "--model.trust_remote_code true" in refused(model, r"own Python code \(own\.OwnConfig\)")
    refused(save_adapter(tmp_path / "adapter", str(model)), r"own Python code")
    with pytest.raises(UserError):
        load_config(resolve_module.ModelSource("", model))
    with pytest.raises(UserError):
        load_model(resolve_module.ModelSource("", model), dtype=torch.float32)
    assert not canary.exists()

    source = resolve(model, trust_remote_code=True)
    assert "running the Python code" in caplog.text
    assert not canary.exists()
    loaded = load_model(source, dtype=torch.float32, trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    assert canary.exists()


def test_j3_a_family_that_transformers_knows_uses_transformers_code(model: Path, tmp_path: Path) -> None:
    import torch

    canary = tmp_path / "canary"
    remote_code(model, canary, "llama")
    edit_json(model / "config.json", architectures=["LlamaForCausalLM"])
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.OwnTokenizer", None]})
    source = resolve(model)
    load_tokenizer(source)
    assert type(load_model(source, dtype=torch.float32)).__module__.startswith("transformers.models.llama")
    assert not canary.exists()


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LITFT_CACHE", str(tmp_path / "own"))
    assert alias.cache_dir() == tmp_path / "own"
    monkeypatch.delenv("LITFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert alias.cache_dir() == tmp_path / "xdg" / "litft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert alias.cache_dir() == Path(os.path.expanduser("~/.cache/litft"))
