"""From what was measured on each row to a set's figures, and to how two models differ."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from litft.evaluate.bootstrap import paired_difference
from litft.evaluate.losses import Documents


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
    loss = nll / tokens if tokens else None
    found: dict[str, Any] = {
        "loss": loss,
        "perplexity": None if loss is None else math.exp(min(loss, 700)),
        "bits_per_byte": nll / math.log(2) / float(sizes[used].sum()) if sizes[used].sum() else None,
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
    if used.any():
        nats = mine.nll[used], other.nll[used]
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
