"""No pickle is ever loaded unguarded: checkpoints, weights, caches and data that would run code when read."""

from __future__ import annotations

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningModule

from litft.data import tokens
from litft.data.files import read_rows
from litft.errors import UserError

VERBS = ("finetune", "generate", "chat")


def unguarded(file: Path) -> Any:
    """What a careless program would call."""
    return lambda: torch.load(io.BytesIO(file.read_bytes()), weights_only=False)


# ---- checkpoints


@pytest.fixture
def run(done: Path, tmp_path: Path) -> Path:
    """A copy, to be tampered with."""
    return Path(shutil.copytree(done, tmp_path / "run", symlinks=True))


def state_file(run: Path) -> Path:
    """A checkpoint whose checksum is gone, as who exchanges the file would see to."""
    file = max((run / "checkpoints").glob("step-*/state.ckpt"))
    file.with_name("state.ckpt.sha256").unlink(missing_ok=True)
    return file


@pytest.mark.parametrize("place", ["top", "optimizer_states", "callbacks", "loops", "hyper_parameters", "state_dict"])
def test_a_checkpoint_that_holds_code(place: str, run: Path, canary: Any, litft: Any) -> None:
    file = state_file(run)
    state = torch.load(file, weights_only=True)
    inside = state if place == "top" else state.setdefault(place, {})
    inside = inside[0] if isinstance(inside, list) else inside
    inside["more"] = canary.bait
    torch.save(state, file)
    kept = {p: p.read_bytes() for p in run.iterdir() if p.is_file()}
    code, said = litft("finetune", None, "--out", run, "--resume", "--trainer.max_steps", 4)
    assert code == 2 and "more than plain data" in said and "mend: remove that checkpoint's folder" in said
    assert kept == {p: p.read_bytes() for p in kept}
    canary.would(unguarded(file))


def test_a_checkpoint_that_names_code(
    run: Path, canary: Any, litft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning calls what `_instantiator` names; weights_only doesn't keep it from that."""
    (tmp_path / "instantiators.py").write_text(f"def touch(*_, **__):\n    {canary.code}")
    monkeypatch.syspath_prepend(str(tmp_path))
    file = state_file(run)
    state = torch.load(file, weights_only=True)
    state["hyper_parameters"] = {"_instantiator": "instantiators.touch", "lr": 1}
    torch.save(state, file)
    code, said = litft("finetune", None, "--out", run, "--resume", "--trainer.max_steps", 4)
    assert code == 2 and "names code to run (_instantiator)" in said

    trusting = {"instantiators.touch"}  # as versions of Lightning before this list trust everybody
    monkeypatch.setattr("lightning.pytorch.core.saving._ALLOWED_INSTANTIATORS", trusting, raising=False)

    def careless() -> None:
        with pytest.raises(AttributeError):  # of the None that it gave back
            LightningModule.load_from_checkpoint(file, weights_only=True)

    canary.would(careless)


def test_a_checkpoint_that_is_a_bare_pickle(run: Path, canary: Any, litft: Any) -> None:
    """Not an archive as torch writes it: damaged, and never read."""
    file = state_file(run)
    file.write_bytes(canary.pickle)
    code, said = litft("finetune", None, "--out", run, "--resume", "--trainer.max_steps", 2)
    assert code == 0 and "damaged" in said, said
    canary.would(lambda: pickle.loads(canary.pickle))


SWAP = """
import torch
from lightning import Callback
from litft.engine.checkpoints import Checkpoints

class Swap(Callback):
    def __init__(self, bad: str) -> None:
        self.bad = bad

    def on_train_end(self, trainer, module):
        saves = next(c for c in trainer.callbacks if isinstance(c, Checkpoints))
        place = saves.folder / "step-000099"  # none that is being written
        place.mkdir(parents=True, exist_ok=True)
        (place / "state.ckpt").write_bytes(open(self.bad, "rb").read())
        saves.best = (0.0, 99)
"""


def test_the_best_checkpoint_that_is_read_at_the_end(
    model: Path, canary: Any, litft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "swapping.py").write_text(SWAP)
    monkeypatch.syspath_prepend(str(tmp_path))
    bad = tmp_path / "bad.ckpt"
    torch.save({"state_dict": {}, "more": canary.bait}, bad)
    callback = json.dumps([{"class_path": "swapping.Swap", "init_args": {"bad": str(bad)}}])
    words = ["--out", "run", "--trainer.max_steps", 2, f"--trainer.callbacks={callback}"]
    code, said = litft("finetune", model, *words)
    assert code == 2 and "more than plain data" in said, said
    assert not Path("run/final").exists()
    canary.would(unguarded(Path("run/checkpoints/step-000099/state.ckpt")))


def dcp_folder(folder: Path, canary: Any) -> Path:
    """A checkpoint of torch.distributed.checkpoint whose pickled `.metadata` is a trap."""
    from torch import distributed

    distributed.checkpoint.save({"a": torch.ones(2)}, checkpoint_id=str(folder), no_dist=True)
    (folder / ".metadata").write_bytes(canary.pickle)
    return folder


def read_dcp(folder: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader

    return lambda: FileSystemReader(folder).read_metadata()


@pytest.mark.parametrize("verb", VERBS)
def test_a_distributed_checkpoint_as_model(verb: str, canary: Any, litft: Any, tmp_path: Path) -> None:
    folder = dcp_folder(tmp_path / "dcp", canary)
    code, said = litft(verb, folder)
    assert code == 2 and "holds no model: there is no config.json" in said and "__0_0.distcp" in said
    canary.would(read_dcp(folder))


def test_a_distributed_checkpoint_in_a_run(run: Path, canary: Any, litft: Any) -> None:
    """It is none of litft's, so it is passed over: the run goes on from the one that is."""
    folder = dcp_folder(run / "checkpoints" / "step-000009", canary)
    code, said = litft("finetune", None, "--out", run, "--resume", "--trainer.max_steps", 3)
    assert code == 0 and "going on from step 2" in said, said
    canary.would(read_dcp(folder))


# ---- models


def as_pickle(model: Path, canary: Any) -> Path:
    (model / "model.safetensors").unlink()
    torch.save({"weight": canary.bait}, model / "pytorch_model.bin")
    return model / "pytorch_model.bin"


def under_the_name_of_safetensors(model: Path, canary: Any) -> Path:
    torch.save({"weight": canary.bait}, model / "model.safetensors")
    return model / "model.safetensors"


def named_by_the_index(model: Path, canary: Any) -> Path:
    weight_map = {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": canary.bait}, file := model / "pytorch_model-00001-of-00001.bin")
    return file


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("pickled", "says"),
    [
        (as_pickle, "a pickle, which can run code when read"),
        (under_the_name_of_safetensors, "cannot load the model|can't be read as safetensors"),
        (named_by_the_index, "is no safetensors file beside it"),
    ],
)
def test_pickled_weights(verb: str, pickled: Any, says: str, model: Path, canary: Any, litft: Any) -> None:
    file = pickled(model, canary)
    code, said = litft(verb, model)
    assert code == 2 and any(part in said for part in says.split("|")), said
    canary.would(unguarded(file))


@pytest.mark.parametrize("verb", VERBS)
def test_a_pickled_adapter(verb: str, tiny_llama: Path, canary: Any, litft: Any, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": str(tiny_llama), "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    torch.save({"x": canary.bait}, adapter / "adapter_model.bin")
    code, said = litft(verb, adapter)
    assert code == 2 and "adapter_model.bin is a pickle, which can run code" in said
    canary.would(unguarded(adapter / "adapter_model.bin"))


STRAY = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin", "model.ckpt")
STRAY += ("adapter_model.bin", "tokenizer.pkl", "vocab.pkl", "state.ckpt", "consolidated.00.pth", ".metadata")


@pytest.mark.parametrize("verb", VERBS)
def test_pickles_beside_a_good_model_are_left_alone(verb: str, model: Path, canary: Any, litft: Any) -> None:
    for name in STRAY:
        (model / name).write_bytes(canary.pickle)
    code, said = litft(verb, model)
    assert code == 0, said
    canary.would(lambda: [pickle.loads((model / name).read_bytes()) for name in STRAY])


# ---- caches


def store(folder: Path, data: Path) -> tokens.TokenStore:
    """The rows of a file as ids, through the cache in `folder`."""

    class Encoded:
        ids, trained, notes = [1, 2, 3], [False, True, True], ()

    rows = list(read_rows(str(data)))
    return tokens.encode_file(lambda: rows, lambda row: ("messages", Encoded), folder, file="f", skip_bad=False)


@pytest.mark.parametrize("name", ["ids", "trained", "offsets", "lines", "prompts"])
def test_an_object_array_in_the_token_cache(
    name: str, chats: Path, canary: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = store(tmp_path / "cache", chats)
    ids = np.array(before.ids)  # of the file, which is about to change under its map
    file = tmp_path / "cache" / f"{name}.npy"
    np.save(file, np.array([canary.bait], object), allow_pickle=True)
    bad = file.read_bytes()
    again = store(tmp_path / "cache", chats)
    assert "damaged" in capsys.readouterr().err
    assert again.digest == before.digest and len(again) == len(before) and np.array_equal(again.ids, ids)
    file.write_bytes(bad)
    canary.would(lambda: np.load(file, allow_pickle=True))


@pytest.mark.parametrize("change", ["shorter", "another type", "descending", "no meta", "odd meta", "missing"])
def test_a_damaged_token_cache_is_made_anew(
    change: str, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, folder = store(tmp_path / "cache", chats), tmp_path / "cache"
    ids = np.array(before.ids)
    if change == "shorter":
        np.save(folder / "ids.npy", ids[:-1])
    elif change == "another type":
        np.save(folder / "ids.npy", ids.astype(np.float32))
    elif change == "descending":
        np.save(folder / "offsets.npy", before.offsets[::-1].copy())
    elif change == "missing":
        (folder / "prompts.npy").unlink()
    else:
        (folder / "meta.json").write_text("{" if change == "no meta" else '{"surprise": 1}')
    again = store(folder, chats)
    assert "damaged" in capsys.readouterr().err
    assert np.array_equal(again.ids, ids) and np.array_equal(again.offsets, before.offsets)
    store(folder, chats)
    assert capsys.readouterr().err == ""


def test_a_tampered_cache_under_a_run(
    model: Path, canary: Any, litft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITFT_CACHE", str(tmp_path / "cache"))
    code, first = litft("finetune", model)
    file = next((tmp_path / "cache" / "tokens").glob("*/ids.npy"))
    np.save(file, np.array([canary.bait], object), allow_pickle=True)
    bad = file.read_bytes()
    code, again = litft("finetune", model)
    assert code == 0 and "damaged" in again
    assert [line for line in first.splitlines() if not line.startswith("memory")] == [  # what is free moves by itself
        line for line in again.splitlines() if not line.startswith("memory") and "damaged" not in line
    ]
    file.write_bytes(bad)
    canary.would(lambda: np.load(file, allow_pickle=True))


# ---- data


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".npy", ".npz", ".joblib"])
def test_pickled_data_is_no_data(suffix: str, tiny_llama: Path, canary: Any, litft: Any, tmp_path: Path) -> None:
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(canary.pickle)
    for words in (("finetune", tiny_llama, "--data", file), ("data", "check", file)):
        code, said = litft(*words)
        assert code == 2 and "unknown file type" in said and len(said.splitlines()) == 1, said
    canary.would(lambda: pickle.loads(file.read_bytes()))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".jsonl.zst"])
def test_a_pickle_under_the_name_of_data(suffix: str, canary: Any, litft: Any, tmp_path: Path) -> None:
    file = tmp_path / f"rows{suffix}"
    file.write_bytes(canary.pickle)
    code, said = litft("data", "check", file)
    assert code == 2 and "Traceback" not in said, said
    canary.would(lambda: pickle.loads(file.read_bytes()))


def test_a_folder_of_pickles(canary: Any, litft: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("rows.pkl", "state.pt", "cache-0123.arrow", "dataset_info.pkl"):
        (folder / name).write_bytes(canary.pickle)
    code, said = litft("data", "check", folder)
    assert code == 2 and "holds no data files" in said
    canary.would(lambda: pickle.loads((folder / "rows.pkl").read_bytes()))


@pytest.mark.parametrize("name", ["rows.pkl", "name.py", "rows.tar"])
def test_a_data_set_id_that_is_a_folder_here(name: str, canary: Any, elsewhere: Path) -> None:
    """The datasets library looks into a folder of that name first; it reads neither pickles nor scripts."""
    folder = elsewhere / "org" / "name"
    folder.mkdir(parents=True)
    (folder / name).write_text(canary.code) if name.endswith(".py") else (folder / name).write_bytes(canary.pickle)
    with pytest.raises(UserError, match="--data org/name"):
        list(read_rows("org/name:train"))
    canary.would(lambda: exec(canary.code) if name.endswith(".py") else pickle.loads((folder / name).read_bytes()))
