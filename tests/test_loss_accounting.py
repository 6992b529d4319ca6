"""A step's loss is sum(CE) / trained tokens of the whole optimizer step, however the step is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_in
from tiny import chat_rows, save_tiny, write_jsonl
from torch.nn import functional as F
from training import Trace, difference, moved, train

from litft import UserError

STEP = 600  # tokens an optimizer step
CUTS: dict[str, dict[str, Any]] = {
    "one micro-batch": {"tokens_per_batch": 4096},
    "small micro-batches": {"tokens_per_batch": 260},
    "padded": {"tokens_per_batch": 4096, "packing": False},
    "padded, small": {"tokens_per_batch": 300, "packing": False},
}
ADAMW: dict[str, Any] = {
    "optimizer": "adamw",
    "lr": 1e-3,
    "schedule": "cosine",
    "warmup": 0.2,
    "clip": 1.0,
    "weight_decay": 0.1,
}
MOE: dict[str, Any] = {"balance_experts": 0.5}


def row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


UNEVEN = [row("why?", "a"), row("sun and moon " * 8, "the"), row("who?", "a stone"), row("when", "word wind " * 20)]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", chat_rows(40))


@pytest.fixture(scope="session")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "uneven.jsonl", UNEVEN)


@pytest.fixture(scope="session")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "moe", "qwen3_moe")


@pytest.fixture(scope="session")
def val(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five held-out rows, of which one has most of the tokens."""
    answers = ["a", "the sun", "river stone " * 20, "old", "no"]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "val.jsonl", [row(f"q{i}", a) for i, a in enumerate(answers)])


@pytest.fixture(scope="session")
def jobs(tiny_llama: Path, moe: Path, rows: Path, uneven: Path, val: Path) -> dict[str, dict[str, Any]]:
    """Runs that are made in one process and in two."""
    return {
        "sgd": {"model": str(tiny_llama), "rows": str(rows), "tokens_per_step": STEP, "tokens_per_batch": 260},
        "adamw": {
            "model": str(tiny_llama),
            "rows": str(rows),
            "tokens_per_step": STEP,
            "tokens_per_batch": 260,
            "method": ADAMW,
            "trainer": {"max_epochs": 2},
        },
        "padded": {
            "model": str(tiny_llama),
            "rows": str(rows),
            "tokens_per_step": STEP,
            "tokens_per_batch": 300,
            "packing": False,
        },
        "lora": {
            "model": str(tiny_llama),
            "rows": str(rows),
            "tokens_per_step": STEP,
            "tokens_per_batch": 260,
            "tuner": ["LoRA", {"r": 4, "dropout": 0.0}],
            "method": {"recompute": "full"},
            "num_workers": 1,
        },
        "moe": {"model": str(moe), "rows": str(rows), "tokens_per_step": STEP, "tokens_per_batch": 260, "method": MOE},
        "uneven": {"model": str(tiny_llama), "rows": str(uneven), "tokens_per_step": 4096, "val": str(val)},
        "a row for one rank only": {
            "model": str(tiny_llama),
            "rows": str(uneven),
            "tokens_per_step": 1,
            "val": str(val),
            "trainer": {"val_check_interval": 2},
        },
        "poisoned": {
            "model": str(tiny_llama),
            "rows": str(rows),
            "tokens_per_step": STEP,
            "tokens_per_batch": 260,
            "poison": 2,
            "method": ADAMW,
        },
    }


@pytest.fixture(scope="session")
def in_two(jobs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every job in two processes; one start of them for all tests."""
    return run_in(2, jobs, tmp_path_factory.mktemp("two"))


def in_one(jobs: dict[str, dict[str, Any]], name: str, **changed: Any) -> Trace:
    import litft

    job = dict(jobs[name])
    if tuner := job.pop("tuner", None):
        job["tuner"] = getattr(litft, tuner[0])(**tuner[1])
    return train(**(job | changed))


def assert_same(a: Trace | dict[str, Any], b: Trace | dict[str, Any]) -> None:
    a, b = (x.state() if isinstance(x, Trace) else x for x in (a, b))
    assert [sorted(r) for r in a["rows"]] == [sorted(r) for r in b["rows"]]
    assert a["losses"] == pytest.approx(b["losses"], rel=1e-5)
    assert a["norms"] == pytest.approx(b["norms"], rel=1e-4)
    assert difference(a["weights"], b["weights"]) < 1e-5


def oracle(trace: Trace, model: Path, rows: list[int]) -> tuple[float, dict[str, torch.Tensor]]:
    """Sum of token cross-entropies over the number of trained tokens, in float64, a row at a time; and its gradient."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
    total, count = torch.zeros((), dtype=torch.float64), 0
    for index in rows:
        ids, trained = (torch.from_numpy(x.copy()) for x in trace.data.selection.read(index))
        labels = torch.where(trained, ids.long(), -100)[1:]
        logits = plain(ids.long()[None], use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, labels, reduction="sum")
        count += int((labels != -100).sum())
    loss = total / count
    loss.backward()
    return float(loss), {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}


# ---- one process


@pytest.mark.parametrize("cut", [{"tokens_per_batch": n} for n in (4096, 150, 80)] + [{"packing": False}], ids=str)
def test_a1_a_step_is_the_sum_over_its_tokens(
    cut: dict[str, Any], tiny_llama: Path, uneven: Path, recwarn: Any
) -> None:
    one = train(tiny_llama, uneven, tokens_per_step=4096, method={"lr": 1.0}, **cut)
    assert len(one.losses) == 1 and sorted(one.rows[0]) == [0, 1, 2, 3]
    trained = one.data.selection.trained
    assert trained.max() > 10 * trained.min()
    expected, gradient = oracle(one, tiny_llama, one.rows[0])
    assert one.losses[0] == pytest.approx(expected, rel=1e-6)
    from transformers import AutoModelForCausalLM

    start = dict(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).named_parameters())
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight - start[name], -gradient[name].float(), atol=2e-6, rtol=1e-5)
    whole = torch.stack([g.norm() for g in gradient.values()]).norm()
    assert one.norms[0] == pytest.approx(float(whole), rel=1e-5)


@pytest.mark.parametrize("method", [{}, ADAMW], ids=["sgd", "adamw"])
def test_a6_the_same_run_however_it_is_cut(method: dict[str, Any], tiny_llama: Path, rows: Path) -> None:
    runs = {
        name: train(tiny_llama, rows, method=method, tokens_per_step=STEP, trainer={"max_epochs": 2}, **cut)
        for name, cut in CUTS.items()
    }
    first = runs["one micro-batch"]
    assert len(first.losses) > 6 and moved(first, tiny_llama) > 1e-3
    assert max(runs["small micro-batches"].micro_batches) > 2
    for run in runs.values():
        assert_same(first, run)


def test_a4_a_short_last_step_is_not_scaled_down(tiny_llama: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "d.jsonl", chat_rows(9))
    trace = train(tiny_llama, file, tokens_per_step=450, tokens_per_batch=300, trainer={"max_steps": 50})
    plan = trace.data.plan
    last = len(plan.steps(0)) - 1
    assert plan.lengths[plan.steps(0)[last]].sum() < 300 < 450, "the last step should be a short one"
    # the same rows as a run of their own, from the weights before that step
    whole = train(tiny_llama, file, tokens_per_step=450, tokens_per_batch=300, method={"lr": 0.0})
    expected, gradient = oracle(whole, tiny_llama, whole.rows[last])
    assert whole.losses[last] == pytest.approx(expected, rel=1e-6)
    assert whole.norms[last] == pytest.approx(
        float(torch.stack([g.norm() for g in gradient.values()]).norm()), rel=1e-5
    )


def test_a5_validation_is_the_sum_over_all_tokens(tiny_llama: Path, rows: Path, val: Path) -> None:
    from litft import Full

    del Full
    seen = []
    for cut in ({"tokens_per_batch": 4096}, {"tokens_per_batch": 220}, {"packing": False, "tokens_per_batch": 220}):
        trace = train(
            tiny_llama,
            rows,
            val=str(val),
            max_length=220,
            tokens_per_step=STEP,
            method={"lr": 0.0},
            trainer={"num_sanity_val_steps": -1, "val_check_interval": 2},
            **cut,
        )
        assert len(trace.val_losses) >= 3
        seen += [losses["val_loss"] for losses in trace.val_losses]
    trace.data.selection = trace.data.val_selections["val"]
    assert len(trace.data.selection) == 5
    expected, _ = oracle(trace, tiny_llama, list(range(5)))
    assert seen == pytest.approx([expected] * len(seen), rel=1e-6)


def test_a5_every_validation_set_has_a_loss_of_its_own(tiny_llama: Path, rows: Path, val: Path, uneven: Path) -> None:
    trace = train(
        tiny_llama,
        rows,
        val={"a": str(val), "b": str(uneven)},
        method={"lr": 0.0},
        tokens_per_batch=300,
        trainer={"num_sanity_val_steps": -1, "max_steps": 1},
    )
    losses = trace.val_losses[0]
    sums = []
    for name in ("a", "b"):
        selection = trace.data.selection = trace.data.val_selections[name]
        expected, _ = oracle(trace, tiny_llama, list(range(len(selection))))
        assert losses[f"val_loss/{name}"] == pytest.approx(expected, rel=1e-6)
        sums.append((expected * selection.trained.sum(), selection.trained.sum()))
    assert losses["val_loss"] == pytest.approx(sum(s for s, _ in sums) / sum(n for _, n in sums), rel=1e-6)


def test_a7_expert_balance_has_the_same_denominator(moe: Path, rows: Path) -> None:
    runs = [train(moe, rows, method=MOE, tokens_per_step=STEP, **cut) for cut in CUTS.values()]
    plain = train(moe, rows, tokens_per_step=STEP)
    assert abs(runs[0].losses[0] - plain.losses[0]) > 0.1, "the balance loss is part of the loss"
    for run in runs[1:]:
        assert_same(runs[0], run)


def test_a7_no_experts_to_balance(tiny_llama: Path, rows: Path) -> None:
    with pytest.raises(UserError, match="balance_experts"):
        train(tiny_llama, rows, method=MOE)


def test_a8_the_denominator_counts_predicted_tokens(tiny_llama: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": "the sun sings"}, {"text": "a"}, {"text": "old bird runs why"}])
    for packing in (True, False):
        trace = train(tiny_llama, file, tokens_per_step=4096, packing=packing)
        data = trace.data
        (step,) = data.train_dataloader(0, 0)
        assert step["trained"] == data.selection.lengths.sum() - len(data.selection)
        assert sum(int((m["target_ids"] >= 0).sum()) for m in step["micro_batches"]) == step["trained"]
        assert [float(m["denominator"]) for m in step["micro_batches"]] == [step["trained"]] * len(
            step["micro_batches"]
        )
        assert trace.losses[0] == pytest.approx(oracle(trace, tiny_llama, trace.rows[0])[0], rel=1e-6)


class NextTokenOracle(torch.nn.Module):
    """A language model that is certain of each next token, and right."""

    class config:
        _attn_implementation = "flash_attention_2"  # one that keeps documents apart
        get_text_config = dict

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(384, 384, bias=False)
        torch.nn.init.eye_(self.head.weight)

    def get_output_embeddings(self) -> Any:
        return self.head

    def forward(self, input_ids: Any, logits_to_keep: Any = slice(None), **kwargs: Any) -> Any:
        from types import SimpleNamespace

        after = torch.cat([input_ids[:, 1:], input_ids[:, :1]], dim=1)
        return SimpleNamespace(logits=self.head(100.0 * F.one_hot(after, 384).float()[:, logits_to_keep]))


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_a3_targets_are_shifted_once(packing: bool, fast: bool) -> None:
    import numpy as np

    from litft.data.batch import pack_documents, pad_documents
    from litft.models.causal_lm import CausalLM

    rng = np.random.default_rng(0)
    documents = [(rng.integers(3, 384, n), rng.random(n) < 0.5) for n in (9, 4, 30)]
    batch = pack_documents(documents, 1.0) if packing else pad_documents(documents, 1.0, 0)
    assert batch["trained"] > 10
    net = CausalLM(NextTokenOracle(), fast_loss=fast)
    assert (net.head is not None) == fast
    assert float(net(batch)["nll"].abs().max()) < 1e-6


# ---- two processes


@pytest.mark.parametrize("name", ["sgd", "adamw", "padded", "lora", "moe", "uneven", "a row for one rank only"])
def test_a2_two_processes_make_the_steps_of_one(name: str, jobs: dict[str, Any], in_two: dict[str, Any]) -> None:
    two = in_two[name]
    assert difference(two["rank0"]["weights"], two["rank1"]["weights"]) == 0.0
    assert_same(in_one(jobs, name), two)


def test_a5_validation_over_two_processes(jobs: dict[str, Any], in_two: dict[str, Any]) -> None:
    name = "a row for one rank only"
    one, two = in_one(jobs, name), in_two[name]
    losses = [losses["val_loss"] for losses in one.val_losses]
    assert len(losses) == 2 and losses[0] != losses[1]
    for rank in ("rank0", "rank1"):
        assert [found["val_loss"] for found in two[rank]["val_losses"]] == pytest.approx(losses, rel=1e-5)


def test_i5_ranks_make_equally_many_micro_batches(in_two: dict[str, Any]) -> None:
    for name, two in in_two.items():
        assert two["rank0"]["micro_batches"] == two["rank1"]["micro_batches"], name
    assert in_two["a row for one rank only"]["micro_batches"] == [1, 1, 1, 1]


def test_i4_every_row_once_an_epoch_over_the_ranks(in_two: dict[str, Any]) -> None:
    two = in_two["adamw"]
    steps = len(two["rows"]) // 2
    epochs = [[row for step in two["rows"][i : i + steps] for row in step] for i in (0, steps)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(40))] * 2
    assert epochs[0] != epochs[1]
    assert two["rank0"]["rows"] == two["rank1"]["rows"], "rows are those of the step over all ranks"


def test_h5_a_bad_step_on_one_rank_is_skipped_on_all(jobs: dict[str, Any], in_two: dict[str, Any]) -> None:
    two = in_two["poisoned"]
    assert difference(two["rank0"]["weights"], two["rank1"]["weights"]) == 0.0
    assert all(torch.isfinite(w).all() for w in two["weights"].values())
    assert [not torch.isfinite(torch.tensor(n)) for n in two["norms"]].index(True) == 2
    assert sum(not torch.isfinite(torch.tensor(n)) for n in two["norms"]) == 1
