"""How the rows of one optimizer step are cut into packs, micro-batches and ranks."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort

import numpy as np

ATTENTION_SHARE = 1 / 4096  # cost of attending over a document of n tokens, in units of n dense tokens: n * this


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


def balance(sizes: np.ndarray, count: int) -> list[list[int]]:
    """Parts of as nearly the same sum as can be.

    The largest differencing method (Karmarkar and Karp, 1982), for several parts: the two partial answers that differ
    most within themselves are joined, the largest part of one with the smallest of the other.

    Args:
        sizes: numbers to share out, at least one.
        count: of the parts.

    Returns:
        The parts as lists of indices into `sizes`; empty ones where there are fewer numbers than parts.
    """
    heap: list[tuple[int, int, np.ndarray, list[list[int]]]] = []
    for index, size in enumerate(sizes.tolist()):
        sums = np.zeros(count, np.int64)
        sums[-1] = size
        parts: list[list[int]] = [[] for _ in range(count)]
        parts[-1].append(index)
        heap.append((-size, index, sums, parts))
    heapq.heapify(heap)
    while len(heap) > 1:
        _, tie, a, mine = heapq.heappop(heap)
        _, _, b, others = heapq.heappop(heap)
        sums = a + b[::-1]
        joined = [x + y for x, y in zip(mine, reversed(others), strict=True)]
        ascending = np.argsort(sums, kind="stable")
        sums = sums[ascending]
        heapq.heappush(heap, (int(sums[0] - sums[-1]), tie, sums, [joined[i] for i in ascending]))
    return heap[0][3]


def squeeze(sizes: np.ndarray, parts: list[list[int]], limit: int) -> bool:
    """Move and swap numbers between parts, in place, until no sum is above a limit; whether that has come about."""
    sums = np.array([int(sizes[part].sum()) for part in parts])
    while sums.max() > limit:
        most = int(sums.argmax())
        best = (0, 0, 0, 0)  # by how much the larger of two sums falls, the other part, and what changes places
        for other in np.flatnonzero(sums < limit).tolist():
            moved = sizes[parts[most]][:, None] - np.append(sizes[parts[other]], 0)[None]  # for nothing, last
            fallen = np.minimum(moved, sums[most] - sums[other] - moved)
            at = int(fallen.argmax())
            if fallen.flat[at] > best[0]:
                best = (int(fallen.flat[at]), other, *divmod(at, len(parts[other]) + 1))
        if not best[0]:
            return False
        _, other, i, j = best
        given, taken = parts[most].pop(i), parts[other][j : j + 1]
        parts[other][j : j + 1] = [given]
        parts[most] += taken
        change = int(sizes[given] - sizes[taken].sum())
        sums[most] -= change
        sums[other] += change
    return True


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
    packs = _even(size, tokens_per_batch, ranks) if packing else _padded(size, tokens_per_batch, ranks)
    count = len(packs)
    packs.sort(key=lambda p: -cost(size[p]))
    shares: list[list[np.ndarray]] = [[] for _ in range(ranks)]
    load = [0.0] * ranks
    for start in range(0, count, ranks):  # heaviest pack of each round to the rank that has least so far
        by_load = sorted(range(ranks), key=lambda r: load[r])
        for rank, chosen in zip(by_load, packs[start : start + ranks], strict=True):
            shares[rank].append(rows[chosen] if chosen else rows[:0])
            load[rank] += cost(size[chosen]) if chosen else 0.0
    return shares


def _even(size: np.ndarray, budget: int, ranks: int) -> list[list[int]]:
    """Packs of nearly the same number of tokens, as few as can be, a multiple of the ranks."""
    fewest = -(-max(1, -(-int(size.sum()) // budget)) // ranks) * ranks
    loose = pack(size, budget)
    for count in range(fewest, len(loose) + 1, ranks):
        if ranks > 1 and (by_cost := _spread(size, count, budget, packing=True)):
            return by_cost
        packs = balance(size, count)
        if len(size) >= count and squeeze(size, packs, budget):
            return packs
    count = max(fewest, -(-len(loose) // ranks) * ranks)
    return _spread(size, count, budget, packing=True) or loose + [[] for _ in range(count - len(loose))]


def _padded(size: np.ndarray, budget: int, ranks: int) -> list[list[int]]:
    """Padded micro-batches, a multiple of the ranks."""
    packs = _pad_together(size, budget)
    count = -(-len(packs) // ranks) * ranks
    if count > len(packs) or ranks > 1:
        packs = _spread(size, count, budget, packing=False) or packs + [[] for _ in range(count - len(packs))]
    return packs


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
