"""The pages on preference methods: their commands and scripts as printed, on a tiny model."""

from __future__ import annotations

import json
import re
import sys

import pytest
from test_tutorials import ROOT, Shell, blocks


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    made = Shell(tmp_path_factory.mktemp("preferences"))
    more = f"--model {made.folder / 'model'}"
    run = f"{sys.executable} -m litft"
    made.script(
        "litft",
        f'case $1 in finetune) exec {run} "$@" {more} $MORE;; data) exec {run} "$@" {more};; *) exec {run} "$@";; esac',
    )
    return made


@pytest.mark.slow
def test_every_command_of_the_page(shell: Shell) -> None:
    """In one process each, as long as the page has them in that order."""
    commands = [line for block in blocks("bash", "preferences") for line in block.strip().splitlines()]
    assert len(commands) == 13
    for command in commands:
        code, said = shell.run(command)
        assert code == 0, f"{command}\n{said}"
    rows = (shell.folder / "scores.jsonl").read_text().splitlines()
    assert len(rows) == 28 and {"chosen_score", "rejected_score"} <= json.loads(rows[0]).keys()
    header = (shell.folder / "runs" / "dpo" / "metrics.csv").read_text().splitlines()[0]
    assert "rewards/accuracies" in header and "val_rewards/margins" in header


def test_the_rows_of_the_page_are_good(shell: Shell) -> None:
    (shell.folder / "shown.jsonl").write_text(blocks("json", "preferences")[0])
    code, said = shell.run("litft data check shown.jsonl")
    assert code == 0 and "1 preference row" in said, said


def test_a_method_of_ones_own(shell: Shell) -> None:
    text = (ROOT / "tutorials" / "add-a-method.md").read_text()
    files = dict(re.findall(r"```python (\w+\.py)\n(.*?)```", text, re.S))
    assert sorted(files) == ["losses.py", "method.py", "train.py"]
    assert sum(len(files[name].splitlines()) for name in ("losses.py", "method.py")) < 30
    script = files["train.py"].replace('"smollm2-135m-instruct"', repr(str(shell.folder / "model")))
    for name, content in (files | {"train.py": script.replace("max_epochs=1", "max_steps=3, max_epochs=1")}).items():
        (shell.folder / name).write_text(content)
    code, said = shell.run(f"PYTHONPATH={ROOT}:. {sys.executable} train.py")
    assert code == 0 and (shell.folder / "unlikely" / "adapter_config.json").is_file(), said
