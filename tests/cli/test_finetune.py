"""`litft finetune` as a person uses it: what it prints, what lies in the run folder, and what runs again."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import CHATML, chat_rows, save_tiny, write_jsonl

from litft.cli.main import main

PLAIN = ["--trainer.precision", "32-true", "--trainer.accelerator", "cpu", "--samples.max_new_tokens", "4"]
CLOCK = {"tokens_per_s", "trained_tokens_per_s", "step_s", "data_s", "memory_gb"}
COLUMNS = "step,epoch,loss,val_loss,lr,grad_norm,tokens,trained_tokens"
COLUMNS += ",tokens_per_s,trained_tokens_per_s,step_s,data_s,memory_gb"


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_rows(36))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def finetune(tiny_llama: Path, chats: Path) -> Any:
    def run(*words: Any, tuner: str = "lora", data: Any = chats) -> int:
        files = data if isinstance(data, list) else [data]
        return main(
            ["finetune", tuner, "--model", str(tiny_llama), "--data", *map(str, files), *PLAIN, *map(str, words)]
        )

    return run


def records(folder: Path | str) -> list[dict[str, str]]:
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]


def result(folder: Path | str) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (Path(folder) / "final").iterdir() if p.suffix == ".safetensors"}


# ---- the run folder


def test_a_run_and_its_folder(finetune: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune("--out", "out", "--trainer.max_steps", 6) == 0
    printed = capsys.readouterr()
    out = Path("out")
    names = {"config.yaml", "run.json", "report.html", "metrics.csv", "checkpoints", "final"}
    assert {p.name for p in out.iterdir()} == names
    assert (out / "metrics.csv").read_text().splitlines()[0] == COLUMNS
    rows = records(out)
    assert [int(r["step"]) for r in rows] == list(range(7))
    assert rows[0]["val_loss"] and rows[-1]["val_loss"] and not rows[0]["loss"]
    facts = json.loads((out / "run.json").read_text())
    assert facts["outcome"] == "done" and facts["steps"] == 6 and facts["versions"]["torch"]
    assert facts["losses_after"]["val_loss"] == min(float(r["val_loss"]) for r in rows if r["val_loss"])
    # what is printed: the plan, the steps, losses before and after, three answers, where, and what next
    assert re.search(r"held-out loss: \d+\.\d{4} before, \d+\.\d{4} after", printed.out)
    assert printed.out.count("  before: ") == printed.out.count("  after:  ") == 3
    for text in (
        "rows to train on",
        "step 6/6",
        "lr ",
        "grad_norm",
        "tok/s",
        "ETA",
        "mem ",
        "out/final",
        "litft chat out",
    ):
        assert text in printed.out, text
    assert printed.err == ""


def test_runs_are_numbered(finetune: Any) -> None:
    for tuner in ("lora", "full"):
        assert finetune("--trainer.max_steps", 1, "--samples.count", 0, tuner=tuner) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["0001-lora", "0002-full"]
    names = {p.name for p in Path("runs/0002-full/final").iterdir()}
    assert "model.safetensors" in names and "config.json" in names


def test_f8_config_yaml_alone_runs_it_again(finetune: Any) -> None:
    words = ["--trainer.max_steps", 5, "--model.tuner.dropout", 0.1, "--model.lr", "1e-3", "--model.tuner.r", 4]
    assert finetune("--out", "a", *words) == 0
    saved = Path("a/config.yaml").read_text()
    assert main(["finetune", "lora", "--config", "a/config.yaml", "--out", "b"]) == 0
    assert records("a") == records("b") and result("a") == result("b") != {}
    assert Path("b/config.yaml").read_text() == saved == Path("a/config.yaml").read_text()
    whole = yaml.safe_load(saved)
    assert whole["model"]["tuner"] == {
        "class_path": "litft.LoRA",
        "init_args": {**whole["model"]["tuner"]["init_args"], "r": 4, "dropout": 0.1},
    }
    assert whole["data"]["tokens_per_step"] and whole["data"]["max_length"] == 512  # decided by data and model, kept
    assert "out" not in whole and "optimizer" not in whole
    # without --out it takes a folder of its own
    assert main(["finetune", "lora", "--config", "a/config.yaml"]) == 0
    assert result("runs/0001-lora") == result("a")


def test_f8_a_used_folder_is_refused_and_a_resume_keeps_the_first_configuration(
    finetune: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("--out", "a", "--trainer.max_steps", 3) == 0
    first = Path("a/config.yaml").read_text()
    before = {p: p.stat().st_mtime_ns for p in Path("a").rglob("*")}
    assert finetune("--out", "a", "--trainer.max_steps", 5) == 2
    assert "--resume" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in Path("a").rglob("*")} == before
    assert main(["finetune", "lora", "--out", "a", "--resume"]) == 0  # nothing left to do
    assert Path("a/config.yaml").read_text() == first
    assert main(["finetune", "lora", "--out", "a", "--resume", "--trainer.max_steps", "5"]) == 0
    assert "going on from step 3 of 5" in capsys.readouterr().out
    assert Path("a/config-until-step-3.yaml").read_text() == first
    assert [int(r["step"]) for r in records("a")] == list(range(6))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--resume"], "--resume needs --out"),
        (["--out", "file"], "is a file"),
        (["--out", "/proc/nowhere/x"], "cannot be written"),
    ],
)
def test_out_and_resume(words: list[str], says: str, finetune: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("x")
    assert finetune(*words, "--trainer.max_steps", 1) == 2
    assert says in capsys.readouterr().err


def test_resume_begins_where_there_is_nothing_yet(finetune: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """So that a script that is started again and again can always say it."""
    Path("empty").mkdir()
    for out in ("missing", "empty"):
        assert finetune("--out", out, "--resume", "--trainer.max_steps", 1, "--samples.count", 0) == 0
        assert "no checkpoint yet: beginning" in capsys.readouterr().out and result(out)


def test_a_folder_that_is_no_run_is_not_resumed(finetune: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos").mkdir()
    Path("photos/cat.jpg").write_text("cat")
    assert finetune("--out", "photos", "--resume") == 2
    assert "nothing to resume" in capsys.readouterr().err


# ---- before a run


def test_print_config_prints_everything_and_runs(capsys: pytest.CaptureFixture[str], tiny_llama: Path) -> None:
    words = ["finetune", "qlora", "--model", str(tiny_llama), "--model.tuner.r", "8", "--print_config"]
    assert main([*words, "--data", "x.jsonl"]) == 0
    whole = yaml.safe_load(capsys.readouterr().out)
    assert whole["data"]["train"] == ["x.jsonl"] and whole["data"]["overlong"] == "drop"
    assert whole["model"]["tuner"]["class_path"] == "litft.QLoRA"
    options = whole["model"]["tuner"]["init_args"]
    assert options["r"] == 8 and options["quant"] == "nf4" and options["alpha"] == 32
    assert whole["checkpoint"]["keep_last"] == 2 and whole["seed_everything"] == 42


def test_dry_run(finetune: Any, chats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune("--dry_run", "--json", "--data.max_length", 40) == 0
    said = capsys.readouterr()
    plan = json.loads(said.out)
    assert said.err == "" and not Path("runs").exists()
    assert plan["rows"] + sum(plan["val_rows"].values()) + sum(plan["dropped"].values()) == plan["rows_read"] == 36
    assert any("longer than 40" in reason for reason in plan["dropped"])
    for key in ("tokens", "trained_tokens", "packs", "steps", "trainable", "parameters"):
        assert plan[key] > 0, key
    assert plan["trained_tokens"] < plan["tokens"] and plan["trainable"] < plan["parameters"]
    assert finetune("--dry_run", "--out", "never") == 0
    text = capsys.readouterr().out
    assert not Path("never").exists()
    for word in ("rows to train on", "trained)", "steps of up to", "micro-batches", "weights learn"):
        assert word in text


def test_dry_run_predicts_the_memory(finetune: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune("--dry_run", "--json") == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["fits"] and memory["recompute"] == memory["offload"] == "none"
    assert 0 < memory["parts_gb"]["activations"] < memory["predicted_gb"] < memory["available_gb"]
    assert finetune("--dry_run", "--json", "--model.memory_gb", 0.01, "--model.recompute", 2) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert not memory["fits"] and memory["recompute"] == 2 and memory["available_gb"] == 0.01
    assert finetune("--dry_run", "--model.memory_gb", 0.01, "--data.tokens_per_step", 1000) == 0
    said = capsys.readouterr().out
    assert "that is more than there is; to take less: --data.tokens_per_batch" in said and "recompute full" not in said


@pytest.mark.parametrize(
    "error", [MemoryError("std::bad_alloc"), RuntimeError("DefaultCPUAllocator: not enough memory")]
)
def test_out_of_memory_ends_with_what_to_change(
    error: Exception, finetune: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from litft import SFT

    def fails(self: Any, step: Any, index: int) -> Any:
        raise error

    monkeypatch.setattr(SFT, "training_step", fails)
    assert finetune("--samples.count", 0, "--model.recompute", "full", "--data.tokens_per_step", 1000) == 1
    said = capsys.readouterr().err.splitlines()[-2:]
    assert said[0] == "error: out of memory on cpu, after step 0"
    assert said[1].startswith("to take less: --data.tokens_per_batch") and "recompute" not in said[1]
    assert "litft finetune qlora" in said[1]


def test_speed_and_memory_are_said_and_kept(
    finetune: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litft.engine.speed.WORTH_S", 0.0)
    assert finetune("--out", "r", "--samples.count", 0, "--data.tokens_per_step", 200) == 0
    said, run = capsys.readouterr().out, json.loads(Path("r/run.json").read_text())
    assert re.search(r"speed: [\d,]+ tokens/s, [\d,]+ trained; peak memory [\d.]+ GB", said)
    assert "of the floor" in said and "MFU" in said
    assert 0 < run["trained_tokens_per_s"] < run["tokens_per_s"]
    assert run["floor_share"] > 0 and run["mfu"] > 0
    assert run["recompilations"] >= 0 and run["compiled_layers"] == 0 and run["peak_memory_gb"] > 0.1
    assert run["memory"]["predicted_gb"] > 0


def test_dry_run_says_what_the_run_then_does(finetune: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--trainer.max_epochs", 2, "--data.tokens_per_step", 200, "--val_every_n_steps", 0, "--samples.count", 0]
    assert finetune("--dry_run", "--json", *words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert finetune("--out", "a", *words, "--trainer.log_every_n_steps", 1) == 0
    rows = [r for r in records("a") if r["loss"]]
    assert len(rows) == plan["steps"] and float(rows[-1]["epoch"]) == plan["epochs"] == 2.0
    assert sum(int(r["tokens"]) for r in rows) == plan["tokens"]
    assert sum(int(r["trained_tokens"]) for r in rows) == plan["trained_tokens"]


# ---- data


def test_several_files_are_a_mix(finetune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (
        write_jsonl(tmp_path / "a.jsonl", chat_rows(10, seed=1)),
        write_jsonl(tmp_path / "b.jsonl", chat_rows(8, seed=2)),
    )
    words = ["--dry_run", "--json", "--data.val_fraction", 0]
    assert finetune(*words, data=[a, b]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 18
    assert finetune(*words, data=a) == 0
    alone = json.loads(capsys.readouterr().out)["tokens"]
    assert finetune(*words, "--data.weights", 2, 0, data=[a, b]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 2 * alone


def test_fewer_than_20_rows_have_no_validation(
    finetune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", chat_rows(12))
    assert finetune("--out", "a", "--trainer.max_steps", 3, data=few) == 0
    printed = capsys.readouterr()
    assert "no rows held out" in printed.out and "held-out loss" not in printed.out
    assert "the last, step 3" in printed.out and printed.err == ""
    assert not any(r["val_loss"] for r in records("a"))


@pytest.mark.parametrize("form", ["flag", "yaml"])
def test_several_validation_sets(form: str, finetune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (write_jsonl(tmp_path / f"{n}.jsonl", chat_rows(6, seed=s)) for n, s in (("maths", 5), ("talk", 6)))
    words = ["--data.val", one, two]
    if form == "yaml":
        (tmp_path / "c.yaml").write_text(yaml.safe_dump({"data": {"val": {"maths": str(one), "talk": str(two)}}}))
        words = ["--config", tmp_path / "c.yaml"]
    assert finetune("--out", "a", "--trainer.max_steps", 2, *words) == 0
    out = capsys.readouterr().out
    assert "held-out loss, maths:" in out and "held-out loss, talk:" in out and "36 rows to train on" in out
    after = json.loads(Path("a/run.json").read_text())["losses_after"]
    assert set(after) == {"val_loss", "val_loss/maths", "val_loss/talk"}
    low, high = sorted(v for k, v in after.items() if "/" in k)
    assert low <= after["val_loss"] <= high


def test_plain_text_rows_have_no_samples(finetune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": f"{i}: " + row["messages"][-1]["content"] * 2} for i, row in enumerate(chat_rows(24))]
    assert finetune("--out", "a", "--trainer.max_steps", 2, data=write_jsonl(tmp_path / "t.jsonl", rows)) == 0
    out = capsys.readouterr().out
    assert "before: " not in out and "held-out loss: " in out and "the result: a/final" in out


# ---- how long


def test_e5_one_epoch_where_nothing_is_said_and_max_steps_goes_on(
    finetune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    four = write_jsonl(tmp_path / "four.jsonl", chat_rows(4))
    assert finetune("--out", "a", "--samples.count", 0, data=four) == 0
    assert [float(r["epoch"]) for r in records("a")][-1] == 1.0
    assert finetune("--out", "b", "--trainer.max_steps", 10, "--samples.count", 0, data=four) == 0
    rows = records("b")
    assert [int(r["step"]) for r in rows] == list(range(1, 11)) and float(rows[-1]["epoch"]) > 2
    assert finetune("--out", "c", "--trainer.max_epochs", 3, "--samples.count", 0, data=four) == 0
    assert float(records("c")[-1]["epoch"]) == 3.0


def test_max_time_ends_a_run_with_a_checkpoint_and_a_result(finetune: Any) -> None:
    words = ["--trainer.max_steps", 400, "--trainer.max_time", "00:00:00:01", "--val_every_n_steps", 0]
    assert finetune("--out", "a", *words, "--samples.count", 0) == 0
    steps = json.loads(Path("a/run.json").read_text())["steps"]
    assert 0 < steps < 400
    assert Path(f"a/checkpoints/step-{steps:06d}/state.ckpt").is_file() and result("a")
    assert records("a")[-1]["val_loss"] and int(records("a")[-1]["step"]) == steps


def test_patience_stops_early(finetune: Any, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--model.lr",
        0,
        "--trainer.max_steps",
        50,
        "--val_every_n_steps",
        2,
        "--patience",
        2,
    ]  # nothing gets better
    assert finetune("--out", "a", *words, "--samples.count", 0) == 0
    assert json.loads(Path("a/run.json").read_text())["steps"] == 6
    out = capsys.readouterr().out
    assert "stopped early" in out and "(--patience 2)" in out


def test_a_refused_resume_leaves_the_run_as_it_was(
    finetune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finetune("--out", "a", "--trainer.max_steps", 3, "--samples.count", 0) == 0
    assert " weights learn" in capsys.readouterr().out
    before = {p: p.read_bytes() for p in Path("a").rglob("*") if p.is_file()}
    other = write_jsonl(tmp_path / "b.jsonl", chat_rows(40, seed=9))
    for _ in range(2):
        assert main(["finetune", "lora", "--out", "a", "--resume", "--data", str(other)]) == 2
        assert "changed since step 3: data (" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in Path("a").rglob("*") if p.is_file()} == before
    assert main(["finetune", "lora", "--out", "a", "--resume", "--trainer.max_steps", "4"]) == 0
    assert [int(r["step"]) for r in records("a")] == list(range(5))


def test_a_kept_configuration_is_never_overwritten(tmp_path: Path) -> None:
    from litft.engine.run import keep_config

    for text in ("first", "second", "third"):
        keep_config(tmp_path, text, 3)
    assert (tmp_path / "config-until-step-3.yaml").read_text() == "first"
    assert (tmp_path / "config.yaml").read_text() == "third"


def test_log_every_n_steps_is_obeyed(finetune: Any) -> None:
    words = ["--trainer.max_steps", 7, "--val_every_n_steps", 0, "--samples.count", 0, "--data.val_fraction", 0]
    assert finetune("--out", "a", *words, "--trainer.log_every_n_steps", 3) == 0
    assert [int(r["step"]) for r in records("a")] == [1, 3, 6, 7]
    assert finetune("--out", "b", *words) == 0
    assert len(records("b")) == 7


# ---- loggers


def test_a_logger_by_config(finetune: Any) -> None:
    words = ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "logs"]
    assert finetune("--out", "a", "--trainer.max_steps", 2, "--samples.count", 0, *words) == 0
    (found,) = Path("logs").rglob("metrics.csv")
    assert "val_loss" in found.read_text()


# ---- signals, on a real process

SLOW = """
import time
from lightning import Callback


class Slow(Callback):
    def on_train_batch_end(self, *args):
        time.sleep(0.3)
"""


def stop_in_the_middle(words: list[Any], folder: str, number: int, tmp_path: Path) -> tuple[int, str, str]:
    """Start `litft` with a callback that takes its time, send it a signal after some steps; code, stdout, stderr."""
    (tmp_path / "slow.py").write_text(SLOW)
    slow = ["--trainer.callbacks", '[{"class_path": "slow.Slow"}]']
    process = subprocess.Popen(
        [sys.executable, "-m", "litft", *map(str, words), *slow],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (Path(folder) / "metrics.csv").exists() and len(records(folder)) > 3:
                break
            time.sleep(0.05)
        process.send_signal(number)
        return process.wait(60), *process.communicate(timeout=60)
    finally:
        process.kill()


def one_line(number: int, folder: str, said: str) -> int:
    """The step of the one line that a stopped run says."""
    name = signal.Signals(number).name
    found = re.fullmatch(
        rf"stopped by {name} after step (\d); go on with: litft finetune lora --out {folder} --resume\n", said
    )
    assert found, said
    return int(found[1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_one_line(
    number: int, code: int, finetune: Any, tiny_llama: Path, chats: Path, tmp_path: Path
) -> None:
    words = ["--trainer.max_steps", 8, "--model.tuner.dropout", 0.1, "--samples.count", 0]
    command = ["finetune", "lora", "--model", tiny_llama, "--data", chats, *words, *PLAIN, "--out", "b"]
    ended, _, err = stop_in_the_middle(command, "b", number, tmp_path)
    assert ended == code, err
    assert Path(f"b/checkpoints/step-{one_line(number, 'b', err):06d}/state.ckpt").is_file()
    assert main(["finetune", "lora", "--out", "b", "--resume", "--trainer.callbacks", "null"]) == 0
    assert finetune("--out", "a", *words) == 0
    assert records("a") == records("b") and result("a") == result("b") != {}


def test_two_processes_are_one_run(finetune: Any, tiny_llama: Path, chats: Path, tmp_path: Path) -> None:
    """Two gloo processes, stopped and resumed: one folder, one report, and the training of one process."""
    from safetensors.torch import load

    words = ["--trainer.max_steps", 8, "--data.tokens_per_step", 300, "--model.lr", "1e-3", "--samples.count", 1]
    two = ["--trainer.devices", 2, "--trainer.strategy", "ddp"]
    command = ["finetune", "lora", "--model", tiny_llama, "--data", chats, *words, *PLAIN, *two]
    ended, out, err = stop_in_the_middle(command, "runs/0001-lora", signal.SIGTERM, tmp_path)
    assert ended == 143, err
    step = one_line(signal.SIGTERM, "runs/0001-lora", err)
    assert out.count("rows to train on") == 1 and len(re.findall(r"^step 1/8", out, re.MULTILINE)) == 1
    again = ["finetune", "lora", "--out", "runs/0001-lora", "--resume", "--trainer.callbacks", "null"]
    done = subprocess.run([sys.executable, "-m", "litft", *again], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and f"going on from step {step} of 8" in done.stdout
    assert len(re.findall("the result:", done.stdout)) == done.stdout.count("  before: ") == 1
    assert [p.name for p in Path("runs").iterdir()] == ["0001-lora"]

    assert finetune("--out", "one", *words) == 0
    ours, theirs = records("runs/0001-lora"), records("one")
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == [str(i) for i in range(9)]
    assert [(r["tokens"], r["trained_tokens"]) for r in ours] == [(r["tokens"], r["trained_tokens"]) for r in theirs]
    for column in ("loss", "val_loss", "grad_norm"):
        assert [float(r[column] or 0) for r in ours] == pytest.approx([float(r[column] or 0) for r in theirs], rel=1e-5)
    (a,), (b,) = result("runs/0001-lora").values(), result("one").values()
    for name, tensor in load(a).items():
        assert (tensor - load(b)[name]).abs().max() < 1e-5, name


def test_a_run_keeps_the_day_it_began_on(
    chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Templates such as Llama 3.2's write today's date: a run that goes on tomorrow has the same tokens."""
    from datetime import date

    from litft.data import chat

    class Tomorrow(date):
        @classmethod
        def today(cls) -> date:
            return date(2031, 2, 3)

    dated = save_tiny(tmp_path / "dated", template="{{ strftime_now('%d %b %Y') }}\n" + CHATML)
    words = ["--model", str(dated), "--data", str(chats), "--samples.count", "0", "--val_every_n_steps", "0"]
    words += ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true", "--trainer.log_every_n_steps", "1"]

    def run(out: str, *more: str) -> int:
        return main(["finetune", "lora", "--out", out, *words, *more])

    assert run("straight", "--trainer.max_steps", "4") == 0
    assert run("a", "--trainer.max_steps", "2") == 0
    today = date.today().isoformat()
    assert yaml.safe_load(Path("a/config.yaml").read_text())["data"]["date"] == today
    monkeypatch.setattr(chat, "Day", Tomorrow)
    assert main(["finetune", "lora", "--out", "a", "--resume", "--trainer.max_steps", "4"]) == 0
    assert [r["loss"] for r in records("a")][:3] == [r["loss"] for r in records("straight")][:3]
    assert {r["tokens"] for r in records("a")} == {r["tokens"] for r in records("straight")}
    assert run("a", "--resume", "--trainer.max_steps", "5", "--data.date", "2031-02-03") == 2
    assert "data (" in capsys.readouterr().err
    assert run("b", "--data.date", "yesterday") == 2
    assert "--data.date yesterday: is no day" in capsys.readouterr().err
