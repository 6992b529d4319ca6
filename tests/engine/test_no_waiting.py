"""What a GPU would have to wait for: numbers read from tensors, and shapes that depend on them."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from tiny import chat_rows, write_jsonl
from torch.utils._python_dispatch import TorchDispatchMode
from training import train

from litft.data.batch import pack_documents, pad_documents
from litft.engine.metrics import StepMetrics
from litft.losses.router import load_balance

WAITS = {
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "equal",
}


READERS = ("training.py",)  # the tests' own callback


class Watch(TorchDispatchMode):
    """Notes operations that read a device's results on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.operations += 1
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in WAITS or by_mask or repeats:
            stack = [f for f in traceback.extract_stack()[:-1] if "/site-packages/torch/" not in f.filename]
            if Path(stack[-1].filename).name not in READERS:
                self.seen.append(f"{name} at {'/'.join(Path(stack[-1].filename).parts[-3:])}:{stack[-1].lineno}")
        return func(*args, **(kwargs or {}))


class WatchSteps(Callback):
    """Watches everything between the beginnings of two optimizer steps, the loop and its other callbacks included."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.mode = first, last, Watch()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.first:
            self.mode.__enter__()
        if trainer.global_step == self.last:
            self.mode.__exit__(None, None, None)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("packing", [True, False])
def test_a_step_reads_nothing_from_the_device(
    packing: bool, fast: bool, optimizer: str, tiny_llama: Path, tmp_path: Path
) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", chat_rows(40))
    watch = WatchSteps(3, 6)
    options = {"optimizer": optimizer, "clip": 1.0, "fast_attention": fast, "fast_loss": fast}
    train(
        tiny_llama,
        file,
        method=options,
        packing=packing,
        tokens_per_step=400,
        tokens_per_batch=200,
        callbacks=[StepMetrics(every=50), watch],
    )
    assert watch.mode.operations > 500
    assert not watch.mode.seen


def test_the_watch_sees_what_waits() -> None:
    x = torch.arange(4.0)
    with Watch() as watch:
        float(x.sum())
        x[x > 1]
        torch.nonzero(x)
        torch.repeat_interleave(torch.arange(2), torch.tensor([1, 2]))
    assert [seen.split()[0] for seen in watch.seen] == ["_local_scalar_dense", "index", "nonzero", "repeat_interleave"]


@pytest.mark.parametrize("packing", [True, False])
def test_the_balance_of_experts_reads_nothing_from_the_device(packing: bool) -> None:
    import numpy as np

    documents = [(np.arange(n), np.ones(n, bool)) for n in (5, 3, 9)]
    batch = pack_documents(documents, 1.0) if packing else pad_documents(documents, 1.0, 0)
    logits = [torch.randn(17, 4) for _ in range(2)]
    with Watch() as watch:
        found = load_balance(logits, batch["cu_seqlens"], batch["document_of_token"], 2)
    assert found.shape == (3,) and watch.operations > 5
    assert not watch.seen
