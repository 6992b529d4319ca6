"""Which rows make up each optimizer step; how a step is cut up is `litft.data.layout`'s.

Two stages, kept apart so that another cut is the same training:

1. `step_rows` is a pure function of (lengths, seed, epoch, tokens_per_step); it never sees ranks or micro-batches.
2. `lay_out` cuts one step's rows into micro-batches of at most `tokens_per_batch` tokens, equally many on every rank,
   balanced by attention cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from litft.data.layout import lay_out

SLACK = 1024  # part of a step's budget that stays free
LOOKAHEAD = 256  # rows looked through for one that fills a step's last gap
WANTED_TOKENS, MIN_STEPS = 16384, 100  # of a step by default, and of a run where it has the rows for them
MICRO_BATCH = 4096  # tokens of a micro-batch by default; a default step is several whole ones, or less than one
COUNTED, SAMPLED = 1000, 200  # steps up to which all packs are counted, and those they are estimated from beyond


def epoch_order(file_of_row: np.ndarray, weights: Sequence[float], seed: int, epoch: int) -> np.ndarray:
    """The rows of one epoch in a seeded order; a file's weight says how many times the epoch uses its rows.

    A weight of 2.5 uses every row of the file twice and a seeded half of them once more.

    Args:
        file_of_row: index into `weights` of each row's file, [rows].
        weights: one weight a file.
        seed: the run's seed.
        epoch: 0-based epoch.

    Returns:
        Row indices, int64.
    """
    rng = np.random.default_rng((seed, epoch))
    parts = []
    for file, weight in enumerate(weights):
        rows = np.flatnonzero(file_of_row == file)
        whole = int(weight)
        parts += [rows] * whole
        extra = round((weight - whole) * len(rows))
        if extra:
            parts.append(rng.permutation(rows)[:extra])
    order = np.concatenate(parts) if parts else np.empty(0, np.int64)
    return rng.permutation(order)


def step_rows(order: np.ndarray, lengths: np.ndarray, tokens_per_step: int) -> list[np.ndarray]:
    """Cut an epoch's order into optimizer steps of at most `tokens_per_step` tokens.

    Rows are taken in order; the last of the budget, room for two or so, goes to those one or two of the following
    `LOOKAHEAD` rows that fill it best. A thousandth of the budget stays free, without which packs of a step would have
    to be filled to the last token. A row longer than that is a step of its own.

    Args:
        order: row indices in the order of the epoch.
        lengths: tokens of each row (of all rows, indexed by `order`'s values).
        tokens_per_step: budget of one optimizer step over all ranks.

    Returns:
        The row indices of each step; together exactly `order`, reordered.
    """
    order = np.asarray(order)
    size = lengths[order]
    budget = tokens_per_step - tokens_per_step // SLACK
    used = np.zeros(len(order), bool)
    steps: list[np.ndarray] = []
    first = 0
    while first < len(order):
        rows: list[int] = []
        room = budget
        position = first
        kept = min(budget // 2, int(2 * size[first : first + LOOKAHEAD].mean()))
        while position < len(order) and (used[position] or size[position] <= room - kept or not rows):
            if not used[position]:
                rows.append(position)
                used[position] = True
                room -= size[position]
            position += 1
        window = np.arange(position, min(position + LOOKAHEAD, len(order)))
        while chosen := _best_fill(size[window], used[window], int(room)):
            rows += [int(window[i]) for i in chosen]
            used[window[chosen]] = True
            room -= size[window[chosen]].sum()
        steps.append(order[rows])
        first = position
        while first < len(order) and used[first]:
            first += 1
    return steps


def _best_fill(size: np.ndarray, used: np.ndarray, room: int) -> list[int]:
    """Indices of the one or two unused rows with the greatest sum that there is room for; empty where none fits."""
    free = np.flatnonzero(~used & (size <= room))
    if not len(free):
        return []
    free = free[np.argsort(size[free], kind="stable")]
    sizes = size[free]
    partner = np.searchsorted(sizes, room - sizes, side="right") - 1  # the largest that fits beside each
    partner = np.minimum(partner, np.arange(len(free)) - 1)  # a smaller one than itself
    sums = sizes + np.where(partner >= 0, sizes[partner], 0)
    best = int(sums.argmax())
    return [int(free[best]), *([int(free[partner[best]])] if partner[best] >= 0 else [])]


@dataclass(frozen=True)
class MicroBatch:
    """What of a micro-batch decides how much memory it takes.

    Attributes:
        slots: tokens, filling included.
        targets: of them, in the loss.
        several: whether an optimizer step has more than one.
    """

    slots: int
    targets: int
    several: bool


@dataclass
class Plan:
    """Every optimizer step of a run, known ahead.

    Args:
        lengths: tokens of each row, [rows].
        trained: trained tokens of each row, [rows].
        file_of_row: index of each row's file in `weights`, [rows].
        weights: how many times an epoch uses each file's rows.
        seed: the run's seed.
        tokens_per_step: budget of one optimizer step over all ranks.
        tokens_per_batch: budget of one micro-batch on one rank.
        ranks: number of data-parallel ranks.
        packing: whole documents packed into flat rows; False pads rows instead.
    """

    lengths: np.ndarray
    trained: np.ndarray
    file_of_row: np.ndarray
    weights: Sequence[float]
    seed: int
    tokens_per_step: int
    tokens_per_batch: int
    ranks: int = 1
    packing: bool = True

    def __post_init__(self) -> None:
        self._epochs: dict[int, list[np.ndarray]] = {}
        self._first_steps = [0]
        self._longest_steps: dict[int, int] = {}

    def steps(self, epoch: int) -> list[np.ndarray]:
        """The rows of each optimizer step of an epoch (0-based)."""
        if epoch not in self._epochs:
            order = epoch_order(self.file_of_row, self.weights, self.seed, epoch)
            while len(self._epochs) >= 4:  # a long run doesn't keep all of its epochs
                self._epochs.pop(next(iter(self._epochs)))
            steps = self._epochs[epoch] = step_rows(order, self.lengths, self.tokens_per_step)
            self._longest_steps[epoch] = _longest(steps, self.lengths) if steps else 0
        return self._epochs[epoch]

    def longest_step(self, epoch: int) -> int:
        """Tokens of the longest optimizer step of an epoch."""
        if epoch not in self._longest_steps:
            self.steps(epoch)
        return self._longest_steps[epoch]

    def largest_micro_batch(self) -> MicroBatch:
        """The size of the first epoch's largest, as packs come out: a step's rows in parts of nearly the same sum."""
        step = self.longest_step(0)
        count = max(1, -(-step // (self.tokens_per_batch * self.ranks)))
        slots = min(self.tokens_per_batch, -(-step // (count * self.ranks)) * 21 // 20)
        share = int(self.trained.sum()) / max(1, int(self.lengths.sum()))
        return MicroBatch(slots, round(slots * share), count > 1)

    def first_step(self, epoch: int) -> int:
        """The number of optimizer steps before an epoch."""
        while len(self._first_steps) <= epoch:
            done = len(self._first_steps) - 1
            self._first_steps.append(self._first_steps[-1] + len(self.steps(done)))
        return self._first_steps[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch and the index within it of an optimizer step (both 0-based)."""
        epoch = 0
        while self.first_step(epoch + 1) <= step:
            epoch += 1
        return epoch, step - self.first_step(epoch)

    def total_steps(self, max_epochs: int | None, max_steps: int | None) -> int:
        """The number of optimizer steps of a run; `max_steps` goes on past one epoch, None or -1 is no limit."""
        epochs = None if max_epochs in (None, -1) else max_epochs
        steps = None if max_steps in (None, -1) else max_steps
        if epochs is None and steps is None:
            epochs = 1
        if not self.steps(0):  # every epoch uses equally many rows, here none
            return 0
        if epochs is None:
            return steps or 0
        if steps is None:
            return self.first_step(epochs)
        epoch = 0
        while epoch < epochs and self.first_step(epoch) < steps:
            epoch += 1
        return min(steps, self.first_step(epoch))

    def layout(self, epoch: int, index: int) -> list[list[np.ndarray]]:
        """`[rank][micro-batch]` rows of one optimizer step of an epoch."""
        return lay_out(self.steps(epoch)[index], self.lengths, self.tokens_per_batch, self.ranks, self.packing)

    def trained_in(self, rows: np.ndarray) -> int:
        """Trained tokens of these rows."""
        return int(self.trained[rows].sum())


def run_counts(plan: Plan, total_steps: int) -> dict[str, int | bool]:
    """What a run of so many steps amounts to.

    Returns:
        `tokens` and `trained_tokens` that it reads; `longest_step` in tokens; `packs`, the micro-batches of all ranks,
        laid out and counted up to `COUNTED` steps (`packs_exact`), beyond that estimated from some steps of one epoch.
    """
    last, index = plan.locate(total_steps - 1)
    final = plan.steps(last)[: index + 1]
    orders = [epoch_order(plan.file_of_row, plan.weights, plan.seed, epoch) for epoch in range(last)]
    rows = [*orders, np.concatenate(final)]
    exact = total_steps <= COUNTED
    if exact:
        some = [(e, i) for e in range(last) for i in range(len(plan.steps(e)))] + [(last, i) for i in range(index + 1)]
    else:
        some = [(0, int(i)) for i in np.unique(np.linspace(0, len(plan.steps(0)) - 1, SAMPLED).astype(int))]
    packs = sum(len(share) for e, i in some for share in plan.layout(e, i))
    return {
        "tokens": int(sum(plan.lengths[used].sum() for used in rows)),
        "trained_tokens": int(sum(plan.trained[used].sum() for used in rows)),
        "longest_step": max([plan.longest_step(epoch) for epoch in range(last)] + [_longest(final, plan.lengths)]),
        "packs": packs if exact else round(packs / len(some) * total_steps),
        "packs_exact": exact,
    }


def _longest(steps: Sequence[np.ndarray], lengths: np.ndarray) -> int:
    """Tokens of the longest step."""
    starts = np.cumsum([0, *map(len, steps[:-1])])
    return int(np.add.reduceat(lengths[np.concatenate(steps)], starts).max())


def default_tokens_per_step(order: np.ndarray, lengths: np.ndarray, max_epochs: int | None = None) -> int:
    """The default budget of a step: `WANTED_TOKENS`, less where few data would make a run of few steps.

    The budget shrinks until a run of so many epochs has `MIN_STEPS` steps, or as many as it has rows. `max_steps` does
    not change it: such a run makes the first steps of one that makes more.

    Args:
        order: row indices of the first epoch.
        lengths: tokens of each row (of all rows, indexed by `order`'s values).
        max_epochs: epochs of the run; one where None or -1.
    """
    epochs = 1 if max_epochs in (None, -1) else max(1, max_epochs or 1)
    an_epoch = min(len(order), -(-MIN_STEPS // epochs))  # steps that it has to have
    if not an_epoch:
        return WANTED_TOKENS
    size = lengths[order]
    if int(size.sum()) > an_epoch * max(WANTED_TOKENS, int(size.max())):
        return WANTED_TOKENS
    enough, most = 1, min(WANTED_TOKENS, max(1, int(size.sum()) // an_epoch))
    budget = most
    while enough < most:  # rows are not split, so a step may hold less than its budget and another one more
        if len(step_rows(order, lengths, budget)) >= an_epoch:
            enough = budget
        else:
            most = budget - 1
        budget = (enough + most + 1) // 2
    return enough if enough < MICRO_BATCH else enough // MICRO_BATCH * MICRO_BATCH
