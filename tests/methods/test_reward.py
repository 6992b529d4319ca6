"""Reward models against transformers, PEFT and TRL."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from preferences import NO_NEWLINE, pair_rows
from tiny import IM_END, chat_rows, save_tiny, write_jsonl
from training import difference, train
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import litft
from litft.data.rows import to_conversation
from litft.infer.score import load_scorer, score


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [row | {"margin": 0.5 * (i % 3)} for i, row in enumerate(pair_rows(24, 3))]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its pad token is the end of a turn, as many a tokenizer has it."""
    return save_tiny(tmp_path_factory.mktemp("model") / "model", "llama", pad_token="<|im_end|>")


def rewarded(model: Path, pairs: Path, tuner: Any = None, **options: Any) -> Any:
    return train(model, pairs, kind="Reward", tuner=tuner, tokens_per_step=400, **options)


def texts(tokenizer: Any, pairs: Path, side: str) -> list[str]:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    return [tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False) for row in rows]


@pytest.mark.parametrize("centring", [0.0, 0.01])
def test_the_loss_is_bradley_and_terrys(model: Path, pairs: Path, centring: float, tmp_path: Path) -> None:
    run = rewarded(model, pairs, method={"centring": centring, "lr": 0.0}, trainer={"max_steps": 2})
    run.method.save(tmp_path / "saved")
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    scores = {}
    for side in ("chosen", "rejected"):
        ids = [tokenizer(text, return_tensors="pt", add_special_tokens=False) for text in texts(tokenizer, pairs, side)]
        with torch.no_grad():
            scores[side] = torch.cat([scorer(**one).logits[:, 0] for one in ids])
    margins = torch.tensor([0.5 * (i % 3) for i in range(24)])
    loss = -torch.nn.functional.logsigmoid(scores["chosen"] - scores["rejected"] - margins)
    loss = loss + centring * (scores["chosen"] + scores["rejected"]) ** 2
    for rows, mine in zip(run.rows, run.losses, strict=True):
        assert mine == pytest.approx(float(loss[rows].mean()), rel=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
def test_g2_the_score_is_that_of_the_last_token_however_padded(
    model: Path, pairs: Path, tmp_path: Path, side: str
) -> None:
    rewarded(model, pairs, trainer={"max_steps": 3}).method.save(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved", padding_side=side)
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    assert scorer.config.pad_token_id == tokenizer.pad_token_id != tokenizer.convert_tokens_to_ids("<|im_end|>")
    chats = chat_rows(7, seed=4)  # several turns, so that the end of one stands in the middle too
    written = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in chats]
    with torch.no_grad():
        together = scorer(**tokenizer(written, return_tensors="pt", padding=True, add_special_tokens=False)).logits
        hidden = [
            scorer.model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).last_hidden_state[0, -1]
            for text in written
        ]
        alone = torch.stack(hidden) @ scorer.score.weight.T
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    bundle = load_scorer(tmp_path / "saved", device="cpu")
    for size in (1, 3):
        mine = torch.tensor(score(bundle, [to_conversation(row) for row in chats], batch_size=size))
        torch.testing.assert_close(mine, alone[:, 0], atol=1e-5, rtol=0)


def test_an_adapter_scores_the_same_in_peft(model: Path, pairs: Path, tmp_path: Path) -> None:
    import peft

    method = rewarded(model, pairs, litft.LoRA(r=4), trainer={"max_steps": 3}).method
    method.save(tmp_path / "saved")
    base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    bundle = load_scorer(tmp_path / "saved", device="cpu")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()][:6]
    mine = score(bundle, [to_conversation({"messages": row["prompt"] + row["chosen"]}) for row in rows])
    for text, value in zip(texts(tokenizer, pairs, "chosen"), mine, strict=False):
        with torch.no_grad():
            found = theirs(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits
        assert value == pytest.approx(float(found), abs=1e-5)


@pytest.mark.parametrize("command", ["merge", "export"])
def test_an_adapter_leaves_as_a_model_that_transformers_scores_with(
    command: str, model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from litft.cli.main import main

    rewarded(model, pairs, litft.LoRA(r=4), trainer={"max_steps": 3}).method.save(tmp_path / "saved")
    asked = [command, str(tmp_path / "saved"), "--out", str(tmp_path / "out"), "--dtype", "fp32"]
    assert main([*asked, "--to", "hf"] if command == "export" else asked) == 0
    assert "checked: read again by transformers" in capsys.readouterr().out
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.num_labels == 1 and not (tmp_path / "out" / "generation_config.json").exists()
    assert "text-classification" in (tmp_path / "out" / "README.md").read_text()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    written = texts(tokenizer, pairs, "chosen")
    with torch.no_grad():
        found = theirs(**tokenizer(written, return_tensors="pt", padding=True, add_special_tokens=False)).logits[:, 0]
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    chats = [to_conversation({"messages": row["prompt"] + row["chosen"]}) for row in rows]
    mine = {name: score(load_scorer(tmp_path / name, device="cpu"), chats) for name in ("saved", "out")}
    assert mine["saved"] == pytest.approx(found.tolist(), abs=1e-5)
    assert mine["out"] == pytest.approx(found.tolist(), abs=1e-5)
    for other in (
        ["export", str(tmp_path / "out"), "--to", "gguf"],
        ["export", str(tmp_path / "saved"), "--to", "vllm"],
    ):
        assert main([*other, "--out", str(tmp_path / "no")]) == 2
        assert "litft score" in capsys.readouterr().err


def test_g2_the_cards_own_code_scores_as_we_do(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an adapter, whose base says that the end of a turn is padding: transformers would read the token before it."""
    model = save_tiny(tmp_path / "model", template=NO_NEWLINE, pad_token="<|im_end|>", pad_token_id=IM_END)
    rewarded(model, pairs, litft.LoRA(r=4), trainer={"max_steps": 3}, method={"lr": 1.0}).method.save(
        tmp_path / "saved"
    )
    card = (tmp_path / "saved" / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", card, re.S)
    capsys.readouterr()
    exec(code.replace('"."', repr(str(tmp_path / "saved"))), {})
    said = float(capsys.readouterr().out)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Ahoy!"}]
    bundle = load_scorer(tmp_path / "saved", device="cpu")
    assert said == pytest.approx(score(bundle, [to_conversation({"messages": messages})])[0], abs=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "qwen3", "gpt2"])
def test_scores_of_other_families(family: str, pairs: Path, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", family)
    rewarded(model, pairs, trainer={"max_steps": 2}).method.save(tmp_path / "saved")
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    written = texts(tokenizer, pairs, "chosen")[:4]
    with torch.no_grad():
        found = [scorer(**tokenizer(w, return_tensors="pt", add_special_tokens=False)).logits.item() for w in written]
    rows = [json.loads(line) for line in pairs.read_text().splitlines()][:4]
    chats = [to_conversation({"messages": row["prompt"] + row["chosen"]}) for row in rows]
    assert score(load_scorer(tmp_path / "saved", device="cpu"), chats) == pytest.approx(found, abs=1e-5)


def test_rows_that_cannot_be_scored_are_named(
    model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from litft.cli.main import main

    rewarded(model, pairs, trainer={"max_steps": 1}).method.save(tmp_path / "saved")
    long = {"messages": [{"role": "user", "content": "sun " * 3000}, {"role": "assistant", "content": "moon"}]}
    pair = json.loads(pairs.read_text().splitlines()[0])
    for row, said in ((long, "context"), (pair | {"chosen_score": 4}, "chosen_score")):
        data = write_jsonl(tmp_path / "rows.jsonl", [pair, row])
        asked = ["score", str(tmp_path / "saved"), "--data", str(data), "--out", str(tmp_path / "scores.jsonl")]
        assert main(asked) == 2
        told = capsys.readouterr().err
        assert said in told and "rows.jsonl:2" in told and not (tmp_path / "scores.jsonl").exists()
        assert main([*asked, "--bad_rows", "skip"]) == 0
        assert len((tmp_path / "scores.jsonl").read_text().splitlines()) == 1
        (tmp_path / "scores.jsonl").unlink()


def test_another_cut_is_the_same_training(model: Path, pairs: Path) -> None:
    whole = rewarded(model, pairs)
    assert len(whole.losses) > 2
    for cut in ({"packing": False}, {"tokens_per_batch": 200}):
        run = rewarded(model, pairs, **cut)
        assert run.losses == pytest.approx(whole.losses, rel=1e-5)
        assert difference(run.weights, whole.weights) < 1e-5


def test_ten_steps_of_trls_trainer(tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    model = save_tiny(tmp_path / "model", "llama")
    rows = pair_rows(40, 7)
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    start: dict[str, torch.Tensor] = {}

    def keep(method: Any) -> None:
        start["score"] = method.net.model.score.weight.detach().clone()

    options = {"optimizer": "adamw", "lr": 1e-3}
    run = train(
        model, source, kind="Reward", method=options, tokens_per_step=330, change=keep, trainer={"max_steps": 10}
    )
    theirs = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32)
    theirs.score.weight.data.copy_(start["score"])
    theirs.config.pad_token_id = 0
    tokenizer = AutoTokenizer.from_pretrained(model)
    losses: list[float] = []
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.0)
    config = RewardConfig(output_dir=str(tmp_path / "trl"), report_to="none", use_cpu=True, bf16=False, max_length=None)
    trainer = RewardTrainer(
        model=theirs, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    data = trainer.train_dataset
    for step in run.rows:  # its own data, collator and loss, over our steps
        batch = trainer.data_collator([data[int(row)] for row in step])
        loss = trainer.compute_loss(trainer.model.train(), dict(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert run.losses == pytest.approx(losses, rel=1e-5)
    found = {name: p.detach() for name, p in trainer.model.named_parameters()}
    assert difference(run.weights, {name: found[name] for name in run.weights}) < 5e-5
