"""From what was measured on each row to a set's figures, and to how two models differ."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from litft.evaluate.bootstrap import paired_difference
from litft.evaluate.losses import Documents
from litft.evaluate.sets import Asked, EvalSet


@dataclass(frozen=True)
class Measured:
    """One model on one set.

    Attributes:
        documents: the rows as the model reads them.
        nll: summed cross-entropy of each row's trained tokens, in nats, [rows].
        answers: what the model said to the rows that were asked.
        scores: of the answers, by name, [answers]; NaN where a row can't be scored.
    """

    documents: Documents
    nll: np.ndarray
    answers: list[str] = field(default_factory=list)
    scores: dict[str, np.ndarray] = field(default_factory=dict)


def figures(m: Measured, used: np.ndarray, sizes: np.ndarray) -> dict[str, Any]:
    """The figures of one model over a set.

    Args:
        m: what was measured.
        used: the rows that count in the loss, bool [rows].
        sizes: bytes of each row's trained text, [rows].

    Returns:
        `loss` (nats a trained token), `perplexity`, `bits_per_byte`, `tokens` (trained ones), `total_tokens`, and the
        mean of each score; None where no row has one.
    """
    nll, tokens = float(m.nll[used].sum()), int(m.documents.trained[used].sum())
    loss = nll / tokens if tokens and math.isfinite(nll) else None  # a broken model's is no number
    found: dict[str, Any] = {
        "loss": loss,
        "perplexity": None if loss is None else math.exp(min(loss, 700)),
        "bits_per_byte": None if loss is None or not sizes[used].sum() else nll / math.log(2) / int(sizes[used].sum()),
        "tokens": tokens,
        "total_tokens": int(m.documents.lengths[used].sum()),
    }
    for name, score in m.scores.items():
        found[name] = None if np.isnan(score).all() else float(np.nanmean(score))
    return found


def differences(
    mine: Measured, other: Measured, used: np.ndarray, sizes: np.ndarray, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """How far a model is from another on the same rows.

    The loss of a token can be compared only where both read the same tokens; where they don't, `bits_per_byte` can:
    what it takes to say the trained text, per byte of that text, whatever the tokens.

    Args:
        mine: the model.
        other: the one it is compared with.
        used: the rows that count in the loss for both, bool [rows].
        sizes: bytes of each row's trained text, the same for both, [rows].
        seed: of the bootstrap.

    Returns:
        `diff`: by figure, `mine - other`; `ci95`: its interval `[low, high]` over the rows (`paired_difference`), None
        for a single row.
    """
    pairs: dict[str, tuple[np.ndarray, ...]] = {}
    nats = mine.nll[used], other.nll[used]
    if used.any() and np.isfinite(nats).all():
        if mine.documents.same_tokens(other.documents):
            pairs["loss"] = *nats, mine.documents.trained[used]
        if sizes[used].sum():
            pairs["bits_per_byte"] = *nats, sizes[used] * math.log(2)
    for name in mine.scores:
        both = ~np.isnan(mine.scores[name]) & ~np.isnan(other.scores[name])
        if both.any():
            pairs[name] = mine.scores[name][both], other.scores[name][both]
    found = {name: paired_difference(*arrays, seed=seed) for name, arrays in pairs.items()}
    return {
        "diff": {name: difference for name, (difference, _) in found.items()},
        "ci95": {name: interval and list(interval) for name, (_, interval) in found.items()},
    }


def summary(rows: EvalSet, asked: Asked, models: list[Measured], sizes: np.ndarray, seed: int) -> dict[str, Any]:
    """What evaluation.json says of a set: the model's figures, the baseline's, and how they differ.

    Args:
        rows: the set.
        asked: which of its rows were answered.
        models: the model, and the baseline where there is one.
        sizes: bytes of each row's trained text, [rows].
        seed: of the bootstrap.
    """
    used = np.logical_and.reduce([m.documents.used for m in models])
    left_out = Counter({"bad": rows.skipped})
    for m in models:
        left_out |= Counter(m.documents.left_out)  # the larger count of each reason
    found = {
        "file": rows.file,
        "content": rows.content[:12],
        "rows": int(used.sum()),
        "rows_answered": len(asked),
        "left_out": dict(+left_out),
        **figures(models[0], used, sizes),
    }
    found["rows_scored"] = {key: int((~np.isnan(score)).sum()) for key, score in models[0].scores.items()}
    if len(models) > 1:
        found["same_tokens"] = models[0].documents.same_tokens(models[1].documents)
        found["baseline"] = figures(models[1], used, sizes)
        found |= differences(models[0], models[1], used, sizes, seed)
    return found


def answer_rows(name: str, asked: Asked, models: list[Measured]) -> list[dict[str, Any]]:
    """What answers.jsonl says of each answered row: prompt and reference, what each model says, the scores of that.

    Args:
        name: of the set.
        asked: the rows that were answered.
        models: the model, and the baseline where there is one.
    """

    def scores_at(m: Measured, at: int) -> dict[str, float | None]:
        return {key: None if np.isnan(score[at]) else round(float(score[at]), 6) for key, score in m.scores.items()}

    found = []
    for at, (question, reference) in enumerate(asked.values()):
        row: dict[str, Any] = {"set": name, "line": question.line, "prompt": question.messages, "reference": reference}
        for prefix, m in zip(("", "baseline_"), models, strict=False):
            row |= {f"{prefix}answer": m.answers[at], f"{prefix}scores": scores_at(m, at)}
        found.append(row)
    return found
