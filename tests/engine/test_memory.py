"""The peak that is predicted is the one that a run reaches; what is chosen is the cheapest that fits."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import chat_rows, save_tiny, write_jsonl
from training import train

from litft import Full, LoRA, UserError
from litft.engine.kept import Kept
from litft.engine.memory import Choice, Facts, candidates, cheapest, predict
from litft.engine.room import room_on
from litft.models import native

WIDE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "initializer_range": 0.02,
}
GEMMA = {"query_pre_attn_scalar": 64, "layer_types": ["sliding_attention", "full_attention"] * 4}
EXPERTS = {"moe_intermediate_size": 512, "num_experts": 8}
QUICK: dict[str, dict[str, Any]] = {
    "lora": {"tuner": "lora"},
    "full, several micro-batches a step": {"tuner": "full", "batch": 2048, "step": 8192},
}
MORE: dict[str, dict[str, Any]] = {
    "full": {"tuner": "full"},
    "full, every second layer again": {"tuner": "full", "method": {"recompute": 2}, "batch": 6144},
    "full, compiled": {"tuner": "full", "method": {"compile": "true"}},
    "lora, compiled": {"tuner": "lora", "method": {"compile": "true"}, "batch": 8192},
    "full, all layers again": {"tuner": "full", "method": {"recompute": "full"}, "batch": 8192},
    "full, compiled, all layers again": {"tuner": "full", "method": {"recompute": "full", "compile": "true"}},
    "full, selective": {"tuner": "full", "method": {"recompute": "selective"}},
    "full, moments in 8 bits": {"tuner": "full", "method": {"optimizer": "adamw_8bit"}},
    "lora, fp32": {"tuner": "lora", "precision": "32-true"},
    "full, fp32": {"tuner": "full", "precision": "32-true", "batch": 2048},
    "qlora": {"tuner": "qlora"},
    "lora, smoothed labels": {"tuner": "lora", "method": {"label_smoothing": 0.1}},
    "lora, distilled": {"tuner": "lora", "kind": "Distill"},
    "full, distilled": {"tuner": "full", "kind": "Distill", "batch": 2048},
    "full, two processes": {"tuner": "full", "devices": 2, "batch": 2048, "step": 4096},
    "full, a large vocabulary": {"tuner": "full", "family": "qwen3", "wide": {"vocab_size": 151936}},
    "lora, gemma2": {"tuner": "lora", "family": "gemma2", "wide": GEMMA, "batch": 6144},
    "lora, all logits at once": {"tuner": "lora", "method": {"fast_loss": False}},
    "lora, experts": {"tuner": "lora", "family": "qwen3_moe", "wide": EXPERTS, "batch": 8192},
    "lora, experts, compiled": {
        "tuner": "lora",
        "family": "qwen3_moe",
        "wide": EXPERTS,
        "batch": 8192,
        "method": {"compile": "true", "balance_experts": 0.0},
    },
    "lora, gpt2": {"tuner": "lora", "family": "gpt2", "wide": {"n_embd": 512, "n_layer": 8, "n_head": 8}},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", chat_rows(1200))


@pytest.mark.skipif(native.compiler() is None, reason="without the arena glibc decides how much memory a process has")
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_predicted_peak_is_within_a_quarter_of_the_measured_one(name: str, rows: Path, tmp_path: Path) -> None:
    run = {**QUICK, **MORE}[name]
    model = save_tiny(tmp_path / "model", run.get("family", "llama"), **{**WIDE, **run.get("wide", {})})
    given = {k: v for k, v in run.items() if k not in ("family", "wide")} | {"model": str(model), "data": str(rows)}
    script = Path(__file__).with_name("memory_run.py")
    done = subprocess.run([sys.executable, str(script), json.dumps(given)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(name, round(found["measured"] / 1e6), round(found["predicted"] / found["measured"], 3))
    assert found["steps"] == 3
    assert found["measured"] > 500e6, "too small to tell"
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.25)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*QUICK, *MORE])
def test_predicted_peak_on_a_gpu_is_within_15_percent(name: str, rows: Path, tmp_path: Path) -> None:
    run = {**QUICK, **MORE}[name]
    if run.get("devices", 1) > 1:
        pytest.skip("one GPU")
    model = save_tiny(tmp_path / "model", run.get("family", "llama"), **{**WIDE, **run.get("wide", {})})
    given = {k: v for k, v in run.items() if k not in ("family", "wide")} | {"model": str(model), "data": str(rows)}
    script = Path(__file__).with_name("memory_run.py")
    command = [sys.executable, str(script), json.dumps(given | {"accelerator": "gpu"})]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.15)


MEASURED = Kept([30e3] * 30, [11e3] * 30, [2.3e3] * 30, 4.6e3, 269e6)
FACTS = Facts(
    weights=538_000_000,
    layer=14_000_000,
    loading=270_000_000,
    learning=134_500_000,
    gradients=538_000_000,
    moments=8.0,
    small=35_000,
    head=28_300_000,
    head_learns=True,
    tied=True,
    vocabulary=49152,
    item=2,
    tokens=8192,
    targets=4096,
    several=False,
    buckets=False,
    distributions=0,
    fused=True,
    experts=False,
    compiled=False,
    trains_base=True,
    device="cpu",
)


def peak(facts: Facts, choice: Choice) -> float:
    return predict(MEASURED, facts, choice)["peak"]


def test_each_way_of_saving_saves() -> None:
    plain = peak(FACTS, Choice())
    assert plain > peak(FACTS, Choice(8)) > peak(FACTS, Choice(2)) > peak(FACTS, Choice("full"))
    assert plain > peak(FACTS, Choice("selective")) > peak(FACTS, Choice("full"))
    assert plain - peak(FACTS, Choice(small_states=True)) == pytest.approx(134.5e6 * (8 - 2.03), rel=0.01)
    cuda = replace(FACTS, device="cuda")
    assert peak(cuda, Choice("full", "activations")) < peak(cuda, Choice("full"))
    assert peak(cuda, Choice("full", "parameters")) < peak(cuda, Choice("full")) - 1.5e9


@pytest.mark.parametrize("room_gb", [20.0, 9.0, 7.0, 5.0, 3.5])
def test_the_cheapest_that_fits_is_chosen(room_gb: float) -> None:
    options = candidates(FACTS, "auto", "auto", None)
    choice, parts = cheapest(MEASURED, FACTS, room_gb * 1e9, options)
    assert parts["peak"] <= room_gb * 1e9
    before = [other for _, other in options][: [other for _, other in options].index(choice)]
    assert all(peak(FACTS, other) > room_gb * 1e9 for other in before)
    assert (choice == Choice()) == (room_gb == 20.0)


@pytest.mark.parametrize("trains_base", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_exact_ways_come_before_those_that_round(trains_base: bool, device: str) -> None:
    facts = replace(FACTS, trains_base=trains_base, device=device)
    rounds = [choice.small_states for _, choice in candidates(facts, "auto", "auto", None)]
    assert rounds == sorted(rounds) and set(rounds) == {False, True}


def test_what_the_user_says_stays() -> None:
    assert {c for _, c in candidates(FACTS, "full", "none", False)} == {Choice("full")}
    assert {c.recompute for _, c in candidates(FACTS, 3, "auto", None)} == {3}
    nothing_fits, _ = cheapest(MEASURED, FACTS, 1e9, candidates(FACTS, "auto", "auto", None))
    assert nothing_fits == Choice("full", "none", True)


def test_a_container_and_the_processes_beside_bound_the_room() -> None:
    import torch

    cpu = torch.device("cpu")
    assert 0 < room_on(cpu, 2) == pytest.approx(room_on(cpu) / 2, rel=0.05)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recompute": 0}, "--model.recompute 0"),
        ({"memory_gb": 0.0}, "--model.memory_gb"),
        ({"offload": "activations", "recompute": 2}, "leave --model.recompute out"),
        ({"offload": "parameters"}, "the run is on the CPU"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    options: dict[str, Any], words: str, tiny_llama: Path, rows: Path
) -> None:
    with pytest.raises(UserError, match=words):
        train(tiny_llama, rows, method=options, trainer={"max_steps": 1})


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process of its own, which holds nothing yet."""
    monkeypatch.setattr("litft.methods.building.resident", lambda: 0.0)


@pytest.mark.usefixtures("fresh")
def test_a_run_that_lacks_memory_recomputes_and_gives_the_same_weights(tmp_path: Path, rows: Path) -> None:
    model = save_tiny(tmp_path / "model", **{**WIDE, "num_hidden_layers": 4, "vocab_size": 384})
    step = {"tokens_per_step": 1024, "trainer": {"max_steps": 2}}
    plain = train(model, rows, tuner=Full(), method={"recompute": "none", "optimizer": "adamw"}, **step)
    needed = plain.method.memory.total / 1e9
    tight = train(model, rows, tuner=Full(), method={"memory_gb": needed * 0.97, "optimizer": "adamw"}, **step)
    assert tight.method.memory.choice.recompute != "none"
    assert tight.method.memory.fits
    assert tight.losses == plain.losses
    short = train(model, rows, tuner=LoRA(), method={"memory_gb": 0.05}, **step)
    assert not short.method.memory.fits
    assert "tokens_per_batch 5" in str(short.method.memory)


@pytest.mark.usefixtures("fresh")
def test_moments_in_8_bits_are_taken_only_where_nothing_exact_fits(tmp_path: Path, rows: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = save_tiny(tmp_path / "model", **{**WIDE, "num_hidden_layers": 4, "vocab_size": 384})
    step = {"tokens_per_step": 256, "trainer": {"max_steps": 1}}
    full = train(model, rows, tuner=Full(), method={"recompute": "full", "optimizer": "adamw"}, **step)
    needed = full.method.memory.total / 1e9
    tight = train(model, rows, tuner=Full(), method={"memory_gb": needed * 0.9, "optimizer": "auto"}, **step)
    assert tight.method.memory.choice.small_states
    assert tight.method.optimizer_name == "adamw_8bit"
    assert "8 bits" in str(tight.method.memory)
