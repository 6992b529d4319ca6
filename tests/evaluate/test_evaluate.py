"""`litft evaluate` as a person types it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IM_END, chat_rows, save_tiny, tiny_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM

from litft.cli.main import main
from litft.data.rows import to_conversation
from litft.evaluate.run import evaluate
from litft.evaluate.sets import names_of, question_of
from litft.export.final import save_final
from litft.infer.generate import generate
from litft.infer.load import load_for_inference
from litft.tuners import LoRA

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def litft(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command line in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["evaluate", *(str(word) for word in argv)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    """An adapter that says something else than its base."""
    model = AutoModelForCausalLM.from_pretrained(base)
    tuner = LoRA(r=4)
    tuner.apply(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return save_final(model, tuner, tiny_tokenizer(), base.parent / "tuned", base=str(base), stop_ids={IM_END})


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "test.jsonl", chat_rows(12, seed=4))


def chat(user: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]}


def facts(folder: str) -> dict[str, Any]:
    return json.loads(Path(folder, "evaluation.json").read_text())


def test_against_the_base_each_figure_has_its_difference_and_interval(
    litft: Run, adapter: Path, base: Path, rows: Path
) -> None:
    more = ("--baseline", "base", "--answers", 5, "--max_new_tokens", 12, "--extract", "number", "--batch_size", 3)
    code, out, err = litft(adapter, "--data", rows, f"again={rows}", *more, "--out", "found")
    assert code == 0, err
    found = facts("found")
    assert list(found["sets"]) == ["test", "again"] and found["sets"]["test"] == found["sets"]["again"]
    one = found["sets"]["test"]
    figures = ("loss", "bits_per_byte", "exact_match", "extracted/number", "rouge1", "rouge2", "rougeL", "chrf")
    for name in figures:
        assert one["diff"][name] == pytest.approx(one[name] - one["baseline"][name], abs=1e-12), name
        low, high = one["ci95"][name]
        assert low <= one["diff"][name] <= high
    assert (one["rows"], one["rows_answered"], one["same_tokens"]) == (12, 5, True)
    assert one["perplexity"] == pytest.approx(math.exp(one["loss"])) and one["tokens"] == one["baseline"]["tokens"]
    assert found["model"]["base"] == str(base) and found["baseline"]["name"] == str(base)
    assert found["model"]["fingerprint"] != found["baseline"]["fingerprint"]
    assert found["settings"]["seed"] == 0 and "torch" in found["versions"]
    assert max(map(len, out.splitlines())) <= 80, out
    assert f"{one['loss']:.4f}" in out and f"{one['diff']['loss']:+.4f}" in out
    alone = evaluate(str(base), {"test": str(rows)}, answers=0, device="cpu").facts["sets"]["test"]
    assert alone["loss"] == pytest.approx(one["baseline"]["loss"], rel=1e-9) and "diff" not in alone


def test_the_answers_are_those_of_generate_and_lie_in_a_file(litft: Run, adapter: Path, rows: Path) -> None:
    assert litft(adapter, "--data", rows, "--limit", 4, "--max_new_tokens", 8, "--out", "found")[0] == 0
    written = [json.loads(line) for line in Path("found/answers.jsonl").read_text().splitlines()]
    asked = [question_of(to_conversation(row)) for row in chat_rows(4, seed=4)]
    bundle = load_for_inference(adapter)
    for row, pair, said in zip(
        written, asked, generate(bundle, [q for q, _ in asked], max_new_tokens=8, temperature=0), strict=True
    ):
        assert pair is not None
        assert (row["prompt"], row["reference"], row["answer"]) == (pair[0].messages, pair[1], said)
        assert row["prompt"][-1]["role"] == "user" and 0 <= row["scores"]["chrf"] <= 1
    assert [row["line"] for row in written] == [1, 2, 3, 4] and facts("found")["sets"]["test"]["rows"] == 4


def test_without_out_a_new_folder_in_runs_is_made_and_a_used_one_is_refused(litft: Run, base: Path, rows: Path) -> None:
    for number in (1, 2):
        code, out, _ = litft(base, "--data", rows, "--answers", 0)
        assert code == 0 and out.endswith(f"in runs/000{number}-evaluate: evaluation.json\n")
    assert not Path("runs/0001-evaluate/answers.jsonl").exists()
    code, out, err = litft(base, "--data", rows, "--answers", 0, "--out", "runs/0001-evaluate")
    assert (code, out) == (2, "") and "already holds files; name another folder" in err


def test_a_perfect_model_scores_perfectly(litft: Run, base: Path) -> None:
    """Rows whose references are the model's own greedy answers."""
    bundle = load_for_inference(base)
    questions = [f"{row['messages'][-2]['content']}" for row in chat_rows(12)]
    said = generate(bundle, questions, max_new_tokens=12, temperature=0)
    good = [chat(q, a) for q, a in zip(questions, said, strict=True) if re.search("[a-z]", a)]
    assert len(good) > 5
    file = write_jsonl(Path("own.jsonl"), good)
    assert litft(base, "--data", file, "--max_new_tokens", 12, "--extract", r"\w+", "--out", "found")[0] == 0
    one = facts("found")["sets"]["own"]
    for name in ("exact_match", "extracted", "rouge1", "rougeL", "chrf"):
        assert one[name] == pytest.approx(1.0), name


def test_another_tokenizer_is_compared_by_bytes_and_not_by_tokens(litft: Run, base: Path, rows: Path) -> None:
    """The same model under a template with more words: other tokens."""
    wordy = tiny_tokenizer().chat_template.replace("<|im_end|>' + '\n'", "<|im_end|>' + '\n\n'")
    other = save_tiny(Path("other"), template=wordy)
    code, out, err = litft(base, "--data", rows, "--baseline", other, "--answers", 0, "--out", "found")
    assert code == 0, err
    one = facts("found")["sets"]["test"]
    assert not one["same_tokens"] and set(one["diff"]) == {"bits_per_byte"} and "bits_per_byte" in out
    said = sum(len(m["content"]) for row in chat_rows(12, seed=4) for m in row["messages"] if m["role"] == "assistant")
    assert one["bits_per_byte"] == pytest.approx(one["loss"] * one["tokens"] / math.log(2) / said)


def test_a_base_without_a_template_is_asked_with_that_of_its_adapter(litft: Run, rows: Path) -> None:
    base = save_tiny(Path("plain"), template=None)
    model = AutoModelForCausalLM.from_pretrained(base)
    tuner = LoRA(r=4)
    tuner.apply(model)
    save_final(model, tuner, tiny_tokenizer(), Path("tuned"), base=str(base.absolute()), stop_ids={IM_END})
    code, _, err = litft("tuned", "--data", rows, "--baseline", "base", "--max_new_tokens", 8, "--out", "found")
    assert code == 0, err
    one = facts("found")["sets"]["test"]  # a fresh adapter changes nothing
    assert one["same_tokens"] and one["diff"]["loss"] == pytest.approx(0, abs=1e-9) and one["diff"]["chrf"] == 0


def test_a_run_is_measured_as_it_was_trained(litft: Run, base: Path, rows: Path) -> None:
    """train_on and max_length come from its config.yaml, and `base` is what it names."""
    run = Path("run")
    save_tiny(run / "final", seed=3)
    (run / "config.yaml").write_text(f"model:\n  path: {base}\ndata:\n  train_on: all\n  max_length: 60\n")
    assert litft(run, "--data", rows, "--answers", 0, "--baseline", "base", "--out", "found")[0] == 0
    settings, one = facts("found")["settings"], facts("found")["sets"]["test"]
    assert (settings["train_on"], settings["max_length"]) == ("all", 60)
    assert one["tokens"] == one["total_tokens"] - one["rows"] and facts("found")["baseline"]["name"] == str(base)
    assert one["left_out"] == {"longer than 60 tokens": 12 - one["rows"]}
    assert evaluate("run/final", {"test": str(rows)}, answers=0).facts["sets"]["test"]["loss"] == one["loss"]
    assert litft(run, "--data", rows, "--answers", 0, "--train_on", "assistant", "--out", "other")[0] == 0
    assert facts("other")["sets"]["test"]["tokens"] < one["tokens"]


def test_plain_text_and_rows_without_an_answer_are_not_asked(litft: Run, base: Path) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {}}}
    odd = [
        chat("why?", "because"),
        {"text": "the moon and the river"},
        {"messages": [*chat("why?", "because")["messages"], {"role": "user", "content": "and?"}]},
        {"messages": [{"role": "user", "content": "go"}, {"role": "assistant", "content": "", "tool_calls": [call]}]},
    ]
    assert [question_of(to_conversation(row)) is not None for row in odd] == [True, False, False, False]
    file = write_jsonl(Path("odd.jsonl"), odd[:3])
    assert litft(base, "--data", file, "--max_new_tokens", 4, "--out", "found")[0] == 0
    one = facts("found")["sets"]["odd"]
    assert (one["rows"], one["rows_answered"]) == (3, 1)


def test_references_that_a_pattern_does_not_match_are_not_scored_and_said(litft: Run, base: Path) -> None:
    file = write_jsonl(Path("some.jsonl"), [chat("a", "b 1"), chat("c", "d"), chat("e", "f 3")])
    code, out, _ = litft(base, "--data", file, "--max_new_tokens", 4, "--extract", "number", "--out", "found")
    assert code == 0 and facts("found")["sets"]["some"]["rows_scored"]["extracted/number"] == 2
    assert "extracted/number: on 2 of them" in out


def test_one_row_is_not_called_rows(litft: Run, base: Path, rows: Path) -> None:
    _, out, _ = litft(base, "--data", rows, "--answers", 0, "--limit", 1)
    assert re.search(r"^test: 1 row, \d+ trained tokens$", out, re.M), out


def test_a_broken_model_has_no_loss_rather_than_nan(litft: Run, rows: Path) -> None:
    folder = save_tiny(Path("broken"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    model.save_pretrained(folder)
    code, out, _ = litft(folder, "--data", rows, "--answers", 0, "--baseline", folder, "--out", "found")
    one = facts("found")["sets"]["test"]
    assert code == 0 and one["loss"] is None and one["diff"] == {} and "NaN" not in json.dumps(one)
    assert re.search(r"loss +- +-$", out, re.M)


def test_bad_rows_are_an_error_or_counted(litft: Run, base: Path) -> None:
    file = write_jsonl(Path("bad.jsonl"), [chat("a", "b"), {"nonsense": 1}, chat("c", "d")])
    code, _, err = litft(base, "--data", file, "--answers", 0)
    assert code == 2 and "bad.jsonl:2: " in err
    assert litft(base, "--data", file, "--answers", 0, "--bad_rows", "skip", "--out", "found")[0] == 0
    assert facts("found")["sets"]["bad"]["left_out"] == {"bad": 1} and facts("found")["sets"]["bad"]["rows"] == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["M"], "--data FILE, or --tasks NAME"),
        (["M", "--data", "absent.jsonl"], "no such file"),
        (["M", "--data", "empty.jsonl"], "no rows in it"),
        (["M", "--data", "unanswered.jsonl"], "unanswered.jsonl:1: no assistant turn"),
        (["M", "--data", "good.jsonl", "good.jsonl"], "two sets are called good"),
        (["M", "--data", "good.jsonl", "--extract", "("], "no regular expression"),
        (["M", "--data", "good.jsonl", "--extract", "gsm8k"], "matches none of the 2 answers"),
        (["M", "--data", "good.jsonl", "--max_length", "3"], "no row is left: 2 longer than 3 tokens"),
        (["M", "--data", "good.jsonl", "--baseline", "base"], "no adapter and no run"),
        (["M", "--data", "good.jsonl", "--date", "today"], "--date today"),
        (["M", "--data", "good.jsonl", "--temperature", "-1"], "--temperature -1"),
        (["nowhere/at/all", "--data", "good.jsonl"], "no folder nowhere"),
        (["plain", "--data", "good.jsonl"], "no chat template, and good.jsonl holds chats"),
        (["M", "--data", "good.jsonl", "--limt", "3"], "did you mean --limit?"),
        (["M", "--data", "good.jsonl", "--answers", "-1"], "--answers"),
    ],
)
def test_a_mistake_is_named_with_its_mend_and_leaves_nothing(
    litft: Run, base: Path, words: list[str], said: str
) -> None:
    save_tiny(Path("plain"), template=None)
    Path("empty.jsonl").touch()
    write_jsonl(Path("good.jsonl"), [chat("a", "b"), chat("c", "d")])
    write_jsonl(Path("unanswered.jsonl"), [{"messages": [{"role": "user", "content": "a"}]}])
    code, out, err = litft(*(base if word == "M" else word for word in words))
    assert (code, out) == (2, ""), err
    assert said in err and 1 <= err.count("\n") <= 5, err
    assert not Path("runs").exists()


def test_sets_are_named_by_hand_or_by_their_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a=b.jsonl").touch()
    assert names_of(["x/gsm8k.test.jsonl", "mine=y/z.json.gz", "a=b.jsonl"]) == {
        "gsm8k": "x/gsm8k.test.jsonl",
        "mine": "y/z.json.gz",
        "a=b": "a=b.jsonl",
    }
