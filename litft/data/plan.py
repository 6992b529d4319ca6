"""Which rows make up each optimizer step, and how a step is cut into packs, micro-batches and ranks.

Two stages, kept apart so that another cut is the same training:

1. `step_rows` is a pure function of (lengths, seed, epoch, tokens_per_step); it never sees ranks or micro-batches.
2. `lay_out` cuts one step's rows into micro-batches of at most `tokens_per_batch` tokens, equally many on every rank,
   balanced by attention cost.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LOOKAHEAD = 256  # rows looked through for one that fills a step's last gap
WANTED_TOKENS, MIN_STEPS = 16384, 100  # of a step by default, and of a run where it has the rows for them
COUNTED, SAMPLED = 1000, 200  # steps up to which all packs are counted, and those they are estimated from beyond
ATTENTION_SHARE = 1 / 4096  # cost of attending over a document of n tokens, in units of n dense tokens: n * this


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

    Rows are taken in order; the gap that the next row doesn't fit is filled with the longest of the following
    `LOOKAHEAD` rows that does. A row longer than `tokens_per_step` is a step of its own.

    Args:
        order: row indices in the order of the epoch.
        lengths: tokens of each row (of all rows, indexed by `order`'s values).
        tokens_per_step: budget of one optimizer step over all ranks.

    Returns:
        The row indices of each step; together exactly `order`, reordered.
    """
    order = np.asarray(order)
    size = lengths[order]
    used = np.zeros(len(order), bool)
    steps: list[np.ndarray] = []
    first = 0
    while first < len(order):
        rows: list[int] = []
        room = tokens_per_step
        position = first
        while position < len(order) and (used[position] or size[position] <= room or not rows):
            if not used[position]:
                rows.append(position)
                used[position] = True
                room -= size[position]
            position += 1
        while room > 0:
            window = slice(position, position + LOOKAHEAD)
            fits = np.where(used[window] | (size[window] > room), 0, size[window])
            if not fits.any():
                break
            best = position + int(fits.argmax())
            rows.append(best)
            used[best] = True
            room -= size[best]
        steps.append(order[rows])
        first = position
        while first < len(order) and used[first]:
            first += 1
    return steps


def pack(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Best-fit decreasing bin packing of whole documents.

    Args:
        lengths: tokens of each document; none above `capacity`.
        capacity: tokens a pack may hold.

    Returns:
        Packs as lists of indices into `lengths`; fewer than 11/9 of the optimum + 1 (Johnson, 1974).
    """
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # packs by the room left in them
    rooms: list[int] = []  # the rooms in use, sorted
    packs: list[list[int]] = []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            chosen = by_room[room].pop()
            if not by_room[room]:
                rooms.pop(at)
        else:
            room, chosen = capacity, len(packs)
            packs.append([])
        packs[chosen].append(index)
        left = room - length
        if not by_room[left]:
            insort(rooms, left)
        by_room[left].append(chosen)
    return packs


def cost(lengths: np.ndarray) -> float:
    """Relative time of a micro-batch: its tokens, and for each document the square that attention costs."""
    n = lengths.astype(np.float64)
    return float((n + ATTENTION_SHARE * n * n).sum())


def lay_out(
    rows: np.ndarray, lengths: np.ndarray, tokens_per_batch: int, ranks: int = 1, packing: bool = True
) -> list[list[np.ndarray]]:
    """Cut one optimizer step into micro-batches, equally many on every rank.

    Args:
        rows: the step's rows.
        lengths: tokens of each row (of all rows, indexed by `rows`' values).
        tokens_per_batch: budget of one micro-batch on one rank.
        ranks: number of data-parallel ranks.
        packing: False counts each row at the padded width of its micro-batch.

    Returns:
        `[rank][micro-batch]` arrays of rows; an array may be empty where there are fewer rows than ranks.
    """
    size = lengths[rows]
    packs = pack(size, tokens_per_batch) if packing else _pad_together(size, tokens_per_batch)
    count = -(-len(packs) // ranks) * ranks
    if count > len(packs) or ranks > 1:
        packs = _spread(size, count, tokens_per_batch, packing) or packs + [[] for _ in range(count - len(packs))]
    packs.sort(key=lambda p: -cost(size[p]))
    shares: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for start in range(0, count, ranks):  # heaviest pack of each round to the rank that has least so far
        by_load = sorted(range(ranks), key=lambda r: load[r])
        for rank, chosen in zip(by_load, packs[start : start + ranks], strict=True):
            shares[rank].append(rows[chosen] if chosen else rows[:0])
            load[rank] += cost(size[chosen]) if chosen else 0.0
    return shares


def _pad_together(size: np.ndarray, budget: int) -> list[list[int]]:
    """Rows of similar length share a padded micro-batch: width x rows stays within the budget."""
    batches: list[list[int]] = []
    width = 0
    for index in np.argsort(-size, kind="stable").tolist():
        if not batches or width * (len(batches[-1]) + 1) > budget:
            batches.append([])
            width = int(size[index])
        batches[-1].append(index)
    return batches


def _spread(size: np.ndarray, count: int, budget: int, packing: bool) -> list[list[int]] | None:
    """Longest processing time first into `count` packs; None where that breaks the budget."""
    packs: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    heap = [(0.0, i) for i in range(count)]
    for index in np.argsort(-size, kind="stable").tolist():
        passed = []
        while heap:
            load, chosen = heapq.heappop(heap)
            width = int(size[packs[chosen][0]]) if packs[chosen] else int(size[index])
            after = tokens[chosen] + int(size[index]) if packing else width * (len(packs[chosen]) + 1)
            if after <= budget:
                break
            passed.append((load, chosen))
        else:
            return None
        packs[chosen].append(index)
        tokens[chosen] += int(size[index])
        for entry in [*passed, (load + cost(size[[index]]), chosen)]:
            heapq.heappush(heap, entry)
    return packs


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
    return enough
