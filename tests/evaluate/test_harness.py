"""Tasks of lm-eval, from local files, against what transformers says of the same choices."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from litft.cli.main import main

TASK = """
task: rain
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
WORDS = ["sleeps", "runs", "falls", "sings", "wind", "fire", "light", "song", "tree", "bird", "stone", "line"]
ROWS = [
    {"question": f"what {word} in the old river?", "choices": [" the moon", f" a {word}"], "label": i % 2}
    for i, word in enumerate(WORDS)
]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rain.yaml").write_text(TASK.format(file=folder / "rain.jsonl"))
    (folder / "rain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def plain(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def right(model: Any, tokenizer: Any, row: dict[str, Any], chat: bool) -> bool:
    """Whether the model finds the right choice likeliest."""
    prompt = f"Question: {row['question']}\nAnswer:"
    if chat:
        messages = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    start, likely = len(tokenizer(prompt)["input_ids"]), []
    for choice in row["choices"]:
        ids = torch.tensor([tokenizer(prompt + choice)["input_ids"]])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        likely.append(sum(float(log_p[at - 1, ids[0, at]]) for at in range(start, ids.shape[1])))
    return likely.index(max(likely)) == row["label"]


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_a_local_task_is_answered_as_transformers_would(tasks: Path, tmp_path: Path, chat: bool) -> None:
    models = [save_tiny(tmp_path / name, seed=seed) for name, seed in (("mine", 5), ("other", 6))]
    words = ["--tasks", "rain", "--include_path", tasks, "--num_fewshot", 0, "--baseline", models[1], "--out", "found"]
    assert main(["evaluate", *(str(w) for w in (models[0], *words, *["--apply_chat_template"] * chat))]) == 0
    found = json.loads((tmp_path / "found" / "evaluation.json").read_text())["tasks"]["rain"]
    mine, other = ([right(model, tokenizer, row, chat) for row in ROWS] for model, tokenizer in map(plain, models))
    assert mine != other
    assert found["metrics"] == {"acc": pytest.approx(sum(mine) / len(ROWS))}
    assert found["baseline"] == {"acc": pytest.approx(sum(other) / len(ROWS))}
    assert found["diff"]["acc"] == pytest.approx((sum(mine) - sum(other)) / len(ROWS))
    assert found["ci95"]["acc"][0] <= found["diff"]["acc"] <= found["ci95"]["acc"][1]
    assert (found["samples"], found["num_fewshot"]) == (len(ROWS), 0) and 0 < found["stderr"]["acc"] < 1


def test_what_is_missing_is_said_before_anything_runs(
    tasks: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["evaluate", str(tiny_llama), "--tasks", "rain", "--include_path"]
    assert main([*command, "absent"]) == 2
    assert "--include_path absent: no such folder" in capsys.readouterr().err
    (tasks / "rain.jsonl").unlink()
    assert main([*command, str(tasks)]) == 1
    assert "the data can't be loaded" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert main([*command, str(tasks)]) == 2
    assert "pip install 'litft[evaluate]'" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_name_that_lm_eval_doesnt_have(tasks: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(tiny_llama), "--include_path", str(tasks), "--tasks", "rain,hellaswg"]) == 2
    said = capsys.readouterr().err
    assert "--tasks hellaswg: no such task in lm-eval nor in" in said and "did you mean hellaswag" in said
