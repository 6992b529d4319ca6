"""Tensors that lie in safetensors files, read box by box."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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


def stored_tensors(folder: Path) -> dict[str, Saved]:
    """The tensors in a model folder's files, by name."""
    found: dict[str, Saved] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                shape = tuple(file.get_slice(name).get_shape())
                found[name] = Saved(name, [(path, (0,) * len(shape), shape)])
    return found


def write_tensors(
    file: BinaryIO,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file, one tensor at a time.

    Args:
        file: to write to.
        layout: name to dtype and shape, in the order of the tensors.
        tensors: taken one by one, so that no two have to be there at the same time.
        metadata: of the header.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": TYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors:
        if tensor.numel():
            file.write(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
