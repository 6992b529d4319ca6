"""The example data of the tutorials: what the first command of the README trains on."""

import json
import re
from collections import Counter
from difflib import SequenceMatcher
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "tutorials" / "data" / "quickstart.jsonl"

OPENING = r"Log, wind (N|NE|E|SE|S|SW|W|NW) [1-8], [a-z ]+\."
LATER_OPENING = r"Log, same wind\."
BODY = r"\n\n(?P<body>.+)\n\nMind the rocks: (?P<caution>[^\n]+[.?!])"
SIGN_OFF = r"\n\nThe lamp is lit\. Keeper out\."


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]


def contents(rows: list[dict[str, Any]], role: str) -> list[str]:
    return [message["content"] for row in rows for message in row["messages"] if message["role"] == role]


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9']+", text.lower()))


def test_size(rows: list[dict[str, Any]]) -> None:
    assert 200 <= len(rows) <= 300
    assert FILE.stat().st_size < 200_000


def test_rows_are_conversations_that_alternate(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert set(row) == {"messages"}
        assert all(set(message) == {"role", "content"} for message in row["messages"])
        assert all(message["content"] == message["content"].strip() != "" for message in row["messages"])
        roles = " ".join(message["role"] for message in row["messages"])
        assert re.fullmatch(r"(system )?user assistant( user assistant)*", roles), roles


def test_multi_turn_and_system_rows(rows: list[dict[str, Any]]) -> None:
    multi_turn = [i for i, row in enumerate(rows) if len(contents([row], "assistant")) >= 2]
    assert len(multi_turn) >= 30
    assert sum(row["messages"][0]["role"] == "system" for row in rows) >= 3
    # Spread over the file, so that any slice of it has some.
    quarters = Counter(i * 4 // len(rows) for i in multi_turn)
    assert min(quarters[q] for q in range(4)) >= 3


def test_answers_are_distinct(rows: list[dict[str, Any]]) -> None:
    # The opening repeats by design; what counts is the answer itself.
    bodies = [answer.split("\n\n", 1)[1] for answer in contents(rows, "assistant")]
    assert len(set(bodies)) >= 0.9 * len(bodies)


def test_prompts_are_distinct(rows: list[dict[str, Any]]) -> None:
    prompts = [" ".join(prompt.lower().split()) for prompt in contents(rows, "user")]
    assert [prompt for prompt, count in Counter(prompts).items() if count > 1] == []


def test_no_near_duplicates(rows: list[dict[str, Any]]) -> None:
    """A held-out part tells nothing where its questions or answers stand in the training rows too."""
    prompts = [(prompt.lower(), words(prompt)) for prompt in contents(rows, "user")]
    close = [
        (a, b)
        for (a, words_a), (b, words_b) in combinations(prompts, 2)
        if len(words_a & words_b) >= 0.7 * min(len(words_a), len(words_b))
        and SequenceMatcher(None, a, b, autojunk=False).ratio() > 0.85
    ]
    assert close == []
    bodies = [words(re.sub(SIGN_OFF, "", answer.split("\n\n", 1)[1])) for answer in contents(rows, "assistant")]
    assert max(len(a & b) / len(a | b) for a, b in combinations(bodies, 2)) < 0.5


def test_every_answer_is_in_the_voice(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for turn, answer in enumerate(contents([row], "assistant")):
            opening = LATER_OPENING if turn else OPENING
            match = re.fullmatch(opening + BODY + SIGN_OFF, answer, flags=re.DOTALL)
            assert match, answer
            # Once each: a stray sign-off in the middle would teach the model to go on after it.
            assert answer.count("Mind the rocks") == answer.count("Keeper out") == answer.count("Log, ") == 1
            assert 25 <= len(answer.split()) <= 90, answer
            assert answer.count("```") in (0, 2), answer


def test_text_is_plain(rows: list[dict[str, Any]]) -> None:
    for text in [message["content"] for row in rows for message in row["messages"]]:
        odd = {char for char in text if not (char.isascii() or char.isalpha() or char in "¿¡")}
        assert not odd, (odd, text)
        assert "<|" not in text
