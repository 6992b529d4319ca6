"""The same training on one process and on several, however they share weights, rows and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_in
from tiny import chat_rows, save_tiny, write_jsonl
from training import difference, train

import litft

QUICKSTART = Path(__file__).parent.parent / "tutorials" / "data" / "quickstart.jsonl"
SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "clip": 1.0}
ADAMW: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-3, "clip": 1.0, "weight_decay": 0.1}
METHODS = {"sgd": SGD, "adamw": ADAMW}
TOLERANCE = {"sgd": 1e-5, "adamw": 1e-4}
TUNERS: dict[str, Any] = {
    "full": ("Full", {}),
    "lora": ("LoRA", {"r": 4}),
    "nf4": ("QLoRA", {"r": 4}),
    "int8": ("QLoRA", {"r": 4, "quant": "int8"}),
    "rows": ("LoRA", {"r": 4, "trainable_rows": [1, 2]}),
    "adapted head": ("LoRA", {"r": 4, "targets": ["q_proj", "lm_head"]}),
    "learning head": ("LoRA", {"r": 4, "modules_to_save": ["lm_head"]}),
}
IN_TWO: dict[str, Any] = {
    "ddp": {},
    "fsdp": {"fsdp": {}},
    "fsdp, gradients held": {"fsdp": {"hold_gradients": True, "reshard_after_forward": False}},
    "fsdp, offload": {"fsdp": {"cpu_offload": True}},
    "tensor": {"fsdp": {"tensor_parallel_size": 2}},
    "context": {"fsdp": {"context_parallel_size": 2}},
}
IN_FOUR: dict[str, Any] = {
    "fsdp of 4": {"fsdp": {}},
    "fsdp x replicate": {"fsdp": {"replicate": 2}},
    "fsdp x tensor": {"fsdp": {"tensor_parallel_size": 2}},
    "tensor x context": {"fsdp": {"tensor_parallel_size": 2, "context_parallel_size": 2}},
    "context of 4, keys repeated": {"fsdp": {"context_parallel_size": 4}},
}
CASES = [(how, tuner, optimizer) for how in IN_TWO for tuner in ("full", "lora") for optimizer in METHODS]
CASES += [(how, tuner, "adamw") for how in ("ddp", "fsdp") for tuner in ("nf4", "int8")]
CASES += [(how, tuner, "adamw") for how in IN_FOUR for tuner in ("full", "lora")]
CASES += [(how, tuner, "sgd") for how in ("fsdp", "tensor") for tuner in ("rows", "adapted head", "learning head")]
FAMILIES = ("qwen3", "gemma2", "qwen2")  # norms of heads; soft caps and windows; biases and tied embeddings
OTHERS = [(how, family) for how in ("fsdp", "tensor", "context") for family in FAMILIES]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every job of a family has in common: rows of which the last step has too few for all processes."""
    folder = tmp_path_factory.mktemp("many")
    rows = write_jsonl(folder / "rows.jsonl", chat_rows(30, 0))
    val = write_jsonl(folder / "val.jsonl", chat_rows(5, 1))
    models = {family: str(save_tiny(folder / family, family)) for family in ("llama", *FAMILIES)}
    plan = {"rows": str(rows), "val": str(val), "tokens_per_step": 500, "tokens_per_batch": 200}
    return {family: {"model": model, **plan} for family, model in models.items()}


def job(common: dict[str, Any], tuner: str, optimizer: str, family: str = "llama") -> dict[str, Any]:
    limits = {"val_check_interval": 2, "max_epochs": 1}
    return {**common[family], "tuner": TUNERS[tuner], "method": METHODS[optimizer], "trainer": limits}


@pytest.fixture(scope="module")
def straight(common: dict[str, Any]) -> dict[str, Any]:
    """One process."""
    found = {}
    jobs = {("llama", tuner, optimizer): job(common, tuner, optimizer) for _, tuner, optimizer in CASES}
    jobs |= {(family, "lora", "sgd"): job(common, "lora", "sgd", family) for family in FAMILIES}
    jobs |= {(family, "full", "sgd"): job(common, "full", "sgd", family) for family in FAMILIES}
    torch.set_num_threads(1)
    for name, options in jobs.items():
        cls, arguments = options.pop("tuner")
        found[name] = train(tuner=getattr(litft, cls)(**arguments), **options)
    return found


@pytest.fixture(scope="module")
def several(common: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two processes, and four."""
    jobs: dict[int, dict[str, Any]] = {2: {}, 4: {}}
    for how, tuner, optimizer in CASES:
        options = job(common, tuner, optimizer) | (IN_TWO | IN_FOUR)[how]
        jobs[2 if how in IN_TWO else 4][f"{how}, {tuner}, {optimizer}"] = options
    for how, family in OTHERS:
        for tuner in ("full", "lora"):
            jobs[2][f"{how}, {family}, {tuner}"] = job(common, tuner, "sgd", family) | IN_TWO[how]
    return run_in(2, jobs[2], tmp_path_factory.mktemp("two")) | run_in(4, jobs[4], tmp_path_factory.mktemp("four"))


def same(one: Any, many: dict[str, Any], tolerance: float) -> None:
    assert len(many["losses"]) == len(one.losses) > 3
    assert many["losses"] == pytest.approx(one.losses, rel=1e-5)
    assert many["norms"] == pytest.approx(one.norms, rel=1e-4)
    assert [sorted(step) for step in many["rows"]] == [sorted(step) for step in one.rows] and many["lrs"] == one.lrs
    assert [v["val_loss"] for v in many["val_losses"]] == pytest.approx(
        [v["val_loss"] for v in one.val_losses], rel=1e-5
    )
    assert difference(many["weights"], one.weights) < tolerance
    ranks = [value for name, value in many.items() if name.startswith("rank")]
    for rank in ranks:  # each has the same numbers, and the same weights to the bit
        assert rank["losses"] == many["losses"] and rank["norms"] == many["norms"]
        assert difference(rank["weights"], many["weights"]) == 0


@pytest.mark.parametrize(("how", "tuner", "optimizer"), CASES, ids=str)
def test_several_processes_make_the_steps_of_one(
    how: str, tuner: str, optimizer: str, straight: dict[str, Any], several: dict[str, Any]
) -> None:
    one = straight["llama", tuner, optimizer]
    many = several[f"{how}, {tuner}, {optimizer}"]
    same(one, many, TOLERANCE[optimizer])


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize(("how", "family"), OTHERS, ids=str)
def test_other_families_too(
    how: str, family: str, tuner: str, straight: dict[str, Any], several: dict[str, Any]
) -> None:
    same(straight[family, tuner, "sgd"], several[f"{how}, {family}, {tuner}"], TOLERANCE["sgd"])


def test_each_process_holds_its_part(straight: dict[str, Any], several: dict[str, Any]) -> None:
    one = straight["llama", "full", "adamw"].held
    # tensor parallelism leaves embedding and head whole, which are half of a model as small as this
    most = {"fsdp": 0.55, "tensor": 0.8, "fsdp of 4": 0.3, "fsdp x tensor": 0.4, "fsdp x replicate": 0.55}
    for how, share in most.items():
        many = several[f"{how}, full, adamw"]
        for rank in range(2 if how in IN_TWO else 4):
            for what in ("weights", "moments"):
                assert many[f"rank{rank}"]["held"][what] < share * one[what], (how, what)


@pytest.mark.slow
def test_the_default_model_makes_the_same_steps(tmp_path: Path) -> None:
    """SmolLM2-135M in fp32, full tuning: one process, ddp, fsdp."""
    from litft.models.alias import DEFAULT_MODEL

    plan = {"rows": str(QUICKSTART), "tokens_per_step": 500, "tokens_per_batch": 500, "model": DEFAULT_MODEL}
    plan |= {"method": {"optimizer": "adamw", "lr": 1e-4, "clip": 1.0}, "trainer": {"max_steps": 3}}
    one = train(**plan)
    jobs = {"ddp": dict(plan), "fsdp": plan | {"fsdp": {}}}
    for many in run_in(2, jobs, tmp_path).values():
        assert many["losses"] == pytest.approx(one.losses, rel=1e-5)
        assert many["norms"] == pytest.approx(one.norms, rel=1e-4)
        assert difference(many["weights"], one.weights) < 1e-4
    assert one.losses[2] < one.losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_loading_and_writing_take_no_copies(tuner: str, tmp_path: Path) -> None:
    """Four ranks: the model once on the host (and 0.3), and no more than a file's worth beside a part to write it."""
    from extensions.benchmark.loading import measure

    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 20}
    path = save_tiny(tmp_path / "model", "llama", **sizes, initializer_range=0.02)
    found = measure(str(path), tuner, 4, "bf16-mixed", first_pass=False)
    assert found["copy"] > 4e8
    assert found["load"] < 1.3 * found["copy"], found
    assert found["held"] < 0.3 * found["copy"]
    assert found["write"] < found["largest"] + 300e6, found
