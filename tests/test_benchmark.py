"""The floor, and a race from its grid to its table."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from tiny import chat_rows, tiny_model, write_jsonl

from extensions.benchmark import ablation, job, race
from litft import LoRA
from litft.engine import floor


def test_the_floor_counts_the_products_that_there_are() -> None:
    """Its operations are those that torch's own counter sees, for a trained row whole and one document."""
    from torch.utils.flop_counter import FlopCounterMode

    model, tokens = tiny_model("llama", hidden_size=64, intermediate_size=128), 64
    found = floor.measure(model, tokens, tokens, tokens, torch.device("cpu"), torch.float32)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False).logits.sum().backward()
    attention = 2 * 6.0 * 4 * 16 * tokens * tokens  # counted whole by torch, half of it is masked
    # the first layer's input asks for no gradient of itself, nor is the loss's product with it missing
    assert found.operations == pytest.approx(counter.get_total_flops() - attention, rel=0.02)
    assert set(found.seconds) == {"blocks", "adapters", "head", "attention"}
    assert 0 < found.share(10 * found.total) == pytest.approx(0.1)


def test_frozen_weights_have_a_lower_floor() -> None:
    sizes = 64, 32, 40, torch.device("cpu"), torch.float32
    full = floor.measure(tiny_model("llama"), *sizes)
    model = tiny_model("llama")
    LoRA(r=2).apply(model)
    lora = floor.measure(model, *sizes)
    assert lora.operations < full.operations
    assert lora.seconds["adapters"] > full.seconds["adapters"] == 0


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj"]])
def test_an_adapted_head_is_still_the_head(targets: list[str]) -> None:
    sizes = 64, 8, 40, torch.device("cpu"), torch.float32
    model = tiny_model("llama", tie_word_embeddings=False)
    plain = floor.measure(tiny_model("llama"), *sizes)
    LoRA(r=2, targets=targets, **({"modules_to_save": ["lm_head"]} if len(targets) == 1 else {})).apply(model)
    found = floor.measure(model, *sizes)
    assert found.operations < plain.operations * 1.1  # over 8 of 64 tokens still
    assert found.seconds["head"] > 0


def test_models_without_attention_have_a_floor() -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    found = floor.measure(AutoModelForCausalLM.from_config(config), 64, 32, 40, torch.device("cpu"), torch.float32)
    assert found.seconds["attention"] == 0 < found.total


def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny: Path, *words: str) -> tuple[dict, str]:
    """A race of litft alone over tiny rows."""
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(40))
    out = tmp_path / "race.json", tmp_path / "race.md"
    options = ["--model", str(tiny), "--data", str(rows), "--peers", "", "--tokens_per_step", "256", "--tuner", "lora"]
    options += ["--json", str(out[0]), "--markdown", str(out[1]), *words]
    monkeypatch.setenv("PYTHONPATH", str(Path(race.__file__).parents[2]))
    assert race.main(options) == 0
    return json.loads(out[0].read_text()), out[1].read_text()


@pytest.mark.slow
def test_a_race(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: Path) -> None:
    found, text = run(monkeypatch, tmp_path, tiny_llama, "--steps", "3", "--warm_up", "1")
    arm = found["races"]["lora"]["arms"]["litft"]
    assert len(arm["losses"]) == 3 and len(arm["reference"]) == 3
    assert arm["deviation"] < 0.02 and not arm["disqualified"]
    assert arm["tokens_per_s"] > 0 and arm["floor_share"] > 0
    assert arm["packing"] <= 1
    assert "| litft |" in text and "sum of products" in text


def test_an_arm_that_is_off_is_disqualified(monkeypatch: pytest.MonkeyPatch) -> None:
    work = job.Job(arm="litft", model="", rows="")
    there = job.Result(losses=[1.0, 1.021], groups=[[0], [1]], lrs=[1.0, 1.0])
    monkeypatch.setattr(race, "run_arm", lambda job: race.Result(losses=[1.0, 1.0]))
    worst, expected = race.check(work, [there], {})
    assert worst == pytest.approx(0.021) and expected == [1.0, 1.0]
    assert worst > race.TOLERANCE


@pytest.mark.parametrize("losses", [[1.0, math.nan], [math.nan, 1.0], [1.0], []])
def test_losses_that_are_missing_or_not_finite_disqualify(losses: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    there = job.Result(losses=losses, groups=[[0], [1]], lrs=[1.0, 1.0])
    monkeypatch.setattr(race, "run_arm", lambda job: race.Result(losses=[1.0, 1.0]))
    assert race.check(job.Job(arm="litft", model="", rows=""), [there], {})[0] > race.TOLERANCE


def test_grids_of_an_earlier_race_are_taken_over(tmp_path: Path) -> None:
    tried = [{"batch": 1, "tokens_per_s": 5.0, "error": ""}, {"batch": 2, "tokens_per_s": 7.0, "error": ""}]
    earlier = tmp_path / "race.json"
    earlier.write_text(json.dumps({"date": "d", "races": {"full": {"tried": {"trl": tried}}}}))
    assert race.grid_of(str(earlier), "full", "trl") == ({"batch": 2}, tried)
    assert race.grid_of(str(earlier), "lora", "trl") is None
    assert race.grid_of("", "full", "trl") is None


def test_the_ablation_switches_one_technique_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict] = []

    def arm(work: job.Job) -> job.Result:
        seen.append(work.setting)
        return job.Result(seconds=[1.0, 1.0], tokens=[len(seen)] * 2, trained=[1, 1], losses=[1.0])

    monkeypatch.setattr(ablation, "run_arm", arm)
    table = ablation.ablate(job.Job(arm="litft", model="", rows="", tuner="lora"), 1, lambda text: None)
    assert [e["tokens_per_s"] for e in table] == [float(n + 1) for n in range(len(ablation.STEPS))]
    for before, after in itertools.pairwise(seen):
        assert len({k for k in after if after[k] != before.get(k)}) == 1
    assert seen[-1]["compile"] == "true" and seen[-1]["arena"]
    assert "| + compiled layers |" in ablation.report("lora", table)
