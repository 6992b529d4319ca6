"""What a run computes in: modes, dtypes, scaled losses, bad steps, and bitwise the same twice."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.plugins import MixedPrecision
from tiny import chat_rows, save_tiny, write_jsonl
from training import difference, moved, train

from litft import Full, LoRA, StepMetrics, UserError
from litft.engine.guard import clip_and_guard
from litft.engine.kept import LENGTHS
from litft.engine.metrics import BadLoss
from litft.engine.samples import Samples

STEP: dict[str, Any] = {"tokens_per_step": 600, "tokens_per_batch": 260}
ADAMW: dict[str, Any] = {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1, "clip": 1.0}
VALIDATED: dict[str, Any] = {"num_sanity_val_steps": -1, "val_check_interval": 1}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", chat_rows(32))


def samples() -> Samples:
    return Samples(prompts=["why?"], max_new_tokens=3, during=True)


# ---- h1: train mode


def test_h1_every_module_trains_also_after_validation_and_answers(tiny_llama: Path, rows: Path) -> None:
    trace = train(tiny_llama, rows, val_fraction=0.2, trainer=VALIDATED, callbacks=[samples()], **STEP)
    assert len(trace.val_losses) == len(trace.losses) + 1 >= 4
    assert trace.modes == {True}
    assert trace.method.net.model.config.use_cache is False


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_h1_recompute_runs_every_layer_twice(recompute: str, tiny_llama: Path, rows: Path) -> None:
    passes = {True: 0, False: 0}

    def count(method: Any) -> None:
        for layer in method.net.model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda m, a: passes.update({m.training: passes[m.training] + 1}))

    trace = train(tiny_llama, rows, method={"recompute": recompute}, change=count, **STEP)
    planning = 2 * len(LENGTHS)  # two layers each
    assert passes == {True: planning + sum(trace.micro_batches) * 2 * (2 if recompute == "full" else 1), False: 0}


def test_h1_dropout_is_on_in_training_and_off_in_validation(tmp_path: Path, rows: Path) -> None:
    found = {}
    for p in (0.0, 0.2):
        model = save_tiny(tmp_path / str(p), "gpt2", embd_pdrop=p, attn_pdrop=p, resid_pdrop=p)
        found[p] = train(model, rows, val_fraction=0.2, method={"lr": 0.0}, trainer=VALIDATED, **STEP)
    assert all(abs(a - b) > 1e-3 for a, b in zip(found[0.0].losses, found[0.2].losses, strict=True))
    losses = {losses["val_loss"] for trace in found.values() for losses in trace.val_losses}
    assert max(losses) - min(losses) < 1e-6


@pytest.mark.parametrize("tuner", [Full, LoRA])
def test_d7_recompute_gives_the_same_weights(tuner: Any, tiny_llama: Path, rows: Path) -> None:
    runs = [
        train(tiny_llama, rows, tuner=tuner(), method={**ADAMW, "recompute": recompute}, **STEP)
        for recompute in ("none", "full")
    ]
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-6)
    assert difference(runs[0].weights, runs[1].weights) < 1e-6
    if tuner is LoRA:
        assert all(w.abs().max() > 0 for name, w in runs[1].weights.items() if "lora_B" in name)


# ---- h2, h3: dtypes


@pytest.mark.parametrize(("tuner", "stored"), [(Full, torch.float32), (Full, torch.bfloat16), (LoRA, torch.bfloat16)])
def test_h2_small_updates_are_not_rounded_away(tuner: Any, stored: torch.dtype, tmp_path: Path, rows: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama", dtype=stored)
    start: dict[str, torch.Tensor] = {}

    def keep(method: Any) -> None:
        start.update({n: p.detach().clone() for n, p in method.tuner.trainable_state(method.net.model).items()})

    trace = train(
        model,
        rows,
        tuner=tuner(),
        method={"optimizer": "adamw", "lr": 1e-5},
        trainer={"precision": "bf16-mixed", "max_steps": 10},
        change=keep,
        **STEP,
    )
    assert {w.dtype for w in trace.weights.values()} == {torch.float32}
    for name, weight in trace.weights.items():
        step = (weight - start[name]).abs()
        assert step.max() > 3e-5, name  # 10 steps of 1e-5; in bf16 a weight of 1 would not move at all
    if tuner is LoRA:
        frozen = {p.dtype for p in trace.method.net.parameters() if not p.requires_grad}
        assert frozen == {torch.bfloat16}


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_h2_weights_in_half_precision_are_refused(precision: str, tiny_llama: Path, rows: Path) -> None:
    with pytest.raises(UserError, match="bf16-mixed"):
        train(tiny_llama, rows, trainer={"precision": precision}, **STEP)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("tuner", [Full, LoRA])
def test_h3_rotary_frequencies_stay_fp32(tuner: Any, precision: str, tmp_path: Path, rows: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama", dtype=torch.bfloat16)
    trace = train(model, rows, tuner=tuner(), trainer={"precision": precision, "max_steps": 1}, **STEP)
    rotary = trace.method.net.model.model.rotary_emb
    size = trace.method.config.head_dim
    exact = 10000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    assert rotary.inv_freq.dtype == torch.float32
    torch.testing.assert_close(rotary.inv_freq, exact.float())
    cos, _ = rotary(torch.zeros(1, 1, 1), torch.tensor([[4000]]))
    torch.testing.assert_close(cos[0, 0, : size // 2].double(), (4000 * exact).cos(), atol=1e-3, rtol=0)


def test_fp16_gradients_are_unscaled_before_they_are_clipped(tiny_llama: Path, rows: Path) -> None:
    def run(scale: float | None) -> Any:
        plugins = []
        if scale:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
        trainer = {"plugins": plugins, "precision": None} if scale else {}
        return train(tiny_llama, rows, method={**ADAMW, "clip": 0.5}, trainer=trainer, **STEP)

    exact, scaled = run(None), run(1024.0)
    assert scaled.norms == pytest.approx(exact.norms, rel=0.02)
    assert scaled.losses == pytest.approx(exact.losses, rel=0.01)
    assert moved(scaled, tiny_llama) == pytest.approx(moved(exact, tiny_llama), rel=0.1)


def test_fp16_overflow_skips_the_step_and_lowers_the_scale(tiny_llama: Path, rows: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    trace = train(
        tiny_llama,
        rows,
        method={**ADAMW, "max_bad_steps": 20},
        trainer={"plugins": [MixedPrecision("16-mixed", "cpu", scaler)], "precision": None, "max_steps": 20},
        **STEP,
    )
    bad = [not torch.isfinite(torch.tensor(n)) for n in trace.norms]
    assert bad[0] and 1 < sum(bad) < 15
    assert scaler.get_scale() == 2.0 ** (24 - sum(bad))
    assert all(torch.isfinite(w).all() for w in trace.weights.values())
    assert moved(trace, tiny_llama) > 1e-3


# ---- h5: bad steps


class Poison(Callback):
    """Makes the loss of some steps infinite or not a number, and watches the weights around each step."""

    def __init__(self, steps: set[int], by: float) -> None:
        self.steps, self.by = steps, by
        self.unmoved: list[bool] = []

    def _state(self, trainer: Any, module: Any) -> Any:
        weights = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
        return weights, copy.deepcopy(trainer.optimizers[0].state_dict()["state"])

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = self._state(trainer, pl_module)
        if trainer.global_step in self.steps:
            part = batch["micro_batches"][0]
            part["denominator"] = part["denominator"] * self.by

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        (old, old_state), (new, new_state) = self.before, self._state(trainer, pl_module)
        same = all(torch.equal(old[name], new[name]) for name in new)
        self.unmoved.append(same and str(old_state) == str(new_state))


@pytest.mark.parametrize("by", [0.0, float("nan")])
@pytest.mark.parametrize(
    "method",
    [ADAMW, {"weight_decay": 0.1}, {"optimizer": "torch.optim.Adagrad"}, {**ADAMW, "optimizer": "adamw_8bit"}],
    ids=str,
)
def test_h5_a_bad_step_moves_nothing(method: Any, by: float, tiny_llama: Path, rows: Path, capsys: Any) -> None:
    watch, metrics = Poison({1, 3}, by), StepMetrics(1)
    trace = train(tiny_llama, rows, method=method, callbacks=[watch, metrics], **STEP)
    assert watch.unmoved == [step in (1, 3) for step in range(len(trace.losses))] and len(trace.losses) >= 4
    assert all(torch.isfinite(w).all() for w in trace.weights.values())
    assert metrics.bad_steps == 2
    assert "rows.jsonl:" in capsys.readouterr().err
    assert len(trace.losses) == trace.data.total_steps == trace.trainer.global_step


def test_h5_too_many_bad_steps_end_the_run(tiny_llama: Path, rows: Path) -> None:
    watch = Poison({1, 2, 3}, 0.0)
    with pytest.raises(BadLoss, match="max_bad_steps 2"):
        train(tiny_llama, rows, method={**ADAMW, "max_bad_steps": 2}, callbacks=[watch, StepMetrics(1)], **STEP)
    assert watch.unmoved == [False, True, True, True]


@pytest.mark.parametrize("bound", [0.0, 0.5, 100.0])
def test_clipping_equals_torchs_own(bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(5, 3, generator=generator)) for _ in range(3)]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    for a, b in zip(mine[:2], theirs[:2], strict=True):  # the third has no gradient
        a.grad = torch.randn(5, 3, generator=generator)
        b.grad = a.grad.clone()
    norm = clip_and_guard(mine, torch.optim.SGD(mine, lr=1.0), bound)
    expected = torch.nn.utils.clip_grad_norm_(theirs, bound or float("inf"))
    torch.testing.assert_close(norm, expected)
    for a, b in zip(mine[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a.grad, b.grad)


# ---- bitwise the same


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_same_run_twice_gives_the_same_bits(precision: str, tiny_llama: Path, rows: Path) -> None:
    runs = [
        train(
            tiny_llama,
            rows,
            tuner=LoRA(dropout=0.1),
            method=ADAMW,
            trainer={"precision": precision},
            num_workers=workers,
            **STEP,
        )
        for workers in (0, 0, 2)
    ]
    for run in runs[1:]:
        assert run.losses == runs[0].losses
        assert difference(run.weights, runs[0].weights) == 0.0
    other = train(tiny_llama, rows, tuner=LoRA(dropout=0.1), method=ADAMW, seed=2, **STEP)
    assert difference(other.weights, runs[0].weights) > 0


def test_f9_validation_and_answers_do_not_change_training(tiny_llama: Path, rows: Path) -> None:
    val = {"val_fraction": 0.2}
    bare = train(tiny_llama, rows, tuner=LoRA(dropout=0.3), method=ADAMW, **val, **STEP)
    watched = train(
        tiny_llama,
        rows,
        tuner=LoRA(dropout=0.3),
        method=ADAMW,
        trainer=VALIDATED,
        callbacks=[samples(), StepMetrics(1)],
        **val,
        **STEP,
    )
    assert len(watched.val_losses) > 3 and not bare.val_losses
    assert watched.rows == bare.rows
    assert watched.losses == bare.losses
    assert difference(watched.weights, bare.weights) == 0.0
