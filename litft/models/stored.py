"""Tensors that lie in safetensors files, read box by box."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor


class Saved:
    """A tensor that lies in several files.

    Args:
        boxes: file, offsets and sizes of each part.
        name: of the tensor.
    """

    def __init__(self, name: str, boxes: list[tuple[Path, tuple[int, ...], tuple[int, ...]]]) -> None:
        self.name, self.boxes = name, boxes
        ends = [[o + s for o, s in zip(offsets, sizes, strict=True)] for _, offsets, sizes in boxes]
        self.shape = tuple(map(max, zip(*ends, strict=True))) if ends[0] else ()

    def read(self, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A box of it, from those files that hold some of it.

        Raises:
            ValueError: part of it is in no file.
        """
        found: Tensor | None = None
        filled = 0
        for path, begin, length in self.boxes:
            spans = [_common(o, s, b, n) for o, s, b, n in zip(offsets, sizes, begin, length, strict=True)]
            if any(start >= end for start, end in spans):
                continue
            with safe_open(path, framework="pt") as file:
                part = file.get_slice(self.name)
                inner = tuple(slice(start - b, end - b) for (start, end), b in zip(spans, begin, strict=True))
                read = part[inner] if inner else file.get_tensor(self.name)
            found = read.new_empty(tuple(sizes)) if found is None else found
            found[tuple(slice(start - o, end - o) for (start, end), o in zip(spans, offsets, strict=True))] = read
            filled += read.numel()
        if found is None or filled != math.prod(sizes):
            raise ValueError(f"{self.name}: a part of it is missing")
        return found

    def whole(self) -> Tensor:
        """All of it."""
        return self.read((0,) * len(self.shape), self.shape)


def _common(a: int, a_length: int, b: int, b_length: int) -> tuple[int, int]:
    return max(a, b), min(a + a_length, b + b_length)
