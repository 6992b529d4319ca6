"""What a run takes on devices that aren't here, from a config.json alone."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny
from transformers import LlamaConfig

from litft import DPO, SFT, Distill, Full, LoRA, QLoRA, Reward
from litft.cli.main import main
from litft.methods.memory import measure_layers
from litft.methods.planning import _without_memory, plan_devices
from litft.models.compiled import layers_of

LLAMA_70B: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "architectures": ["LlamaForCausalLM"],
}


@pytest.fixture(scope="module")
def of_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("70b")
    LlamaConfig(**LLAMA_70B).save_pretrained(folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    return folder


@pytest.mark.parametrize("tuner", [Full, LoRA], ids=["full", "lora"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_without_memory_keeps_what_a_real_one_keeps(family: str, tuner: Any, tmp_path: Path) -> None:
    path = save_tiny(tmp_path / "model", family, hidden_size=128, intermediate_size=256, head_dim=32)
    facts, thought = _without_memory(SFT(str(path), tuner()), 512)
    real = SFT(str(path), tuner())
    real.build("bf16-mixed")
    with torch.autocast("cpu", torch.bfloat16):
        measured = measure_layers(real, layers_of(real.net.model), torch.device("cpu"))
    assert thought.layers == pytest.approx(measured.layers, rel=0.02)
    assert thought.inputs == measured.inputs and thought.products == pytest.approx(measured.products, rel=0.02)
    assert facts.weights == sum(p.numel() * p.element_size() for p in real.net.parameters())


def test_what_stands_frozen_beside_a_model_is_counted(tmp_path: Path) -> None:
    """A reference in full tuning and a teacher, as the built method has them; none where there is none."""
    path = str(save_tiny(tmp_path / "model", "llama", hidden_size=128, intermediate_size=256))
    larger = str(save_tiny(tmp_path / "larger", "llama", hidden_size=128, intermediate_size=256, num_hidden_layers=4))
    plain = {tuner: _without_memory(SFT(path, tuner()), 512)[0].weights for tuner in (Full, LoRA)}
    cases: list[tuple[Any, str | None]] = [
        (DPO(path, Full()), path),
        (Distill(path, Full(), teacher=larger), larger),
        (Distill(path, LoRA(), teacher=larger), larger),
        (DPO(path, LoRA()), None),
        (DPO(path, Full(), reference="cached"), None),
        (Distill(path, LoRA(), teacher=larger, top_k=4), None),
    ]
    for method, beside in cases:
        thought = _without_memory(method, 512)[0].weights - plain[type(method.tuner)]
        assert (thought > 0) == (beside is not None)
        if beside is not None:
            real = type(method)(path, type(method.tuner)(), **({"teacher": larger} if beside == larger else {}))
            assert thought == real.build("bf16-mixed").beside > 0


def test_a_reward_model_is_planned_without_logits(tmp_path: Path) -> None:
    path = str(save_tiny(tmp_path / "model", "llama"))
    facts, _ = _without_memory(Reward(path, Full()), 512)
    real = Reward(path, Full())
    real.build("bf16-mixed")
    assert facts.weights == sum(p.numel() * p.element_size() for p in real.net.parameters())
    assert facts.targets == 1 and facts.fused


def test_a_70b_model_is_planned_in_a_minute_and_2_gb(of_70b: Path) -> None:
    words = ["--model", str(of_70b), "--dry_run", "--plan.devices", "8", "--plan.device_memory_gb", "80", "--json"]
    begin = time.monotonic()
    code = "import sys; from litft.cli.main import main; from litft.engine.metrics import peak_memory_gb; "
    code += "code = main(sys.argv[1:]); print(peak_memory_gb(), file=sys.stderr); sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code, "finetune", "full", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - begin < 60 and float(done.stderr.split()[-1]) < 2
    plan = json.loads(done.stdout)
    ddp, fsdp, offload = plan["ways"]
    # 16 bytes a weight: fp32 weights, gradients and two moments
    assert ddp["predicted_gb"] > 70.5 * 10 and not ddp["fits"]
    parts = fsdp["parts_gb"]
    assert parts["optimizer"] == pytest.approx(70.55 * 8 / 8, rel=0.01)
    assert parts["gradients"] == pytest.approx(70.55 * 4 / 8, rel=0.01)
    assert 70.55 * 4 / 8 < parts["weights"] < 70.55 * 4 / 8 + 15  # its own, and what is gathered at a time
    assert not fsdp["fits"] and offload["fits"] and "cpu_offload true" in plan["advice"]


def test_more_devices_take_less_each_and_advice_holds(tmp_path: Path) -> None:
    LlamaConfig(**LLAMA_70B | {"num_hidden_layers": 8}).save_pretrained(tmp_path)
    method = SFT(str(tmp_path), LoRA())
    took = [plan_devices(method, n, 80, 4096, None).fits[1].bytes for n in (2, 8, 64)]
    assert took[0] > took[1] > took[2]
    plan = plan_devices(SFT(str(tmp_path), Full()), 16, 80, 2048, None)
    assert not plan.fits[0].fits and plan.fits[1].fits
    assert plan.advice == "choose: --trainer.devices 8 --trainer.strategy fsdp on 2 machines of 8"
    small = plan_devices(SFT(str(tmp_path), Full()), 2, 16, 2048, None)
    assert "nothing fits" in small.advice and "litft finetune lora" in small.advice
    lora, qlora = (plan_devices(SFT(str(tmp_path), tuner), 2, 80, 4096, None).fits for tuner in (LoRA(), QLoRA()))
    assert qlora[0].bytes < lora[0].bytes - 6.5e9  # of 7 billion weights in layers, 1.5 bytes each, less what is kept


def test_it_is_asked_for_as_a_whole(of_70b: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "lora", "--model", str(of_70b), "--dry_run", "--plan.devices", "8"]) == 2
    assert "--plan.device_memory_gb GB" in capsys.readouterr().err
    words = ["--dry_run", "--plan.devices", "8", "--plan.device_memory_gb", "80"]
    words += ["--trainer.strategy.tensor_parallel_size", "3"]
    assert main(["finetune", "lora", "--model", str(of_70b), *words]) == 2
    assert "does not divide the run's 8 processes" in capsys.readouterr().err
