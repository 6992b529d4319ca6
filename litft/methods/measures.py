"""Figures that a method measures beside its loss: means over the rows of a step, or of a validation set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Measures:
    """Sums and counts by name, kept on the device: nothing is read from it until somebody asks."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._differences: dict[str, tuple[str, str]] = {}

    def add(self, name: str, values: Tensor, count: Tensor | int | None = None) -> None:
        """Take in a figure of some rows.

        Args:
            name: of the figure; every process adds the same names in the same order, if only of no rows.
            values: what is added up.
            count: the number of rows that is divided by; of `values` by default.
        """
        values = values.detach().float()
        count = values.numel() if count is None else count
        count = count.float() if isinstance(count, Tensor) else values.new_full((), count)
        pair = torch.stack([values.sum(), count])
        self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def subtract(self, name: str, of: str, other: str) -> None:
        """Let a figure be the difference of the means of two others, of which rows may have one each."""
        self._differences[name] = of, other

    def means(self, strategy: Any) -> dict[str, float]:
        """The means over the rows of all processes; NaN of none.

        Args:
            strategy: of the Trainer, which adds up over the processes.
        """
        if not self._sums:
            return {}
        sums = strategy.reduce(torch.stack(list(self._sums.values())), reduce_op="sum")
        found = dict(zip(self._sums, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
        return found | {name: found[of] - found[other] for name, (of, other) in self._differences.items()}
