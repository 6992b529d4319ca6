"""What the README says is so."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from tests.tiny import chat_rows, save_tiny

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_two_commands_are_the_first_block_and_what_ci_runs():
    first, second = blocks("bash")[0].strip().splitlines()
    assert first == "pip install -e . && litft finetune lora --data tutorials/data/quickstart.jsonl"
    assert second == "pip install -e '.[test]' && pytest"
    assert "## Two commands" in (ROOT / ".ci" / "run").read_text()


def test_the_trainer_script_runs_and_is_short(tmp_path):
    (script,) = blocks("python")
    assert len(script.strip().splitlines()) < 12
    save_tiny(tmp_path / "model", "llama")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows(24, 0)))
    script = script.replace("smollm2-135m-instruct", str(tmp_path / "model"))
    script = script.replace("tutorials/data/quickstart.jsonl", str(tmp_path / "rows.jsonl"))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
    metrics = next(tmp_path.glob("lightning_logs/*/metrics.csv")).read_text()
    assert "trained_tokens_per_s" in metrics


def test_every_flag_it_shows_is_a_flag():
    from litft.cli.main import VERBS

    for line in "\n".join(blocks("bash")).splitlines():
        for command in re.findall(r"litft (\w+)", line):
            assert command in VERBS, line
