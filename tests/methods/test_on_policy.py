"""Distillation on the student's own answers, against transformers' answers and formulas written out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import chat_rows, save_tiny, write_jsonl
from training import train
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import litft
from litft.data.batch import documents_of, pack_documents, pad_documents
from litft.errors import UserError
from litft.methods import on_policy


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "chats.jsonl", chat_rows(10, seed=2))


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("student") / "model", "llama", initializer_range=0.2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("teacher") / "model", "llama", seed=5, num_hidden_layers=3)


def distilled(student: Path, rows: Path, teacher: Path, tuner: Any = None, **options: Any) -> Any:
    method = {"teacher": str(teacher), "on_policy": 1.0, "max_new_tokens": 12, **options.pop("method", {})}
    return train(student, rows, kind="Distill", tuner=tuner, method=method, tokens_per_step=400, **options)


@pytest.mark.parametrize("make", ["packed", "padded"])
def test_documents_come_out_of_a_batch_as_they_went_in(make: str) -> None:
    import numpy as np

    draw = np.random.default_rng(0)
    documents = [(draw.integers(0, 99, n), draw.random(n) < 0.5) for n in (1, 7, 30)]
    for _, trained in documents:
        trained[0] = False
    batch = pack_documents(documents, 1.0, 64) if make == "packed" else pad_documents(documents, 1.0, 0)
    found = documents_of(batch, 3)
    assert len(found) == 3
    for (ids, trained), (their_ids, theirs) in zip(found, documents, strict=True):
        assert ids.tolist() == their_ids.tolist() and trained.tolist() == theirs.tolist()


def test_the_loss_is_that_of_greedy_answers_by_transformers(
    student: Path, teacher: Path, rows: Path, tmp_path: Path
) -> None:
    """Also where the model's own settings would have answers penalised."""
    student = shutil.copytree(student, tmp_path / "student")
    settings = GenerationConfig.from_pretrained(student)
    settings.update(repetition_penalty=5.0)
    settings.save_pretrained(student)
    method = {"answer_temperature": 0.0, "loss_type": "reverse_kl", "ce_share": 0.4}
    run = distilled(student, rows, teacher, method=method, trainer={"max_steps": 1})
    one, other = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in (student, teacher))
    stop = AutoTokenizer.from_pretrained(student).eos_token_id
    total, count = 0.0, 0
    for index in run.rows[0]:
        ids, trained = (torch.from_numpy(part.copy()) for part in run.data.selection.read(index))
        begin = int((trained[1:] & ~trained[:-1]).nonzero()[-1]) + 1  # of the last answer
        prompt = ids[None, :begin].long()
        plain = {"do_sample": False, "repetition_penalty": 1.0}
        whole = one.generate(prompt, max_new_tokens=12, **plain, eos_token_id=stop, pad_token_id=0)
        with torch.no_grad():
            mine, theirs = (m(whole).logits[0, begin - 1 : -1].double().log_softmax(-1) for m in (one, other))
        total += float((mine.exp() * (mine - theirs)).sum())  # and no cross-entropy
        count += len(mine)
    assert run.losses[0] == pytest.approx(total / count, rel=1e-5)
    assert run.figures[0]["divergence"] == pytest.approx(total / count, rel=1e-5)


def test_rows_of_the_data_and_own_ones_are_mixed(
    student: Path, teacher: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[on_policy.Answered]] = []
    inner = on_policy._answer
    monkeypatch.setattr(on_policy, "_answer", lambda *a: seen.append(inner(*a)) or seen[-1])
    distilled(student, rows, teacher, method={"on_policy": 0.5}, trainer={"max_epochs": 6})
    own = [one.own for step in seen for one in step]
    assert 0.3 < sum(own) / len(own) < 0.7 and len(own) == 60
    answers = [one.ids[one.trained].tolist() for step in seen for one in step if one.own]
    assert all(1 <= len(answer) <= 12 for answer in answers)
    assert len(set(map(tuple, answers))) > len(answers) / 2  # drawn anew in each epoch


def test_a_student_has_nothing_to_learn_from_itself_on_its_own_answers(student: Path, rows: Path) -> None:
    for precision in ("32-true", "bf16-mixed"):
        trainer = {"max_steps": 1, "precision": precision}
        run = distilled(student, rows, student, litft.LoRA(r=4, dropout=0.1), trainer=trainer)
        assert abs(run.losses[0]) < 1e-6


@pytest.mark.parametrize("tuner", ["Full", "LoRA"])
def test_answering_in_bf16_leaves_the_step_its_gradients(tuner: str, student: Path, teacher: Path, rows: Path) -> None:
    run = distilled(student, rows, teacher, getattr(litft, tuner)(), trainer={"precision": "bf16-mixed"})
    before = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).state_dict()
    moved = {name: bool((w != before[name]).any() if name in before else w.any()) for name, w in run.weights.items()}
    assert all(moved.values()), [name for name, did in moved.items() if not did]


def test_longer_answers_make_more_micro_batches_within_the_plan(student: Path, teacher: Path, rows: Path) -> None:
    run = distilled(student, rows, teacher, method={"max_new_tokens": 100}, tokens_per_batch=200)
    assert run.method.micro_batch.slots <= 256 and all(loss > 0 for loss in run.losses)


def test_what_cannot_be_is_said(teacher: Path) -> None:
    for options, said in [
        ({"top_k": 4}, "ahead"),
        ({"step_in_backward": True, "clip": 0.0}, "step_in_backward"),
        ({"on_policy": 1.5}, "from 0 to 1"),
    ]:
        with pytest.raises(UserError, match=said):
            litft.Distill(teacher=str(teacher), **{"on_policy": 0.5, **options})


def test_text_has_no_answer_to_give(student: Path, teacher: Path, tmp_path: Path, rows: Path) -> None:
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": f"sun moon river {i} " * 6} for i in range(8)])
    run = distilled(student, texts, teacher, trainer={"max_steps": 1})
    plain = distilled(student, texts, teacher, method={"on_policy": 0.0}, trainer={"max_steps": 1})
    assert run.losses == pytest.approx(plain.losses, rel=1e-6)
    with pytest.raises(UserError, match="train_on all"):
        distilled(student, rows, teacher, train_on="all")
