"""A reference's log-probabilities of all rows, computed once before training and kept on disk."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from litft.data import tokens
from litft.data.layout import lay_out
from litft.data.loader import Whole
from litft.data.progress import Progress
from litft.data.selection import Selection
from litft.models.alias import cache_dir
from litft.models.load import fingerprint


def prepare(method: Any, data: Any) -> None:
    """Give each of the data's selections the log-probabilities of its documents.

    Args:
        method: a `Referenced`, its model built and before training, or at a checkpoint's weights.
        data: planned, with the method.
    """
    reference = None
    for name, rows in {"train": data.selection, **data.val_selections}.items():
        path = cache_dir() / "reference" / f"{_key(method, rows)}.npy"
        found = _read(path, rows) if _all(path.is_file()) else None
        if found is None:
            reference = method.reference = reference or method.make_reference()
            found = _compute(method, data, rows, name)
            if not (distributed.is_initialized() and distributed.get_rank()):
                _write(path, found)
        rows.reference = found
    method.reference = None  # a frozen copy is memory that nothing needs any more


def _key(method: Any, rows: Selection) -> str:
    """A hash of what decides the numbers: the rows' tokens, the model and how it is computed."""
    content = [store.digest for store in rows.stores]
    which = [rows.file_of_row.tolist(), rows.row_of_file.tolist(), rows.max_length]
    storage = getattr(method.tuner, "quant", None)
    model = fingerprint(method.source), str(method.compute_dtype), storage, method.prompts_too
    return tokens.cache_key(content, which, model)


def _all(here: bool) -> bool:
    """Whether something is so on every process."""
    if not distributed.is_initialized():
        return here
    agreed = torch.tensor(int(here), device="cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(agreed, distributed.ReduceOp.MIN)
    return bool(agreed)


def _read(path: Path, rows: Selection) -> np.ndarray | None:
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # damaged: computed anew
        return None
    whole = found.dtype == np.float32 and found.shape == rows.lengths_of.shape and np.isfinite(found).all()
    return found if whole else None


def _write(path: Path, found: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}.npy")
    np.save(beside, found)
    os.replace(beside, path)


def _compute(method: Any, data: Any, rows: Selection, name: str) -> np.ndarray:
    plan = data.plan
    packs = lay_out(np.arange(len(rows)), rows.lengths, plan.tokens_per_batch, plan.ranks, plan.packing)[data._rank]
    make, whole = data.maker(rows), Whole(np.arange(len(rows)), int(rows.trained.sum()))
    found = torch.zeros(rows.lengths_of.shape, device=method.run_device)
    counted = torch.zeros(len(rows), device=method.run_device)
    done = 0
    with Progress(f"reference of {name}") as advance:
        for some in packs:
            batch = make(some, whole)
            batch = {k: v.to(method.run_device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            log_p = method.reference_log_p(batch)
            index = torch.from_numpy(some).to(method.run_device)
            found[index] = log_p.view(len(some), -1)
            counted[index] = 1
            done += len(some)
            advance(done)
    if distributed.is_initialized():
        distributed.all_reduce(found)
        distributed.all_reduce(counted)
    return (found / counted[:, None]).cpu().numpy()
