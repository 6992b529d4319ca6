"""What another model says of all rows, computed once before training and kept on disk."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, distributed

from litft.data import tokens
from litft.data.batch import Batch
from litft.data.layout import lay_out
from litft.data.loader import Whole
from litft.data.progress import Progress
from litft.data.selection import Attached, Selection
from litft.models.alias import cache_dir

Compute = Callable[[Batch], dict[str, Tensor]]
"""A micro-batch to numbers of its rows, by name; each fp32 or int32 [any, ...]."""


def attach(
    data: Any,
    device: torch.device,
    key: list[Any],
    counts: Callable[[Selection], np.ndarray],
    compute: Callable[[], Compute],
    what: str,
) -> None:
    """Give each of the data's selections what `compute` says of its rows.

    Args:
        data: planned.
        device: where micro-batches go.
        key: what decides the numbers beside the rows' tokens.
        counts: how many numbers each row of a selection has, [rows].
        compute: makes the function; called where something is not on disk yet.
        what: is computed, for the progress line.
    """
    ready: Compute | None = None
    for name, rows in {"train": data.selection, **data.val_selections}.items():
        offsets = np.concatenate([[0], np.cumsum(counts(rows))])
        path = cache_dir() / "computed" / f"{_key(rows, key)}.npz"
        found = _read(path, int(offsets[-1]))
        if not _all_have(found):
            ready = ready or compute()
            found = _of_all_rows(data, rows, offsets, device, ready, f"{what}, {name}")
            if not (distributed.is_initialized() and distributed.get_rank()):
                _write(path, found)
        rows.attached |= {name: Attached(values, offsets) for name, values in (found or {}).items()}


def settings_of(method: Any, data: Any) -> list[Any]:
    """What decides how the numbers of a model that doesn't learn come out, beyond its weights; for keys."""
    tuner = method.tuner
    split = [tuner.init, tuner.r, tuner.alpha] if getattr(tuner, "init", "") == "pissa" else None
    storage = [getattr(tuner, "quant", None), tuner.trains_base, split]
    fast = [method.fast_attention, method.fast_loss, method.fast_lora, method.net.compiled]
    return [str(method.compute_dtype), method.run_device.type, data.plan.packing, *storage, *fast]


def _key(rows: Selection, key: list[Any]) -> str:
    content = [store.digest for store in rows.stores]
    which = [rows.file_of_row.tolist(), rows.row_of_file.tolist(), rows.max_length]
    return tokens.cache_key(content, which, key)


def _all_have(found: Any) -> bool:
    """Whether the numbers are there in every process."""
    if not distributed.is_initialized():
        return found is not None
    agreed = torch.tensor(int(found is not None), device="cuda" if distributed.get_backend() == "nccl" else "cpu")
    distributed.all_reduce(agreed, distributed.ReduceOp.MIN)
    return bool(agreed)


def _read(path: Path, count: int) -> dict[str, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, BadZipFile):  # not there, or damaged: computed anew
        return None
    whole = all(len(values) == count and np.isfinite(values).all() for values in found.values())
    return found if found and whole else None


def _write(path: Path, found: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}.npz")
    np.savez(beside, **found)  # type: ignore[arg-type]
    os.replace(beside, path)


def _of_all_rows(
    data: Any, rows: Selection, offsets: np.ndarray, device: torch.device, compute: Compute, what: str
) -> dict[str, np.ndarray]:
    """The numbers of all rows, each process computing its share."""
    plan, make = data.plan, data.maker(rows)
    whole = Whole(np.arange(len(rows)), int(rows.trained.sum()))
    packs = lay_out(whole.rows, rows.lengths, plan.tokens_per_batch, plan.ranks, plan.packing)[data._rank]
    found: dict[str, Tensor] = {}
    times = torch.zeros(int(offsets[-1]), device=device)
    with Progress(what) as advance, torch.no_grad():
        done = 0
        for some in packs:
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in make(some, whole).items()}
            parts = [np.arange(offsets[row], offsets[row + 1]) for row in some]
            index = torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, np.int64)).to(device)
            times[index] = 1
            for name, values in compute(batch).items():
                if name not in found:
                    found[name] = values.new_zeros((int(offsets[-1]), *values.shape[1:]))
                found[name][index] = values
            done += len(some)
            advance(done)
    if distributed.is_initialized():
        distributed.all_reduce(times)
        for values in found.values():  # each row is somebody's, or of a group's that shares its computing
            distributed.all_reduce(values)
            count = times.to(values.dtype).view(-1, *(1,) * (values.ndim - 1))
            values.div_(count, rounding_mode=None if values.is_floating_point() else "floor")
    return {name: values.cpu().numpy() for name, values in found.items()}
