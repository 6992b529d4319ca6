"""Names can't lead out of the run folder, archives aren't unpacked, and files have the user's permissions."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from safetensors.torch import load_file, save_file
from tiny import CHATML, chat_rows, tiny_tokenizer
from transformers import AutoModelForCausalLM

from litft import ChatData
from litft.data.files import read_rows
from litft.errors import UserError
from litft.models.load import load_tokenizer
from litft.models.resolve import resolve

OUT = ["--out", "run", "--trainer.max_steps", 2]


def everything(folder: Path) -> dict[Path, bytes | str]:
    """What lies in a folder, links unfollowed."""
    found: dict[Path, bytes | str] = {}
    for root, folders, names in os.walk(folder):
        for path in (Path(root) / name for name in (*folders, *names)):
            if path.is_symlink():
                found[path] = os.readlink(path)
            elif path.is_file():
                found[path] = path.read_bytes()
    return found


# ---- names


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "..", ".", "", "a\\b", "a\0b", "a\nb"])
def test_names_of_validation_sets(name: str, tiny_llama: Path, chats: Path, litft: Any) -> None:
    with pytest.raises(UserError, match=r"--data.val: .* is no name for a set"):
        ChatData(str(chats), val={name: str(chats)})
    code, said = litft("finetune", tiny_llama, f"--data.val={json.dumps({name: str(chats)})}", *OUT)
    assert code == 2 and not Path("run").exists(), said
    assert ChatData(str(chats), val={"gsm8k (v1.1)": str(chats)}).val_files


@pytest.mark.parametrize("name", ["../../../evil", "/tmp/evil", "a/../../../evil", "..", "a\0b", "a\nb", ""])
@pytest.mark.parametrize("verb", ["finetune", "generate"])
def test_names_of_chat_templates(verb: str, name: str, model: Path, litft: Any, tmp_path: Path) -> None:
    """Each but the first becomes a file of its own beside the result."""
    (model / "chat_template.jinja").unlink()
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "default", "template": CHATML}, {"name": name, "template": CHATML}]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    before = everything(tmp_path)
    code, said = litft(verb, model, *(OUT if verb == "finetune" else []))
    assert code == 2 and "has a chat template named" in said, said
    assert everything(tmp_path) == before


def test_good_names_of_chat_templates(model: Path, litft: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": CHATML, "rag-2.0": CHATML}
    tokenizer.save_pretrained(model)
    assert litft("finetune", model, *OUT)[0] == 0
    saved = sorted(p.name for p in Path("run/final/additional_chat_templates").iterdir())
    assert saved == ["rag-2.0.jinja", "tool_use.jinja"]


@pytest.mark.parametrize("name", ["../secret.safetensors", "ABSOLUTE", "a/../../secret.safetensors", "x\0.safetensors"])
@pytest.mark.parametrize("verb", ["finetune", "generate"])
def test_weight_maps_that_lead_out(verb: str, name: str, model: Path, litft: Any) -> None:
    secret = model.parent / "secret.safetensors"
    weights = load_file(model / "model.safetensors")
    save_file(weights, secret, {"format": "pt"})
    (model / "model.safetensors").unlink()
    (model / "a").mkdir()
    shard = str(secret) if name == "ABSOLUTE" else name
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, shard)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    code, said = litft(verb, model)
    assert code == 2 and "is no safetensors file beside it" in said, said
    if "\0" not in name:  # what would be read otherwise
        assert AutoModelForCausalLM.from_pretrained(model).state_dict().keys() >= weights.keys()


@pytest.mark.parametrize(
    "key", ["tokenizer_file", "vocab_file", "merges_file", "added_tokens_file", "chat_template_file"]
)
def test_file_names_in_a_tokenizer(key: str, model: Path, tmp_path: Path) -> None:
    """Neither read from elsewhere nor carried into the result."""
    secret = tmp_path / "secret.json"
    secret.write_text((model / "tokenizer.json").read_text().replace('"the"', '"SECRET"'))
    settings = json.loads((model / "tokenizer_config.json").read_text()) | {key: str(secret)}
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"fast_tokenizer_files": ["tokenizer.json"]}))
    tokenizer = load_tokenizer(resolve(model))
    assert (
        "SECRET" not in tokenizer.get_vocab() and tokenizer("the")["input_ids"] == tiny_tokenizer()("the")["input_ids"]
    )
    tokenizer.save_pretrained(tmp_path / "saved")
    assert not any(b"SECRET" in content for content in everything(tmp_path / "saved").values())  # type: ignore


@pytest.mark.parametrize("out", ["r\0n", "../out/r\0n"])
def test_a_run_folder_with_a_nul(out: str, tiny_llama: Path, litft: Any, elsewhere: Path) -> None:
    """A command line can't hold one; a file can."""
    Path("mine.yaml").write_text(json.dumps({"out": out}))
    code, said = litft("finetune", tiny_llama, "--config", "mine.yaml", "--trainer.max_steps", 1, dry=False)
    assert code == 2 and "cannot be written: embedded null byte" in said, said
    assert [p.name for p in elsewhere.iterdir()] == ["mine.yaml"]


# ---- links in the folder of a run that somebody else made


LINKS = ["run.json", "run.json.partial", "metrics.csv", "config.yaml", "config-until-step-2.yaml", "final"]
LINKS += ["checkpoints/last", "checkpoints/best", "checkpoints/step-000003", "checkpoints/.step-000003.partial"]
LINKS += ["checkpoints/step-000002"]


@pytest.mark.parametrize("name", LINKS)
def test_links_that_lead_out_of_a_run(name: str, done: Path, tmp_path: Path, litft: Any) -> None:
    run = Path(shutil.copytree(done, tmp_path / "run", symlinks=True))
    outside = tmp_path / "outside"
    outside.mkdir()
    link = run / name
    target = outside / link.name
    if link.is_symlink() or not link.exists():
        link.unlink(missing_ok=True)
        target.mkdir()
    else:
        shutil.move(link, target)  # what was there, so that it would be gone on with
    link.symlink_to(target)
    before = everything(outside)
    words = ["--out", run, "--resume", "--trainer.max_steps", 4, "--checkpoint.every_steps", 1]
    code, said = litft("finetune", None, *words)
    assert code == 2 and " is a link to " in said and "mend: remove" in said, said
    assert everything(outside) == before and link.is_symlink()


def test_checkpoints_on_a_larger_disk(done: Path, tmp_path: Path, litft: Any) -> None:
    """The one link that people make themselves."""
    run = Path(shutil.copytree(done, tmp_path / "run", symlinks=True))
    shutil.move(run / "checkpoints", tmp_path / "scratch")
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    code, said = litft("finetune", None, "--out", run, "--resume", "--trainer.max_steps", 3)
    assert code == 0 and "going on from step 2" in said, said
    assert (tmp_path / "scratch" / "last").resolve().name == "step-000003"


# ---- archives


def make_tar(file: Path) -> None:
    kind = "w:gz" if file.name.endswith("gz") else "w"
    with tarfile.open(file, kind) as archive:
        for name in ("../escaped", "/tmp/litft-escaped", "config.json", "rows.jsonl"):
            entry = tarfile.TarInfo(name)
            entry.size = 2
            archive.addfile(entry, io.BytesIO(b"{}"))


def make_zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        for name in ("../escaped", "/tmp/litft-escaped", "config.json", "rows.jsonl"):
            archive.writestr(name, "{}")


@pytest.mark.parametrize(
    "name", ["x.tar", "x.tar.gz", "x.tgz", "x.zip", "x.jsonl.zip", "x.jsonl.tar", "x.jsonl", "x.parquet"]
)
def test_archives(name: str, tiny_llama: Path, elsewhere: Path, tmp_path: Path, litft: Any) -> None:
    """As data and as model: refused, or read as the bytes they are; nothing is written beside them."""
    make = make_zip if "zip" in name or name == "x.parquet" else make_tar
    make(elsewhere / name)
    before = everything(tmp_path)
    code, said = litft("data", "check", name)
    unknown = name not in ("x.jsonl", "x.parquet")
    assert code == 2 and ("unknown file type" in said) == unknown, said
    assert litft("finetune", tiny_llama, "--data", name)[0] == 2
    for verb in ("finetune", "generate"):
        code, said = litft(verb, f"./{name}")
        assert code == 2 and "is a file\nname the folder that holds the model" in said, said
    assert everything(tmp_path) == before and not Path("/tmp/litft-escaped").exists()


def test_a_folder_of_archives(tiny_llama: Path, elsewhere: Path, litft: Any) -> None:
    (elsewhere / "data").mkdir()
    make_tar(elsewhere / "data" / "rows.tar.gz")
    make_zip(elsewhere / "data" / "rows.zip")
    assert "holds no data files" in litft("data", "check", "data")[1]
    (elsewhere / "model").mkdir()
    make_zip(elsewhere / "model" / "model.zip")
    assert "holds no model" in litft("generate", "./model")[1]
    assert sorted(p.name for p in elsewhere.rglob("*")) == ["data", "model", "model.zip", "rows.tar.gz", "rows.zip"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_data_is_streamed(suffix: str, elsewhere: Path) -> None:
    """60 MB of text in some kB."""
    line = json.dumps(chat_rows(1)[0]).encode() + b" " * 40_000 + b"\n"
    pack = gzip.compress if suffix == ".gz" else zstandard.compress
    file = elsewhere / f"rows.jsonl{suffix}"
    file.write_bytes(pack(line * 1500))
    assert file.stat().st_size < 1e6
    tracemalloc.start()
    assert sum(1 for row in read_rows(str(file)) if row.error is None) == 1500
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6, peak
    assert [p.name for p in elsewhere.iterdir()] == [file.name]


# ---- permissions


@pytest.mark.parametrize(("umask", "tuner"), [(0o022, "lora"), (0o027, "full"), (0o077, "lora")])
def test_files_follow_the_umask(
    umask: int, tuner: str, model: Path, litft: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITFT_CACHE", str(tmp_path / "cache"))
    os.umask(umask)
    code, said = litft("finetune", model, *OUT, tuner=tuner)
    assert code == 0, said
    rows = ["--data", "rows.jsonl", "--out", "answers.jsonl"]
    Path("rows.jsonl").write_text(json.dumps(chat_rows(1)[0]))
    assert litft("generate", "run", *rows)[0] == 0
    made = [Path("answers.jsonl"), Path("run"), *Path("run").rglob("*"), *(tmp_path / "cache").rglob("*")]
    names = {path.name for path in made}
    weights = "adapter_model.safetensors" if tuner == "lora" else "model.safetensors"
    assert names >= {weights, "tokenizer.json", "config.yaml", "run.json", "metrics.csv", "state.ckpt", "ids.npy"}
    for path in made:
        if path.is_symlink() or path.suffix == ".so":  # compilers make programs
            continue
        wanted = (0o777 if path.is_dir() else 0o666) & ~umask
        assert path.stat().st_mode & 0o777 == wanted, f"{path}: {path.stat().st_mode:o}"


def test_an_adapter_that_a_tuner_saves(tiny_llama: Path, tmp_path: Path) -> None:
    from litft import SFT, LoRA

    os.umask(0o027)
    sft = SFT(str(tiny_llama), tuner=LoRA(r=2)).build()
    sft.tuner.save(sft.net.model, tmp_path / "adapter", str(tiny_llama))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()}
    assert modes == dict.fromkeys(("adapter_config.json", "adapter_model.safetensors"), 0o640)
    assert np.isfinite(load_file(tmp_path / "adapter" / "adapter_model.safetensors").popitem()[1].numpy()).all()
