"""How an adapter behaves in training: dtypes, gradients, state, groups, switching off."""

from __future__ import annotations

import copy
import io
from typing import Any

import lightning
import pytest
import torch
from adapters import EXPERTS, ids, logits, perturb, trained
from tiny import tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from litft.errors import UserError
from litft.tuners import Full, LoRA, QLoRA, Tuner
from litft.tuners.layers import LoRALinear
from litft.tuners.quant import quantise

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"dora": True},
    "pissa": {"init": "pissa"},
    "rows": {"trainable_rows": [5, 7]},
    "whole": {"modules_to_save": ["lm_head", "embed_tokens"]},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_d3_adapters_are_fp32_over_a_bf16_base(kind: str) -> None:
    model = tiny_model("llama").to(torch.bfloat16)
    LoRA(r=4, **OPTIONS[kind]).apply(model)
    seen = set()
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, out: seen.add((out[0] if isinstance(out, tuple) else out).dtype))
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(ids(), labels=ids())
        assert out.logits.dtype == torch.bfloat16
        out.loss.backward()
    assert seen == {torch.bfloat16}
    for name, param in model.named_parameters():
        assert param.dtype == (torch.float32 if param.requires_grad else torch.bfloat16), name
        if param.requires_grad:
            assert param.grad is not None and param.grad.dtype == torch.float32, name


def test_d3_fp32_everywhere_without_autocast_and_bf16_products_with_it() -> None:
    model, _ = trained("llama")
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 5, 32)
    want = (x.double() @ layer.full_weight().double().T).float()
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), want, atol=0.3, rtol=0.05)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quant", [None, "nf4", "int8"])
def test_bias_is_added_once_and_not_scaled(quant: Any, dora: bool) -> None:
    torch.manual_seed(0)
    for base in (nn.Linear(64, 48), Conv1D(48, 64)):
        base.requires_grad_(False).bias.normal_()
        bias, x = base.bias.clone(), torch.randn(3, 64)
        layer = LoRALinear(base if quant is None else quantise(base, quant), 4, 2.0, dora=dora)
        perturb(layer)
        want = nn.functional.linear(x, layer.full_weight(), bias)
        torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)


def test_d3_small_updates_are_not_lost() -> None:
    """A step of 1e-5 on a weight of 0.1 vanishes in bf16."""
    model = tiny_model("llama").to(torch.bfloat16)
    tuner = LoRA(r=4)
    tuner.apply(model)
    before = {name: value.clone() for name, value in tuner.trainable_state(model).items() if name.endswith("lora_A")}
    optimizer = torch.optim.AdamW(tuner.param_groups(model, 1e-5, 0.0))
    perturb(model, 1e-3)
    start = {name: tuner.trainable_state(model)[name].clone() for name in before}
    model(ids(), labels=ids()).loss.backward()
    optimizer.step()
    for name, value in start.items():
        moved = (tuner.trainable_state(model)[name] - value).abs()
        assert moved.median() > 5e-6, name


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tiny_model("llama").to(torch.bfloat16)
        self.tuner = LoRA(r=4)
        self.tuner.apply(self.model)
        self.dtypes: set[torch.dtype] = set()

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        self.dtypes = {p.dtype for p in self.model.parameters() if p.requires_grad}
        return self.model(batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.tuner.param_groups(self.model, 1e-3, 0.0))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_d3_lightning_leaves_adapters_fp32_or_is_told_off(precision: Any) -> None:
    module = Module()
    trainer = lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        precision=precision,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.DataLoader([ids()[0], ids()[1]], batch_size=2)
    if precision == "bf16-true":  # casts every parameter before the optimizer is made
        with pytest.raises(UserError, match="bf16-mixed"):
            trainer.fit(module, data)
    else:
        trainer.fit(module, data)
        assert module.dtypes == {torch.float32}


def test_a_copy_of_an_adapted_model_is_a_model_of_its_own() -> None:
    model, tuner = trained("qwen3", trainable_rows=[5, 7], dora=True)
    twin = copy.deepcopy(model)
    ours = logits(model)
    assert torch.equal(logits(twin), ours)
    assert set(tuner.trainable_state(twin)) == set(tuner.trainable_state(model))  # the tied rows are still one
    perturb(twin)
    assert torch.equal(logits(model), ours) and not torch.equal(logits(twin), ours)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_d7_gradient_checkpointing_reaches_every_adapter(family: str, reentrant: bool) -> None:
    options = {"target_parameters": EXPERTS} if family == "qwen3_moe" else {"dora": True}

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model, _ = trained(family, **options)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        for _ in range(2):
            model(ids(), labels=ids(), use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    want, got = gradients(False), gradients(True)
    assert sum("lora_B" in name for name in got) >= 8
    for name, grad in got.items():
        assert grad is not None and grad.norm() > 0, name
        torch.testing.assert_close(grad, want[name], atol=1e-5, rtol=1e-5)


def test_d5_state_is_small_complete_and_strict() -> None:
    model, tuner = trained("llama")
    state = tuner.trainable_state(model)
    assert set(state) == {name for name, p in model.named_parameters() if p.requires_grad}
    big = tiny_model("llama", hidden_size=256, intermediate_size=512)
    one = LoRA(r=1)
    one.apply(big)
    buffer = io.BytesIO()
    torch.save(one.trainable_state(big), buffer)
    assert buffer.getbuffer().nbytes < 0.05 * sum(p.numel() * p.element_size() for p in big.parameters())

    fresh = tiny_model("llama")
    tuner.apply(fresh)
    name = next(iter(state))
    before = {key: value.clone() for key, value in tuner.trainable_state(fresh).items()}
    for broken in (
        {key: value for key, value in state.items() if key != name},
        {**{key: value for key, value in state.items() if key != name}, name + "_": state[name]},
        {**state, "stranger": state[name]},
        {**state, name: state[name][:1]},
    ):
        with pytest.raises(UserError, match="does not fit"):
            tuner.load_trainable_state(fresh, broken)
    assert all(torch.equal(value, before[key]) for key, value in tuner.trainable_state(fresh).items())
    tuner.load_trainable_state(fresh, state)
    assert torch.equal(logits(fresh), logits(model))


def test_d5_names_do_not_depend_on_compile_or_checkpoint_wrappers() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, tuner = trained("llama")
    names = set(tuner.trainable_state(model))
    model.model.layers[0] = torch.compile(model.model.layers[0])
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    assert set(tuner.trainable_state(model)) == names


@pytest.mark.parametrize("kind", [*OPTIONS, "experts"])
def test_disabled_is_the_model_before_training(kind: str) -> None:
    family, options = ("qwen3_moe", {"target_parameters": EXPERTS}) if kind == "experts" else ("llama", OPTIONS[kind])
    base = logits(tiny_model(family))
    model, tuner = trained(family, **options)
    ours = logits(model)
    with tuner.disabled(model):
        torch.testing.assert_close(logits(model), base, atol=1e-5 if kind == "pissa" else 0, rtol=0)
        with tuner.disabled(model):
            pass
        torch.testing.assert_close(logits(model), base, atol=1e-5 if kind == "pissa" else 0, rtol=0)
    assert torch.equal(logits(model), ours)
    with pytest.raises(ZeroDivisionError), tuner.disabled(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), ours)


def test_dropout_acts_in_training_only_and_not_on_the_base() -> None:
    model = tiny_model("llama")
    LoRA(r=4, dropout=0.5).apply(model)
    x = ids()
    model.train()
    assert torch.equal(model(x).logits, model(x).logits)  # B is zero: the base layers see no dropout
    perturb(model)
    assert not torch.equal(model(x).logits, model(x).logits)
    layer = model.model.layers[0].mlp.up_proj
    probe = torch.randn(4, 32)
    mean = torch.stack([layer(probe) for _ in range(3000)]).mean(0)
    model.eval()
    torch.testing.assert_close(mean, layer(probe), atol=0.15, rtol=0.1)
    assert torch.equal(model(x).logits, model(x).logits)


@pytest.mark.parametrize("training", [True, False])
def test_apply_keeps_the_mode_of_the_model(training: bool) -> None:
    for tuner in (LoRA(dropout=0.1, trainable_rows=[3]), QLoRA(dropout=0.1, quant="int8")):
        model = tiny_model("llama").train(training)
        tuner.apply(model)
        assert all(module.training == training for module in model.modules())


def test_groups_decay_matrices_only_and_speed_up_b() -> None:
    model, tuner = tiny_model("llama"), LoRA(r=4, dora=True, lora_plus_ratio=16)
    tuner.apply(model)
    groups = {group["name"]: group for group in tuner.param_groups(model, 1e-4, 0.1)}
    names = {id(p): name for name, p in model.named_parameters()}
    endings = {
        name: {names[id(p)].rpartition(".")[2] for p in group["params"]} for name, group in groups.items()
    }  # fmt: skip
    assert endings == {"decay": {"lora_A"}, "no_decay": {"lora_magnitude_vector"}, "decay_lr_x16": {"lora_B"}}
    assert [(g["lr"], g["weight_decay"]) for g in groups.values()] == [(1e-4, 0.1), (1e-4, 0.0), (16e-4, 0.1)]
    torch.optim.AdamW(tuner.param_groups(model, 1e-4, 0.1))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_full_trains_everything_and_decays_as_transformers_does(family: str) -> None:
    from transformers import Trainer, TrainingArguments

    model, tuner = tiny_model(family), Full()
    model.requires_grad_(False)
    applied = tuner.apply(model)
    assert applied.trainable == applied.total == sum(p.numel() for p in model.parameters())
    groups = {g["name"]: {id(p) for p in g["params"]} for g in tuner.param_groups(model, 1e-3, 0.1)}
    theirs = Trainer(model, TrainingArguments(weight_decay=0.1, report_to=[], use_cpu=True)).create_optimizer()
    assert [groups["decay"], groups["no_decay"]] == [{id(p) for p in g["params"]} for g in theirs.param_groups]
    with pytest.raises(TypeError, match="frozen copy"), tuner.disabled(model):
        pass


def test_tuners_say_what_they_are() -> None:
    kinds: list[type[Tuner]] = [Full, LoRA, QLoRA]
    assert [(k.name, k.default_lr, k.trains_base) for k in kinds] == [
        ("full", 2e-5, True),
        ("lora", 2e-4, False),
        ("qlora", 2e-4, False),
    ]


def test_start_is_that_of_peft() -> None:
    """A uniform in +-1/sqrt(in), B zero; gaussian with deviation 1/r; PiSSA's product is the best rank-r part."""
    model = tiny_model("llama", hidden_size=128, intermediate_size=256)
    LoRA(r=8).apply(model)
    layer = model.model.layers[0].mlp.down_proj
    bound = 256**-0.5
    assert layer.lora_A.abs().max() <= bound and layer.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not layer.lora_B.any()
    model = tiny_model("llama", hidden_size=128)
    LoRA(r=8, init="gaussian").apply(model)
    assert model.model.layers[0].mlp.up_proj.lora_A.std().item() == pytest.approx(1 / 8, rel=0.1)
    weight = tiny_model("llama").model.layers[0].mlp.up_proj.weight
    model = tiny_model("llama")
    LoRA(r=4, alpha=12, init="pissa").apply(model)
    layer = model.model.layers[0].mlp.up_proj
    spectrum = torch.linalg.svdvals(layer.base_layer.weight)
    torch.testing.assert_close(spectrum[:28], torch.linalg.svdvals(weight)[4:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.full_weight(), weight, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_jsonargparse_builds_every_tuner_from_its_signature() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--tuner", type=Tuner)
    config = parser.parse_args(["--tuner", "litft.tuners.QLoRA", "--tuner.r", "8", "--tuner.quant", "int8"])
    tuner = parser.instantiate_classes(config).tuner
    assert isinstance(tuner, QLoRA) and (tuner.r, tuner.quant) == (8, "int8")
