"""The commands of tutorials/evaluate.md, as printed but for the model (a tiny one) and the number of steps."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_tutorials import Shell, blocks


@pytest.mark.slow
def test_evaluate(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    few = '[ $1 = finetune ] && MORE="--model model --samples.count 0 --trainer.max_steps 2" || MORE="--batch_size 20"'
    shell.script("litft", f'{few}\nexec {sys.executable} -m litft "$@" $MORE')
    first, loss_only, extract, task = blocks("bash", "evaluate")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "poles.yaml").write_text(blocks("yaml", "evaluate")[0])
    (tmp_path / "tasks" / "poles.jsonl").write_text(blocks("jsonl", "evaluate")[0])
    *prepare, compare = first.strip().splitlines()
    found = []
    for number, command in enumerate(["\n".join([*prepare, f"{compare} --limit 3"]), loss_only, extract, task], 1):
        code, said = shell.run(f"set -e\n{command}")
        assert code == 0, said
        file = tmp_path / "runs" / f"000{number}-evaluate" / "evaluation.json"
        found.append(json.loads(file.read_text()))
    assert found[0]["sets"]["test"]["rows_answered"] == 3 and "ci95" in found[0]["sets"]["test"]
    assert list(found[1]["sets"]) == ["held", "seen"] and found[1]["sets"]["seen"]["rows_answered"] == 0
    assert found[2]["sets"]["test"]["rows_scored"]["extracted"] == 20
    assert found[3]["tasks"]["poles"]["samples"] == 2 and "baseline" in found[3]["tasks"]["poles"]
