"""Rows whose answers the model itself gives, in the place of the data's, for a teacher to judge."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import distributed

from litft.data.batch import Batch, documents_of
from litft.data.layout import lay_out
from litft.data.loader import Step, Whole, make_batch

if TYPE_CHECKING:
    from litft.methods.base import Method


class Answered(NamedTuple):
    """A document of a step.

    Attributes:
        ids: its tokens.
        trained: which of them are in the loss.
        own: whether its last answer is the model's own.
    """

    ids: np.ndarray
    trained: np.ndarray
    own: bool = False


def with_own_answers(method: Method, step: Step, share: float, temperature: float, max_new_tokens: int) -> list[Batch]:
    """The step's micro-batches with the last answers of some rows sampled from the model as it is.

    Which rows and what they are answered depends on the step and the row alone, so however the step is cut and whoever
    computes it, its training is the same. As answers may be longer than the data's, the step is cut into micro-batches
    anew, none larger than the plan's largest (or than one document).

    Args:
        method: with its model built.
        step: of the loader; its counts of tokens become those of the new rows.
        share: of the rows that are answered.
        temperature: of the sampling, from all tokens.
        max_new_tokens: longest answer.

    Returns:
        This rank's micro-batches; `own` [targets] says which targets are of the model's answers.
    """
    assert method.micro_batch is not None
    packing = "attention_mask" not in step["micro_batches"][0]
    documents = [Answered(*one) for batch in step["micro_batches"] for one in documents_of(batch, batch["rows"])]
    together = method.parallel is not None  # each has a part of the model: all answer everybody's
    documents = _of_all(step, documents) if together else documents
    documents = _answer(method, step["step_seed"], documents, share, temperature, max_new_tokens)
    documents = documents if together else _of_all(step, documents)

    lengths = np.array([len(one.ids) for one in documents])
    trained = sum(int(one.trained[1:].sum()) for one in documents)
    step |= {"tokens": int(lengths.sum()), "trained": trained}
    budget = max(method.micro_batch.slots, int(lengths.max()))
    rows = np.arange(len(documents))
    whole = Whole(rows, trained, step["ranks"])
    pad_id = method.tokenizer.pad_token_id or 0
    batches = []
    for some in lay_out(rows, lengths, budget, step["ranks"], packing)[step["rank"]]:
        batch = make_batch(some, lambda row: [documents[row][:2]], whole, packing, pad_id)
        own = torch.tensor([*(documents[row].own for row in some), False])  # what fills up comes last
        batches.append(batch | {"own": own[batch["document_ids"].clamp(max=len(some))]})
    return move_data_to_device(batches, method.run_device)


def _of_all(step: Step, documents: list[Answered]) -> list[Answered]:
    """The documents of all ranks; those that share a rank's have the same."""
    if not distributed.is_initialized():
        return documents
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, (step["rank"], documents))
    by_rank = dict(found)
    return [one for rank in range(step["ranks"]) for one in by_rank[rank]]


def _answer(
    method: Method,
    seed: int,
    documents: Sequence[Answered],
    share: float,
    temperature: float,
    max_new_tokens: int,
) -> list[Answered]:
    """The documents, some with answers of the model."""
    from transformers import GenerationConfig

    from litft.infer.engine import Engine, Request
    from litft.infer.generate import decoding
    from litft.infer.live import answering

    asked: dict[int, Request] = {}
    with answering(method) as bundle:
        plain = GenerationConfig(
            eos_token_id=sorted(bundle.stop_ids) or None, pad_token_id=bundle.settings.pad_token_id
        )
        bundle = replace(bundle, settings=plain)  # no penalty or filter of the model's own
        settings = decoding(bundle, max_new_tokens, temperature, top_p=1.0, top_k=0, min_p=0.0)
        for index, one in enumerate(documents):
            prompt = one.ids[: _last_answer(one.trained)]
            name = f"{seed}/{hashlib.sha256(one.ids.astype(np.int64).tobytes()).hexdigest()}"
            room = min(max_new_tokens, (method.context_length or len(prompt) + max_new_tokens) - len(prompt))
            if len(prompt) > 1 and room > 0 and random.Random(name).random() < share:
                asked[index] = Request(prompt.tolist(), settings, room, seed=name)
        Engine(bundle).run(sorted(asked.values(), key=lambda request: -len(request.ids)))
    found = list(documents)
    for index, request in asked.items():
        ids = np.array(request.ids + request.new)
        found[index] = Answered(ids, np.arange(len(ids)) >= len(request.ids), own=True)
    return found


def _last_answer(trained: np.ndarray) -> int:
    """Where the last run of trained tokens begins; 0 where there is none, 1 where all of a text is trained."""
    begins = np.flatnonzero(trained[1:] & ~trained[:-1])
    return int(begins[-1]) + 1 if len(begins) else 0
