"""Tokens and passwords stay out of what a run writes and says."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from litft.engine.secrets import HIDDEN, hide, hide_yaml

HUB = "hf_" + "aB3dE5fG7h" * 3 + "JkLm"
WANDB = "0123456789abcdef" * 2 + "01234567"
ENVIRONMENT = {
    "HF_TOKEN": HUB,
    "HUGGING_FACE_HUB_TOKEN": "an-older-hub-token",
    "WANDB_API_KEY": WANDB,
    "MLFLOW_TRACKING_PASSWORD": "correct horse battery",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/bPxRfiCY",
    "MY_CREDENTIALS": "credentials-of-mine",
}
LOGGER = """
from lightning.pytorch.loggers import CSVLogger

class Logger(CSVLogger):
    given = {}

    def __init__(self, api_key: str = "", password: str = "", url: str = "", note: str = "", options: dict = {}):
        super().__init__("elsewhere")
        Logger.given.update(api_key=api_key, password=password, url=url, note=note, options=options)
"""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A logger that wants secrets, installed."""
    import sys

    sys.modules.pop("keyed", None)
    (tmp_path / "keyed.py").write_text(LOGGER)
    monkeypatch.syspath_prepend(str(tmp_path))
    import keyed

    return keyed.Logger


# ---- a run


def test_a_run_that_is_given_secrets(
    model: Path, litft: Any, logger: Any, environment: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    address = "https://user:pa55word@tracking.example/x?token=t0ken-in-url&y=1"
    note = f"wandb {WANDB} and hub {HUB}"
    words = ["--trainer.logger", "keyed.Logger", "--trainer.logger.api_key", "k3y", "--trainer.logger.password=p4ss"]
    words += ["--trainer.logger.url", address, "--trainer.logger.note", note]
    words += ["--trainer.logger.options", json.dumps({"auth_token": "7ok", "deep": {"secret": "5ecret", "n": 1}})]
    code, said = litft("finetune", model, *words, "--out", "run", "--trainer.max_steps", 2)
    assert code == 0, said
    secrets = [*ENVIRONMENT.values(), "k3y", "p4ss", "pa55word", "t0ken-in-url", "7ok", "5ecret"]
    given = str(logger.given)
    assert all(secret in given for secret in ("k3y", "p4ss", "pa55word", "t0ken-in-url", "7ok", "5ecret", HUB, WANDB))
    files = [path for path in (*Path("run").rglob("*"), *Path("elsewhere").rglob("*")) if path.is_file()]
    assert {"config.yaml", "run.json", "metrics.csv", "state.ckpt", "adapter_config.json"} <= {p.name for p in files}
    for secret in secrets:
        assert [str(path) for path in files if secret.encode() in path.read_bytes()] == [], secret
        assert secret not in said and secret not in caplog.text
    run = json.loads(Path("run/run.json").read_text())
    assert run["command"].count(HIDDEN) == 1 and f"--trainer.logger.password={HIDDEN}" in run["command"]
    logged = yaml.safe_load(Path("run/config.yaml").read_text())["trainer"]["logger"]["init_args"]
    assert logged["api_key"] == logged["password"] == HIDDEN and logged["note"] == f"wandb {HIDDEN} and hub {HIDDEN}"
    assert logged["url"] == f"https://{HIDDEN}@tracking.example/x?token={HIDDEN}&y=1"
    assert logged["options"] == {"auth_token": HIDDEN, "deep": {"secret": HIDDEN, "n": 1}}


def test_what_was_hidden_has_to_be_said_again(model: Path, litft: Any, logger: Any) -> None:
    words = ["--trainer.logger", "keyed.Logger", "--trainer.logger.api_key", "k3y"]
    assert litft("finetune", model, *words, "--out", "run", "--trainer.max_steps", 1)[0] == 0
    code, said = litft("finetune", None, "--config", "run/config.yaml")
    assert code == 2 and said.startswith("error: run/config.yaml:") and "a secret was left out" in said, said
    assert litft("finetune", None, "--out", "run", "--resume")[0] == 2
    code, said = litft("finetune", None, "--config", "run/config.yaml", "--trainer.logger.init_args.api_key", "again")
    assert code == 0 and logger.given["api_key"] == "again", said


def test_the_configuration_of_a_run_without_secrets(
    model: Path, litft: Any, environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Byte for byte what the parser wrote, and it runs again."""
    import litft.cli.finetune as module

    dumped: list[str] = []

    def note(text: str) -> str:
        dumped.append(text)
        return hide_yaml(text)

    monkeypatch.setattr(module, "hide_yaml", note)
    words = ["--model.lr", "1e-4", "--data.val_fraction", "0.25", "--samples.prompts", "tokens: 5", "key: value"]
    assert litft("finetune", model, *words, "--out", "run", "--trainer.max_steps", 1)[0] == 0
    assert Path("run/config.yaml").read_bytes() == dumped[0].encode()
    assert HIDDEN not in Path("run/run.json").read_text() + dumped[0]
    code, said = litft("finetune", None, "--config", "run/config.yaml")
    assert code == 0 and "steps of up to" in said, said


@pytest.mark.parametrize("flag", ["--data", "--model", "--data.chat_template", "--config"])
def test_errors(flag: str, model: Path, litft: Any, environment: None) -> None:
    value = f"https://user:pa55word@host/{HUB}/x.jsonl"
    code, said = litft("finetune", None if flag == "--model" else model, flag, value)
    assert code == 2 and "https://" in said, said
    assert "pa55word" not in said and HUB not in said and HIDDEN in said, said


def test_failures(litft: Any, environment: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Path:
        raise RuntimeError(f"cannot log in with {WANDB}")

    monkeypatch.setattr("litft.cli.config.find_config", fail)
    code, said = litft("config", None, "show", "x")
    assert code == 1 and f"cannot log in with {HIDDEN}" in said and WANDB not in said


# ---- what is a secret


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("https://me:pw@host/a", f"https://{HIDDEN}@host/a"),
        ("https://me:p@w@host/a", f"https://{HIDDEN}@host/a"),
        ("ssh://token@host:22/a", f"ssh://{HIDDEN}@host:22/a"),
        ("https://host/a?x=1&api_key=abc&y", f"https://host/a?x=1&api_key={HIDDEN}&y"),
        (f"x {HUB}.", f"x {HIDDEN}."),
        ("ghp_" + "a1" * 18, HIDDEN),
        ("--a.api_key=abc", f"--a.api_key={HIDDEN}"),
        ("WANDB_API_KEY=abc litft", f"WANDB_API_KEY={HIDDEN} litft"),
        ("{'password': 'a b', \"token\": \"c\"}", f"{{'password': '{HIDDEN}', \"token\": \"{HIDDEN}\"}}"),
        (["--a.token", "abc", "--b", "c"], ["--a.token", HIDDEN, "--b", "c"]),
        (
            {"apiKey": "abc", "secret": 5, "x": ["--password", "p"]},
            {"apiKey": HIDDEN, "secret": HIDDEN, "x": ["--password", HIDDEN]},
        ),
    ],
)
def test_secrets(given: Any, left: Any) -> None:
    assert hide(given) == left


@pytest.mark.parametrize(
    "text",
    [
        "tokens: 5, trained_tokens: 3, tokens_per_step: 16384, max_new_tokens=4, add_tokens: true, eos_token: </s>",
        "https://host/a/b.jsonl, s3://bucket/key, git@host:a/b, ssh://git@host/a, me@example.org, runs/hf_lora/x.jsonl",
        "hf_conversations.jsonl  keyboard: us  monkey=1  key: value  secretary: Bob",
        "api_key: null\npassword: ''\ntoken: false\n",
        "Qwen/Qwen3-0.6B at 0123456789012345678901234567890123456789",
    ],
)
def test_no_secrets(text: str) -> None:
    assert hide(text) == text
    assert hide({"tokens": 5, "tokenizer": "x", "text": text, "token": None}) == {
        "tokens": 5,
        "tokenizer": "x",
        "text": text,
        "token": None,
    }


@pytest.mark.parametrize(
    ("name", "value", "hidden"),
    [
        ("HF_TOKEN", "12345678", True),
        ("HF_TOKEN", "1234567", False),  # too short to be told from other text
        ("TOKENIZERS_PARALLELISM", "false", False),
        ("HF_TOKEN_PATH", os.getcwd(), False),  # where a token lies is no secret
        ("SOME_PASSWORD", "longer than eight", True),
        ("EDITOR", "longer than eight", False),
        ("MODEL_KEY", "constant", False),  # a key of another kind, and a word that config.yaml needs
        ("MODEL_APIKEY", "k0nstantly", True),
        ("TOKENIZER_NAME", "org/model-0.5B", False),
    ],
)
def test_values_of_the_environment(name: str, value: str, hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert (hide(f"a {value} b") == f"a {HIDDEN} b") == hidden


def test_yaml_without_secrets_stays_as_it_is() -> None:
    text = "# a comment\na:   1e-5\nb: [1,  2]\nc: 'x'\nnan: .nan\ntokens_per_step: 5\napi_key: null\n"
    assert hide_yaml(text) is text
    hidden = yaml.safe_load(hide_yaml("lr: 1.0e-05\napi_key: 'a\n\n  b'\nlist:\n- password: x\n- y\n"))
    assert hidden == {"lr": 1e-05, "api_key": HIDDEN, "list": [{"password": HIDDEN}, "y"]}
