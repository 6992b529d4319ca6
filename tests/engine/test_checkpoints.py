"""Checkpoints: what is in them, which are kept, what a broken one does, and what another process can do with them."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same, assert_same_run, last, metrics, resave, start
from tiny import chat_rows, save_tiny, write_jsonl

from litft import SFT
from litft.engine import checkpoint_files
from litft.engine.checkpoint_files import FILE, complete, is_whole, newest, newest_whole
from litft.engine.checkpoints import Checkpoints
from litft.engine.metrics import BadLoss
from litft.errors import UserError


def steps_in(folder: Path) -> list[int]:
    return [int(p.name.removeprefix("step-")) for p in complete(folder / "checkpoints")]


# ---- contents


def test_d5_only_what_is_trained_is_saved(tmp_path: Path, chats: Path) -> None:
    model = save_tiny(tmp_path / "model", hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    start(tmp_path / "a", model, chats, steps=2, val_every=0)
    state = last(tmp_path / "a")
    base = sum(p.stat().st_size for p in model.glob("*.safetensors"))
    trained = sum(t.numel() * t.element_size() for t in state["state_dict"].values())
    assert all(".lora_" in name for name in state["state_dict"])
    assert trained < 0.05 * base
    overhead = 64 * 1024  # random states, loops, names
    assert newest(tmp_path / "a" / "checkpoints").stat().st_size < 3 * trained + overhead  # weights and two moments


@pytest.mark.parametrize("change", ["missing", "renamed"])
def test_d5_a_checkpoint_that_lacks_a_weight_is_refused(
    change: str, tmp_path: Path, tiny_llama: Path, chats: Path
) -> None:
    start(tmp_path / "a", tiny_llama, chats, steps=4, stop_at=2)
    file = newest(tmp_path / "a" / "checkpoints")
    state = torch.load(file, weights_only=True)
    name = next(iter(state["state_dict"]))
    tensor = state["state_dict"].pop(name)
    if change == "renamed":
        state["state_dict"][name.replace("layers.0", "layers.9")] = tensor
    resave(state, file)
    with pytest.raises(UserError, match=r"lora_|layers"):
        start(tmp_path / "a", tiny_llama, chats, steps=4, resume=True)


def plain(value: Any, where: str = "") -> None:
    """Nothing in a checkpoint but tensors and what JSON has, tuples included."""
    if isinstance(value, dict):
        for key, inner in value.items():
            assert type(key) in (str, int), f"{where}: key {key!r}"
            plain(inner, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for inner in value:
            plain(inner, f"{where}[]")
    else:
        assert value is None or type(value) in (bool, int, float, str, torch.Tensor), f"{where}: {type(value)}"


@pytest.mark.parametrize("tuner", ["lora", "qlora", "full"])
def test_f6_checkpoints_hold_plain_types_only(tuner: str, tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    options = {"trainer": {"max_time": "00:01:00:00"}, "patience": 5, "samples": 1, "val_every": 1}
    start(tmp_path / "a", tiny_llama, chats, tuner=tuner, steps=2, **options)
    plain(last(tmp_path / "a"))


class Canary:
    """Unpickled with its code, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.file), "w")


@pytest.mark.parametrize("how", ["reduce", "instantiator"])
def test_j1_a_malicious_checkpoint_is_refused(how: str, tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    start(tmp_path / "a", tiny_llama, chats, steps=4, stop_at=2)
    file = newest(tmp_path / "a" / "checkpoints")
    assert file is not None
    state, canary = torch.load(file, weights_only=True), tmp_path / "canary"
    if how == "reduce":
        state["more"] = Canary(canary)
    else:
        state["hyper_parameters"] = {"_instantiator": "os.system", "path": f"touch {canary}"}
    resave(state, file)
    files = {p: p.read_bytes() for p in (tmp_path / "a").glob("*.*") if p.is_file()}
    with pytest.raises(UserError, match=r"more than plain data|names code to run") as error:
        start(tmp_path / "a", tiny_llama, chats, steps=4, resume=True)
    assert "weights_only" not in str(error.value) and not canary.exists()
    assert {p: p.read_bytes() for p in files} == files  # run.json too
    if how == "reduce":
        torch.load(file, weights_only=False)
        assert canary.exists()  # it would have


SCRIPT = """
import sys
from lightning import Trainer, seed_everything
from litft import SFT, ChatData, LoRA
from litft.engine.checkpoints import Checkpoints

out, model, data, steps, ckpt = sys.argv[1:]
seed_everything(42)
trainer = Trainer(max_steps=int(steps), accelerator="cpu", precision="32-true", logger=False, default_root_dir=out,
                  callbacks=[Checkpoints()], enable_progress_bar=False, num_sanity_val_steps=0)
sft = SFT(model, tuner=LoRA(r=4, dropout=0.2), schedule="constant")
trainer.fit(sft, datamodule=ChatData(data, tokens_per_step=160), ckpt_path=ckpt or None)
"""


def test_f6_a_plain_script_resumes_in_a_fresh_process(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    """`weights_only` is left to torch, which loads tensors and plain types only."""
    (tmp_path / "script.py").write_text(SCRIPT)

    def fit(out: str, steps: int, ckpt: str = "") -> dict[str, Any]:
        words = [tmp_path / "script.py", tmp_path / out, tiny_llama, chats, str(steps), ckpt]
        subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True, timeout=120)
        return last(tmp_path / out)

    straight = fit("a", 6)
    fit("b", 3)
    resumed = fit("b", 6, str(tmp_path / "b" / "checkpoints" / "last" / FILE))
    assert straight["global_step"] == resumed["global_step"] == 6
    assert all(torch.equal(straight["state_dict"][k], resumed["state_dict"][k]) for k in straight["state_dict"])


# ---- which are kept


class ValLosses(SFT):
    """Says the validation losses that a test wants."""

    wanted = (9.0, 3.0, 1.0, 2.0, 4.0)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.val_losses = {"val_loss": self.wanted[self.trainer.global_step]}


def test_f4_best_and_last_are_the_best_and_the_last(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    _, outcome, _ = start(
        tmp_path / "a",
        tiny_llama,
        chats,
        steps=4,
        val_every=1,
        method=ValLosses,
        checkpoints={"every_steps": 1, "keep_last": 1},
    )
    assert (outcome.final_step, outcome.losses_before, outcome.losses_after) == (
        2,
        {"val_loss": 9.0},
        {"val_loss": 1.0},
    )
    assert steps_in(tmp_path / "a") == [2, 4]
    shutil.move(tmp_path / "a", tmp_path / "moved")
    moved = tmp_path / "moved" / "checkpoints"
    states = {name: torch.load(moved / name / FILE, weights_only=True) for name in ("best", "last")}
    assert {name: state["global_step"] for name, state in states.items()} == {"best": 2, "last": 4}
    from safetensors.torch import load_file

    final = load_file(tmp_path / "moved" / "final" / "adapter_model.safetensors")
    saved = [t for _, t in sorted(states["best"]["state_dict"].items())]
    assert len(saved) == len(final)
    assert all(torch.equal(a, b) for a, (_, b) in zip(saved, sorted(final.items()), strict=True))


def test_f4_final_last_takes_the_last(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    options = {"steps": 4, "val_every": 1, "method": ValLosses, "checkpoints": {"final": "last"}}
    _, outcome, _ = start(tmp_path / "a", tiny_llama, chats, **options)
    assert (outcome.final_step, outcome.losses_after) == (4, {"val_loss": 4.0})


def test_f4_without_validation_the_last_is_saved(tmp_path: Path, tiny_llama: Path) -> None:
    few = write_jsonl(tmp_path / "few.jsonl", chat_rows(12))
    _, outcome, _ = start(tmp_path / "a", tiny_llama, few, steps=3)
    assert outcome.final_step == 3 and not outcome.losses_before and not outcome.losses_after
    assert steps_in(tmp_path / "a") == [3]
    assert (tmp_path / "a" / "final" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "a" / "checkpoints" / "best").exists()


def test_the_best_before_a_resume_is_still_the_best(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    options = {"steps": 4, "val_every": 1, "method": ValLosses}
    _, straight, _ = start(tmp_path / "a", tiny_llama, chats, **options)
    start(tmp_path / "b", tiny_llama, chats, stop_at=3, **options)
    _, resumed, _ = start(tmp_path / "b", tiny_llama, chats, resume=True, **options)
    assert (
        (resumed.final_step, resumed.losses_before)
        == (straight.final_step, straight.losses_before)
        == (2, {"val_loss": 9.0})
    )
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_keep_last_keeps_so_many(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    options = {"every_steps": 2, "keep_last": 2}
    start(tmp_path / "a", tiny_llama, chats, steps=7, val_every=0, checkpoints=options)
    assert steps_in(tmp_path / "a") == [6, 7]


@pytest.mark.parametrize("wrong", [{"keep_last": 0}, {"every_steps": 0}])
def test_wrong_numbers_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="at least 1"):
        Checkpoints(**wrong)


# ---- broken ones


def test_f3_killed_while_saving_the_one_before_is_whole(
    tmp_path: Path, tiny_llama: Path, chats: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process ends after half of a checkpoint's bytes."""
    start(tmp_path / "a", tiny_llama, chats, steps=6, val_every=2)
    publish = checkpoint_files.publish

    def half(written: Path, place: Path) -> None:
        if place.name != "step-000004":
            return publish(written, place)
        data = (written / FILE).read_bytes()
        (written / FILE).write_bytes(data[: len(data) // 2])
        raise SystemExit  # ends the thread that writes

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_files, "publish", half)
        options = {"steps": 6, "val_every": 2, "checkpoints": {"every_steps": 2}, "how": "power cut"}
        start(tmp_path / "b", tiny_llama, chats, stop_at=5, **options)
    assert steps_in(tmp_path / "b") == [2]
    assert [p.name for p in (tmp_path / "b" / "checkpoints").glob(".*")] == [".step-000004.partial"]
    start(tmp_path / "b", tiny_llama, chats, resume=True, **options)
    said = capsys.readouterr()
    assert "going on from step 2 of 6" in said.out and "only half written: .step-000004.partial" in said.err
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert not list((tmp_path / "b" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_f3_a_damaged_newest_is_put_aside(
    damage: str, tmp_path: Path, tiny_llama: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path / "a", tiny_llama, chats, steps=6, val_every=0)
    keep = {"keep_last": 3, "every_steps": 2}
    start(tmp_path / "b", tiny_llama, chats, steps=6, val_every=0, checkpoints=keep, stop_at=4)
    file = newest(tmp_path / "b" / "checkpoints")
    data = bytearray(file.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    file.write_bytes(data[: {"cut": len(data) // 2, "flipped": len(data), "empty": 0}[damage]])
    assert not is_whole(file)
    start(tmp_path / "b", tiny_llama, chats, steps=6, val_every=0, checkpoints=keep, resume=True)
    said = capsys.readouterr()
    assert "passed over, damaged: step-000004" in said.err and "going on from step 2" in said.out
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_no_checkpoint_yet_begins_at_the_start(
    tmp_path: Path, tiny_llama: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path / "a", tiny_llama, chats, steps=3)
    assert newest_whole(tmp_path / "b" / "checkpoints") == (None, [])
    start(tmp_path / "b", tiny_llama, chats, steps=3, resume=True)
    assert "no checkpoint yet" in capsys.readouterr().out
    assert_same_run(tmp_path / "a", tmp_path / "b")


# ---- what may not be mixed


def test_other_data_are_refused(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    start(tmp_path / "a", tiny_llama, chats, steps=4, stop_at=2)
    other = write_jsonl(tmp_path / "other.jsonl", chat_rows(36, seed=1))
    with pytest.raises(UserError, match=r"data \(\w{12} then, \w{12} now\)"):
        start(tmp_path / "a", tiny_llama, other, steps=4, resume=True)
    with pytest.raises(UserError, match="optimizer adamw, not of sgd"):
        start(tmp_path / "a", tiny_llama, chats, steps=4, resume=True, optimizer="sgd")


# ---- bad losses


class BadAt(SFT):
    """Loses its loss at some steps."""

    bad: tuple[int, ...] = ()

    def loss(self, batch: Any) -> Any:
        return super().loss(batch) * (float("inf") if self.trainer.global_step in self.bad else 1.0)


class BadOnce(BadAt):
    bad = (2,)


class BadForGood(BadAt):
    bad = tuple(range(2, 99))


def finite(state: dict[str, Any]) -> bool:
    moments = [m[k] for m in state["optimizer_states"][0]["state"].values() for k in ("exp_avg", "exp_avg_sq")]
    return all(torch.isfinite(t).all() for t in [*state["state_dict"].values(), *moments])


def test_h5_a_bad_step_leaves_no_trace_in_checkpoints(
    tmp_path: Path, tiny_llama: Path, chats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start(tmp_path / "a", tiny_llama, chats, steps=5, method=BadOnce, checkpoints={"every_steps": 1, "keep_last": 5})
    files = complete(tmp_path / "a" / "checkpoints")
    states = {int(p.name[5:]): torch.load(p / FILE, weights_only=True) for p in files}
    assert sorted(states) == [1, 2, 3, 4, 5] and all(map(finite, states.values()))
    weights = [s["state_dict"] for _, s in sorted(states.items())]
    same = [all(torch.equal(a[k], b[k]) for k in a) for a, b in pairwise(weights)]
    assert same == [False, True, False, False]  # the bad step, the third, changed nothing
    assert "step 3: loss or gradient not finite" in capsys.readouterr().err


def test_h5_too_many_bad_steps_end_the_run(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    with pytest.raises(BadLoss, match="max_bad_steps 1"):
        start(
            tmp_path / "a",
            tiny_llama,
            chats,
            steps=8,
            method=BadForGood,
            max_bad_steps=1,
            checkpoints={"every_steps": 1, "keep_last": 9},
        )
    assert steps_in(tmp_path / "a") and max(steps_in(tmp_path / "a")) < 5
    assert all(finite(torch.load(p / FILE, weights_only=True)) for p in complete(tmp_path / "a" / "checkpoints"))
    assert not (tmp_path / "a" / "final").exists()
    assert len(metrics(tmp_path / "a")) >= 3


def test_f3_no_flipped_bit_is_trained_on(tmp_path: Path, tiny_llama: Path, chats: Path) -> None:
    """A byte flipped anywhere is found, or lies where nothing is read from."""
    start(tmp_path / "a", tiny_llama, chats, steps=2, val_every=0)
    file = newest(tmp_path / "a" / "checkpoints")
    assert file is not None
    data, good = file.read_bytes(), torch.load(file, weights_only=True)
    dice, found = random.Random(0), 0
    places = [dice.randrange(len(data)) for _ in range(150)] + list(range(40)) + [len(data) - 1 - i for i in range(60)]
    for place in places:
        flipped = bytearray(data)
        flipped[place] ^= 1 << dice.randrange(8)
        file.write_bytes(flipped)
        if is_whole(file):
            assert_same(torch.load(file, weights_only=True), good, f"byte {place}")
        else:
            found += 1
    assert found > 100
