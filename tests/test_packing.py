"""Documents that lie in one packed row are trained as if each were alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback
from tiny import FAMILIES, VOCAB, chat_rows, tiny_model, write_jsonl
from torch.nn import functional as F
from training import train

from litft.data.batch import Document, pack_documents, pad_documents
from litft.models import attention
from litft.models.causal_lm import CausalLM

LENGTHS = (21, 1, 13, 2, 30, 9)  # longer than the tiny models' windows of 8, and documents of a single token


def documents(seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [(rng.integers(3, VOCAB, n).astype(np.int32), rng.random(n) < 0.6) for n in LENGTHS]


def batch_of(packing: bool, some: list[Document] | None = None) -> dict[str, Any]:
    some = some or documents()
    return pack_documents(some, 1.0) if packing else pad_documents(some, 1.0, 0)


def as_trained(family: str, implementation: str = attention.NAME, **overrides: Any) -> CausalLM:
    attention.register()
    model = tiny_model(family, **overrides)
    model.set_attn_implementation(implementation)
    return CausalLM(model)


def loss_and_gradients(net: CausalLM, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    net.zero_grad()
    nll = net(batch)["nll"]
    (nll.sum() / len(nll)).backward()
    return nll.detach(), {name: p.grad for name, p in net.model.named_parameters() if p.grad is not None}


def padded_by_transformers(family: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of transformers' own forward over rows padded to the right, with its own loss."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    some = documents()
    width = max(LENGTHS)
    ids = torch.zeros(len(some), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (tokens, trained) in enumerate(some):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
        mask[row, : len(tokens)] = 1
        labels[row, : len(tokens)] = torch.where(torch.from_numpy(trained), ids[row, : len(tokens)], -100)
    output = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_padded_equals_transformers(family: str) -> None:
    net = as_trained(family)
    packed, gradients = loss_and_gradients(net, batch_of(True))
    gradients = {name: g.clone() for name, g in gradients.items()}
    padded, padded_gradients = loss_and_gradients(net, batch_of(False))
    expected, expected_gradients = padded_by_transformers(family)
    torch.testing.assert_close(packed, padded, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(packed.mean(), expected, atol=1e-6, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys() == padded_gradients.keys()
    for name, gradient in expected_gradients.items():
        bound = 2e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(gradients[name], gradient, atol=bound, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        torch.testing.assert_close(padded_gradients[name], gradient, atol=bound, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_recompute_changes_nothing(family: str) -> None:
    plain = loss_and_gradients(as_trained(family), batch_of(True))
    net = as_trained(family)
    net.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = loss_and_gradients(net, batch_of(True))
    torch.testing.assert_close(again, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a7_balance_of_each_document_equals_transformers(family: str, packing: bool) -> None:
    net = as_trained(family)
    net.balance_experts = True
    found = net(batch_of(packing))["balance"]
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    alone = [
        model(torch.from_numpy(ids).long()[None], use_cache=False, output_router_logits=True).aux_loss
        for ids, _ in documents()
    ]
    torch.testing.assert_close(found, torch.stack(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_recompute_keeps_the_experts_balance(packing: bool) -> None:
    found = []
    for recompute in (False, True):
        net = as_trained("qwen3_moe")
        net.balance_experts = True
        if recompute:
            net.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        out = net(batch_of(packing))
        out["balance"].sum().backward()
        gate = next(p for name, p in net.named_parameters() if "gate.weight" in name)
        found.append((out["balance"].detach(), gate.grad))
        assert gate.grad.abs().max() > 0
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_c1_another_document_changes_nothing(family: str) -> None:
    net = as_trained(family)
    some = documents()
    other = documents(seed=1)
    before, after = batch_of(True, some), batch_of(True, [other[0], *some[1:4], other[4], some[5]])
    with torch.no_grad():
        hidden = [net.model(**inputs_of(net, b)).logits[0] for b in (before, after)]
    mine = before["cu_seqlens"].tolist()
    for document in (1, 2, 3, 5):
        span = slice(mine[document], mine[document + 1])
        assert torch.equal(hidden[0][span], hidden[1][span]), f"document {document}"
    assert not torch.equal(hidden[0][: mine[1]], hidden[1][: mine[1]])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_c1_attention_that_may_mix_documents_is_refused(implementation: str) -> None:
    # transformers' gpt_oss, opt and afmoe build their masks without position_ids
    net = as_trained("llama", implementation)
    with pytest.raises(RuntimeError, match="would see each other"):
        net(batch_of(True))
    nll = net(batch_of(False))["nll"]
    torch.testing.assert_close(nll, as_trained("llama")(batch_of(True))["nll"], atol=2e-5, rtol=1e-5)


def inputs_of(net: CausalLM, batch: dict[str, Any]) -> dict[str, Any]:
    """What `CausalLM` hands to the model, with every position kept."""
    seen: dict[str, Any] = {}

    class Stop(Exception):
        pass

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)
        raise Stop

    handle = net.model.register_forward_pre_hook(look, with_kwargs=True)
    with pytest.raises(Stop):
        net(batch)
    handle.remove()
    assert "attention_mask" not in seen and seen["use_cache"] is False
    return {**seen, "logits_to_keep": 0}


class Perturb(Callback):
    """Keeps the losses by document of each pass, after changing the first document of every packed row if asked to."""

    def __init__(self, change: bool) -> None:
        self.change, self.train, self.val = change, [], []

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        def keep(module: Any, args: Any, output: Any) -> None:
            batch = args[0]
            others = batch["document_ids"] > 0
            assert others.any()
            (self.train if module.training else self.val).append(output["nll"].detach()[others].clone())

        pl_module.net.register_forward_hook(keep)

    def _change(self, batch: dict[str, Any]) -> None:
        if self.change:
            end = int(batch["cu_seqlens"][1])
            batch["input_ids"][0, :end] = (batch["input_ids"][0, :end] + 7) % VOCAB

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for part in batch["micro_batches"]:
            self._change(part)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._change(batch)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_c1_through_the_training_and_validation_steps(recompute: str, tiny_llama: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", chat_rows(12))
    val = write_jsonl(tmp_path / "val.jsonl", chat_rows(6, seed=5))

    seen = []
    for change in (False, True):
        watch = Perturb(change)
        train(
            tiny_llama,
            file,
            val=str(val),
            tokens_per_step=500,
            method={"lr": 0.0, "recompute": recompute},
            trainer={"num_sanity_val_steps": -1},
            callbacks=[watch],
        )
        seen.append(watch)
    assert len(seen[0].train) > 1 and len(seen[0].val) == 1
    for a, b in zip(seen[0].train + seen[0].val, seen[1].train + seen[1].val, strict=True):
        assert torch.equal(a, b)


def test_c3_positions_restart_in_each_document() -> None:
    batch = batch_of(True)
    assert batch["position_ids"][0].tolist() == [i for n in LENGTHS for i in range(n)]
    net = as_trained("gpt2")
    expected = []
    for ids, trained in documents():
        logits = net.model(torch.from_numpy(ids).long()[None], use_cache=False).logits[0]
        targets = np.flatnonzero(trained[1:])
        expected.append(F.cross_entropy(logits[targets], torch.from_numpy(ids[1:][targets]).long(), reduction="none"))
    torch.testing.assert_close(net(batch)["nll"], torch.cat(expected), atol=1e-5, rtol=1e-5)


def test_c4_no_target_from_the_document_before() -> None:
    everything = [(ids, np.ones_like(trained)) for ids, trained in documents()]
    for packing in (True, False):
        batch = batch_of(packing, everything)
        assert batch["trained"] == sum(n - 1 for n in LENGTHS)
    packed = batch_of(True, everything)
    starts = set(packed["cu_seqlens"].tolist())
    assert not starts & {int(p) + 1 for p in packed["target_positions"]}
    net = as_trained("llama")
    alone = sum(float(net(batch_of(True, [one]))["nll"].sum().detach()) for one in everything)
    assert float(net(packed)["nll"].sum().detach()) == pytest.approx(alone, rel=1e-6)


def test_c5_documents_of_one_token_keep_their_borders() -> None:
    rng = np.random.default_rng(3)
    some = [(rng.integers(3, VOCAB, n).astype(np.int32), np.ones(n, bool)) for n in (4, 1, 1, 3)]
    batch = batch_of(True, some)
    assert batch["cu_seqlens"].tolist() == [0, 4, 5, 6, 9]
    assert batch["document_ids"].tolist() == [0, 0, 0, 3, 3]
    net = as_trained("llama")
    alone = torch.cat([net(batch_of(True, [some[i]]))["nll"] for i in (0, 3)])
    torch.testing.assert_close(net(batch)["nll"], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_without_targets_has_gradients_of_zero(packing: bool) -> None:
    net = as_trained("llama")
    nothing = [(ids, np.zeros_like(trained)) for ids, trained in documents()]
    nll = net(batch_of(packing, nothing))["nll"]
    assert nll.shape == (0,)
    nll.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in net.parameters())


def test_h8_a_row_that_is_almost_all_padding_is_finite() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        net = as_trained("llama").to(dtype)
        nll, gradients = loss_and_gradients(net, batch_of(False))
        assert torch.isfinite(nll).all() and all(torch.isfinite(g).all() for g in gradients.values())


_SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.15}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
OTHERS: dict[str, dict[str, Any]] = {
    "mamba": {**_SIZES, "state_size": 4},
    "bloom": {**_SIZES, "n_layer": 2, "n_head": 4},
    "gpt_neo": {
        **_SIZES,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 8,
    },
    "lfm2": {**_SIZES, **_HEADS, "layer_types": ["conv", "full_attention"]},
    "opt": {**_SIZES, "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": {**_SIZES, "num_attention_heads": 4, "intermediate_size": 64},
    "phi": {**_SIZES, **_HEADS},
    "gptj": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "initializer_range": 0.15},
}
BY_VERSION = ("gptj",)  # got transformers' attention interface in 5.24


@pytest.mark.parametrize("kind", OTHERS)
def test_models_that_cannot_be_packed_are_padded_instead(kind: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from litft.models.load import can_pack

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **OTHERS[kind])).eval()
    model.config.use_cache = False
    expected = []
    for ids, trained in documents():
        targets = np.flatnonzero(trained[1:])
        logits = model(input_ids=torch.from_numpy(ids).long()[None], use_cache=False).logits[0, targets]
        expected.append(F.cross_entropy(logits, torch.from_numpy(ids[1:][targets]).long(), reduction="none"))
    reason = can_pack(model)
    assert kind in BY_VERSION or (reason is None) == (kind in ("opt", "gpt_neox", "phi"))
    if reason is None:
        model.set_attn_implementation(attention.register())
    for packing in (True, False) if reason is None else (False,):
        nll = CausalLM(model)(batch_of(packing))["nll"]
        torch.testing.assert_close(nll, torch.cat(expected), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_attaches_and_learns(family: str) -> None:
    from litft import LoRA

    net = as_trained(family)
    applied = LoRA(r=4).apply(net.model)
    assert applied.matched and applied.trainable < applied.total
    _, gradients = loss_and_gradients(net, batch_of(True))
    assert gradients and all("lora_" in name for name in gradients)
    assert all(g.abs().max() > 0 for name, g in gradients.items() if "lora_B" in name)
