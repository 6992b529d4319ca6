"""`litft push` against a hub on this machine: what arrives there, and what is refused before anything does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub, running
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from tiny import save_tiny, tiny_model, tiny_tokenizer

from litft.errors import UserError
from litft.export.card import Base, Training, model_card
from litft.export.push import prepare


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running() as hub:
        yield hub


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an adapter in its final/, by PEFT, and a whole model."""
    folder = tmp_path_factory.mktemp("made")
    base = save_tiny(folder / "base")
    final = folder / "run" / "final"
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(final)
    tiny_tokenizer().save_pretrained(final)
    training = Training("SFT", "lora", losses_after={"val_loss": 1.0})
    (final / "README.md").write_text(model_card(final, Base("base"), training))
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made / "run", tmp_path / "run"))


def push(hub: FakeHub | None, *words: object, token: str | None = TOKEN, **more: str) -> tuple[int, str, str]:
    env = {key: value for key, value in os.environ.items() if key not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    env |= {"HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    env |= {"HF_HUB_DISABLE_XET": "1", **more}  # Xet has a protocol of its own; the hub takes both
    env |= {"HF_TOKEN": token} if token else {}
    command = [sys.executable, "-m", "litft", "push", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_a_run_arrives_whole_with_the_hubs_names(hub: FakeHub, run: Path) -> None:
    code, out, err = push(hub, run, "--repo", "mine", "--base", "org/tiny", "--message", "first")
    assert (code, out) == (0, f"{hub.url}/me/mine\n"), err
    assert hub.private == {"me/mine": True} and hub.messages == ["first"]  # nobody said that it may be public
    there, final = hub.files["me/mine", "main"], run / "final"
    assert sorted(there) == sorted(file.name for file in final.iterdir())
    same = [name for name in there if there[name] == (final / name).read_bytes()]
    assert set(there) - set(same) == {"README.md", "adapter_config.json"}
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == "org/tiny"
    card = ModelCard(there["README.md"].decode())
    assert card.data.base_model == "org/tiny" and 'name = "me/mine"' in card.text
    assert 'litft generate me/mine --prompt "Hello"' in card.text
    assert "vllm serve org/tiny --enable-lora --max-lora-rank 8 --lora-modules tuned=me/mine" in card.text
    assert str(run.parent) not in json.dumps({name: data.decode(errors="replace") for name, data in there.items()})
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"].startswith("/")


def test_a_model_without_a_card_gets_one_on_a_branch_of_a_public_repository(hub: FakeHub, made: Path) -> None:
    words = (made / "base", "--repo", "me/whole", "--private", "false", "--revision", "v1")
    code, out, err = push(hub, *words)
    assert (code, out) == (0, f"{hub.url}/me/whole/tree/v1\n"), err
    assert hub.private == {"me/whole": False} and hub.files["me/whole", "main"] == {}
    card = ModelCard(hub.files["me/whole", "v1"]["README.md"].decode())
    assert card.data.library_name == "transformers" and "vllm serve me/whole" in card.text
    assert not (made / "base" / "README.md").exists()
    assert push(hub, *words)[0] == 0 and len(hub.messages) == 2  # again, into what is there


def test_what_is_public_is_not_taken_for_private(hub: FakeHub, run: Path) -> None:
    hub.private["me/mine"], hub.files["me/mine", "main"] = False, {}
    code, out, err = push(hub, run, "--repo", "me/mine", "--base", "org/tiny", "--private", "true")
    assert (code, out) == (2, "") and "is there, and public" in err and not hub.messages


@pytest.mark.parametrize(
    ("path", "status", "code", "said"),
    [
        ("whoami", 401, 2, "hf auth login"),
        ("create", 403, 2, "may not write there"),
        ("commit", 403, 2, "may not write there"),
        ("preupload", 404, 2, "no such owner or repository"),
        ("commit", 500, 1, "the hub failed (500)"),
        ("blob", 400, 1, "(400)"),
    ],
)
def test_a_hub_that_refuses_is_explained(hub: FakeHub, run: Path, path: str, status: int, code: int, said: str) -> None:
    hub.fail = (path, status)
    found, out, err = push(hub, run, "--repo", "me/mine", "--base", "org/tiny")
    assert (found, out) == (code, "") and said in err, err
    assert err.count("\n") <= 7 and TOKEN not in err and "Traceback" not in err
    assert not hub.messages


def test_others_repositories_log_ins_and_networks(hub: FakeHub, run: Path) -> None:
    words = (run, "--base", "org/tiny", "--repo")
    assert "may not write there" in push(hub, *words, "others/mine")[2]
    for token in (None, "hf_" + "wrong" * 8):
        code, _, err = push(hub, *words, "me/mine", token=token)
        assert code == 2 and "hf auth login" in err
    code, _, err = push(None, *words, "me/mine")
    assert code == 1 and "can't be reached" in err and err.count("\n") <= 5
    code, _, err = push(hub, *words, "me/mine", HF_HUB_OFFLINE="1")
    assert code == 2 and "HF_HUB_OFFLINE" in err
    assert "no name of a repository" in push(hub, *words, "a/b/c")[2]


def test_a_dry_run_asks_nobody(hub: FakeHub, run: Path) -> None:
    code, out, _ = push(hub, run, "--repo", "me/mine", "--base", "org/tiny", "--dry_run")
    assert code == 0 and out.split() == sorted(file.name for file in (run / "final").iterdir()) and not hub.asked
    code, _, err = push(hub, run, "--repo", "no name!", "--base", "org/tiny", "--dry_run")
    assert code == 2 and "is no name of a repository" in err


# ---- what is refused before anything leaves


def refused(folder: Path, base: str | None = "org/tiny") -> str:
    with pytest.raises(UserError) as error:
        prepare(folder, "me/mine", base)
    assert str(error.value).count("\n") < 5
    return str(error.value)


def test_an_adapter_to_a_folder_of_this_machine(run: Path) -> None:
    assert "--base OWNER/NAME" in refused(run, None)
    assert "no id of a model" in refused(run, "tiny")


@pytest.mark.parametrize(
    ("named", "known"),
    [
        ("/home/a/.cache/litft/models/smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        (f"/x/hub/models--org--name/snapshots/{'b' * 40}", "org/name"),
        ("org/name", "org/name"),
    ],
)
def test_bases_that_the_hub_knows_by_another_name(run: Path, named: str, known: str) -> None:
    config = run / "final" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": named}))
    upload = prepare(run, "me/mine")
    text = upload.rewritten.get("adapter_config.json", config.read_text())
    assert json.loads(text)["base_model_name_or_path"] == known
    assert json.loads(text).get("revision") == ("b" * 40 if "snapshots" in named else None)
    assert bool(upload.notes) == (named != known)


@pytest.mark.parametrize("name", ["optimizer.pt", "pytorch_model.bin", "deep/data.pkl"])
def test_pickles(run: Path, name: str) -> None:
    file = run / "final" / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"\x80\x04.")
    assert "is a pickle" in refused(run) and file.name in refused(run)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", f"---\nlicense: mit\n---\nuse {TOKEN}\n"),
        ("notes.txt", "line\napi_key = abcdefgh12345678\n"),
        ("tokenizer.json", json.dumps({"model": TOKEN})),
        ("log.csv", f"step,{TOKEN}\n"),
        ("generation_config.json", json.dumps({"url": "https://me:password1@example.org/x"})),
    ],
)
def test_tokens_and_passwords(run: Path, name: str, text: str) -> None:
    (run / "final" / name).write_text(text)
    said = refused(run)
    assert (
        f"{name}:{3 if 'md' in name or 'txt' in name else 1}".rpartition(":")[0] in said
        and "token or a password" in said
    )
    assert TOKEN not in said and "password1" not in said


def test_the_value_of_a_secret_in_the_environment(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PASSWORD", "correct-horse")
    (run / "final" / "notes.txt").write_text("it is correct-horse\n")
    assert "notes.txt:1" in refused(run)


def test_words_of_a_vocabulary_are_no_passwords(run: Path) -> None:
    file = run / "final" / "vocab.json"
    file.write_text(json.dumps({"password": 17000, "token": 123456, "api_key": 99999999}))
    assert "vocab.json" in [path.name for path in prepare(run, "me/mine", "org/tiny").files]


def test_a_card_may_show_how_a_server_is_asked(run: Path) -> None:
    card = run / "final" / "README.md"
    card.write_text(card.read_text() + '\n```python\nclient = OpenAI(api_key="not-needed-here")\n```\n')
    assert 'api_key="not-needed-here"' in prepare(run, "me/mine", "org/tiny").rewritten["README.md"]


def test_json_that_is_none(run: Path) -> None:
    (run / "final" / "extra.json").write_text("{")
    assert "is no JSON" in refused(run)


def test_paths_of_this_machine_in_words(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = run / "final" / "README.md"
    text = card.read_text()
    for path in ("/home/somebody/rows.jsonl", str((run / "final").resolve() / "x")):
        monkeypatch.setenv("HOME", "/home/somebody")
        card.write_text(f"{text}\ntrained on {path}\n")
        assert "README.md:" in (said := refused(run)) and "names a path of this machine" in said
    card.write_text(f"{text}\nanswers may name /home/anybody/else\n")
    assert prepare(run, "me/mine", "org/tiny").files


def test_paths_of_this_machine(run: Path) -> None:
    file = run / "final" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"name_or_path": "/home/me/models/secret"}))
    assert "name_or_path is a path of this machine" in refused(run)


def test_links_out_of_the_folder_and_hidden_files(run: Path, tmp_path: Path) -> None:
    (run / "final" / ".env").write_text(TOKEN)
    assert ".env" not in [file.name for file in prepare(run, "me/mine", "org/tiny").files]
    (tmp_path / "diary.txt").write_text("dear diary")
    (run / "final" / "notes.txt").symlink_to(tmp_path / "diary.txt")
    assert "link out of the folder" in refused(run)


def test_folders_that_hold_no_model(tmp_path: Path, made: Path) -> None:
    assert "is no folder" in refused(tmp_path / "none")
    assert "holds no model" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "no weights" in refused(tmp_path)
    assert "needs no base" in refused(made / "base")
    card = Path(shutil.copytree(made / "base", tmp_path / "copy")) / "README.md"
    card.write_text("# mine\n")
    assert "front matter" in refused(card.parent, None)
