"""Tensors of which each process holds a part: where that lies in the whole, and how a whole one is read into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Part:
    """A box of a tensor.

    Attributes:
        shape: of the whole.
        offsets: where the box begins.
        sizes: of the box.
        first: whether this process is the first of those that hold this very box.
    """

    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    first: bool = True


def stored(module: Any) -> Any:
    """The weight that a module stores, under whatever adapter; an adapter's own `weight` is computed at each call."""
    while "base_layer" in getattr(module, "_modules", {}):
        module = module.base_layer
    return getattr(module, "weight", None)


class Source(Protocol):
    """A whole tensor that is read box by box; a `Tensor` is one, by `box`."""

    @property
    def shape(self) -> Sequence[int]:
        """Of the whole."""

    def read(self, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """A box of it."""


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True)
class Cut:
    """How tensor parallelism cut a parameter before FSDP did.

    Attributes:
        dim: along which; None where each process of the group has all of it.
        rank: of this process in the group.
        size: of the group.
        group: of processes.
        partial: each process has a part of a sum for its gradient.
    """

    dim: int | None
    rank: int
    size: int
    group: Any = None
    partial: bool = False


@contextmanager
def cuts_kept(module: nn.Module) -> Iterator[None]:
    """Inside the context parameters may be replaced; their successors are marked as they were."""
    cuts = {name: parameter.cut for name, parameter in module.named_parameters() if hasattr(parameter, "cut")}
    yield
    for name, parameter in module.named_parameters():
        if name in cuts:
            parameter.cut = cuts[name]  # type: ignore[attr-defined]


def cut_of(parameter: Tensor) -> Cut:
    """How tensor parallelism cut it."""
    return getattr(parameter, "cut", Cut(None, 0, 1))


def part_of(tensor: Tensor) -> Part:
    """Where this process's part of a parameter lies: cut by tensor parallelism, then along its first dimension."""
    shape, sizes = list(tensor.shape), list(local(tensor).shape)
    offsets = [0] * len(shape)
    first = True
    if isinstance(tensor, DTensor):
        mesh = tensor.device_mesh
        coordinate = mesh.get_coordinate()
        assert coordinate is not None
        for placement, rank, size in zip(tensor.placements, coordinate, mesh.shape, strict=True):
            if isinstance(placement, Shard):
                dim = placement.dim
                offsets[dim] = min(shape[dim], rank * -(-shape[dim] // size))
            else:
                first = first and rank == 0
    cut = cut_of(tensor)
    if cut.dim is None:
        first = first and cut.rank == 0
    else:
        offsets[cut.dim] += cut.rank * shape[cut.dim]
        shape[cut.dim] *= cut.size
    return Part(tuple(shape), tuple(offsets), tuple(sizes), first)


def whole(parameter: Tensor) -> Tensor:
    """The whole of a parameter, detached; every process that has a part calls this."""
    tensor = parameter.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    cut = cut_of(parameter)
    if cut.dim is not None:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(cut.size)]
        torch.distributed.all_gather(parts, tensor.contiguous(), group=cut.group)
        tensor = torch.cat(parts, cut.dim)
    return tensor


def box(source: Tensor | Source, part: Part) -> Tensor:
    """The part of a whole tensor."""
    if isinstance(source, Tensor):
        for dim, (offset, size) in enumerate(zip(part.offsets, part.sizes, strict=True)):
            source = source.narrow(dim, offset, size)
        return source
    return source.read(part.offsets, part.sizes)


@torch.no_grad()
def put(parameter: Tensor, source: Tensor | Source) -> None:
    """Copy this process's part of a whole tensor into a parameter."""
    here = local(parameter)
    if here.numel():
        here.copy_(box(source, part_of(parameter)))


def like(parameter: Tensor, source: Tensor | Source) -> Tensor:
    """This process's part of a whole tensor, cut up as a parameter of the same shape is."""
    part = part_of(parameter)
    read = box(source, part) if local(parameter).numel() else None
    here = torch.empty_like(local(parameter), dtype=read.dtype if read is not None else None)
    if read is not None:
        here.copy_(read)
    if not isinstance(parameter, DTensor):
        return here
    whole: dict[str, Any] = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(here, parameter.device_mesh, parameter.placements, run_check=False, **whole)
