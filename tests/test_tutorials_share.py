"""The commands of tutorials/report.md, push.md and doctor.md, as printed but for the model (tiny) and the steps."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest
from fake_hub import TOKEN, FakeHub, running
from test_tutorials import ROOT, Shell, blocks
from tiny import save_tiny

from litft.cli.main import main
from litft.models.alias import HUB_ID


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """Only `litft finetune` is given a model, which has the default one's name."""
    shell = Shell(tmp_path_factory.mktemp("share"))
    model = save_tiny(shell.folder / "smollm2-135m-instruct")
    tiny = f"--model {model} $MORE"
    shell.script("litft", f'[ "$1" = finetune ] && set -- "$@" {tiny}\nexec {sys.executable} -m litft "$@"')
    return shell


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with running() as hub:
        yield hub


def commands(page: str) -> list[str]:
    return "".join(blocks("bash", page)).strip().splitlines()


@pytest.mark.slow
def test_report(shell: Shell) -> None:
    train, again, other, both = commands("report")
    code, said = shell.run(f"{train} && {again}")
    assert code == 0 and said.endswith("runs/mine/report.html\n"), said
    code, said = shell.run(f"{other} && {both}")
    assert code == 0 and said.endswith("compare.html\n"), said
    assert "2 runs side by side" in (shell.folder / "compare.html").read_text()


@pytest.mark.slow
def test_push(shell: Shell, hub: FakeHub) -> None:
    env = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "", "HF_HUB_DISABLE_XET": "1"}
    train, look, adapter, merge, model = commands("push")
    if not (shell.folder / "runs" / "mine").exists():
        assert shell.run(train)[0] == 0
    code, said = shell.run(look, **env)
    assert code == 0 and "adapter_model.safetensors" in said.split() and not hub.asked, said
    for command, repo, private in ((adapter, "me/my-adapter", True), (f"{merge} && {model}", "me/my-model", False)):
        code, said = shell.run(command, **env)
        assert code == 0 and said.endswith(f"{hub.url}/{repo}\n"), said
        assert hub.private[repo] is private
    config = json.loads(hub.files["me/my-adapter", "main"]["adapter_config.json"])
    assert config["base_model_name_or_path"] == HUB_ID and hub.messages[-1] == "First version"


@pytest.mark.slow
def test_doctor(shell: Shell) -> None:
    look, keep = commands("doctor")
    code, said = shell.run(look)
    assert code == 0 and "litft can train here\n" in said, said
    code, said = shell.run(keep)
    assert code == 0 and json.loads((shell.folder / "machine.json").read_text())["can_train"], said


def test_the_flags_that_the_pages_name_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("push", "report", "doctor"):
        text = (ROOT / "tutorials" / f"{verb}.md").read_text()
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        shown = capsys.readouterr().out
        named = [word.strip("`.,;)") for word in text.split() if word.startswith("`--")]
        assert all(flag in shown for flag in named), (verb, named)
