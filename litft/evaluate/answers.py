"""How good generated answers are: against a reference answer, row by row."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

import numpy as np

from litft.errors import UserError

PATTERNS = {
    "gsm8k": r"####\s*\$?(-?[\d.,]*\d)",
    "number": r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)",
}
"""Named patterns: the number behind GSM8K's `####` (Cobbe et al. 2021), and the last number of any text."""
CHRF_ORDER = 6
ROUGE = ("rouge1", "rouge2", "rougeL")


def patterns_of(texts: Sequence[str]) -> dict[str, re.Pattern[str]]:
    """The patterns that `--extract` names, by the name of their figure: `extracted/gsm8k`, `extracted` for one's own.

    Raises:
        UserError: no regular expression.
    """
    found: dict[str, re.Pattern[str]] = {}
    for text in texts:
        own = sum(not name.startswith("extracted/") or name[10:].isdigit() for name in found)
        name = f"extracted/{text}" if text in PATTERNS else f"extracted/{own + 1}" if own else "extracted"
        try:
            found[name] = re.compile(PATTERNS.get(text, text))
        except re.error as error:
            raise UserError(
                f"--extract {text!r}: no regular expression: {error}\n"
                f"mend: one that finds the answer, its first group or all of it, or one of {', '.join(PATTERNS)}"
            ) from None
    return found


def spoken(answer: str) -> str:
    """An answer without the thoughts before it, which references lack (`<think> ... </think>`)."""
    return answer.rpartition("</think>")[2].strip()


def normalised(text: str) -> str:
    """A text as exact match compares it: in lower case, any blanks as one space, without a full stop at the end."""
    return " ".join(text.casefold().split()).removesuffix(".")


def extracted(text: str, pattern: re.Pattern[str]) -> str | None:
    """What the last match of a pattern finds, its first group where it has one; None where there is no match.

    A number comes without thousands separators, currency and trailing zeros: 1,000 and $1000.00 are both 1000.
    """
    last = next(iter(deque(pattern.finditer(text), maxlen=1)), None)
    if last is None:
        return None
    value = (last[1] if pattern.groups and last[1] is not None else last[0]).strip()
    try:
        number = Decimal(re.sub(r"[\s,$€£%]", "", value).removesuffix("."))
    except InvalidOperation:
        return normalised(value)
    return f"{number.normalize():f}" if number.is_finite() else normalised(value)


def scores(
    answers: Sequence[str],
    references: Sequence[str],
    patterns: dict[str, re.Pattern[str]] | None = None,
    advance: Callable[[int], None] = lambda more: None,
) -> dict[str, np.ndarray]:
    """Score answers against references, each from 0 to 1.

    Args:
        answers: what the model said.
        references: what stands in the rows.
        patterns: of `patterns_of`; the last match in the answer is compared with the last one in the reference.
        advance: called after each row.

    Returns:
        By name, fp64 [rows]: `exact_match` (of `normalised` texts), one figure a pattern, `rouge1`, `rouge2`, `rougeL`
        (F-measures of words, as the rouge_score package and torchmetrics have them: only a to z and digits are words)
        and `chrf` (Popović 2015: the mean F-measure of character 1- to 6-grams, of the lengths that the reference has;
        a row at a time). NaN where a row can't be scored: the
        reference has no match, or no such word.
    """
    from torchmetrics.functional.text import chrf_score, rouge_score

    answers = [spoken(answer) for answer in answers]
    pairs = list(zip(answers, references, strict=True))
    found = {"exact_match": np.array([float(normalised(a) == normalised(r)) for a, r in pairs])}
    for name, pattern in (patterns or {}).items():
        wanted = [extracted(reference, pattern) for reference in references]
        given = [extracted(answer, pattern) for answer in answers]
        found[name] = np.array([np.nan if w is None else float(w == g) for w, g in zip(wanted, given, strict=True)])
    overlap = np.full((len(pairs), len(ROUGE) + 1), np.nan)
    for i, (answer, reference) in enumerate(pairs):
        if re.search("[a-z0-9]", reference.lower()):
            rouge = rouge_score(answer, reference, rouge_keys=ROUGE)
            overlap[i, :-1] = [float(rouge[f"{key}_fmeasure"]) for key in ROUGE]
        if orders := min(CHRF_ORDER, len("".join(reference.split()))):
            chrf: Any = chrf_score([answer], [[reference]], CHRF_ORDER, n_word_order=0)
            overlap[i, -1] = float(chrf) * CHRF_ORDER / orders  # torchmetrics counts lengths that it lacks as missed
        advance(1)
    return found | dict(zip((*ROUGE, "chrf"), overlap.T, strict=True))
