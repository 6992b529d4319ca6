"""What may and may not differ between a run and the command that goes on with it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import assert_same_run, last, metrics, resave, start
from tiny import chat_rows, save_tiny, write_jsonl

from litft.engine.checkpoint_files import newest
from litft.engine.identity import PARTS, parse_allowed
from litft.errors import UserError


@pytest.fixture
def model(tmp_path: Path, tiny_llama: Path) -> Path:
    return shutil.copytree(tiny_llama, tmp_path / "model")


def other_data(folder: Path, options: dict[str, Any]) -> None:
    options["data"] = write_jsonl(folder / "other.jsonl", chat_rows(36, seed=1))


def other_seed(folder: Path, options: dict[str, Any]) -> None:
    options["seed"] = 7


def other_limit(folder: Path, options: dict[str, Any]) -> None:
    options["tokens_per_step"] = 200


def other_tokenizer(folder: Path, options: dict[str, Any]) -> None:
    path = options["model"] / "tokenizer.json"
    settings = json.loads(path.read_text())
    token = {"id": 90_000, "content": "<extra>", "single_word": False, "lstrip": False, "rstrip": False}
    settings["added_tokens"].append(token | {"normalized": False, "special": True})
    settings["added_tokens"][-1]["id"] = max(t["id"] for t in settings["added_tokens"][:-1]) + 1
    path.write_text(json.dumps(settings))


def other_template(folder: Path, options: dict[str, Any]) -> None:
    path = options["model"] / "chat_template.jinja"
    path.write_text(path.read_text() + "{# changed #}")


def other_model(folder: Path, options: dict[str, Any]) -> None:
    save_tiny(folder / "again", seed=5)
    for file in (folder / "again").glob("*.safetensors"):
        shutil.copy(file, options["model"] / file.name)


def other_tuner(folder: Path, options: dict[str, Any]) -> None:
    options["tuner"] = "qlora"


def other_loss(folder: Path, options: dict[str, Any]) -> None:
    options["neftune"] = 5.0


CHANGES: dict[str, tuple[Callable[[Path, dict[str, Any]], None], str]] = {
    "rows": (other_data, "data"),
    "seed": (other_seed, "data"),
    "tokens_per_step": (other_limit, "data"),
    "tokenizer": (other_tokenizer, "tokenizer"),
    "template": (other_template, "template"),
    "weights": (other_model, "model"),
    "tuner": (other_tuner, "tuner"),
    "loss": (other_loss, "method"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_refused_by_name_and_can_be_allowed(
    change: str, tmp_path: Path, model: Path, chats: Path
) -> None:
    options: dict[str, Any] = {"model": model, "data": chats, "steps": 5}
    start(tmp_path / "a", stop_at=3, **options)
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    make, part = CHANGES[change]
    make(tmp_path, options)
    with pytest.raises(UserError) as refused:
        start(tmp_path / "a", resume=True, **options)
    said = str(refused.value)
    found = re.findall(r"(\w+) \((\w{12}) then, (\w{12}) now\)", said)
    assert [name for name, *_ in found] == [part] and found[0][1] != found[0][2]
    assert f"--allow_changed {part}" in said and len(said.splitlines()) <= 5
    assert {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()} == before
    others = tuple(p for p in PARTS if p != part)
    with pytest.raises(UserError, match=f"{part} "):
        start(tmp_path / "a", resume=True, allow_changed=others, **options)
    trace, *_ = start(tmp_path / "a", resume=True, allow_changed=(part,), **options)
    assert sorted(trace.rows) == [3, 4]
    assert [int(row["step"]) for row in metrics(tmp_path / "a")] == list(range(6))


def test_a_moved_model_and_moved_data_are_the_same(tmp_path: Path, model: Path, chats: Path) -> None:
    start(tmp_path / "a", model, chats, steps=5)
    start(tmp_path / "b", model, chats, steps=5, stop_at=3)
    moved = shutil.move(model, tmp_path / "elsewhere")
    rows = shutil.copy(chats, tmp_path / "renamed.jsonl")
    start(tmp_path / "b", Path(moved), Path(rows), steps=5, resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_another_cut_goes_on_with_the_same_rows(tmp_path: Path, model: Path, chats: Path) -> None:
    straight, *_ = start(tmp_path / "a", model, chats, steps=6, tokens_per_step=400)
    start(tmp_path / "b", model, chats, steps=6, tokens_per_step=400, stop_at=3)
    trace, *_ = start(tmp_path / "b", model, chats, steps=6, tokens_per_step=400, tokens_per_batch=200, resume=True)
    assert {s: sorted(r) for s, r in trace.rows.items()} == {s: sorted(straight.rows[s]) for s in (3, 4, 5)}
    assert {s: trace.lrs[s] for s in (3, 4, 5)} == {s: straight.lrs[s] for s in (3, 4, 5)}


def test_what_happens_to_the_schedule_is_said(
    tmp_path: Path, model: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path / "a", model, chats, steps=4, lr=1e-3, warmup=0)
    capsys.readouterr()
    start(tmp_path / "a", model, chats, steps=4, lr=1e-3, warmup=0, resume=True)
    assert "schedule:" not in capsys.readouterr().out
    trace, *_ = start(tmp_path / "a", model, chats, steps=8, lr=2e-3, warmup=0, resume=True)
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("schedule:")]
    assert line == "schedule: steps 4 -> 8, lr 0.001 -> 0.002; step 5 has lr 0.001 (was to be 0)"
    assert trace.lrs[4] == pytest.approx(1e-3)


def test_the_words_of_allow_changed() -> None:
    assert parse_allowed(None) == [] and parse_allowed("data, model") == ["data", "model"]
    with pytest.raises(
        UserError, match="--allow_changed weights: is none of data, tokenizer, template, model, method, tuner"
    ):
        parse_allowed("weights")


def test_a_checkpoint_of_an_earlier_version_is_named_as_such(tmp_path: Path, model: Path, chats: Path) -> None:
    start(tmp_path / "a", model, chats, steps=4, stop_at=2)
    state, file = last(tmp_path / "a"), newest(tmp_path / "a" / "checkpoints")
    assert file is not None
    state["litft"] = {"random_state": [], "fingerprint": "abc", "optimizer": "adamw"}
    resave(state, file)
    with pytest.raises(UserError, match="made by an earlier version of litft"):
        start(tmp_path / "a", model, chats, steps=4, resume=True)
