"""The loader that hands out one optimizer step at a time: this rank's micro-batches, and what the step counts."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from litft.data.batch import Batch, Document, pack_documents, pad_documents

SLOTS = 64
"""Packed rows are filled up to a multiple of this: the matrix libraries make a kernel for every new length."""
Step = dict[str, Any]
"""`micro_batches` and `seed` of this `rank`; and of all `ranks`: `tokens`, `trained`, `rows` (ids of the rows in it),
`step_seed`."""


@dataclass(frozen=True)
class Whole:
    """What micro-batches are parts of: an optimizer step, or a validation set.

    Attributes:
        rows: of all ranks.
        trained: their trained tokens.
        ranks: that share them.
    """

    rows: np.ndarray
    trained: int
    ranks: int = 1

    @cached_property
    def ordered(self) -> np.ndarray:
        """The rows in the order of the file, each once."""
        return np.unique(self.rows)


Make = Callable[[np.ndarray, Whole], Batch]
"""Rows, and what they are a part of, to a micro-batch."""


def make_batch(
    rows: np.ndarray, read: Callable[[int], list[Document]], whole: Whole, packing: bool, pad_id: int
) -> Batch:
    """One micro-batch of these rows: what `litft.data.batch` makes of their documents, and two numbers.

    `rows` says how many there are, `row_denominator` is to a loss that is a mean over rows what `denominator` is to one
    over tokens. Each rank's gradient is averaged over the ranks, so all divide by their share of the whole's count.

    A rank that has no row left still takes part in every forward and backward pass (the others wait for it): it is
    given a row of the whole with nothing to train on.
    """
    documents = [document for row in rows for document in read(int(row))]
    if not documents:
        ids, trained = read(int(whole.rows[0]))[0]
        documents = [(ids[:8], np.zeros_like(trained[:8]))]
    denominator = whole.trained / whole.ranks
    if packing:
        batch = pack_documents(documents, denominator, SLOTS, pad_id)
    else:
        batch = pad_documents(documents, denominator, pad_id)
    if not len(rows):
        batch["tokens"] = 0
    batch["rows"] = len(rows)
    batch["row_denominator"] = torch.tensor(len(whole.rows) / whole.ranks, dtype=torch.float32)
    return batch


class Steps(Dataset):
    """Optimizer steps by index.

    Args:
        layout: index -> `[rank][micro-batch]` rows.
        rank: whose micro-batches are made.
        make: of a micro-batch.
        lengths: tokens of each row.
        trained: trained tokens of each row.
        count: number of steps.
        seed: of the run and of the epoch; a step's own follows from it, the index and the rank.
    """

    def __init__(
        self,
        layout: Callable[[int], list[list[np.ndarray]]],
        rank: int,
        make: Make,
        lengths: np.ndarray,
        trained: np.ndarray,
        count: int,
        seed: tuple[int, ...] = (),
    ) -> None:
        self.layout, self.rank, self.make, self.count, self.seed = layout, rank, make, count, seed
        self.lengths, self.trained = lengths, trained

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Step:
        shares = self.layout(index)
        rows = np.concatenate([pack for share in shares for pack in share])
        trained = int(self.trained[rows].sum())
        whole = Whole(rows, trained, len(shares))
        return {
            "micro_batches": [self.make(pack, whole) for pack in shares[self.rank]],
            "tokens": int(self.lengths[rows].sum()),
            "trained": trained,
            "rows": rows.tolist(),
            "seed": _seed(*self.seed, index, self.rank),
            "step_seed": _seed(*self.seed, index),
            "rank": self.rank,
            "ranks": len(shares),
        }


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


class MicroBatches(Dataset):
    """A rank's micro-batches of a validation set, each the same whatever the others are.

    Args:
        packs: rows of each.
        make: of a micro-batch.
        whole: all of the set.
    """

    def __init__(self, packs: list[np.ndarray], make: Make, whole: Whole) -> None:
        self.packs, self.make, self.whole = packs, make, whole

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Batch:
        return self.make(self.packs[index], self.whole)


def leave_signals_to_parent(worker: int) -> None:
    """Let a worker outlive a signal to the whole process group, such as Ctrl-C or a scheduler's SIGTERM.

    The run still needs its workers for the step it is in. Only the parent's own SIGTERM ends one, as at its exit.

    Args:
        worker: its number.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere Python doesn't tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)


class FromStep(DistributedSampler):
    """Counts from a start to the end of the epoch.

    A `DistributedSampler` by type only: that is what makes Trainer and Fabric leave it alone, since the plan has shared
    the rows out already. Its length is the whole epoch's, as Trainer counts a resumed epoch from its beginning.
    """

    def __init__(self, length: int, start: int = 0) -> None:
        self.length, self.start = length, start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.length))

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Nothing to do: an epoch's order is the plan's."""


class StepLoader(DataLoader):
    """A `DataLoader` over steps whose position is an index, so that a resumed run starts where the last one stopped.

    Args:
        steps: the steps of an epoch.
        start: the first one to hand out.
        workers: processes that make batches.
        pin_memory: for asynchronous copies to a GPU.
    """

    def __init__(self, steps: Dataset, start: int = 0, workers: int = 0, pin_memory: bool = False) -> None:
        length = len(steps)  # type: ignore[arg-type]
        super().__init__(
            steps,
            batch_size=None,
            sampler=FromStep(length, start),
            num_workers=workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # its own, so that making an iterator doesn't move the run's random state
            persistent_workers=False,
            worker_init_fn=leave_signals_to_parent,
        )

    def state_dict(self) -> dict[str, Any]:
        """Empty: the plan and the number of steps done say where to go on."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""
