"""Random numbers of an optimizer step: a function of the run's seed, the step and the rank, of nothing before them."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_step(seed: int) -> None:
    """Set every random state, of Python, numpy, torch and its devices, for one optimizer step.

    So a step's dropout depends on no other step. A run that goes on from a checkpoint, or with a state that an error
    left in mid-step, draws the same numbers as one that was never interrupted, on however many ranks; none of them has
    to hand its random state to a checkpoint.

    Args:
        seed: the step's, `step["seed"]`.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
