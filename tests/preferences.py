"""Preference rows for tests: pairs and labelled answers in the tiny tokenizer's words, and a model that reads them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tiny import CHATML, save_tiny, tiny_tokenizer, write_jsonl

NO_NEWLINE = CHATML.replace("'<|im_end|>' + '\n'", "'<|im_end|>'")
"""ChatML that ends with the end of the turn, as TRL then counts the same completion tokens as we do."""
_WORDS = ["sun", "moon", "river", "stone", "bird", "old", "quick", "under", "nine", "because", "what", "light"]
Row = dict[str, Any]


def pair_rows(n: int, seed: int = 0, longest: int = 12) -> list[Row]:
    """`n` pairs whose answers are of uneven length, prompts and answers all distinct; `prompt` is one user message."""
    rng = random.Random(seed)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(_WORDS, k=rng.randint(low, high)))

    rows = []
    for i in range(n):
        answers = ({"role": "assistant", "content": f"{mark}{i} {text(1, longest)}"} for mark in "gb")
        chosen, rejected = ([answer] for answer in answers)
        prompt = [{"role": "user", "content": f"{i}: {text(2, 8)}?"}]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def labelled_rows(n: int, seed: int = 0, longest: int = 12) -> list[Row]:
    """`n` answers of which two in three are good ones, on average and in no order."""
    rng = random.Random(seed + 1)
    found = []
    for row in pair_rows(n, seed, longest):
        good = rng.random() < 2 / 3
        found.append({"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good})
    return found


def even_rows(n: int, labelled: bool, low: int, high: int, seed: int = 0) -> list[Row]:
    """`n` rows of between `low` and `high` tokens, both documents of a pair together."""
    tokenizer = tiny_tokenizer(NO_NEWLINE)

    def size(row: Row) -> int:
        answers = [row["completion"]] if labelled else [row["chosen"], row["rejected"]]
        return sum(len(tokenizer.apply_chat_template(row["prompt"] + a, return_dict=False)) for a in answers)

    some = labelled_rows(20 * n, seed, 90) if labelled else pair_rows(20 * n, seed, 24)
    fitting = [row for row in some if low <= size(row) <= high][:n]
    assert len(fitting) == n, len(fitting)
    return fitting


def save_model(folder: Path, **options: Any) -> Path:
    """A tiny Llama whose template writes nothing after the end of a turn."""
    return save_tiny(folder, template=NO_NEWLINE, **options)


def files(folder: Path, pairs: int = 24, labelled: int = 24) -> dict[str, Path]:
    """A file of either kind, by what methods call it."""
    return {
        "pairs": write_jsonl(folder / "pairs.jsonl", pair_rows(pairs)),
        "labelled": write_jsonl(folder / "labelled.jsonl", labelled_rows(labelled)),
    }
