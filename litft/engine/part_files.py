"""Checkpoints of many processes: a safetensors file of each, with the place of every tensor's part in the whole.

The places stand in the file's header as torch.distributed.checkpoint's `HuggingFaceStorageReader` reads them. There is
no pickle among them, and any number of processes can read what any other number has written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open
from torch import Tensor

from litft.models.parts import Part, local, part_of
from litft.models.stored import Saved, write_tensors

PATTERN = "part-*.safetensors"
PLACES = "DCP_SHARDING_INFO"


def name_of(rank: int, world: int) -> str:
    """The file of a process."""
    return f"part-{rank:05d}-of-{world:05d}.safetensors"


def files_in(folder: Path) -> list[Path]:
    """The parts' files of a checkpoint."""
    return sorted(folder.glob(PATTERN))


def complete(folder: Path) -> bool:
    """Whether the file of each process is there, or nobody has written any."""
    found = files_in(folder)
    return not found or [path.name for path in found] == [name_of(rank, len(found)) for rank in range(len(found))]


def write(file: BinaryIO, tensors: Mapping[str, tuple[Tensor, Part]]) -> None:
    """Write a process's parts.

    Args:
        file: to write to.
        tensors: name to a tensor and its place in the whole.
    """
    places = {name: {"saved_offsets": list(part.offsets)} for name, (_, part) in tensors.items()}
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, (tensor, _) in tensors.items()}
    write_tensors(file, layout, (tensor for tensor, _ in tensors.values()), {PLACES: json.dumps(places)})


def take_apart(
    checkpoint: dict[str, Any], trained: Sequence[tuple[str, Tensor]], optimizers: Sequence[Any]
) -> dict[str, tuple[Tensor, Part]]:
    """Take out of a Trainer's checkpoint what this process has a part of.

    Args:
        checkpoint: changed in place; what is left in it is the same in every process.
        trained: name and parameter of each weight that learns.
        optimizers: whose states are in it.

    Returns:
        Name to tensor and place, of what this process is the first to hold.
    """
    found: dict[str, tuple[Tensor, Part]] = {}

    def take(key: str, tensor: Tensor, parameter: Tensor) -> None:
        part = part_of(parameter)
        if part.first and 0 not in part.sizes:
            found[key] = local(tensor), part

    for name, parameter in trained:
        take(f"model/{name}", parameter.detach(), parameter)
    checkpoint["state_dict"] = {}
    names = {id(parameter): name for name, parameter in trained}
    checkpoint["parts"] = []
    for optimizer, saved in zip(optimizers, checkpoint["optimizer_states"], strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        checkpoint["parts"].append([names[id(p)] for p in parameters])
        for index, state in saved["state"].items():
            name = names[id(parameters[index])]
            saved["state"][index] = rest = dict(state)
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == parameters[index].shape and value.ndim:
                    take(f"optimizer/{key}/{name}", rest.pop(key), parameters[index])
    return found


def put_back(checkpoint: dict[str, Any], folder: Path, whole: bool) -> None:
    """Put into a checkpoint what lies in the parts' files beside it.

    Args:
        checkpoint: as `take_apart` has left it; changed in place.
        folder: of the files.
        whole: as tensors, else as `Saved`.
    """
    orders = checkpoint.pop("parts")
    places = [{name: index for index, name in enumerate(order)} for order in orders]
    for key, saved in read(folder).items():
        value = saved.whole() if whole else saved
        kind, _, name = key.partition("/")
        if kind == "model":
            checkpoint["state_dict"][name] = value
            continue
        field, _, name = name.partition("/")
        for state, place in zip(checkpoint["optimizer_states"], places, strict=True):
            if name in place:
                state["state"][place[name]][field] = value


def read(folder: Path) -> dict[str, Saved]:
    """The tensors of a checkpoint that lie in parts' files, by name; nothing of them is read yet."""
    boxes: dict[str, list[tuple[Path, tuple[int, ...], tuple[int, ...]]]] = {}
    for path in files_in(folder):
        with safe_open(path, framework="pt") as file:
            places = json.loads((file.metadata() or {}).get(PLACES, "{}"))
            for name in file.keys():  # noqa: SIM118 - not a mapping
                shape = tuple(file.get_slice(name).get_shape())
                offsets = tuple(places.get(name, {}).get("saved_offsets", [0] * len(shape)))
                boxes.setdefault(name, []).append((path, offsets, shape))
    return {name: Saved(name, found) for name, found in boxes.items()}
