"""Preference methods are the same training however steps are cut, on one process or two, interrupted or not."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from preferences import files, labelled_rows, pair_rows, save_model
from processes import run_in
from runs import assert_same_run, last, metrics, start
from tiny import chat_rows, write_jsonl
from training import Trace, difference, train

import litft

METHODS: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "DPO"},
    "dpo, sorted": {"kind": "DPO", "method": {"loss_type": ["aot", "aot_unpaired"], "label_smoothing": 0.1}},
    "dpo, following": {"kind": "DPO", "method": {"sync_reference": 2}},
    "dpo, mixed": {"kind": "DPO", "method": {"loss_type": ["ipo", "sft"], "loss_weights": [0.01, 1.0]}},
    "dpo, cached": {"kind": "DPO", "method": {"reference": "cached"}},
    "kto": {"kind": "KTO", "method": {"undesirable_weight": 2.0}},
    "orpo": {"kind": "ORPO"},
    "orpo, prompts too": {"kind": "ORPO", "method": {"nll_on": "all"}},
    "cpo": {"kind": "CPO"},
    "simpo": {"kind": "SimPO"},
    "reward": {"kind": "Reward", "method": {"centring": 0.01}},
    "distill": {"kind": "Distill", "method": {"ce_share": 0.3, "loss_type": "reverse_kl"}},
    "distill, own answers": {"kind": "Distill", "method": {"on_policy": 0.5, "ce_share": 0.3, "max_new_tokens": 20}},
    "distill, top_k": {"kind": "Distill", "method": {"top_k": 16}},
}
AHEAD = ("dpo, cached", "distill, top_k")
"""Computed before training; on two processes with other limits, so that nothing is on disk yet."""
TUNERS: dict[str, Any] = {
    "full": ("Full", {}),
    "lora": ("LoRA", {"r": 4}),
    "qlora": ("QLoRA", {"r": 4}),
}
CUTS: dict[str, dict[str, Any]] = {
    "small parts": {"tokens_per_batch": 150},
    "padded": {"packing": False, "tokens_per_batch": 300},
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp": {"fsdp": {}},
    "tensor": {"fsdp": {"tensor_parallel_size": 2}},
    "context": {"fsdp": {"context_parallel_size": 2}},
}
FEW = "ddp, few rows"
"""Steps of one row or two, so that a process has none to itself."""
PLAIN = [
    *(("dpo", "lora", "ddp"), ("dpo", "full", "fsdp"), ("dpo, sorted", "lora", "fsdp"), ("kto", "full", "ddp")),
    *(("kto", "lora", "fsdp"), ("orpo, prompts too", "full", "fsdp"), ("simpo", "qlora", "ddp")),
    *(("dpo, following", "full", "ddp"), ("cpo", "lora", "ddp")),
    *(("dpo, sorted", "full", FEW), ("kto", "lora", FEW), ("orpo, prompts too", "lora", FEW)),
    *(("distill, own answers", "lora", "ddp"), ("distill, top_k", "lora", "ddp")),
    *(("dpo, cached", "lora", "ddp"), ("dpo, cached", "full", FEW)),
]
PLAIN += [("dpo, sorted", "full", "tensor"), ("kto", "lora", "context"), ("orpo, prompts too", "lora", "context")]


def can_be(name: str, tuner: str, how: str) -> bool:
    """Not refused (`litft.methods.refusals`)."""
    refused = (
        name == "dpo, following"
        or (tuner == "qlora" and how == "tensor")
        or (how == "context" and name.partition(",")[0] in ("reward", "distill"))
    )
    return how == "ddp" or not refused


ALL = [case for case in itertools.product(METHODS, TUNERS, STRATEGIES) if can_be(*case)]


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The model, and the rows of either kind: of the last step there are too few for all processes' micro-batches."""
    folder = tmp_path_factory.mktemp("common")
    rows = files(folder, 25, 45) | {"chats": write_jsonl(folder / "chats.jsonl", chat_rows(30, seed=5))}
    val = {
        "pairs": write_jsonl(folder / "val-pairs.jsonl", pair_rows(5, seed=3)),
        "labelled": write_jsonl(folder / "val-labelled.jsonl", labelled_rows(5, seed=3)),
        "chats": write_jsonl(folder / "val-chats.jsonl", chat_rows(5, seed=6)),
        "one": write_jsonl(folder / "val-one.jsonl", pair_rows(1, seed=4)),
    }
    teacher = save_model(folder / "teacher", seed=5, num_hidden_layers=3)
    return {"model": str(save_model(folder / "model")), "teacher": str(teacher), "rows": rows, "val": val}


def job(common: dict[str, Any], name: str, tuner: str, **data: Any) -> dict[str, Any]:
    case = METHODS[name]
    kind = getattr(litft, case["kind"]).rows
    taught = {"teacher": common["teacher"]} if case["kind"] == "Distill" else {}
    return {
        "model": common["model"],
        "rows": str(common["rows"][kind]),
        "val": str(common["val"][kind]),
        "kind": case["kind"],
        "tuner": TUNERS[tuner],
        "method": {"optimizer": "sgd", "lr": 0.05, "clip": 1.0, **taught, **case.get("method", {})},
        "trainer": {"max_epochs": 1, "val_check_interval": 2},
        "tokens_per_step": 400,
        "tokens_per_batch": 4096,
        **data,
    }


def few_rows(common: dict[str, Any], name: str) -> dict[str, Any]:
    """Beside steps of few rows, for pairs a validation set of one row."""
    val = {} if METHODS[name]["kind"] == "KTO" else {"val": str(common["val"]["one"])}
    return {"tokens_per_step": 50, "trainer": {"max_steps": 8, "val_check_interval": 4}} | val


def run(options: dict[str, Any]) -> Trace:
    cls, arguments = options["tuner"]
    return train(**{**options, "tuner": getattr(litft, cls)(**arguments)})


@pytest.fixture(scope="module")
def straight(common: dict[str, Any]) -> Any:
    """A method's run with a tuner on one process, each step in one piece; made once."""
    made: dict[tuple[str, str, bool], Trace] = {}

    def get(name: str, tuner: str, few: bool = False) -> Trace:
        if (name, tuner, few) not in made:
            made[name, tuner, few] = run(job(common, name, tuner, **(few_rows(common, name) if few else {})))
        return made[name, tuner, few]

    return get


def same(one: Trace, other: dict[str, Any]) -> None:
    """Losses, norms, figures, of training and of validation, and weights; and they are not nothing."""
    assert len(one.losses) == len(other["losses"]) > 3 and len(one.val_losses) > 1
    assert other["losses"] == pytest.approx(one.losses, rel=1e-5, abs=1e-6)
    assert other["norms"] == pytest.approx(one.norms, rel=1e-4)
    assert [sorted(step) for step in other["rows"]] == [sorted(step) for step in one.rows]
    for mine, theirs in zip(one.figures + one.val_losses, other["figures"] + other["val_losses"], strict=True):
        assert theirs.keys() == mine.keys()
        for name, value in mine.items():
            if name.endswith("rewards/accuracies") and abs(mine[name.replace("accuracies", "margins")]) < 1e-5:
                continue  # which of two equal rewards is the greater is rounding's to say
            assert theirs[name] == pytest.approx(value, rel=1e-4, abs=2e-5, nan_ok=True), name
    assert difference(other["weights"], one.weights) < 1e-5
    assert max(one.norms) > 0.1 and all(map(math.isfinite, one.losses))


def every_cut() -> Iterator[Any]:
    """Each method with one of the two in plain pytest."""
    for i, name in enumerate(METHODS):
        for j, cut in enumerate(CUTS):
            case = name, ("full", "lora")[i % 2], cut
            yield pytest.param(*case, id="-".join(case), marks=pytest.mark.slow if (i // 2 + j) % 2 else ())


@pytest.mark.parametrize(("name", "tuner", "cut"), list(every_cut()))
def test_another_cut_is_the_same_training(
    name: str, tuner: str, cut: str, common: dict[str, Any], straight: Any
) -> None:
    one, other = straight(name, tuner), run(job(common, name, tuner, **CUTS[cut]))
    assert set(one.micro_batches) == {1} and max(other.micro_batches) > 1
    same(one, other.state())


# ---- two processes


@pytest.fixture(scope="module")
def in_two(common: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two gloo processes make of some of the cases, all of them in one go."""
    made: dict[str, dict[str, Any]] = {}

    def get(cases: list[tuple[str, str, str]], wanted: tuple[str, str, str]) -> dict[str, Any]:
        if ", ".join(wanted) not in made:
            jobs = {
                ", ".join((name, tuner, how)): job(common, name, tuner, tokens_per_batch=200)
                | (few_rows(common, name) if how == FEW else STRATEGIES[how])
                | ({"max_length": 300} if name in AHEAD else {})
                for name, tuner, how in cases
            }
            made.update(run_in(2, jobs, tmp_path_factory.mktemp("two")))
        return made[", ".join(wanted)]

    return get


def same_on_every_rank(one: Trace, two: dict[str, Any]) -> None:
    same(one, two)
    for rank in (two["rank0"], two["rank1"]):
        assert rank["losses"] == two["losses"] and difference(rank["weights"], two["weights"]) == 0


@pytest.mark.parametrize(("name", "tuner", "how"), PLAIN, ids=str)
def test_two_processes_make_the_steps_of_one(name: str, tuner: str, how: str, straight: Any, in_two: Any) -> None:
    one = straight(name, tuner, how == FEW)
    assert how != FEW or 1 in map(len, one.rows)
    same_on_every_rank(one, in_two(PLAIN, (name, tuner, how)))


def test_g7_what_two_processes_compute_ahead_is_live(straight: Any, in_two: Any) -> None:
    two = in_two(PLAIN, ("dpo, cached", "lora", "ddp"))
    assert two["losses"] == pytest.approx(straight("dpo", "lora").losses, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tuner", "how"), [case for case in ALL if case not in PLAIN], ids=str)
def test_every_method_tuner_and_strategy(name: str, tuner: str, how: str, straight: Any, in_two: Any) -> None:
    same_on_every_rank(straight(name, tuner), in_two([c for c in ALL if c not in PLAIN], (name, tuner, how)))


# ---- interrupted


SLOWER = ("dpo, lora, following", "dpo, full, cached", "orpo, qlora")
RESUMED: dict[str, dict[str, Any]] = {
    "dpo, lora": {"method": litft.DPO, "tuner": "lora"},
    "dpo, lora, following": {"method": litft.DPO, "tuner": "lora", "sync_reference": 2},
    "dpo, full, following": {"method": litft.DPO, "tuner": "full", "sync_reference": 2},
    "dpo, full, cached": {"method": litft.DPO, "tuner": "full", "reference": "cached"},
    "dpo, continued, cached": {"method": litft.DPO, "tuner": "lora", "reference": "cached"},
    "kto, lora": {"method": litft.KTO, "tuner": "lora"},
    "orpo, qlora": {"method": litft.ORPO, "tuner": "qlora"},
    "distill, own answers": {"method": litft.Distill, "tuner": "lora", "on_policy": 0.5, "max_new_tokens": 20},
}
STEPS: dict[str, Any] = {"steps": 6, "tokens_per_step": 400, "tokens_per_batch": 150, "val_every": 2, "lr": 1e-3}


@pytest.fixture(scope="module")
def adapter(common: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "final"
    run(job(common, "dpo", "lora")).method.save(folder)
    return folder


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOWER else ()) for c in RESUMED])
def test_f1_interrupted_is_straight(
    case: str, common: dict[str, Any], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a step; what was computed ahead is lost too, and computed again."""
    options = {**STEPS, **RESUMED[case]}
    cache = tmp_path / "cache"
    monkeypatch.setenv("LITFT_CACHE", str(cache))
    model = adapter if "continued" in case else Path(common["model"])
    data = common["rows"][options["method"].rows]
    options |= {"teacher": common["teacher"]} if "distill" in case else {}
    start(tmp_path / "straight", model, data, **options)
    start(tmp_path / "stopped", model, data, stop_at=3, how="signal within", **options)
    assert last(tmp_path / "stopped")["global_step"] == 3
    assert ("reference" in last(tmp_path / "stopped")) == ("following" in case)
    shutil.rmtree(cache / "computed", ignore_errors=True)
    start(tmp_path / "stopped", model, data, resume=True, **options)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    assert metrics(tmp_path / "straight")[0]["step"] == "0"


# ---- metrics.csv


@pytest.mark.parametrize("name", ["dpo", "kto", "orpo"])
def test_metrics_have_trls_names(name: str, common: dict[str, Any], tmp_path: Path) -> None:
    kind = METHODS[name]["kind"]
    data = common["rows"]["labelled" if name == "kto" else "pairs"]
    start(tmp_path, Path(common["model"]), data, **STEPS, method=getattr(litft, kind))
    rewards = {f"rewards/{what}" for what in ("chosen", "rejected", "margins")} | {"logps/chosen", "logps/rejected"}
    names = {
        "dpo": rewards | {"rewards/accuracies"},
        "kto": rewards | {"kl"},
        "orpo": rewards | {"rewards/accuracies", "nll_loss", "log_odds_chosen", "log_odds_ratio"},
    }[name]
    records = metrics(tmp_path)
    assert names | {f"val_{n}" for n in names} <= set(records[0])
    for record in records:
        step = int(record["step"])
        for n in names:
            assert (record[n] != "") == (step > 0), (step, n)
            assert (record[f"val_{n}"] != "") == (step % 2 == 0), (step, n)
    if name == "dpo":
        first, final = records[0], records[-1]
        assert float(first["val_loss"]) == pytest.approx(math.log(2), abs=1e-6)
        assert float(first["val_rewards/margins"]) == 0 != float(final["val_rewards/margins"])
        assert float(final["rewards/margins"]) == pytest.approx(
            float(final["rewards/chosen"]) - float(final["rewards/rejected"]), abs=1e-6
        )


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
