"""What a checkpoint may hold: tensors and plain data, which load without running anybody's code."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

ATOMS = (int, float, bool, str, type(None), torch.dtype, torch.Size)


class NotPlain(TypeError):
    """A value that a checkpoint can't hold."""


def plain(value: Any) -> Any:
    """The value with numpy's numbers as Python's, and tuples with names as tuples.

    Raises:
        NotPlain: there is something else in it, which no checkpoint could give back without unpickling code.
    """
    if type(value) in ATOMS or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {plain(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return (tuple if isinstance(value, tuple) else list)(plain(inner) for inner in value)
    raise NotPlain(f"{type(value).__module__}.{type(value).__qualname__}")
