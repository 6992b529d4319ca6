"""Layers that run again, are compiled, or leave things in the host's memory: the gradients stay what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, save_tiny
from training import difference

from litft import SFT, Full, LoRA, QLoRA, UserError
from litft.data.batch import pack_documents
from litft.models.compiled import compile_layers, layers_of, recompilations
from litft.models.recompute import Again, all_kept, keep_less, recomputed

WAYS: list[tuple[Any, Any]] = [
    (1, "none"),
    (2, "none"),
    ("selective", "none"),
    ("full", "none"),
    ("none", "activations"),
    ("none", "parameters"),
]
TUNERS: list[Any] = [Full, LoRA, lambda: QLoRA("int8")]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    """transformers wraps every family's layers in one function, whose graphs in one process are limited."""
    torch._dynamo.reset()


def gradients(
    folder: Path, tuner: Any, how: Any = "none", offload: Any = "none", compiled: bool = False, **options: Any
) -> tuple[float, dict[str, torch.Tensor], Any]:
    """Loss and gradients of a packed micro-batch, fp32."""
    import numpy as np

    torch.manual_seed(0)
    method = SFT(str(folder), tuner(), compile="true" if compiled else "false", **options).build()
    keep_less(layers_of(method.net.model), how, offload)
    if compiled:
        method.compile_if_worth()
    rng = np.random.default_rng(0)
    for lengths in ((19, 60, 33), (7, 40), (50, 21, 11)) if compiled else ((19, 60, 33),):
        documents = [(rng.integers(3, 384, n).astype(np.int64), np.arange(n) > 4) for n in lengths]
        method.net.zero_grad()
        loss = method.loss(pack_documents(documents, 50.0, 64))
        loss.backward()
    found = {n: p.grad.clone() for n, p in method.net.named_parameters() if p.grad is not None}
    return float(loss), found, method


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize(("how", "offload"), WAYS)
def test_gradients_are_bitwise_the_same(how: Any, offload: Any, tuner: Any, tiny_llama: Path) -> None:
    loss, expected, _ = gradients(tiny_llama, tuner)
    found_loss, found, _ = gradients(tiny_llama, tuner, how, offload)
    assert found_loss == loss
    assert difference(found, expected) == 0


def test_layers_kept_in_the_host_s_memory_do_not_move(tiny_llama: Path) -> None:
    _, _, method = gradients(tiny_llama, Full, "none", "parameters")
    method.net.to("meta")
    devices = {name: p.device.type for name, p in method.net.named_parameters()}
    assert {device for name, device in devices.items() if ".layers." in name} == {"cpu"}
    assert {device for name, device in devices.items() if ".layers." not in name} == {"meta"}


def test_every_nth_layer_runs_again() -> None:
    assert list(recomputed(range(7), 3)) == [0, 3, 6]
    assert list(recomputed(range(3), "full")) == [0, 1, 2]
    assert list(recomputed(range(3), "none")) == []


def test_all_kept_lifts_it_for_a_while(tiny_llama: Path) -> None:
    _, _, method = gradients(tiny_llama, Full, "full")
    layers = layers_of(method.net.model)
    with all_kept(layers):
        assert not any(isinstance(layer.forward, Again) for layer in layers)
    assert all(isinstance(layer.forward, Again) for layer in layers)


def test_what_is_kept_selectively_are_products_and_attention(tiny_llama: Path) -> None:
    """Norms and gates run twice, products once."""
    from torch.utils._python_dispatch import TorchDispatchMode

    counts: dict[str, dict[str, int]] = {}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = str(func)
            counts[how][name] = counts[how].get(name, 0) + 1
            return func(*args, **(kwargs or {}))

    for how in ("none", "selective", "full"):
        counts[how] = {}
        with Count():
            gradients(tiny_llama, Full, how)
    products = {how: found["aten.mm.default"] for how, found in counts.items()}
    assert products["none"] == products["selective"] < products["full"]
    gates = {how: found["aten.silu.default"] for how, found in counts.items()}
    assert gates["none"] < gates["selective"] == gates["full"]


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES[1:])])
def test_compiled_layers_give_the_same_and_are_not_made_again_for_other_lengths(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / family, family)
    before = recompilations()
    loss, expected, method = gradients(folder, Full, compiled=True, balance_experts=0.0)
    again = recompilations() - before
    print(family, method.compiled, again)
    if method.compiled.failed:
        assert "moe" in family or family == "gpt_oss", method.compiled.failed
        assert not method.net.compiled
        return
    assert method.compiled.layers == len(layers_of(method.net.model))
    assert again <= 3
    eager: Any = SFT(str(folder), Full(), compile="false", balance_experts=0.0).build()
    eager.net.load_state_dict(method.net.state_dict())
    import numpy as np

    rng = np.random.default_rng(0)
    for lengths in ((19, 60, 33), (7, 40), (50, 21, 11)):
        documents = [(rng.integers(3, 384, n).astype(np.int64), np.arange(n) > 4) for n in lengths]
        eager.net.zero_grad()
        eager_loss = eager.loss(pack_documents(documents, 50.0, 64))
        eager_loss.backward()
    assert loss == pytest.approx(float(eager_loss), rel=1e-6)
    wanted = {n: p.grad for n, p in eager.net.named_parameters() if p.grad is not None}
    assert difference(expected, wanted) < 1e-5


@pytest.mark.parametrize("quant", ["int8", pytest.param("nf4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.1, marks=pytest.mark.slow)])
def test_compiled_layers_of_packed_weights_validate(
    quant: Any, dropout: float, tiny_llama: Path, tmp_path: Path
) -> None:
    from tiny import chat_rows, write_jsonl
    from training import train

    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(30))
    often = {"val_check_interval": 1, "max_epochs": 1, "num_sanity_val_steps": -1}
    options = {"tokens_per_step": 600, "val_fraction": 0.2, "trainer": often}
    found = [
        train(tiny_llama, rows, tuner=QLoRA(quant, r=2, dropout=dropout), method={"compile": how, "lr": 0.0}, **options)
        for how in ("true", "false")
    ]
    assert found[0].method.compiled.layers == 2, found[0].method.compiled.failed
    val = [[losses["val_loss"] for losses in trace.val_losses] for trace in found]
    assert len(val[0]) > 1 and val[0] == pytest.approx(val[1], rel=1e-6)


@pytest.mark.slow
def test_a_run_with_windows_and_validation_makes_no_more_graphs_than_its_first_pass(tmp_path: Path) -> None:
    from tiny import chat_rows, write_jsonl
    from training import train

    kinds = ["sliding_attention", "full_attention"] * 2
    folder = save_tiny(tmp_path / "gemma3", "gemma3", num_hidden_layers=4, layer_types=kinds)
    rows = write_jsonl(tmp_path / "rows.jsonl", chat_rows(40))
    often = {"val_check_interval": 1, "max_epochs": 1, "num_sanity_val_steps": -1}
    options = {"tokens_per_step": 400, "val_fraction": 0.2, "trainer": often}
    trace = train(folder, rows, tuner=LoRA(r=2), method={"compile": "true"}, **options)
    assert trace.method.compiled.layers == 4 and len(trace.losses) > 3
    assert recompilations() - trace.method.compiled.graphs <= 3


@pytest.mark.slow
@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize(("how", "offload"), WAYS[1:5])
def test_compiled_layers_that_run_again_give_the_same(how: Any, offload: Any, tuner: Any, tiny_llama: Path) -> None:
    if how == "selective" and tuner is not Full:
        with pytest.raises(UserError, match="selective recomputing"):
            gradients(tiny_llama, tuner, how, offload, compiled=True, recompute="selective")
        return
    loss, expected, _ = gradients(tiny_llama, tuner, compiled=True)
    found_loss, found, method = gradients(tiny_llama, tuner, how, offload, compiled=True)
    assert method.compiled.layers == 2
    assert found_loss == pytest.approx(loss, rel=1e-6)
    assert difference(found, expected) < 1e-5


def test_layers_that_do_not_compile_run_as_they_were(tiny_llama: Path) -> None:
    _, _, method = gradients(tiny_llama, Full, 2)
    layers = layers_of(method.net.model)
    before = [layer.forward.forward if isinstance(layer.forward, Again) else None for layer in layers]

    def fails() -> None:
        raise RuntimeError("no compiler\nand more")

    found = compile_layers(method.net.model, fails)
    assert "uncompiled" in str(found)
    assert "no compiler" in str(found)
    after = [layer.forward.forward if isinstance(layer.forward, Again) else None for layer in layers]
    assert after == before
    assert all(layer._compiled_call_impl is None for layer in layers)
