"""The verbs beside finetune, driven as a person types them, against the tokenizer's and transformers' own answers."""

from __future__ import annotations

import gzip
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import CHATML, IM_END, chat_rows, save_tiny, tiny_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from litft.cli import parsing
from litft.cli.main import main

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def litft(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line: exit code, stdout, stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(word) for word in argv])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("rows") / "chats.jsonl", chat_rows(25, seed=3))


def lines_of(*rows: Any) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)


def chat(user: str, answer: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": answer, **more}]}


def template_ids(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, return_dict=True, **options)["input_ids"])


# ---- the command line itself

ALL = [
    ["data"],
    ["data", "check"],
    ["data", "show"],
    ["data", "stats"],
    ["generate"],
    ["evaluate"],
    ["chat"],
    ["serve"],
    ["config"],
    ["config", "list"],
    ["config", "show"],
    ["config", "copy"],
    ["config", "check"],
    ["download"],
    ["merge"],
    ["export"],
    ["quantize"],
    ["report"],
    ["push"],
    ["doctor"],
]


def test_help_of_every_verb_is_quick_because_nothing_heavy_is_imported() -> None:
    script = f"""
import io, sys, contextlib
from litft.cli import parsing
from litft.cli.main import main
for words in {ALL}:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            code = main([*words, "--help"])
        except SystemExit as done:
            code = done.code
    text = out.getvalue()
    assert code == 0 and text.startswith("usage: litft " + " ".join(words)), words
    assert len(words) == 1 and words[0] in ("data", "config") or "example: litft " in text, words
heavy = {{"torch", "transformers", "lightning", "datasets", "numpy", "yaml"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "F", "--prompt", "x", "--max_new", "3"], "did you mean --max_new_tokens?"),
        (["generate", "F", "--prompt", "x", "--max-new-tokens", "3"], "did you mean --max_new_tokens?"),
        (["generate", "F", "--promt", "x"], "--prompt"),
        (["generate", "F"], "one of the arguments --prompt --data is required"),
        (["generate", "F", "--prompt", "why", "me"], "'me' is a word too many"),
        (["generate", "F", "--prompt", "-x"], "--prompt=VALUE"),
        (["generate", "F", "--prompt", "x", "--data", "y"], "not allowed with"),
        (["generate", "F", "--prompt", "x", "--max_new_tokens", "0"], "--max_new_tokens"),
        (["generate", "F", "--prompt", "x", "--temperature", "warm"], "--temperature"),
        (["generate", "F", "--prompt", "x", "--out", "y"], "--out goes with --data"),
        (["generate", "F", "--data", "x"], "--data needs --out"),
        (["generate", "F", "--data", "x", "--out", "y", "--system", "z"], "--system goes with --prompt"),
        (["generate", "--prompt", "x"], "missing: FOLDER"),
        (["chat"], "missing: FOLDER"),
        (["chat", "F", "--sistem", "x"], "did you mean --system?"),
        (["download"], "missing: ID"),
        (["data"], "check|show|stats"),
        (["data", "chek", "F"], "did you mean check?"),
        (["data", "check"], "missing: FILE"),
        (["data", "show", "F", "--modle", "m"], "did you mean --model?"),
        (["data", "show", "F", "--rows", "2", "--row", "3"], "not allowed with"),
        (["data", "show", "F", "--row", "0"], "--row"),
        (["data", "show", "F", "--train_on", "first"], "--train_on"),
        (["data", "show", "F", "--allow_special_tokens", "maybe"], "true or false"),
        (["config", "chek", "F"], "did you mean check?"),
        (["config", "show"], "missing: NAME_OR_FILE"),
    ],
)
def test_a_wrong_command_line_is_refused_with_the_mend(litft: Run, words: list[str], said: str) -> None:
    code, out, err = litft(*words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.startswith("error: ") and err.count("\n") <= 5


def test_who_waits_is_told_what_for(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parsing, "PATIENCE_S", 0.1)
    with parsing.waiting("loading quickly"):
        pass
    with parsing.waiting("loading for long"):
        time.sleep(0.4)
    with parsing.progress("counting quickly", 2, "rows") as advance:
        advance(2)
    with parsing.progress("counting for long", None, "rows", wait=0.1) as advance:
        time.sleep(0.2)
        advance(1, 4)
    out, err = capsys.readouterr()
    assert out == "" and "quickly" not in err
    assert err.startswith("loading for long ...\n") and "counting for long:" in err and "1/4" in err


# ---- data check


def test_check_counts_the_rows_of_a_good_file(litft: Run, rows_file: Path) -> None:
    assert litft("data", "check", rows_file) == (0, "25 messages rows\n25 rows, 0 bad\n", "")


def test_i8_check_names_every_bad_line_once_with_its_mend(litft: Run, tmp_path: Path) -> None:
    good = chat("why?", "because")
    bad = [
        '{"messages": [',
        "42",
        "{}",
        {"messages": []},
        {"messages": [{"role": "user", "content": "no answer"}]},
        {"messages": [{"role": "robot", "content": "x"}, {"role": "assistant", "content": "y"}]},
        chat("why?", ""),
        {"messages": "why?"},
        {"question": "why?", "answer": "because"},
        {"instruction": "x", "output": 7},
        chat("\ud800", "x"),
    ]
    rows: list[Any] = [good]
    for row in bad:
        rows += [json.dumps(row) if not isinstance(row, str) else row, "", good]  # blank lines are no rows
    file = tmp_path / "mixed.jsonl"
    file.write_text(lines_of(*rows), encoding="utf-8")
    code, out, err = litft("data", "check", file)
    found = re.findall(rf"^{re.escape(str(file))}:(\d+): \S.*; \S.*$", out, re.M)
    assert [int(number) for number in found] == [2 + 3 * i for i in range(len(bad))], out
    assert out.splitlines()[-2:] == [f"{len(bad) + 1} messages rows", f"{2 * len(bad) + 1} rows, {len(bad)} bad"]
    assert (code, err) == (2, "")


def test_check_counts_rows_for_other_methods_as_good(litft: Run, tmp_path: Path, tiny_llama: Path) -> None:
    preference = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    kto = write_jsonl(tmp_path / "k.jsonl", [{**chat("a", "b"), "label": True}])
    assert litft("data", "check", preference) == (
        0,
        "3 preference rows (for dpo, orpo, simpo, cpo, reward)\n3 rows, 0 bad\n",
        "",
    )
    assert litft("data", "check", kto) == (0, "1 kto row (for kto)\n1 rows, 0 bad\n", "")
    assert litft("data", "check", preference, "--model", tiny_llama)[:2] == (
        0,
        "3 preference rows (for dpo, orpo, simpo, cpo, reward)\n3 rows, 0 bad\n",
    )


def test_check_of_several_files_ends_with_the_sum(litft: Run, tmp_path: Path, rows_file: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(lines_of(chat("a", "b"), "nonsense"))
    code, out, _ = litft("data", "check", rows_file, other)
    assert code == 2
    assert f"{other}:2: " in out
    assert f"{rows_file}: 25 messages rows, 25 rows, 0 bad\n" in out
    assert out.splitlines()[-1] == "27 rows, 1 bad"


def test_check_with_a_model_also_finds_rows_whose_mask_cannot_be(litft: Run, tmp_path: Path, tiny_llama: Path) -> None:
    file = tmp_path / "rows.jsonl"
    untrained = chat("why?", "because", train=False)
    file.write_text(lines_of(chat("a", "b"), untrained, "broken", chat("c", "d")))
    code, out, _ = litft("data", "check", file)
    assert (code, out.splitlines()[-1]) == (2, "4 rows, 1 bad")
    code, out, _ = litft("data", "check", file, "--model", tiny_llama)
    assert code == 2
    assert [int(n) for n in re.findall(r"rows\.jsonl:(\d+): ", out)] == [3, 2]
    assert "no token of this row would be trained" in out
    assert out.splitlines()[-1] == "4 rows, 2 bad"


@pytest.mark.parametrize("model", [False, True])
def test_check_of_a_file_that_breaks_off_says_so_once(
    litft: Run, tmp_path: Path, tiny_llama: Path, model: bool
) -> None:
    rng = np.random.default_rng(0)
    rows = [chat(str(rng.integers(1 << 60)), str(rng.integers(1 << 60))) for _ in range(4000)]
    whole = gzip.compress(lines_of(*rows).encode())
    file = tmp_path / "cut.jsonl.gz"
    file.write_bytes(whole[: len(whole) // 2])
    code, out, err = litft("data", "check", file, *(["--model", tiny_llama] if model else []))
    assert code == 2 and "Traceback" not in err
    assert out.count(str(file)) == 1
    assert re.fullmatch(r"\d+ rows, 1 bad", out.splitlines()[-1])


@pytest.mark.parametrize("verb", ["check", "show", "stats"])
def test_a_source_that_is_not_there_or_empty_is_said_before_a_model_is_loaded(
    litft: Run, tmp_path: Path, verb: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, said in (("absent.jsonl", "no such file"), ("empty.jsonl", "")):
        code, out, err = litft("data", verb, tmp_path / name, "--model", tmp_path / "nothing")
        assert (code, out) == (2, "")
        assert name in err and said in err and "nothing" not in err


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text("broken\n" * 20000)
    command = f"{sys.executable} -m litft data check {file}"
    script = f"set -o pipefail; {command} | head -n 1"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith(f"{file}:1: ") and done.stderr == ""
    assert done.returncode == 0


# ---- data show


def test_show_json_is_the_tokenizers_own_render_with_the_answers_trained(
    litft: Run, rows_file: Path, tiny_llama: Path
) -> None:
    code, out, err = litft("data", "show", rows_file, "--model", tiny_llama, "--json")
    assert (code, err) == (0, "")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    shown = [json.loads(line) for line in out.splitlines()]
    rows = [json.loads(line)["messages"] for line in rows_file.read_text().splitlines()]
    assert [row["row"] for row in shown] == list(range(1, 26))
    for row, messages in zip(shown, rows, strict=True):
        assert list(row) == ["row", "tokens", "trained", "text"]
        assert row["tokens"] == template_ids(tokenizer, messages)
        assert row["text"] == tokenizer.apply_chat_template(messages, tokenize=False)
        assert set(row["trained"]) == {0, 1} and len(row["trained"]) == len(row["tokens"])
        trained = [token for token, flag in zip(row["tokens"], row["trained"], strict=True) if flag]
        answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
        assert tokenizer.decode(trained) == "".join(answers)


def test_show_goes_on_after_a_bad_row_and_ends_with_2(litft: Run, tmp_path: Path, tiny_llama: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(lines_of(chat("a", "b"), "", "broken", chat("c", "d", train=False), chat("e", "f")))
    code, out, err = litft("data", "show", file, "--model", tiny_llama, "--json")
    assert code == 2
    assert [json.loads(line)["row"] for line in out.splitlines()] == [1, 4]
    assert re.findall(r"^\S+rows\.jsonl:(\d+): ", err, re.M) == ["3", "4"]


def test_show_takes_the_first_rows_or_one(litft: Run, rows_file: Path, tiny_llama: Path) -> None:
    def numbers(*options: str) -> list[int]:
        code, out, _ = litft("data", "show", rows_file, "--model", tiny_llama, *options)
        assert code == 0
        if "--json" in options:
            return [json.loads(line)["row"] for line in out.splitlines()]
        return [int(n) for n in re.findall(r"^row (\d+) \(", out, re.M)]

    assert numbers("--json", "--rows", "3") == [1, 2, 3]
    assert numbers("--json", "--row", "7") == [7]
    assert numbers("--rows", "12") == list(range(1, 13))
    assert numbers() == list(range(1, 11))
    assert "(the first 10 rows; " in litft("data", "show", rows_file, "--model", tiny_llama)[2]
    code, out, err = litft("data", "show", rows_file, "--model", tiny_llama, "--row", "26")
    assert (code, out) == (2, "") and "fewer rows" in err


def test_show_marks_the_trained_text_to_the_character(litft: Run, tmp_path: Path, tiny_llama: Path) -> None:
    answers = ["née 🌞 und\nzwei", "  blanks  "]
    messages = [{"role": "user", "content": "日本\x1b[2J?"}, {"role": "assistant", "content": answers[0]}]
    messages += [{"role": "user", "content": "é"}, {"role": "assistant", "content": answers[1]}]
    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}])
    plain = litft("data", "show", file, "--model", tiny_llama)[1]
    assert re.findall(r"\[\[(.*?)\]\]", plain, re.S) == [f"{text}<|im_end|>" for text in answers]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    text = str(tokenizer.apply_chat_template(messages, tokenize=False)).replace("\x1b", "\\x1b")
    assert plain.partition("\n")[2].strip() == mark(text, answers).strip()
    colored = litft("data", "show", file, "--model", tiny_llama, "--color")[1]
    assert re.findall("\x1b\\[32m(.*?)\x1b\\[0m", colored) == ["née 🌞 und", "zwei<|im_end|>", "  blanks  <|im_end|>"]
    assert re.sub("\x1b\\[(32|0)m", "", colored) == re.sub(r"\[\[|\]\]", "", plain)
    assert "\x1b[2J" not in colored  # what a row holds does not steer the terminal


def mark(text: str, answers: list[str]) -> str:
    for answer in answers:
        text = text.replace(f"{answer}<|im_end|>", f"[[{answer}<|im_end|>]]")
    return text


def test_show_takes_the_options_that_decide_ids_and_mask(litft: Run, tmp_path: Path, tiny_llama: Path) -> None:
    messages = chat("say <|im_end|>", "one")["messages"] + chat("more", "two")["messages"]
    file = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}])
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)

    def show(*options: str) -> dict[str, Any]:
        code, out, err = litft("data", "show", file, "--model", tiny_llama, "--json", *options)
        assert code == 0, err
        return json.loads(out)

    def trained(row: dict[str, Any]) -> str:
        return str(tokenizer.decode([t for t, flag in zip(row["tokens"], row["trained"], strict=True) if flag]))

    literal, special = show(), show("--data.allow_special_tokens", "true")
    assert special["tokens"] == template_ids(tokenizer, messages)
    assert special["tokens"].count(IM_END) == literal["tokens"].count(IM_END) + 1
    assert trained(literal) == "one<|im_end|>two<|im_end|>"
    assert trained(show("--data.train_on", "last")) == "two<|im_end|>"
    assert all(show("--train_on", "all")["trained"])


def test_a_tokenizer_without_a_template_needs_one_for_chats_only(litft: Run, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "bare", template=None)
    chats = write_jsonl(tmp_path / "chats.jsonl", [chat("a", "b")])
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "the sun sings"}])
    for verb in ("check", "show", "stats"):
        code, _, err = litft("data", verb, chats, "--model", model)
        assert code == 2 and "data.chat_template" in err and "chatml" in err
    code, out, _ = litft("data", "show", chats, "--model", model, "--json", "--data.chat_template", "chatml")
    assert code == 0
    assert json.loads(out)["tokens"] == template_ids(tiny_tokenizer(), chat("a", "b")["messages"])
    code, out, _ = litft("data", "show", texts, "--model", model, "--json")
    assert code == 0
    assert json.loads(out)["tokens"][:-1] == tiny_tokenizer()("the sun sings")["input_ids"]


def test_tokens_that_the_template_needs_can_be_added(litft: Run, tmp_path: Path, tiny_llama: Path) -> None:
    template = tmp_path / "turns.jinja"
    template.write_text(
        "{% for m in messages %}{{ '<|turn|>' + m['role'] + ':' + m['content'] + '<|over|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn|>assistant:' }}{% endif %}"
    )
    file = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")])
    options = ["data", "show", file, "--model", tiny_llama, "--json", "--data.chat_template", template]
    code, _, err = litft(*options)
    assert code == 2 and "<|turn|>" in err and "model.add_tokens" in err
    code, out, _ = litft(*options, "--model.add_tokens", "true")
    row = json.loads(out)
    vocabulary = len(AutoTokenizer.from_pretrained(tiny_llama))
    assert code == 0 and max(row["tokens"]) == vocabulary + 1  # two tokens more
    assert [t for t, flag in zip(row["tokens"], row["trained"], strict=True) if flag][-1] >= vocabulary


# ---- data stats


def test_stats_are_those_of_the_rendered_rows(litft: Run, rows_file: Path, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = [json.loads(line)["messages"] for line in rows_file.read_text().splitlines()]
    lengths = np.array([len(template_ids(tokenizer, messages)) for messages in rows])
    answers = ["".join(m["content"] + "<|im_end|>" for m in ms if m["role"] == "assistant") for ms in rows]
    trained = np.array([len(tokenizer(text)["input_ids"]) for text in answers])
    limit = int(np.median(lengths))
    options = ["data", "stats", rows_file, "--model", tiny_llama, "--data.max_length", limit]
    code, out, _ = litft(*options, "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["rows"], found["bad"], found["schemas"]) == (25, 0, {"messages": 25})
    assert found["tokens"] == lengths.sum()
    assert found["trained_tokens"] == pytest.approx(trained.sum(), abs=25)  # a merge may cross the end of an answer
    assert found["length"]["max"] == lengths.max() and found["length"]["min"] == lengths.min()
    assert found["length"]["p95"] == pytest.approx(np.percentile(lengths, 95), abs=0.06)
    assert found["longer"] == (lengths > limit).sum() > 0
    code, out, _ = litft(*options)
    assert code == 0
    assert f"{found['longer']} rows longer than {limit:,} tokens would be dropped" in out
    bars = re.findall(r"^ *(\d+) - +(\d+) (#*) +(\d+)$", out, re.M)
    for low, high, bar, count in bars:
        assert int(count) == ((lengths >= int(low)) & (lengths <= int(high))).sum()
        assert bool(bar) == (int(count) > 0)
    assert sum(int(count) for *_, count in bars) == 25 and 1 < len(bars) <= 12


def test_stats_show_an_outlier_without_flattening_the_rest(litft: Run, tmp_path: Path, tiny_llama: Path) -> None:
    rows = [{"text": "a" * (10 + i % 30)} for i in range(300)] + [{"text": "wind river " * 3000}]
    file = write_jsonl(tmp_path / "texts.jsonl", rows)
    code, out, err = litft("data", "stats", file, "--model", tiny_llama)
    assert (code, err) == (0, "")  # no warning of the tokenizer's
    counts = [int(count) for count in re.findall(r"^ *[\d,]+ - +[\d,]+ #* +(\d+)$", out, re.M)]
    assert sum(counts) == 301 and counts[-1] == 1 and sum(count > 10 for count in counts) > 5
    assert "1 row longer than 512 tokens would be dropped" in out


def test_stats_take_the_limit_of_the_model_where_nobody_names_one(
    litft: Run, rows_file: Path, tiny_llama: Path
) -> None:
    found = json.loads(litft("data", "stats", rows_file, "--model", tiny_llama, "--json")[1])
    assert (found["max_length"], found["longer"]) == (512, 0)  # its context; finetune's own default is above it


def test_stats_count_bad_rows(litft: Run, tmp_path: Path, tiny_llama: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(lines_of(chat("a", "b"), "broken"))
    code, out, err = litft("data", "stats", file, "--model", tiny_llama)
    assert code == 2 and "1 (1 messages), 1 bad" in out and f"{file}:2: " in err
    file.write_text("broken\n")
    code, out, err = litft("data", "stats", file, "--model", tiny_llama)
    assert (code, out) == (2, "") and "no usable row" in err and f"{file}:1: " in err


# ---- generate and chat


def answer_of(model: Path, messages: list[dict[str, Any]], tokens: int) -> str:
    """What transformers answers by itself, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor([template_ids(tokenizer, messages, add_generation_prompt=True)])
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    out = network.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).lstrip("\n").rstrip()


def test_generate_prints_only_the_answer_that_transformers_gives(litft: Run, tiny_llama: Path) -> None:
    greedy = ["--max_new_tokens", 12, "--temperature", 0, "--device", "cpu"]
    code, out, err = litft("generate", tiny_llama, "--prompt", "why is the sun old?", *greedy)
    user = {"role": "user", "content": "why is the sun old?"}
    expected = answer_of(tiny_llama, [user], 12)
    assert (code, out, err) == (0, expected + "\n", "") and expected
    asked = ["generate", tiny_llama, "--prompt", user["content"], "--system", "Be quick.", *greedy]
    system = {"role": "system", "content": "Be quick."}
    assert litft(*asked)[1] == answer_of(tiny_llama, [system, user], 12) + "\n"
    stop = expected[4:6]
    out = litft("generate", tiny_llama, "--prompt", user["content"], *greedy, "--stop", stop)[1]
    assert out == expected[: expected.index(stop)].rstrip() + "\n"


def test_generate_computes_in_the_precision_asked_for(litft: Run, tiny_llama: Path) -> None:
    from litft.infer import generate

    seen: list[Any] = []
    real = generate.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "generate", lambda b, *a, **k: (seen.append(b.model.dtype), real(b, *a, **k))[1])
        for dtype in ("bfloat16", "float32"):
            assert litft("generate", tiny_llama, "--prompt", "x", "--dtype", dtype, "--min_p", "0.1")[0] == 0
    assert seen == [torch.bfloat16, torch.float32]


def test_generate_draws_the_same_from_the_same_seed(litft: Run, tiny_llama: Path) -> None:
    def draw(seed: int) -> str:
        options = ["--temperature", 1.5, "--max_new_tokens", 12, "--seed", seed]
        code, out, err = litft("generate", tiny_llama, "--prompt", "why?", *options)
        assert code == 0, err
        return out

    assert draw(1) == draw(1) != draw(2)


def test_generate_answers_every_row_of_a_file(litft: Run, tmp_path: Path, rows_file: Path, tiny_llama: Path) -> None:
    out = tmp_path / "answers.jsonl"
    greedy = ["--max_new_tokens", 5, "--temperature", 0, "--batch_size", 10]
    code, printed, err = litft("generate", tiny_llama, "--data", rows_file, "--out", out, *greedy)
    assert (code, printed) == (0, "")
    assert "answering: " in err and "25/25" in err and err.endswith(f"25 answers in {out}\n")
    rows = [json.loads(line)["messages"] for line in rows_file.read_text().splitlines()]
    answered = [json.loads(line)["messages"] for line in out.read_text().splitlines()]
    assert [messages[:-1] for messages in answered] == [messages[:-1] for messages in rows]
    for messages in answered[:3]:
        assert messages[-1] == {"role": "assistant", "content": answer_of(tiny_llama, messages[:-1], 5)}


def test_generate_refuses_or_leaves_out_a_bad_row(litft: Run, tmp_path: Path, tiny_llama: Path) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    file.write_text(lines_of(chat("a", "b"), "broken"))
    command = ["generate", tiny_llama, "--data", file, "--out", out, "--max_new_tokens", 2]
    code, _, err = litft(*command)
    assert code == 2 and f"{file}:2: " in err and not out.exists()
    code, _, err = litft(*command, "--bad_rows", "skip")
    assert code == 0 and err.endswith(f"1 answer in {out}, 1 bad row left out\n")
    assert len(out.read_text().splitlines()) == 1


@pytest.mark.parametrize("verb", [["generate", "--prompt", "x"], ["chat"]])
def test_a_folder_without_a_model_is_the_users_mistake(litft: Run, tmp_path: Path, verb: list[str]) -> None:
    for name, said in (("", "no model"), ("absent", "no folder")):
        code, out, err = litft(verb[0], tmp_path / name, *verb[1:])
        assert (code, out) == (2, "") and said in err


def test_chat_remembers_until_reset(litft: Run, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("why?\nand then?\n/reset\nwhy?\n/exit\nnot read\n"))
    code, out, err = litft("chat", tiny_llama, "--temperature", 0, "--max_new_tokens", 6, "--system", "Be old.")
    assert (code, err) == (0, "")
    history = [{"role": "system", "content": "Be old."}, {"role": "user", "content": "why?"}]
    first = answer_of(tiny_llama, history, 6)
    history += [{"role": "assistant", "content": first}, {"role": "user", "content": "and then?"}]
    second = answer_of(tiny_llama, history, 6)
    said = re.findall(r"^you> model> (.*)$", out.replace(" (cut at the longest answer allowed)", ""), re.M)
    assert said == [first, second, first]


def test_j3_code_that_a_model_brings_is_not_run(litft: Run, tmp_path: Path, rows_file: Path, tiny_llama: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_llama, model)
    canary = tmp_path / "canary"
    (model / "own.py").write_text(f"open({str(canary)!r}, 'w')\nclass Own: pass\n")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}}
    (model / "config.json").write_text(json.dumps(config))
    commands = [["generate", model, "--prompt", "x"], ["chat", model], ["download", model]]
    commands += [["data", verb, rows_file, "--model", model] for verb in ("check", "show", "stats")]
    for command in commands:
        code, _, err = litft(*command)
        assert code == 2 and "--model.trust_remote_code true" in err, command
    assert not canary.exists()


def test_j2_a_template_that_reaches_for_python_is_refused(
    litft: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever renders: as a file of the user's, and as it came with the model."""
    canary, template = tmp_path / "canary", tmp_path / "evil.jinja"
    attack = f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}"
    template.write_text(CHATML + attack)
    tame, evil = save_tiny(tmp_path / "tame"), save_tiny(tmp_path / "evil", template=CHATML + attack)
    file, out = write_jsonl(tmp_path / "rows.jsonl", [chat("a", "b")]), tmp_path / "out.jsonl"
    tries: list[tuple[object, ...]] = [
        *(
            ("data", verb, file, "--model", tame, "--data.chat_template", template)
            for verb in ("check", "show", "stats")
        ),
        *(("data", verb, file, "--model", evil) for verb in ("check", "show", "stats")),
        ("finetune", "lora", "--model", tame, "--data", file, "--data.chat_template", template, "--dry_run"),
        ("finetune", "lora", "--model", evil, "--data", file, "--dry_run"),
        ("generate", evil, "--prompt", "why?", "--max_new_tokens", 2),
        ("generate", evil, "--data", file, "--out", out, "--max_new_tokens", 2),
        ("chat", evil, "--max_new_tokens", 2),
    ]
    for words in tries:
        monkeypatch.setattr("sys.stdin", io.StringIO("why?\n"))
        code, printed, err = litft(*words)
        said = printed + err
        assert "unsafe" in said and "Traceback" not in said, words
        assert code == 2 or words[0] == "chat", words  # a conversation goes on after a line that can't be answered
    assert not canary.exists() and not out.exists()


# ---- config


def test_config_lists_shows_and_copies(litft: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = litft("config", "list")
    names = [line.split()[0] for line in out.splitlines()]
    assert code == 0 and {"smollm2/135m-lora", "qwen3/0.6b-qlora", "llama3/8b-lora"} <= set(names)
    code, text, _ = litft("config", "show", "smollm2/135m-lora")
    assert code == 0 and text
    monkeypatch.chdir(tmp_path)
    assert litft("config", "copy", "smollm2/135m-lora")[:2] == (0, "135m-lora.yaml\n")
    assert Path("135m-lora.yaml").read_text().strip() == text.strip()
    assert litft("config", "show", "135m-lora.yaml")[1] == text
    Path("135m-lora.yaml").write_text("mine")
    code, _, err = litft("config", "copy", "smollm2/135m-lora")
    assert code == 2 and "not overwritten" in err and Path("135m-lora.yaml").read_text() == "mine"
    assert litft("config", "copy", "smollm2/135m-lora", "other.yaml")[0] == 0
    assert litft("config", "copy", "smollm2/135m-lora", "no/such/other.yaml")[0] == 2
    code, _, err = litft("config", "show", "smolm2/135m-lora")
    assert code == 2 and "did you mean smollm2/135m-lora?" in err


def test_config_check_accepts_what_the_hub_holds(litft: Run) -> None:
    names = [line.split()[0] for line in litft("config", "list")[1].splitlines()]
    for name in names:
        code, out, err = litft("config", "check", name)
        assert code == 0, err
        named = re.search(r"^  tuner: (\w+)$", litft("config", "show", name)[1], re.M)
        tuner = {"full": "Full", "lora": "LoRA", "qlora": "QLoRA"}[named[1] if named else ""]
        assert out.startswith(f"{name}: good; ") and f" {tuner} on " in out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model:\n  path: /no/such/model\n  lr: 0.1\n", None),  # no model is loaded
        ("data:\n  weights: [1.0, 0.5]\n", None),
        ("data:\n  train: [a.jsonl, b.jsonl]\n  weights: [1.0, 0.5]\n", None),
        ("model:\n  tuner: qlora\n  tuner.r: 4\n", None),
        ("model:\n  tuner:\n    r: 4\n", None),
        ("model:\n  learning_rate: 0.1\n", "model.learning_rate"),
        ("model:\n  lrr: 0.1\n", "did you mean --model.lr?"),
        ("model:\n  lr: fast\n", "model.lr"),
        ("model:\n  tuner: full\n  tuner.r: 4\n", "model.tuner.r"),
        ("data:\n  train: [a.jsonl, b.jsonl]\n  weights: [1.0]\n", "weights"),
        ("trainer:\n  gradient_clip_val: 1.0\n", "model.clip"),
        ("model: [\n", "not YAML"),
        ("- a\n", "not keys and values"),
    ],
)
def test_config_check_reads_as_finetune_does(litft: Run, tmp_path: Path, text: str, said: str | None) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    code, out, err = litft("config", "check", file)
    if said is None:
        assert code == 0 and out.startswith(f"{file}: good; "), err
    else:
        assert (code, out) == (2, "") and said in err


# ---- download


def test_download_prints_where_the_model_lies(litft: Run, tmp_path: Path, tiny_llama: Path) -> None:
    code, out, err = litft("download", tiny_llama)
    assert (code, out) == (0, f"{tiny_llama}\n")
    assert "litft finetune lora --model" in err
    code, out, err = litft("download", "nobody/nothing")  # tests are offline
    assert (code, out) == (2, "") and "nobody/nothing" in err and err.count("\n") <= 5
