"""Distillation, held against formulas written out, and against itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import VOCAB, chat_rows, save_tiny, tiny_tokenizer, write_jsonl
from torch.nn import functional as F
from training import difference, train
from transformers import AutoModelForCausalLM, AutoTokenizer

import litft
from litft.errors import UserError
from litft.losses.distillation import divergence, linear_loss, with_rest
from litft.methods.distill import check_vocabularies


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "chats.jsonl", chat_rows(16, seed=2))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("student") / "model", "llama")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("teacher") / "model", "llama", seed=5, num_hidden_layers=3)


def distilled(student: Path, rows: Path, teacher: Path, tuner: Any = None, **options: Any) -> Any:
    method = {"teacher": str(teacher), **options.pop("method", {})}
    return train(student, rows, kind="Distill", tuner=tuner, method=method, tokens_per_step=300, **options)


# ---- the divergences


def test_g8_divergences_of_three_tokens_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.3, 0.2]]).double(), torch.tensor([[0.2, 0.2, 0.6]]).double()
    forward = (p * (p / q).log()).sum()
    reverse = (q * (q / p).log()).sum()
    mixture = 0.3 * p + 0.7 * q
    js = 0.3 * (p * (p / mixture).log()).sum() + 0.7 * (q * (q / mixture).log()).sum()
    found = {
        "forward_kl": forward,
        "reverse_kl": reverse,
        "symmetric_kl": 0.3 * forward + 0.7 * reverse,
        "js_divergence": js,
    }
    for kind, expected in found.items():
        torch.testing.assert_close(divergence(q.log(), p.log(), kind, 0.3)[0], expected)  # type: ignore[arg-type]
        assert divergence(p.log(), p.log(), kind, 0.3).abs().max() < 1e-12  # type: ignore[arg-type]


def test_a_loss_in_blocks_has_the_gradients_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litft.losses.distillation.BLOCK", 128 * 77)
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(s, requires_grad=True) for s in ((300, 16), (77, 16), (77,)))
    theirs = torch.randn(300, 77).log_softmax(-1)

    def loss(some: slice, logits: torch.Tensor) -> torch.Tensor:
        return divergence(logits.log_softmax(-1), theirs[some], "js_divergence")

    found = linear_loss(hidden, weight, bias, loss, scale=0.5, softcap=4.0)
    expected = loss(slice(None), 4.0 * torch.tanh((hidden @ weight.T + bias) * 0.5 / 4.0))
    torch.testing.assert_close(found, expected)
    for mine, whole in zip(
        torch.autograd.grad(found.sum() / 7, (hidden, weight, bias)),
        torch.autograd.grad(expected.sum() / 7, (hidden, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(mine, whole, atol=1e-6, rtol=1e-4)


def test_the_rest_of_a_distribution_is_one_token_more() -> None:
    log_p = torch.tensor([[0.5, 0.3], [0.5, 0.5]]).log()
    torch.testing.assert_close(with_rest(log_p).exp()[0], torch.tensor([0.5, 0.3, 0.2]))
    assert torch.isfinite(with_rest(log_p)).all()


# ---- whole runs


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_g8_a_model_has_nothing_to_learn_from_itself(precision: str, rows: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "llama", attention_dropout=0.1)
    tuner = litft.LoRA(r=4, dropout=0.1)
    for kind in ("forward_kl", "reverse_kl", "symmetric_kl", "js_divergence"):
        options = {"method": {"ce_share": 0.0, "loss_type": kind}, "trainer": {"precision": precision, "max_steps": 1}}
        assert abs(distilled(model, rows, model, tuner, **options).losses[0]) < 1e-6


@pytest.mark.parametrize(
    ("method", "tuner"),
    [({}, None), ({"loss_type": "reverse_kl", "temperature": 2.0, "ce_share": 0.25}, litft.LoRA(r=4))],
    ids=["full", "lora"],
)
def test_the_loss_is_that_of_the_formula(
    method: dict[str, Any], tuner: Any, student: Path, teacher: Path, rows: Path
) -> None:
    run = distilled(student, rows, teacher, tuner, method=method, trainer={"max_steps": 1})
    one, other = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (student, teacher))
    t, share, kind = method.get("temperature", 1.0), method.get("ce_share", 0.5), method.get("loss_type", "forward_kl")
    total, count = 0.0, 0
    for index in run.rows[0]:
        ids, trained = (torch.from_numpy(part.copy()) for part in run.data.selection.read(index))
        with torch.no_grad():
            mine, theirs = (m(ids[None].long()).logits[0, :-1][trained[1:]].double() for m in (one, other))
        p, q = ((x / t).softmax(-1) for x in (theirs, mine))
        kl = (p * (p / q).log()).sum(-1) if kind == "forward_kl" else (q * (q / p).log()).sum(-1)
        ce = F.cross_entropy(mine, ids[1:][trained[1:]].long(), reduction="none")
        total += float((share * ce + (1 - share) * t * t * kl).sum())
        count += int(trained[1:].sum())
    assert run.losses[0] == pytest.approx(total / count, rel=1e-5)


def test_g8_neither_padding_nor_the_cut_change_anything(student: Path, teacher: Path, rows: Path) -> None:
    whole = distilled(student, rows, teacher)
    assert len(whole.losses) > 2
    for cut in ({"packing": False}, {"tokens_per_batch": 130}):
        run = distilled(student, rows, teacher, **cut)
        assert run.losses == pytest.approx(whole.losses, rel=1e-5)
        assert difference(run.weights, whole.weights) < 1e-5


def test_g8_rows_that_fill_a_vocabulary_up_are_left_out(
    student: Path, teacher: Path, rows: Path, tmp_path: Path
) -> None:
    padded = AutoModelForCausalLM.from_pretrained(teacher)
    padded.resize_token_embeddings(VOCAB + 64)
    with torch.no_grad():
        padded.lm_head.weight[VOCAB:] = 9.0
    padded.save_pretrained(tmp_path / "padded")
    tiny_tokenizer().save_pretrained(tmp_path / "padded")
    live = distilled(student, rows, teacher).losses
    assert distilled(student, rows, tmp_path / "padded").losses == live
    ahead = distilled(student, rows, tmp_path / "padded", method={"top_k": VOCAB + 50})
    assert ahead.losses == pytest.approx(live, rel=1e-5)


def test_g8_a_token_that_the_teacher_has_no_logit_for_is_refused(student: Path, teacher: Path) -> None:
    own, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (student, teacher))
    own.add_tokens(["<|new|>"])
    check_vocabularies(own, theirs, "teacher", VOCAB + 1)
    with pytest.raises(UserError, match="new"):
        check_vocabularies(own, theirs, "teacher", VOCAB)


def test_the_likeliest_tokens_on_disk_are_the_teacher(
    student: Path, teacher: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LITFT_CACHE", str(tmp_path / "cache"))
    live = distilled(student, rows, teacher)
    every = distilled(student, rows, teacher, method={"top_k": VOCAB})
    assert every.losses == pytest.approx(live.losses, rel=1e-5) and not every.method._teacher
    some = distilled(student, rows, teacher, method={"top_k": 8})
    assert some.losses != pytest.approx(live.losses, rel=1e-3)
    (file,) = [f for f in (tmp_path / "cache" / "computed").iterdir() if f.stat().st_size < 200_000]
    kept = file.stat().st_mtime_ns
    assert distilled(student, rows, teacher, method={"top_k": 8}).losses == some.losses
    assert file.stat().st_mtime_ns == kept, "read, not computed again"


@pytest.mark.parametrize("quant", ["nf4", "int8"])
def test_a_quantised_teacher_says_nearly_the_same(quant: str, student: Path, teacher: Path, rows: Path) -> None:
    plain = distilled(student, rows, teacher, method={"ce_share": 0.0}).losses
    found = distilled(student, rows, teacher, method={"ce_share": 0.0, "teacher_quant": quant}).losses
    assert found == pytest.approx(plain, rel=0.1) and found != plain


def test_other_vocabularies_are_refused(student: Path, rows: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    check_vocabularies(tokenizer, tiny_tokenizer(), "x")
    vocabulary = tokenizer.get_vocab()
    first, second = sorted(vocabulary)[:2]

    class Swapped:
        def get_vocab(self) -> dict[str, int]:
            return vocabulary | {first: vocabulary[second], second: vocabulary[first]}

    with pytest.raises(UserError, match=r"2 of 384 tokens differ"):
        check_vocabularies(tokenizer, Swapped(), "x")
    with pytest.raises(UserError, match="needs a model to learn from"):
        litft.Distill(str(student))


# ---- options of supervised fine-tuning


def test_smoothed_labels_are_torchs(student: Path, rows: Path) -> None:
    run = train(student, rows, method={"label_smoothing": 0.1}, tokens_per_step=300, trainer={"max_steps": 1})
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for index in run.rows[0]:
        ids, trained = (torch.from_numpy(part.copy()) for part in run.data.selection.read(index))
        with torch.no_grad():
            logits = model(ids[None].long()).logits[0, :-1][trained[1:]]
        targets = ids[1:][trained[1:]].long()
        total += float(F.cross_entropy(logits, targets, reduction="sum", label_smoothing=0.1))
        count += len(targets)
    assert run.losses[0] == pytest.approx(total / count, rel=1e-5)


def test_noise_is_of_the_size_of_the_paper_and_in_training_only(student: Path, rows: Path) -> None:
    seen: list[torch.Tensor] = []
    shortest: list[int] = []

    def watch(method: Any) -> None:
        embedding, add = method.net.model.get_input_embeddings(), method.noise

        def noise(batch: Any) -> Any:
            context = add(batch)
            shortest.append(int(batch["cu_seqlens"].diff().min()))  # that of what fills the row up, maybe
            clean = embedding(batch["input_ids"]).detach()

            class Watching:
                def __enter__(self) -> None:
                    context.__enter__()
                    hook = embedding.register_forward_hook(lambda m, a, out: seen.append((out - clean).detach()))
                    self.hook = hook

                def __exit__(self, *error: Any) -> None:
                    self.hook.remove()
                    context.__exit__(*error)

            return Watching()

        method.noise = noise

    run = train(student, rows, method={"neftune": 5.0}, tokens_per_step=300, trainer={"max_steps": 1}, change=watch)
    plain = train(student, rows, tokens_per_step=300, trainer={"max_steps": 1})
    assert run.losses[0] != plain.losses[0] and run.losses[0] == pytest.approx(plain.losses[0], rel=0.2)
    bound = 5.0 / (min(shortest) * 32) ** 0.5
    assert seen and 0.8 * bound < max(float(part.abs().max()) for part in seen) <= bound * 1.001
