"""How the next token of each row is chosen from its logits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import GenerationConfig

_READ = {"do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"}
_ELSEWHERE = {"max_new_tokens", "max_length", "eos_token_id", "bos_token_id", "pad_token_id", "use_cache"}
_ELSEWHERE |= {"stop_strings", "num_return_sequences", "transformers_version", "cache_implementation"}
_ELSEWHERE |= {"length_penalty", "early_stopping"}  # of beams only
_NEUTRAL = {"num_beams": 1, "num_beam_groups": 1, "encoder_repetition_penalty": 1.0, "typical_p": 1.0}
_NEUTRAL |= {"guidance_scale": 1.0}
_FIRST = 1024  # likeliest tokens looked at before all of them are sorted, which is slow and hardly ever needed


@dataclass(frozen=True)
class Sampling:
    """How one row's tokens are chosen.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw from this many likeliest tokens; 0 is all.
        top_p: then from the likeliest of them that together have this probability.
        min_p: then from those with at least this share of the likeliest one's probability.
        repetition_penalty: divides positive, multiplies negative logits of tokens that came before (1 leaves them).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @staticmethod
    def of(settings: GenerationConfig) -> Sampling:
        """What transformers' settings ask for."""
        penalty = settings.repetition_penalty or 1.0
        if not settings.do_sample:
            return Sampling(repetition_penalty=penalty)
        return Sampling(
            1.0 if settings.temperature is None else settings.temperature,
            settings.top_k or 0,
            1.0 if settings.top_p is None else settings.top_p,
            settings.min_p or 0.0,
            penalty,
        )


def not_read(settings: GenerationConfig) -> list[str]:
    """The settings that `Sampling` does not know and that change what transformers' `generate` does."""
    known = _READ | _ELSEWHERE
    return [
        key
        for key, value in settings.to_dict().items()
        if value and key not in known and value != _NEUTRAL.get(key) and not key.startswith(("_", "output_", "return_"))
    ]


@dataclass
class Draw:
    """One row's way of choosing: settings, random numbers of its own, and the tokens so far for the penalty.

    Attributes:
        sampling: the settings.
        seed: of the row's random numbers; None draws anew.
    """

    sampling: Sampling
    seed: int | str | None = None
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)


def choose(logits: Tensor, draws: Sequence[Draw], before: Sequence[Sequence[int]]) -> list[int]:
    """The next token of each row.

    A row's choice depends on its own logits and random numbers alone, whatever rows lie beside it.

    Args:
        logits: [rows, vocabulary], fp32; changed where a row has a penalty.
        draws: one a row.
        before: the prompt and the answer so far of each row; read for the penalty only.
    """
    for row, (draw, seen) in enumerate(zip(draws, before, strict=True)):
        if draw.sampling.repetition_penalty != 1.0:
            ids = torch.tensor(sorted(set(seen)), device=logits.device)
            scores = logits[row, ids]
            penalty = draw.sampling.repetition_penalty
            logits[row, ids] = torch.where(scores < 0, scores * penalty, scores / penalty)
    chosen = logits.argmax(1).tolist()
    for row, draw in enumerate(draws):
        if draw.sampling.temperature > 0:
            chosen[row] = _drawn(logits[row], draw.sampling, draw.random.random())
    return chosen


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, likeliest first, and their probabilities, which add up to 1.

    The filters follow each other as in transformers: temperature, top_k, top_p, min_p.

    Args:
        logits: [vocabulary].
        sampling: with a temperature above 0.
    """
    logits = logits / sampling.temperature
    size = len(logits)
    count = min(sampling.top_k or size, size)
    if count == size and sampling.top_p == 1:
        ids, kept = torch.arange(size, device=logits.device), logits.softmax(0)
    else:
        looked = min(_FIRST, size) if count == size else count
        values, ids = logits.topk(looked)
        kept = (values - (logits if count == size else values).logsumexp(0)).exp()
        if looked < count and float(kept.sum()) < sampling.top_p:
            values, ids = logits.topk(size)
            kept = values.softmax(0)
        inside = kept.cumsum(0) - kept < sampling.top_p  # the one that reaches it belongs to them
        kept, ids = kept[inside], ids[inside]
    if sampling.min_p > 0:
        inside = kept >= sampling.min_p * kept.max()
        kept, ids = kept[inside], ids[inside]
    return ids, kept / kept.sum()


def _drawn(logits: Tensor, sampling: Sampling, at: float) -> int:
    """The token at this place, 0 to 1, along the probabilities laid end to end."""
    ids, probabilities = candidates(logits, sampling)
    ends = probabilities.double().cumsum(0)
    place = int((ends <= at * ends[-1]).sum())
    return int(ids[min(place, len(ids) - 1)])
