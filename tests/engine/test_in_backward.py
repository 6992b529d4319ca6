"""Steps within the backward pass, weights in bf16, and packages that are not there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import chat_rows, write_jsonl
from training import difference, train

from litft import Full, LoRA, UserError

STEP: dict[str, Any] = {"tokens_per_step": 256, "tokens_per_batch": 512}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", chat_rows(24))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "torch.optim.RMSprop"])
def test_the_steps_are_those_of_an_ordinary_run(optimizer: str, tiny_llama: Path, rows: Path) -> None:
    method = {"optimizer": optimizer, "lr": 1e-3, "schedule": "linear", "weight_decay": 0.01}
    plain = train(tiny_llama, rows, method=method, **STEP)
    early = train(tiny_llama, rows, method=method | {"step_in_backward": True}, **STEP)
    assert len(plain.losses) > 3
    assert early.losses == plain.losses
    assert difference(early.weights, plain.weights) == 0
    assert early.norms == pytest.approx(plain.norms, rel=1e-5)
    assert early.lrs == plain.lrs


def test_gradients_are_gone_when_the_backward_pass_ends(tiny_llama: Path, rows: Path) -> None:
    alive: list[int] = []

    def watch(method: Any) -> None:
        parameters = list(method.net.parameters())

        def count(_: Any) -> None:
            alive.append(sum(p.grad is not None for p in parameters))

        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(count)

    train(tiny_llama, rows, method={"step_in_backward": True}, change=watch, trainer={"max_steps": 1}, **STEP)
    assert set(alive) == {1}


def test_a_gradient_that_is_not_finite_leaves_its_weight_alone(tiny_llama: Path, rows: Path) -> None:
    def spoil(method: Any) -> None:
        method.net.model.model.norm.weight.register_hook(lambda grad: grad * float("nan"))

    options = {"step_in_backward": True, "optimizer": "adamw", "lr": 1e-2}
    trace = train(tiny_llama, rows, method=options, change=spoil, trainer={"max_steps": 2}, **STEP)
    norm = trace.method.net.model.model.norm.weight
    assert torch.equal(norm, torch.ones_like(norm))
    assert all(weight.isfinite().all() for weight in trace.weights.values())
    assert not any(torch.isfinite(torch.tensor(trace.norms)))


@pytest.mark.parametrize(
    ("method", "data", "words"),
    [
        ({"clip": 1.0}, {}, "clip"),
        ({}, {"tokens_per_step": 512, "tokens_per_batch": 256}, "one micro-batch a step"),
    ],
)
def test_what_needs_whole_gradients_is_refused(
    method: dict[str, Any], data: dict[str, Any], words: str, tiny_llama: Path, rows: Path
) -> None:
    with pytest.raises(UserError, match=words):
        train(tiny_llama, rows, method={"step_in_backward": True} | method, **(STEP | data))


def test_weights_in_bf16_learn_updates_below_their_rounding(tiny_llama: Path, rows: Path) -> None:
    pytest.importorskip("torchao")
    method = {"optimizer": "adamw_bf16", "lr": 1e-4, "compile": "false"}
    trace = train(tiny_llama, rows, method=method, trainer={"precision": "bf16-mixed", "max_epochs": 2}, **STEP)
    start = train(tiny_llama, rows, method=method | {"lr": 0.0}, trainer={"precision": "bf16-mixed"}, **STEP)
    assert {weight.dtype for weight in trace.weights.values()} == {torch.bfloat16}
    moved = [(trace.weights[n] != start.weights[n]).float().mean().item() for n in trace.weights if "proj" in n]
    assert 0.02 < sum(moved) / len(moved) < 0.9  # rounding to nearest would move next to none, fp32 all
    half = len(trace.losses) // 2
    assert sum(trace.losses[half:]) < sum(trace.losses[:half])


def test_bf16_weights_are_for_full_tuning(tiny_llama: Path, rows: Path) -> None:
    with pytest.raises(UserError, match="adapters stay in fp32"):
        train(tiny_llama, rows, tuner=LoRA(), method={"optimizer": "adamw_bf16"}, **STEP)


@pytest.mark.parametrize(
    ("options", "package", "words"),
    [
        ({"optimizer": "adamw_bf16"}, "torchao", r"pip install 'litft\[torchao\]'"),
        ({"float8": True}, None, "needs a GPU that multiplies float8"),
        ({"liger": True}, None, "needs a CUDA GPU"),
    ],
)
def test_what_is_missing_is_said(
    options: dict[str, Any],
    package: str | None,
    words: str,
    tiny_llama: Path,
    rows: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if package:
        monkeypatch.setitem(sys.modules, f"{package}.optim", None)
    with pytest.raises(UserError, match=words):
        train(tiny_llama, rows, tuner=Full(), method=options, **STEP)


def test_float8_and_liger_name_their_packages(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import tiny_model

    from litft.models.extras import use_float8, use_liger

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", None)
    model, gpu = tiny_model("llama"), torch.device("cuda")
    with pytest.raises(UserError, match="torchao"):
        use_float8(model, gpu, trains_base=True)
    with pytest.raises(UserError, match="only for full tuning"):
        use_float8(model, gpu, trains_base=False)
    with pytest.raises(UserError, match="liger-kernel"):
        use_liger(model, gpu)
