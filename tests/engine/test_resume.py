"""A run that was interrupted and resumed ends bitwise where the straight one ends, on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import Trace, assert_same_run, last, metrics, resave, start
from tiny import chat_rows, write_jsonl

from litft.engine.checkpoint_files import newest


def in_pieces(folder: Path, model: Path, data: Path, stops: list[int], how: str = "signal", **options: object) -> list:
    """The run, ended after each of `stops` and gone on with; the traces of its pieces."""
    traces = []
    for index, stop in enumerate([*stops, None]):
        trace, *_ = start(folder, model, data, stop_at=stop, how=how, resume=index > 0, **options)
        traces.append(trace)
    return traces


def assert_one_order(straight: Trace, pieces: list[Trace]) -> None:
    together: dict[int, list[int]] = {}
    rates: dict[int, float] = {}
    for trace in pieces:
        together |= trace.rows
        rates |= trace.lrs
    assert together == straight.rows
    assert rates == straight.lrs


CASES = {
    "middle of an epoch": {"steps": 7, "stops": [4]},
    "after the first step": {"steps": 6, "stops": [1]},
    "in the last step": {"steps": 6, "stops": [6]},
    "validation at the same step": {"steps": 7, "stops": [3], "val_every": 3},
    "validation one step later": {"steps": 7, "stops": [2], "val_every": 3},
    "twice": {"steps": 8, "stops": [3, 6]},
    "power cut, two steps after the checkpoint": {
        "steps": 8,
        "stops": [5],
        "how": "power cut",
        "checkpoints": {"every_steps": 3},
    },
    "two workers": {"steps": 7, "stops": [4], "workers": 2},
    "padded rows": {"steps": 6, "stops": [3], "packing": False},
    "patience": {"steps": 8, "stops": [4], "val_every": 2, "patience": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_f1_resumed_is_bitwise_the_straight_run(case: str, tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    options = dict(CASES[case])
    stops, how = options.pop("stops"), options.pop("how", "signal")
    straight, *_ = start(tmp_path / "a", tiny_llama, chats, **options)
    pieces = in_pieces(tmp_path / "b", tiny_llama, chats, stops, how, **options)
    assert_one_order(straight, pieces)
    assert_same_run(tmp_path / "a", tmp_path / "b")


@pytest.fixture(scope="module")
def three_epochs(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, chats: Path) -> tuple[Path, Trace, list]:
    """A straight run: its folder, its trace, and the steps of each of its epochs."""
    folder = tmp_path_factory.mktemp("three-epochs")
    trace, _, trainer = start(folder, tiny_llama, chats, epochs=3, val_every=5, tokens_per_step=155)
    return folder, trace, [len(trainer.datamodule.plan.steps(epoch)) for epoch in range(3)]


@pytest.mark.parametrize("where", ["end", "start", "middle", "end and middle"])
def test_f1_epochs_of_different_lengths(
    where: str, tmp_path: Path, tiny_llama: Path, chats: Path, three_epochs: tuple[Path, Trace, list]
) -> None:
    folder, straight, lengths = three_epochs
    assert len(set(lengths)) > 1, lengths
    first, second = lengths[0], lengths[0] + lengths[1]
    stops = {"end": [first], "start": [first + 1], "middle": [first + 2], "end and middle": [first, second - 1]}[where]
    pieces = in_pieces(tmp_path / "b", tiny_llama, chats, stops, epochs=3, val_every=5, tokens_per_step=155)
    assert len(straight.rows) == sum(lengths)
    assert_one_order(straight, pieces)
    assert_same_run(folder, tmp_path / "b")


@pytest.mark.parametrize("tuner", ["full", "qlora"])
def test_f9_dropout_goes_on_where_it_was(tuner: str, tmp_path: Path, gpt2_with_dropout: Path, chats: Path) -> None:
    straight, *_ = start(tmp_path / "a", gpt2_with_dropout, chats, tuner=tuner, steps=6)
    pieces = in_pieces(tmp_path / "b", gpt2_with_dropout, chats, [2], tuner=tuner, steps=6)
    assert_one_order(straight, pieces)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_f9_what_only_looks_changes_nothing(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    plain, *_ = start(tmp_path / "a", tiny_llama, chats, steps=5, val_every=0, checkpoints={"final": "last"})
    looked, *_ = start(
        tmp_path / "b",
        tiny_llama,
        chats,
        steps=5,
        val_every=1,
        samples=2,
        checkpoints={"final": "last", "every_steps": 1, "keep_last": 5},
    )
    assert looked.rows == plain.rows
    assert [row["loss"] for row in metrics(tmp_path / "a")] == [row["loss"] for row in metrics(tmp_path / "b")]
    names = ("adapter_model.safetensors",) * 2
    one, two = ((tmp_path / f / "final" / n).read_bytes() for f, n in zip("ab", names, strict=True))
    assert one == two


def test_d2_resume_keeps_the_adapter_and_its_optimizer(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    straight, *_ = start(tmp_path / "a", tiny_llama, chats, steps=4)
    _, second = in_pieces(tmp_path / "b", tiny_llama, chats, [2], steps=4)
    assert second.trainable == straight.trainable > 0
    assert metrics(tmp_path / "a")[3]["loss"] == metrics(tmp_path / "b")[3]["loss"]
    state = last(tmp_path / "b")
    assert all(".lora_" in name for name in state["state_dict"])
    moments = state["optimizer_states"][0]["state"]
    assert {float(m["step"]) for m in moments.values()} == {4.0}
    assert sum(m["exp_avg"].numel() for m in moments.values()) == straight.trainable


def analytic_lr(step: int, lr: float, total: int, warmup: int) -> float:
    """Warmup and cosine, written out."""
    import math

    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    return lr * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


def test_e4_the_schedule_follows_the_new_command(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    first, *_ = start(tmp_path / "a", tiny_llama, chats, steps=4, lr=1e-3, warmup=2, betas=(0.9, 0.99))
    options = {"steps": 9, "lr": 4e-3, "warmup": 2, "betas": (0.8, 0.99), "weight_decay": 0.1}
    second, _, trainer = start(tmp_path / "a", tiny_llama, chats, resume=True, **options)
    assert first.lrs == pytest.approx({s: analytic_lr(s, 1e-3, 4, 2) for s in range(4)})
    assert second.lrs == pytest.approx({s: analytic_lr(s, 4e-3, 9, 2) for s in range(4, 9)})
    groups = trainer.optimizers[0].param_groups
    assert all(group["betas"] == (0.8, 0.99) for group in groups)
    assert any(group["weight_decay"] == 0.1 for group in groups)


def test_e4_more_epochs_after_the_end(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    straight, *_ = start(tmp_path / "a", tiny_llama, chats, epochs=2, schedule="constant", warmup=0, val_every=0)
    one, *_ = start(tmp_path / "b", tiny_llama, chats, epochs=1, schedule="constant", warmup=0, val_every=0)
    two, *_ = start(
        tmp_path / "b", tiny_llama, chats, epochs=2, schedule="constant", warmup=0, val_every=0, resume=True
    )
    assert_one_order(straight, [one, two])
    a, b = last(tmp_path / "a"), last(tmp_path / "b")
    assert all((a["state_dict"][k] == b["state_dict"][k]).all() for k in a["state_dict"])


def test_resume_of_a_finished_run_writes_its_result_again(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    import shutil

    _, outcome, _ = start(tmp_path / "a", tiny_llama, chats, steps=4, val_every=2, samples=2)
    before = {p.name: p.read_bytes() for p in (tmp_path / "a" / "final").iterdir()}
    shutil.rmtree(tmp_path / "a" / "final")
    trace, again, _ = start(tmp_path / "a", tiny_llama, chats, steps=4, val_every=2, samples=2, resume=True)
    assert not trace.rows
    assert {p.name: p.read_bytes() for p in (tmp_path / "a" / "final").iterdir()} == before
    assert (again.losses_before, again.losses_after) == (outcome.losses_before, outcome.losses_after)
    assert again.answers == outcome.answers and len(again.answers) == 2
    assert len(json.loads((tmp_path / "a" / "run.json").read_text())["answers"]) == 2


def test_max_time_is_a_commands_own(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    start(tmp_path / "a", tiny_llama, chats, steps=6, stop_at=2, trainer={"max_time": "00:00:10:00"})
    file = newest(tmp_path / "a" / "checkpoints")
    assert file is not None
    state = torch.load(file, weights_only=True)
    state["callbacks"]["Timer"]["time_elapsed"]["train"] = 3600.0  # an hour used by the command before
    resave(state, file)
    trace, outcome, _ = start(
        tmp_path / "a", tiny_llama, chats, steps=6, resume=True, trainer={"max_time": "00:00:10:00"}
    )
    assert sorted(trace.rows) == [2, 3, 4, 5] and not outcome.stopped


def test_i6_the_held_out_rows_stay_the_same_after_resume(
    tmp_path: Path, tiny_llama: Path, tiny_folder: Callable[..., Path]
) -> None:
    rows = chat_rows(40)
    data = write_jsonl(tmp_path / "twice.jsonl", [*rows, *rows[:10]])  # ten prompts stand in it twice

    def sides(trainer: object) -> tuple[set[int], set[int]]:
        data = trainer.datamodule  # type: ignore[attr-defined]
        return set(data.selection.prompts().tolist()), set(data.val_selections["val"].prompts().tolist())

    *_, first = start(tmp_path / "a", tiny_llama, data, steps=6, stop_at=3)
    *_, second = start(tmp_path / "a", tiny_llama, data, steps=6, resume=True)
    assert sides(first) == sides(second)
    assert not sides(first)[0] & sides(first)[1]
