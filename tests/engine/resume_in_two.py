"""One of two processes: a straight run, one that a signal to the second process stopped, and the same gone on with."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from runs import start

STEPS: dict[str, Any] = {"steps": 6, "tokens_per_step": 600, "tokens_per_batch": 160, "val_every": 2}
"""Of which each process has several micro-batches."""


def main(out: Path, model: Path, data: Path, tuners: dict[str, dict[str, Any]]) -> None:
    """Runs `TUNER/straight`, `TUNER/stopped` and `TUNER/resumed` below `out`."""
    import torch

    torch.set_num_threads(1)
    rank = int(os.environ["LOCAL_RANK"])
    for name, tuner in tuners.items():
        folder = out / name
        options: dict[str, Any] = {**STEPS, **tuner}
        options["trainer"] = {"devices": 2, "strategy": "ddp"}
        start(folder / "straight", model, data, **options)
        how = "signal within" if rank == 1 else "the other process's business"
        start(folder / "stopped", model, data, stop_at=3, how=how, **options)
        torch.distributed.barrier()
        if rank == 0:
            shutil.copytree(folder / "stopped", folder / "resumed", symlinks=True)
        torch.distributed.barrier()
        start(folder / "resumed", model, data, resume=True, **options)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
