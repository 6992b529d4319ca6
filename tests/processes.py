"""One of several processes of a run: `python processes.py JOBS OUT`, started as often as need be by `run_in`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TIMEOUT = 300  # seconds; processes that wait for each other for ever are a failure, not a hang


def run_in(processes: int, jobs: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Run `training.train` for every job in several gloo processes.

    Args:
        processes: how many.
        jobs: name to arguments of `train`, as JSON can hold them; `tuner` is a name and its arguments, `fsdp` arguments
            of that strategy, `poison` the step at which the last rank's loss is infinite.
        folder: where results are written.

    Returns:
        For every job, the trace of each rank.
    """
    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    started = []
    with tempfile.TemporaryFile("w+") as output:
        for rank in range(processes):
            command = [sys.executable, __file__, str(folder / "jobs.json"), str(folder), str(processes)]
            env = dict(environment, LOCAL_RANK=str(rank))
            started.append(subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(TIMEOUT) for process in started]
        except subprocess.TimeoutExpired:
            codes = [-1]
        finally:
            for process in started:
                process.kill()
        output.seek(0)
        assert codes == [0] * processes, output.read()[-4000:]
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(processes)]
    return {name: {f"rank{i}": r[name] for i, r in enumerate(ranks)} | ranks[0][name] for name in jobs}


def poison(step: int) -> Any:
    """A callback that makes rank 1's part of one optimizer step infinite."""
    from lightning import Callback

    class Poison(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == step and trainer.global_rank == trainer.world_size - 1:
                batch["micro_batches"][0]["denominator"] = batch["micro_batches"][0]["denominator"] * 0

    return Poison()


def _main(jobs: Path, out: Path, processes: int) -> None:
    import torch
    from training import train

    import litft

    torch.set_num_threads(1)
    traces = {}
    for name, job in json.loads(jobs.read_text()).items():
        if tuner := job.pop("tuner", None):
            job["tuner"] = getattr(litft, tuner[0])(**tuner[1])
        strategy: Any = litft.FSDP(**job.pop("fsdp")) if "fsdp" in job else "ddp"
        job["trainer"] = {"devices": processes, "strategy": strategy} | job.get("trainer", {})
        job["callbacks"] = [poison(job.pop("poison"))] if "poison" in job else []
        traces[name] = train(**job).state()
    torch.save(traces, out / f"rank{os.environ['LOCAL_RANK']}.pt")


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
