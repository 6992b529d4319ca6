"""Known mistakes of preference methods, by their ids: none of them here."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import Callback
from preferences import Row, files, pair_rows, save_model
from tiny import save_tiny, tiny_tokenizer, write_jsonl
from training import Trace, difference, train

import litft
from litft.data.loader import Whole
from litft.data.preference_data import before

STEPS: dict[str, Any] = {"tokens_per_step": 400, "tokens_per_batch": 150}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return files(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def adapter(model: Path, rows: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained adapter, whose B is not zero."""
    folder = tmp_path_factory.mktemp("adapter") / "final"
    train(model, rows["pairs"], kind="DPO", tuner=litft.LoRA(r=4), **STEPS).method.save(folder)
    return folder


@pytest.fixture(scope="module")
def with_dropout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dropout = {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}
    return save_tiny(tmp_path_factory.mktemp("dropout"), "gpt2", **dropout)


class FirstFigures(Callback):
    """What the first step measured, and what the reference said of its first micro-batch then."""

    def __init__(self) -> None:
        self.first: dict[str, float] = {}
        self.batch: Any = None
        self.said: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.batch is None:
            self.batch = batch["micro_batches"][0]
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                self.said = pl_module.reference_log_p(self.batch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.first = self.first or pl_module.measures.means(trainer.strategy)

    def after(self, trace: Trace) -> Any:
        with torch.no_grad(), trace.trainer.precision_plugin.forward_context():
            return trace.method.reference_log_p(self.batch)


TUNERS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("Full", {}),
    "lora": ("LoRA", {"r": 4, "dropout": 0.1}),
    "dora": ("LoRA", {"r": 4, "dora": True}),
    "pissa": ("LoRA", {"r": 4, "init": "pissa"}),
    "head": ("LoRA", {"r": 4, "modules_to_save": ["lm_head"]}),
    "rows": ("LoRA", {"r": 4, "trainable_rows": [1, 2]}),
    "qlora": ("QLoRA", {"r": 4, "dropout": 0.1}),
}
AT_START = [("llama", tuner, "32-true") for tuner in TUNERS]
AT_START += [("llama", tuner, "bf16-mixed") for tuner in ("full", "lora", "qlora")]
AT_START += [("dropout", "full", "32-true"), ("dropout", "lora", "bf16-mixed")]
AT_START += [("adapter", "lora", "32-true"), ("adapter", "full", "32-true"), ("adapter", "lora", "bf16-mixed")]


@pytest.mark.parametrize(("which", "tuner", "precision"), AT_START, ids=str)
def test_g1_the_model_begins_as_its_reference_which_stays(
    which: str, tuner: str, precision: str, model: Path, adapter: Path, with_dropout: Path, rows: dict[str, Path]
) -> None:
    """Whatever has dropout, however the tuner begins; three steps later the reference is to the bit as it was."""
    cls, options = TUNERS[tuner]
    figures = FirstFigures()
    trace = train(
        {"llama": model, "adapter": adapter, "dropout": with_dropout}[which],
        rows["pairs"],
        kind="DPO",
        tuner=getattr(litft, cls)(**options),
        trainer={"max_steps": 3, "precision": precision},
        callbacks=[figures],
        **STEPS,
    )
    assert trace.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert trace.losses[2] != pytest.approx(math.log(2), abs=1e-3)
    rewards = [figures.first[f"rewards/{side}"] for side in ("chosen", "rejected", "margins")]
    # pissa takes its adapter out of the weights, which is added again: the same but for rounding
    assert rewards == ([pytest.approx(0.0, abs=1e-6)] * 3 if tuner == "pissa" else [0.0] * 3)
    assert torch.equal(figures.after(trace), figures.said)


@pytest.mark.slow
@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_g1_compiled_layers_round_as_their_reference_does(tuner: str, model: Path, rows: dict[str, Path]) -> None:
    """In bf16 the frozen copy isn't compiled, and layers without adapters are another graph than those with."""
    trace = train(
        model,
        rows["pairs"],
        kind="DPO",
        tuner=getattr(litft, TUNERS[tuner][0])(),
        method={"compile": "true"},
        trainer={"max_steps": 2, "precision": "bf16-mixed"},
        **STEPS,
    )
    assert trace.method.net.compiled
    assert trace.losses[0] == pytest.approx(math.log(2), abs=1e-6) != trace.losses[1]


def test_g1_a_continued_adapter_is_its_own_reference(model: Path, adapter: Path, rows: dict[str, Path]) -> None:
    """Not the model without any adapter."""
    said = {}
    for start in (model, adapter):
        figures = FirstFigures()
        train(start, rows["pairs"], kind="DPO", tuner=litft.LoRA(r=4), callbacks=[figures], **STEPS)
        said[start] = figures.said
    assert (said[model] - said[adapter]).abs().max() > 1e-2


@pytest.mark.parametrize("start", ["fresh", "continued"])
def test_g1_adapters_are_back_after_an_error_in_the_references_pass(start: str, model: Path, adapter: Path) -> None:
    method = litft.DPO(path=str(adapter if start == "continued" else model), tuner=litft.LoRA(r=4)).build()
    with torch.no_grad():
        for parameter in method.trainable_parameters():
            parameter += 0.1
    before = [p.detach().clone() for p in method.trainable_parameters()]
    ids = torch.arange(8)[None]

    def logits() -> torch.Tensor:
        return method.net.model(ids).logits.detach()

    learnt = logits()
    with pytest.raises(KeyError), method.reference.active():
        assert (logits() - learnt).abs().max() > 1e-3
        raise KeyError
    assert torch.equal(logits(), learnt)
    assert all(torch.equal(a, b) for a, b in zip(before, method.trainable_parameters(), strict=True))


def test_a_reference_that_follows(model: Path, rows: dict[str, Path]) -> None:
    """Every two steps, the whole way: then the loss begins anew at log 2."""
    for tuner in (litft.Full(), litft.LoRA(r=4)):
        options = {"sync_reference": 2, "sync_share": 1.0}
        losses = train(model, rows["pairs"], kind="DPO", tuner=tuner, method=options, **STEPS).losses
        same = [index for index, loss in enumerate(losses) if abs(loss - math.log(2)) < 1e-6]
        assert same == [0, 2, 4][: len(same)] and len(same) > 1, losses


# ---- g3: what is added up


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>"], ids=["pad", "pad is eos"])
def test_g3_log_probabilities_are_those_of_answers_alone(pad: str, packing: bool, tmp_path: Path) -> None:
    """Of rows of unequal length, against plain logits of each document by itself; the losses from them by formula."""
    folder = save_tiny(tmp_path / "model")
    tiny_tokenizer(pad_token=pad).save_pretrained(folder)
    some = pair_rows(2, seed=5)
    file = write_jsonl(tmp_path / "rows.jsonl", some)
    by_hand, lengths = [], []
    method = litft.DPO(path=str(folder), tuner=litft.Full()).build()
    for row in some:
        for answer in (row["chosen"], row["rejected"]):
            prompt = method.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
            ids = method.tokenizer.apply_chat_template(row["prompt"] + answer, return_dict=False)
            ids = ids[: len(ids) - ids[::-1].index(method.tokenizer.convert_tokens_to_ids("<|im_end|>"))]
            with torch.no_grad():
                log_p = method.net.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            at = range(len(prompt), len(ids))
            by_hand.append(sum(float(log_p[i - 1, ids[i]]) for i in at))
            lengths.append(len(at))
    assert len(set(lengths)) > 2
    data = litft.PreferenceData(str(file), val_fraction=0, packing=packing).prepare(method)
    batch = data.maker(data.selection)(np.arange(2), Whole(np.arange(2), int(data.selection.trained.sum())))
    found = method.answers(batch)
    assert found.log_p.tolist() == pytest.approx(by_hand, rel=1e-5)
    assert found.tokens.tolist() == lengths
    mean = [p / n for p, n in zip(by_hand, lengths, strict=True)]
    assert _loss("SimPO", folder, batch) == pytest.approx(
        _mean(mean, lambda c, r: _softplus(1 - 2 * (c - r))), rel=1e-5
    )
    cpo = _mean(by_hand, lambda c, r: _softplus(-0.1 * (c - r)))
    nll = -sum(by_hand[0::2]) / sum(lengths[0::2])
    assert _loss("CPO", folder, batch) == pytest.approx(cpo + nll, rel=1e-5)
    odds = _mean(mean, lambda c, r: _softplus(-(_log_odds(c) - _log_odds(r))))
    assert _loss("ORPO", folder, batch) == pytest.approx(nll + 0.1 * odds, rel=1e-5)
    assert _loss("DPO", folder, batch) == pytest.approx(math.log(2), abs=1e-6)
    assert _loss("DPO", folder, batch, loss_type="ipo") == pytest.approx(25.0, rel=1e-6)  # (0 - 1 / (2 * 0.1))^2


def _loss(kind: str, folder: Path, batch: Any, **options: Any) -> float:
    method = getattr(litft, kind)(path=str(folder), tuner=litft.Full(), **options).build()
    return float(method.loss(batch).detach())


def _mean(values: list[float], loss: Any) -> float:
    return sum(loss(c, r) for c, r in zip(values[0::2], values[1::2], strict=True)) / (len(values) // 2)


def _softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def _log_odds(x: float) -> float:
    return x - math.log(-math.expm1(x))


# ---- g4: what is cut


def sized(prompt: int, *answers: int) -> Row:
    """A pair whose prompt, and whose answers after it, have so many tokens of this model's."""
    tokenizer = tiny_tokenizer()

    def ids(messages: list[dict[str, str]], asked: bool) -> list[int]:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=asked, return_dict=False)

    def grow(length: int, make: Any) -> str:
        text = "a"
        while (lacking := length - make(text)) > 0:
            text += " sun" * lacking
        assert not lacking
        return text

    asked = grow(prompt, lambda text: len(ids([{"role": "user", "content": text}], True)))
    question = [{"role": "user", "content": asked}]
    texts = [
        grow(n, lambda text: len(ids([*question, {"role": "assistant", "content": text}], False)) - prompt)
        for n in answers
    ]
    return {"prompt": asked, "chosen": texts[0], "rejected": texts[1]}


@pytest.mark.parametrize(
    ("sizes", "limit", "lengths"),
    [
        ((20, 40, 30), 50, (50, 50)),
        ((20, 40, 20), 50, (50, 40)),
        ((20, 500, 60), 200, (200, 80)),
        ((20, 5000, 600), 2048, (2048, 620)),
        ((50, 40, 30), 50, None),
        ((60, 10, 11), 50, None),
        ((49, 40, 10), 50, (50, 50)),
    ],
    ids=str,
)
def test_g4_no_answer_is_cut_away(
    sizes: tuple[int, int, int], limit: int, lengths: tuple[int, int] | None, tmp_path: Path
) -> None:
    """Each of a pair is cut at the limit by itself, behind the same prompt; where that leaves nothing, the row goes."""
    folder = save_tiny(tmp_path / "model", max_position_embeddings=8192)
    kept = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    file = write_jsonl(tmp_path / "rows.jsonl", [sized(*sizes), kept])
    method = litft.DPO(path=str(folder), tuner=litft.Full())
    data = litft.PreferenceData(str(file), val_fraction=0, max_length=limit, overlong="truncate").prepare(method)
    rows = data.selection
    if lengths is None:
        assert len(rows) == 1 and rows.dropped == {"nothing to train on within the limit": 1}
        return
    assert len(rows) == 2 and rows.truncated == 1
    (chosen, mask), (rejected, other) = rows.documents(0)
    assert (len(chosen), len(rejected)) == lengths
    begin = sizes[0]
    assert np.array_equal(chosen[:begin], rejected[:begin])
    assert not mask[:begin].any() and not other[:begin].any() and mask[begin] and other[begin]
    assert mask.sum() >= 1 and other.sum() >= 1
    dropping = litft.PreferenceData(str(file), val_fraction=0, max_length=limit, overlong="drop").prepare(method)
    assert len(dropping.selection) == 1 and dropping.selection.dropped == {f"longer than {limit} tokens": 1}


# ---- g5: the pairs that KTO's KL is estimated on


@pytest.mark.parametrize("step", [[4], [0, 3, 9], [9, 2, 5, 7, 1], [3, 3, 8]], ids=str)
def test_g5_no_prompt_gets_its_own_answer(step: list[int]) -> None:
    others = {row: next(before(row, np.unique(step), 12)) for row in step}
    assert set(others) == set(step) and all(row != other for row, other in others.items())
    if len(set(step)) > 1:  # each answer is used once
        assert sorted(others.values()) == sorted(set(step))


def test_g5_the_mismatched_documents(model: Path, rows: dict[str, Path]) -> None:
    """Odd steps, cut into single rows: the prompt of a row, the answer of the step's row before it."""
    method = litft.KTO(path=str(model), tuner=litft.Full())
    data = litft.PreferenceData(str(rows["labelled"]), val_fraction=0, **STEPS).prepare(method)
    selection, step = data.selection, np.array([7, 2, 11])
    make = data.maker(selection)
    for row, other in ((2, 11), (7, 2), (11, 7)):
        batch = make(np.array([row]), Whole(step, 1))["mismatched"]
        (ids, trained), (other_ids, other_trained) = selection.read(row), selection.read(other)
        begin, first = int(trained.argmax()), int(other_trained.argmax())
        expected = [*ids[:begin].tolist(), *other_ids[first:].tolist()]
        assert batch["input_ids"][0, : len(expected)].tolist() == expected
        assert batch["target_ids"].tolist() == other_ids[other_trained].tolist()


def test_g5_answers_to_the_same_prompt_are_no_mismatch(model: Path, tmp_path: Path) -> None:
    """A good and a bad answer to each prompt, side by side, as such files often are."""
    some = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pair_rows(8)
        for side in ("chosen", "rejected")
    ]
    method = litft.KTO(path=str(model), tuner=litft.Full())
    data = litft.PreferenceData(str(write_jsonl(tmp_path / "rows.jsonl", some)), val_fraction=0, **STEPS)
    selection = data.prepare(method).selection
    make = data.maker(selection)
    for step in (np.arange(16), np.array([4, 5]), np.array([3])):
        for row in step:
            made = make(np.array([row]), Whole(step, 1))["mismatched"]
            ids, trained = selection.read(int(row))
            targets = made["target_ids"].tolist()
            own = [selection.read(int(row) ^ i) for i in (0, 1)]  # both answers to its prompt
            assert made["input_ids"][0, : int(trained.argmax())].tolist() == ids[: int(trained.argmax())].tolist()
            assert all(targets != other[mask].tolist() for other, mask in own)


class FirstKL(Callback):
    """The estimate, and what it is an estimate of, in the second step."""

    found: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 1:
            with torch.no_grad():
                each = [b["mismatched"] for b in batch["micro_batches"]]
                ratios = [pl_module.answers(b).log_p - pl_module.reference_log_p(b) for b in each]
                self.found = float(torch.cat(ratios).mean()), pl_module.look_ahead(batch["micro_batches"])


@pytest.mark.parametrize("labels", ["both", "good", "bad"])
def test_g5_one_class_alone_is_finite_and_the_first_step_is_known(labels: str, model: Path, tmp_path: Path) -> None:
    """Before the model has moved every loss is 1 - sigmoid(0); a step has one estimate of the KL in all its parts."""
    some = [json.loads(line) for line in files(tmp_path)["labelled"].read_text().splitlines()]
    some = [row | ({} if labels == "both" else {"label": labels == "good"}) for row in some]
    kl = FirstKL()
    trace = train(model, write_jsonl(tmp_path / "rows.jsonl", some), kind="KTO", callbacks=[kl], **STEPS)
    assert trace.losses[0] == pytest.approx(0.5, abs=1e-6)
    assert all(map(math.isfinite, trace.losses + trace.norms)) and trace.norms[0] > 0.1
    mean, ahead = kl.found
    assert len(ahead) > 1 and len({float(value) for value in ahead}) == 1
    assert float(ahead[0]) == pytest.approx(max(mean, 0.0), rel=1e-5, abs=1e-6)
    assert not any(value.requires_grad for value in ahead)


# ---- g7: a reference's log-probabilities computed ahead


def test_g7_what_was_computed_otherwise_is_computed_again(
    tmp_path: Path, rows: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16 rounds otherwise for other kernels: the first loss is ln 2 to the last digit against its own reference."""
    monkeypatch.setenv("LITFT_CACHE", str(tmp_path / "cache"))
    model = save_model(tmp_path / "model", initializer_range=0.1)
    arms: list[dict[str, Any]] = [
        {},
        {"packing": False},
        {"fast_attention": False},
        {"fast_lora": False},
        {"pissa": True},
        {},
    ]
    for arm in [*arms, {}]:
        tuner = litft.LoRA(r=4, init="pissa" if arm.get("pissa") else "default")
        method = {"reference": "cached"} | {k: v for k, v in arm.items() if k.startswith("fast")}
        data = {k: v for k, v in arm.items() if k == "packing"}
        trainer = {"precision": "bf16-mixed", "max_steps": 1}
        trace = train(model, rows["pairs"], kind="DPO", tuner=tuner, method=method, trainer=trainer, **data)
        assert trace.losses[0] == pytest.approx(math.log(2), abs=1e-6), arm


CACHED: dict[str, Any] = {"method": {"reference": "cached"}, **STEPS}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of their own."""
    monkeypatch.setenv("LITFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def entries(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("*.npz")}


@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize("start", ["base", "adapter"])
def test_g7_cached_is_live(
    start: str, tuner: str, model: Path, adapter: Path, rows: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """Of two files, their rows shuffled, some left out, over two epochs; computed, and then read."""
    more = write_jsonl(tmp_path / "more.jsonl", [sized(100, 20, 20), *pair_rows(9, seed=8), {"bad": 1}])
    path, cls = adapter if start == "adapter" else model, TUNERS[tuner][0]
    options: dict[str, Any] = {
        **STEPS,
        "kind": "DPO",
        "max_length": 80,
        "bad_rows": "skip",
        "val_fraction": 0.2,
        "trainer": {"max_epochs": 2, "val_check_interval": 3},
    }
    data = [str(rows["pairs"]), str(more)]
    live, computed, read = (
        train(path, data, tuner=getattr(litft, cls)(), method={"reference": kind}, **options)
        for kind in ("live", "cached", "cached")
    )
    assert live.data.selection.dropped and live.losses[-1] < live.losses[0] - 0.05
    for cached in (computed, read):
        assert cached.losses == pytest.approx(live.losses, rel=1e-5)
        assert difference(cached.weights, live.weights) < 1e-5
        assert [v["val_loss"] for v in cached.val_losses] == pytest.approx(
            [v["val_loss"] for v in live.val_losses], rel=1e-5
        )
    assert len(entries(cache)) == 2  # training and validation rows


def test_g7_the_cache_knows_what_it_was_made_of(
    model: Path, rows: dict[str, Path], cache: Path, tmp_path: Path
) -> None:
    """Another limit, template or base: computed anew, under a name of its own; the same again: not."""
    other = tmp_path / "other"
    shutil.copytree(save_model(tmp_path / "seeded", seed=1), other)
    short = {"max_length": 48, "overlong": "truncate"}
    seen: list[set[str]] = []
    for path, options in ((model, {}), (model, {}), (model, short), (model, {"chat_template": "chatml"}), (other, {})):
        train(path, rows["pairs"], kind="DPO", trainer={"max_steps": 1}, **CACHED, **options)
        seen.append(entries(cache))
    assert [len(names) for names in seen] == [1, 1, 2, 3, 4]


def test_g7_a_damaged_entry_is_computed_anew(model: Path, rows: dict[str, Path], cache: Path) -> None:
    runs = []
    for _ in range(3):
        runs.append(train(model, rows["pairs"], kind="DPO", trainer={"max_steps": 2}, **CACHED).losses)
        (entry,) = cache.rglob("*.npz")
        entry.write_bytes(entry.read_bytes()[: len(runs) * 100])
    assert runs[0] == runs[1] == runs[2]


# ---- a pair in a packed batch


def test_the_rejected_answer_is_nothing_to_the_chosen_one(model: Path, tmp_path: Path) -> None:
    """To the bit, in the same packed micro-batch, whatever it says."""
    some = pair_rows(4, seed=2)
    other = [{**row, "rejected": [{"role": "assistant", "content": "stone " * 3}]} for row in some]
    said = []
    for index, lines in enumerate((some, other)):
        method = litft.DPO(path=str(model), tuner=litft.Full()).build()
        file = write_jsonl(tmp_path / f"{index}.jsonl", lines)
        data = litft.PreferenceData(str(file), val_fraction=0).prepare(method)
        batch = data.maker(data.selection)(np.arange(4), Whole(np.arange(4), 1))
        assert "attention_mask" not in batch
        said.append(method.answers(batch).log_p)
    assert torch.equal(said[0][0::2], said[1][0::2])
    assert (said[0][1::2] != said[1][1::2]).all()


def test_mixtures_of_experts_are_not_balanced(tmp_path: Path, rows: dict[str, Path]) -> None:
    """Their router's loss is no part of these methods: asked for, it is refused; asked for by a model, left out."""
    with pytest.raises(litft.UserError, match="has no balance loss"):
        litft.DPO(balance_experts=0.01)
    folder = save_tiny(tmp_path / "moe", "qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.5)
    trace = train(folder, rows["pairs"], kind="DPO", trainer={"max_steps": 1}, **STEPS)
    assert trace.losses[0] == pytest.approx(math.log(2), abs=1e-6) and not trace.method.net.balance_experts
