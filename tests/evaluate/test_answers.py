"""Scores of answers against the packages whose names they bear, and by what anybody can see."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from litft.errors import UserError
from litft.evaluate.answers import PATTERNS, extracted, normalised, patterns_of, scores, spoken

ANSWERS = ["The cat sat on the mat.", "forty two", "", "Janet makes $18 a day", "a b c d e f", "über die Brücke"]
REFERENCES = [
    "the cat is on the mat",
    "42",
    "nothing",
    "She makes 18 dollars every day.",
    "f e d c b a",
    "über Brücken",
]


def test_rouge_is_that_of_googles_package() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"])
    found = scores(ANSWERS, REFERENCES)
    for i, (answer, reference) in enumerate(zip(ANSWERS, REFERENCES, strict=True)):
        for name, wanted in scorer.score(reference, answer).items():
            assert found[name][i] == pytest.approx(wanted.fmeasure, abs=1e-6), (name, answer)


def test_chrf_is_that_of_sacrebleu() -> None:
    from sacrebleu import sentence_chrf

    found = scores(ANSWERS, REFERENCES)["chrf"]
    for i, (answer, reference) in enumerate(zip(ANSWERS, REFERENCES, strict=True)):
        wanted = sentence_chrf(answer, [reference], eps_smoothing=True).score / 100
        if reference == "42":  # of the six lengths it has two, and sacrebleu counts the others as missed
            wanted *= 6 / 2
        assert found[i] == pytest.approx(wanted, abs=1e-6), answer


def test_another_script_has_no_rouge_and_is_not_counted_as_wrong() -> None:
    found = scores(["雨が降る", "rain"], ["雨が降る", "rain"])
    assert math.isnan(found["rouge1"][0]) and found["rouge1"][1] == 1
    assert found["chrf"].tolist() == pytest.approx([1, 1]) and found["exact_match"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("text", "same"),
    [("  The\n Cat. ", "the cat"), ("STRASSE", "straße"), ("-5", "-5"), ("3.14", "3.14"), ("a  b", "a b")],
)
def test_exact_match_is_blind_to_case_blanks_and_a_full_stop_only(text: str, same: str) -> None:
    assert normalised(text) == normalised(same)
    assert normalised("5") != normalised("-5") and normalised("the cat") != normalised("a cat")


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("gsm8k", "48/2 = 24\n#### 72", "72"),
        ("gsm8k", "#### 1,000", "1000"),
        ("gsm8k", "#### 7\nno:\n####  $1,234.50.", "1234.5"),
        ("gsm8k", "so it is 72", None),
        ("gsm8k", "#### -3", "-3"),
        ("number", "of 5 apples 3 are left, so 2.", "2"),
        ("number", "it costs $1,250.00", "1250"),
        ("number", "it is -0.50 today, not 0", "0"),
        ("number", "none", None),
        ("number", "-.5", "-0.5"),
    ],
)
def test_the_last_match_counts_and_numbers_are_compared_as_numbers(name: str, text: str, wanted: str | None) -> None:
    assert extracted(text, re.compile(PATTERNS[name])) == wanted


def test_ones_own_pattern() -> None:
    patterns = patterns_of(["number", r"answer: (\w+)", r"^(yes|no)\b"])
    assert list(patterns) == ["extracted/number", "extracted", "extracted/2"]
    found = scores(["Answer: Paris; answer: Rome", "no"], ["answer: rome 7", "yes"], patterns)
    assert found["extracted"][0] == 1 and math.isnan(found["extracted"][1])
    assert found["extracted/2"][1] == 0 and found["extracted/number"][0] == 0
    with pytest.raises(UserError, match="no regular expression"):
        patterns_of(["(unclosed"])


def test_thoughts_are_no_part_of_an_answer() -> None:
    assert spoken("<think>\nhm, 3\n</think>\n\n4") == "4"
    assert scores(["<think>3</think>4"], ["4"])["exact_match"].tolist() == [1]
    assert np.isfinite(scores(["<think> never ends"], ["4"])["chrf"]).all()
