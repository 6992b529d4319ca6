"""The loss of each row on its trained tokens: the mask, the packing and the loss of training."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np

from litft.data.conversation import Conversation
from litft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from litft.data.batch import Document
    from litft.data.template import TrainOn
    from litft.infer.load import ChatModel

Advance = Callable[[int], None]
"""Called with how many more rows are done."""


@dataclass(frozen=True)
class Documents:
    """A set's rows as one model reads them.

    Attributes:
        rows: ids (int32) and mask of the trained tokens (bool), each [tokens]; the first token is never trained.
        used: which rows have a loss, [rows].
        left_out: how many have none, by reason, as in training.
    """

    rows: list[Document]
    used: np.ndarray
    left_out: dict[str, int]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each row."""
        return np.array([len(ids) for ids, _ in self.rows])

    @property
    def trained(self) -> np.ndarray:
        """Trained tokens of each row."""
        return np.array([int(mask.sum()) for _, mask in self.rows])

    def same_tokens(self, other: Documents) -> bool:
        """Whether another model reads the same tokens and is scored on the same ones, in the rows that both use."""
        return all(
            np.array_equal(mine, theirs)
            for i in np.flatnonzero(self.used & other.used)
            for mine, theirs in zip(self.rows[i], other.rows[i], strict=True)
        )


def encode(
    conversations: Sequence[Conversation],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    train_on: TrainOn = "assistant",
    today: date | None = None,
    allow_special_tokens: bool = False,
    skip_bad: bool = False,
    advance: Advance = lambda more: None,
) -> Documents:
    """Write rows with a model's chat template, as training does.

    Args:
        conversations: the rows.
        tokenizer: of the model, with its chat template.
        max_length: longest row in tokens; longer ones are left out.
        train_on: which turns count, as in training.
        today: the day that the chat template takes for today's.
        allow_special_tokens: as in training.
        skip_bad: leave out rows that the template refuses, in place of an error.
        advance: called after each row.

    Raises:
        DataError: the template refuses a row, or its mask can't be established.
    """
    from litft.data.template import ChatEncoder

    encoder = ChatEncoder(tokenizer, train_on=train_on, allow_special_tokens=allow_special_tokens, today=today)
    rows: list[Document] = []
    used = np.zeros(len(conversations), bool)
    left_out: Counter[str] = Counter()
    for i, conversation in enumerate(conversations):
        ids, mask = np.empty(0, np.int32), np.empty(0, bool)
        try:
            encoded = encoder(conversation)
            ids, mask = np.array(encoded.ids, np.int32), np.array(encoded.trained, bool)
            mask[:1] = False  # nothing precedes a row's first token, so nothing predicts it
        except DataError:
            if not skip_bad:
                raise
            left_out["refused by the chat template"] += 1
        else:
            used[i] = len(ids) <= max_length and mask.any()
            if not used[i]:
                left_out[f"longer than {max_length} tokens" if mask.any() else "nothing to train on"] += 1
        rows.append((ids, mask))
        advance(1)
    return Documents(rows, used, dict(left_out))


def row_losses(bundle: ChatModel, documents: Documents, *, advance: Advance = lambda more: None) -> np.ndarray:
    """The summed cross-entropy of each row's trained tokens, in nats.

    Rows are packed into micro-batches as for validation in training and go through the same attention and the same
    loss, so only the trained tokens meet the vocabulary matrix.

    Args:
        bundle: the model; left as it was.
        documents: of `encode`, with this model's tokenizer.
        advance: called with the rows of each micro-batch.

    Returns:
        fp64 [rows]; 0 for the rows that are not used.
    """
    import torch
    from lightning.fabric.utilities import move_data_to_device

    from litft.data.batch import pack_documents, pad_documents
    from litft.data.layout import lay_out
    from litft.data.loader import SLOTS
    from litft.data.plan import MICRO_BATCH
    from litft.models import attention
    from litft.models.causal_lm import CausalLM
    from litft.models.load import can_pack

    model: Any = bundle.model
    found, chosen = np.zeros(len(documents.rows)), np.flatnonzero(documents.used)
    if not len(chosen):
        return found
    packing = can_pack(model.config) is None
    half = model.dtype.itemsize == 2
    implementation = attention.best(model.config, model.device, half) if packing else None
    lengths, pad = documents.lengths, bundle.tokenizer.pad_token_id or 0
    budget = max(MICRO_BATCH, int(lengths[chosen].max()))
    with torch.inference_mode(), _attending(model, implementation):
        net = CausalLM(model)
        for pack in lay_out(chosen, lengths, budget, packing=packing)[0]:
            read = [documents.rows[row] for row in pack]
            batch = pack_documents(read, 1.0, SLOTS, pad) if packing else pad_documents(read, 1.0, pad)
            nll = net(move_data_to_device(batch, model.device))["nll"].cpu().numpy()
            sums = np.bincount(batch["document_ids"].cpu(), weights=nll.astype(np.float64), minlength=len(pack))
            found[pack] = sums[: len(pack)]
            advance(len(pack))
    return found


@contextmanager
def _attending(model: Any, implementation: str | None) -> Iterator[None]:
    """Inside the block the model has training's attention and no cache."""
    before, cache = model.config._attn_implementation, model.config.use_cache
    try:
        if implementation:
            model.set_attn_implementation(implementation)
        model.config.use_cache = False
        yield
    finally:
        model.config.use_cache = cache
        model.set_attn_implementation(before)


def text_sizes(documents: Documents, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Bytes (UTF-8) of each row's trained text, without special tokens, [rows]."""
    trained = [ids[mask].tolist() for ids, mask in documents.rows]
    texts = [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in trained]
    return np.array([len(str(text).encode()) for text in texts])
