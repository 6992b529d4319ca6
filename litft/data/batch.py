"""From documents to one micro-batch of tensors, computed on the CPU so that a training step needs no device sync."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Batch = dict[str, Any]
Document = tuple[np.ndarray, np.ndarray]
"""Token ids (int) and which of them are trained (bool), both [tokens]."""


def pack_documents(documents: Sequence[Document], denominator: float, multiple: int = 1, pad_id: int = 0) -> Batch:
    """Lay whole documents end to end in one flat row.

    A document's first token is never a target: nothing of its own precedes it.

    Args:
        documents: the documents, at least one.
        denominator: what the summed loss is divided by; the same for all micro-batches of an optimizer step.
        multiple: the row is filled up to a multiple of so many slots, with one more document that has no targets.
        pad_id: the token that fills it.

    Returns:
        `input_ids`, `position_ids` (restarting at each document) [1, slots]; `cu_seqlens` [documents + 1] int32, and
        as a tuple on the host `document_bounds`; `max_seqlen` (int); `target_positions` (which hidden states predict a
        trained token), `target_ids` and `document_ids` of the targets, each [targets]; `document_targets`, how many of
        them each document has [documents]; `document_of_token` [slots]; `denominator` (float tensor); `tokens` (those
        of the documents) and `trained` (ints).
    """
    real = sum(len(ids) for ids, _ in documents)
    if real % multiple:
        filling = multiple - real % multiple
        documents = [*documents, (np.full(filling, pad_id), np.zeros(filling, bool))]
    lengths = np.array([len(ids) for ids, _ in documents])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = np.concatenate([ids for ids, _ in documents]).astype(np.int64)
    trained = np.concatenate([mask for _, mask in documents]).astype(bool)
    trained[starts[:-1]] = False
    targets = np.flatnonzero(trained)
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    return {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "cu_seqlens": torch.from_numpy(starts.astype(np.int32)),
        "max_seqlen": int(lengths.max()),
        "document_bounds": tuple(starts.tolist()),
        "target_positions": torch.from_numpy(targets - 1),
        "target_ids": torch.from_numpy(ids[targets]),
        "document_ids": torch.from_numpy(np.repeat(np.arange(len(documents)), lengths)[targets]),
        "document_targets": torch.from_numpy(np.add.reduceat(trained, starts[:-1], dtype=np.int64)),
        "document_of_token": torch.from_numpy(np.repeat(np.arange(len(documents)), lengths)),
        "denominator": torch.tensor(denominator, dtype=torch.float32),
        "tokens": real,
        "trained": len(targets),
    }


def pad_documents(documents: Sequence[Document], denominator: float, pad_id: int) -> Batch:
    """One padded row a document, for models whose attention can't take packed rows.

    Returns:
        As `pack_documents`, with `input_ids`, `position_ids` and `attention_mask` [documents, width]; `real_positions`
        of the tokens in the flattened [documents * width]; and in the place of `target_positions` `kept_columns`, in
        which any row predicts a trained token, `target_rows`, and `target_columns` as indices of kept ones [targets].
    """
    width = max(len(ids) for ids, _ in documents)
    flat = pack_documents(documents, denominator)
    rows, columns = np.nonzero(np.arange(width) < np.array([len(ids) for ids, _ in documents])[:, None])
    shape = (len(documents), width)
    input_ids = torch.full(shape, pad_id)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    input_ids[rows, columns] = flat["input_ids"][0]
    position_ids[rows, columns] = flat["position_ids"][0]
    attention_mask[rows, columns] = 1
    targets = flat.pop("target_positions").numpy()
    kept, target_columns = np.unique(columns[targets], return_inverse=True)
    return flat | {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "attention_mask": attention_mask,
        "real_positions": torch.from_numpy(rows * width + columns),
        "kept_columns": torch.from_numpy(kept),
        "target_rows": torch.from_numpy(rows[targets]),
        "target_columns": torch.from_numpy(target_columns),
    }


def documents_of(batch: Batch, count: int) -> list[Document]:
    """The first `count` documents of a micro-batch, as they went into it."""
    lengths = batch["cu_seqlens"].diff().cpu().numpy()
    if "attention_mask" in batch:
        width = batch["input_ids"].shape[1]
        ids = batch["input_ids"].flatten()[batch["real_positions"]].cpu().numpy()
        targets = batch["target_rows"] * width + batch["kept_columns"][batch["target_columns"]] + 1
        place = {position: i for i, position in enumerate(batch["real_positions"].tolist())}
        at = [place[target] for target in targets.tolist()]
    else:
        ids, at = batch["input_ids"][0].cpu().numpy(), (batch["target_positions"] + 1).tolist()
    trained = np.zeros(len(ids), bool)
    trained[at] = True
    ends = np.cumsum(lengths)[:count]
    return [(ids[end - n : end], trained[end - n : end]) for end, n in zip(ends, lengths, strict=False)]
