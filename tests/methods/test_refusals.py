"""The table of what doesn't go together: each entry is met, and said before the model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import save_tiny

import litft
from litft import DPO, SFT, Full, LoRA, QLoRA, Reward, UserError
from litft.methods.refusals import TABLE, refuse
from litft.models.mesh import Sizes

MEETING: dict[str, dict[str, Any]] = {
    "16-mixed": {"precision": "16-mixed"},
    "adamw_8bit": {"optimizer": "paged_adamw_8bit"},
    "step_in_backward": {"step_in_backward": True, "clip": 0.0},
    "offload parameters": {"offload": "parameters"},
    "float8": {"float8": True},
    "qlora": {"tuner": QLoRA(), "tensor": 2},
    "dora": {"tuner": LoRA(dora=True), "tensor": 2},
    "pissa": {"tuner": LoRA(init="pissa"), "tensor": 2},
    "balance_experts": {"balance_experts": 0.1, "context": 2},
    "reward": {"kind": Reward, "context": 2},
    "neftune": {"neftune": 5.0, "context": 2},
    "sync_reference": {"kind": DPO, "sync_reference": 2},
    "offload_reference": {"kind": DPO, "offload_reference": True},
}


def asked(
    path: Path, precision: str = "32-true", tensor: int = 1, context: int = 1, kind: Any = SFT, **options: Any
) -> Any:
    method = kind(str(path), **({"tuner": Full()} | options))
    strategy = SimpleNamespace(sizes=Sizes(4, tensor, context))
    return method, SimpleNamespace(strategy=strategy, precision=precision)


def test_every_entry_is_met_here(tiny_llama: Path) -> None:
    met = set()
    for words, options in MEETING.items():
        with pytest.raises(UserError) as said:
            refuse(*asked(tiny_llama, **options))
        [entry] = [refusal for refusal in TABLE if str(refusal) == str(said.value)]
        assert words in entry.what and "\nmend: " in str(entry)
        met.add(entry.what)
    assert met == {refusal.what for refusal in TABLE}


@pytest.mark.parametrize("options", [{}, {"tensor": 2}, {"context": 2}, {"tensor": 2, "context": 2}], ids=str)
@pytest.mark.parametrize("tuner", [Full(), LoRA()], ids=["full", "lora"])
def test_what_goes_together_is_let_through(options: dict[str, int], tuner: Any, tiny_llama: Path) -> None:
    method, trainer = asked(tiny_llama, tuner=tuner, **options)
    refuse(method, trainer)
    sizes = trainer.strategy.sizes
    assert not [str(refusal) for refusal in TABLE if refusal.meets(method, sizes, "32-true")]


@pytest.mark.parametrize(
    ("family", "changed", "options", "said"),
    [
        ("gpt2", {}, {"tensor": 2}, "no tensor-parallel plan for gpt2"),
        ("qwen3_moe", {}, {"tensor": 2}, "cuts layers as litft can't (moe_tp_experts, packed_colwise"),
        ("llama", {}, {"tensor": 3}, "4 attention heads; 2 would do"),
        ("llama", {"intermediate_size": 63}, {"tensor": 2}, "63 features in its feed-forward layers"),
        ("llama", {"num_attention_heads": 2}, {"tensor": 2, "context": 2}, "(of which tensor parallelism leaves 1"),
    ],
)
def test_models_that_cannot_be_shared(
    family: str, changed: dict[str, Any], options: dict[str, int], said: str, tmp_path: Path
) -> None:
    path = save_tiny(tmp_path / "model", family)
    config = json.loads((path / "config.json").read_text()) | changed
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        refuse(*asked(path, **options))
    assert said in str(error.value) and "\nmend: " in str(error.value)


def test_weights_between_cut_layers_that_a_plan_leaves_out() -> None:
    """Apertus's activation has some: each process would have a part of their gradient, and nobody would sum it."""
    from transformers import ApertusConfig, AutoModelForCausalLM

    from litft.models.tensor_parallel import _refuse_unplanned, plan_of

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    model = AutoModelForCausalLM.from_config(ApertusConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    plan = plan_of(model)
    with pytest.raises(UserError, match=r"says nothing of model\.layers\.0\.mlp\.act_fn"):
        _refuse_unplanned(model, plan, [name for name, style in plan.items() if style == "colwise"])


def test_every_argument_of_a_method_is_part_of_what_a_run_goes_on_with(tmp_path: Path) -> None:
    """But for those that say where or when something is computed."""
    import inspect

    from litft.engine.identity import of

    free = {"reference", "offload_reference", "offload_teacher", "args", "options", "self"}
    other: dict[str, Any] = {
        "loss_type": {"DPO": "ipo", "CPO": "ipo", "Distill": "reverse_kl"},
        **{
            "loss_weights": [0.5],
            "f_divergence": "js_divergence",
            "f_alpha": 0.7,
            "nll_on": "all",
            "sync_reference": 3,
        },
        **{
            "teacher": "other",
            "top_k": 3,
            "teacher_quant": "int8",
            "max_new_tokens": 7,
            "neftune": 3.0,
            "nll_weight": 0.7,
        },
    }
    needs: dict[str, dict[str, Any]] = {"nll_on": {"nll_weight": 1.0}, "sync_share": {"sync_reference": 2}}

    class Data:
        fingerprint = plan_fingerprint = ""

    def identity(cls: Any, **options: Any) -> str:
        made = cls(str(model), **({"teacher": "x"} if cls is litft.Distill else {}) | options)
        return of(made, Data())["method"]

    model = save_tiny(tmp_path / "model", "llama")
    for cls in (litft.SFT, litft.DPO, litft.KTO, litft.ORPO, litft.CPO, litft.SimPO, litft.Reward, litft.Distill):
        own = [c for c in cls.__mro__ if issubclass(c, litft.Method) and c is not litft.Method]
        names = {n for c in own if "__init__" in vars(c) for n in inspect.signature(c.__init__).parameters} - free
        if cls is litft.Distill:
            names -= {"label_smoothing"}  # refused
        for name in sorted(names):
            value = other.get(name, 0.25)
            value = value[cls.__name__] if isinstance(value, dict) else value
            base = {k: v for k, v in needs.get(name, {}).items() if k in names}
            assert identity(cls, **base) != identity(cls, **base, **{name: value}), (cls, name)
