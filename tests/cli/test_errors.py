"""Mistakes: one to five lines that say what, where and how to mend it, exit code 2, and never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import chat_rows, save_tiny, write_jsonl

from litft.cli.main import main

CLASSES = "lightning.pytorch.callbacks"
ACCUMULATE, AVERAGE = (
    "--trainer.callbacks=" + json.dumps([{"class_path": f"{CLASSES}.{name}", "init_args": arguments}])
    for name, arguments in (
        ("GradientAccumulationScheduler", {"scheduling": {"0": 2}}),
        ("StochasticWeightAveraging", {"swa_lrs": 0.1}),
    )
)
CPU = ["--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("chats") / "chats.jsonl", chat_rows(24))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mistake(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line that ends in exit code 2; returns what it says."""

    def run(*words: Any) -> str:
        capsys.readouterr()
        code = main(["finetune", *map(str, words)])
        said = capsys.readouterr()
        assert code == 2, said
        assert said.err.startswith("error: ") and "Traceback" not in said.err
        assert 1 <= len(said.err.splitlines()) <= 5, said.err
        assert not Path("runs").exists()
        return said.err

    return run


# ---- the command


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "needs a method"),
        (["lorra"], "did you mean lora?"),
        (["--data", "x"], "needs a method"),
        (["lora"], "--data FILE is missing"),
        (["lora", "--trainer.max_step", "3"], "did you mean --trainer.max_steps?"),
        (["lora", "--config", "nope.yaml"], "no such file"),
    ],
)
def test_commands(argv: list[str], says: str, mistake: Any) -> None:
    assert says in mistake(*argv)


def test_an_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetun"]) == 2
    assert "did you mean litft finetune?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--trainer.max_steps", "many"], "--trainer.max_steps many: must be a whole number"),
        (["--model.lr", "fast"], "--model.lr fast: must be a number"),
        (["--model.schedule", "cosin"], "must be cosine, linear, constant or wsd; did you mean cosine?"),
        (["--model.tuner.r", "x"], "--model.tuner.r x: must be a whole number"),
        (["--data.packing", "maybe"], "--data.packing maybe: must be true or false"),
        (["--data.overlong", "cut"], "must be drop, truncate or error"),
        (["--model.betas", "[1,2,3]"], "--model.betas"),
        (["--patience", "x"], "--patience x: must be a whole number"),
        (["--model.optimizer", "adamv"], "did you mean adamw?"),
        (["--data.val_fraction", "2"], "--data.val_fraction 2.0: must be at least 0 and below 1"),
        (["--data.weights", "1", "2"], "give one number >= 0 a file"),
        (["--checkpoint.keep_last", "0"], "must be at least 1"),
        (["--trainer.max_time", "soon"], "DD:HH:MM:SS"),
        (["--trainer.strategy", "foo"], "strategy"),
        (["--trainer.devices", "none"], "trainer"),
        (["--trainer.precision", "bf16-true"], "bf16-mixed trains fp32 weights"),
        (["--trainer.logger", "Foo"], "no class Foo"),
        (["--trainer.log_every_n_steps", "0"], "--trainer.log_every_n_steps 0: must be at least 1"),
        (["--seed_everything", "-5"], "--seed_everything -5"),
        (["--val_every_n_steps", "-1"], "--val_every_n_steps -1"),
        (["--patience", "-3"], "--patience -3"),
        (["--patience", "2", "--data.val_fraction", "0"], "no rows are held out"),
        (["--patience", "2", "--val_every_n_steps", "0"], "--val_every_n_steps 0 validates only"),
        (["--checkpoint.every_minutes", "-1"], "--checkpoint.every_minutes -1"),
        (["--samples.count", "-1"], "--samples.count -1"),
        (["--json"], "--dry_run"),
        ([ACCUMULATE], "set data.tokens_per_step"),
        ([AVERAGE], "mend: leave it out"),
        (["--model.tuner.r", "0"], "error: the rank of an adapter is at least 1, r is 0"),
        (["--model.tuner.dropout", "2"], "error: dropout is a probability below 1, not 2.0"),
        (["--model.betas", "0.9", "x"], "--model.betas 0.9 x: not numbers"),
        (["--trainer.logger", "lightning.pytorch.loggers.TensorBoardLogger"], "--trainer.logger.save_dir"),
    ],
)
def test_values(words: list[str], says: str, mistake: Any, tiny_llama: Path, chats: Path) -> None:
    cpu = [w for pair in zip(CPU[::2], CPU[1::2], strict=True) if pair[0] not in words for w in pair]
    assert says in mistake("lora", "--model", tiny_llama, "--data", chats, *cpu, *words)


def test_a_logger_whose_package_is_missing(mistake: Any, tiny_llama: Path, chats: Path) -> None:
    from importlib.util import find_spec

    if find_spec("wandb"):
        pytest.skip("wandb is installed")
    words = ["--trainer.logger", "lightning.pytorch.loggers.WandbLogger"]
    assert "pip install 'litft[wandb]'" in mistake("lora", "--model", tiny_llama, "--data", chats, *CPU, *words)


@pytest.mark.parametrize(
    "words",
    [
        ["--trainer.limit_train_batches", "3"],
        ["--trainer.overfit_batches", "2"],
        ["--trainer.fast_dev_run", "true"],
        ["--trainer.accumulate_grad_batches", "4"],
        ["--trainer.gradient_clip_val", "1.0"],
        ["--trainer.val_check_interval", "5"],
        ["--trainer.check_val_every_n_epoch", "2"],
    ],
)
def test_trainer_flags_that_would_cut_planned_steps(
    words: list[str], mistake: Any, tiny_llama: Path, chats: Path
) -> None:
    text = mistake("lora", "--model", tiny_llama, "--data", chats, *CPU, *words)
    assert words[0] in text and "mend:" in text


@pytest.mark.parametrize(
    "strategy",
    ["ddp_spawn", "ddp_fork", "fsdp_cpu_offload", "deepspeed_stage_2", "lightning.pytorch.strategies.FSDPStrategy"],
)
def test_strategies_that_cannot_work(strategy: str, mistake: Any, tiny_llama: Path, chats: Path) -> None:
    text = mistake("lora", "--model", tiny_llama, "--data", chats, *CPU, "--trainer.strategy", strategy)
    assert "mend: --trainer.strategy auto, ddp or fsdp" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--trainer.strategy.tensor_size", 2],
            "fsdp has no option tensor_size; did you mean --trainer.strategy.tensor_",
        ),
        (["--trainer.strategy", "fsdp", "--trainer.strategy.replicas", 2], "fsdp has no option replicas"),
        (["--trainer.strategy.cpu_offload", "maybe"], "--trainer.strategy.cpu_offload maybe"),
        (
            ["--trainer.strategy.replicate", 2, "--trainer.devices", 3],
            "replicate 2 does not divide the run's 3 processes",
        ),
        (["--trainer.strategy.timeout_minutes", 0], "--trainer.strategy.timeout_minutes: must be above 0"),
        (["--trainer.strategy", "fdsp"], "--trainer.strategy fdsp: is none of auto, ddp, fsdp"),
        (["--trainer.num_nodes", 2, "--trainer.strategy", "ddp"], "started by torchrun or Slurm"),
        (["--trainer.strategy.context_parallel_size", 0], "context_parallel_size 0: must be at least 1"),
        (
            ["--trainer.strategy.tensor_parallel_size", 4, "--trainer.devices", 4],
            "does not divide the model's 2 key-value",
        ),
        (
            ["--trainer.strategy.context_parallel_size", 3, "--trainer.devices", 3],
            "does not divide the model's 4 attention",
        ),
    ],
    ids=str,
)
def test_options_of_fsdp(words: list[Any], said: str, mistake: Any, tiny_llama: Path, chats: Path) -> None:
    assert said in mistake("lora", "--model", tiny_llama, "--data", chats, *CPU, *words)


def test_all_batches_and_64_bits_are_no_mistake(tiny_llama: Path, chats: Path) -> None:
    words = ["--trainer.limit_train_batches", "1.0", "--trainer.precision", "64-true", "--trainer.accelerator", "cpu"]
    command = ["finetune", "lora", "--model", str(tiny_llama), "--data", str(chats), "--out", "a", *words]
    assert main([*command, "--trainer.max_steps", "2", "--samples.count", "1"]) == 0


def test_a_dry_run_finds_what_the_optimizer_refuses(mistake: Any, tiny_llama: Path, chats: Path) -> None:
    own = "import torch\nclass Own(torch.optim.SGD):\n    def __init__(self, params):\n"
    own += "        raise ValueError('too odd')\n"
    Path("own_optimizer.py").write_text(own)
    sys.path.insert(0, str(Path.cwd()))
    try:
        words = ["--dry_run", "--model.optimizer", "own_optimizer.Own"]
        assert "too odd" in mistake("lora", "--model", tiny_llama, "--data", chats, *CPU, *words)
    finally:
        sys.path.remove(str(Path.cwd()))


def test_a_missing_logger_is_named_as_litfts_extra() -> None:
    from litft.cli.readable import readable

    said = "Neither `tensorboard` nor `tensorboardX` is available. Try `pip install`ing either."
    assert "pip install 'litft[tensorboard]'" in readable(said)


def test_a_gpu_that_is_not_there(mistake: Any, tiny_llama: Path, chats: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    text = mistake("lora", "--model", tiny_llama, "--data", chats, "--trainer.accelerator", "gpu")
    assert "no CUDA GPU" in text and "CPU cores" in text and "mend:" in text


# ---- data and models


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.jsonl", None, "missing.jsonl"),
        ("empty.jsonl", "", "empty.jsonl"),
        ("broken.jsonl", '{"messages": [{"role": "user"\n', "broken.jsonl:1"),
        ("robot.jsonl", json.dumps({"messages": [{"role": "robot", "content": "x"}]}) + "\n", "robot.jsonl:1"),
        ("ours.txt", "just text\n", "ours.txt"),
    ],
)
def test_data_files(name: str, content: str | None, says: str, mistake: Any, tiny_llama: Path) -> None:
    if content is not None:
        Path(name).write_text(content)
    assert says in mistake("lora", "--model", tiny_llama, "--data", name, *CPU)


def test_all_rows_dropped(mistake: Any, tiny_llama: Path, chats: Path) -> None:
    text = mistake("lora", "--model", tiny_llama, "--data", chats, "--data.max_length", 4, *CPU)
    assert "no train row is left" in text and "24 longer than 4 tokens" in text


def test_preference_rows_are_for_another_method(mistake: Any, tiny_llama: Path) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path = write_jsonl("pairs.jsonl", [row] * 3)
    assert "preference" in mistake("lora", "--model", tiny_llama, "--data", path, *CPU)


def test_model_folders(mistake: Any, chats: Path, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    assert "nothing" in mistake("lora", "--model", tmp_path / "nothing", "--data", chats, *CPU)
    pickled = save_tiny(tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    import torch

    torch.save({}, pickled / "pytorch_model.bin")
    text = mistake("lora", "--model", pickled, "--data", chats, *CPU)
    assert "pytorch_model.bin" in text or "safetensors" in text
    remote = save_tiny(tmp_path / "remote")
    config = json.loads((remote / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoModelForCausalLM": "code.Model", "AutoConfig": "code.Config"}}
    (remote / "config.json").write_text(json.dumps(config))
    assert "trust_remote_code" in mistake("lora", "--model", remote, "--data", chats, *CPU)


def test_qlora_without_bitsandbytes(
    mistake: Any, tiny_llama: Path, chats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what Python does where an import is blocked
    text = mistake("qlora", "--model", tiny_llama, "--data", chats, "--out", "q", *CPU)
    assert "bitsandbytes" in text and "pip install" in text


def test_a_mistake_found_late_leaves_no_used_folder(mistake: Any, tiny_llama: Path, chats: Path) -> None:
    words = ["lora", "--model", tiny_llama, "--data", chats, "--out", "out", *CPU]
    assert "adamw" in mistake(*words, "--model.optimizer", "adamv")
    assert main(["finetune", *map(str, words), "--trainer.max_steps", "1", "--samples.count", "0"]) == 0


def test_an_unwritable_out(mistake: Any, tiny_llama: Path, chats: Path) -> None:
    assert "cannot be written" in mistake("lora", "--model", tiny_llama, "--data", chats, "--out", "/proc/x", *CPU)


# ---- our own faults, and --debug


def test_our_fault_is_one_line_and_exit_1(
    tiny_llama: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import litft.engine.run

    def broken(*args: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(litft.engine.run, "plan", broken)
    words = ["finetune", "lora", "--model", str(tiny_llama), "--data", str(chats), *CPU]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "KeyError" in said and "--debug" in said and "Traceback" not in said
    with pytest.raises(KeyError):
        main([*words, "--debug"])


def test_debug_shows_a_mistakes_traceback() -> None:
    command = [sys.executable, "-m", "litft", "finetune", "lora", "--dat", "x"]
    plain = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert plain.returncode == 2 and "Traceback" not in plain.stderr
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True, timeout=60)
    assert "Traceback" in debug.stderr and "arguments.py" in debug.stderr


def test_a_stopped_bad_loss_exits_1(
    tiny_llama: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from litft import SFT

    loss = SFT.loss
    monkeypatch.setattr(SFT, "loss", lambda self, batch: loss(self, batch) * float("nan"))
    words = ["--out", "bad", "--model.max_bad_steps", "2", "--samples.count", "0"]
    assert main(["finetune", "lora", "--model", str(tiny_llama), "--data", str(chats), *CPU, *words]) == 1
    said = capsys.readouterr().err
    assert "not finite" in said and "stopped: more than model.max_bad_steps 2" in said and "chats.jsonl:" in said
    assert not Path("bad/final").exists()
    assert "BadLoss" in json.loads(Path("bad/run.json").read_text())["outcome"]
