"""Host memory when a model is loaded and written by several processes, and what each of them holds.

    python -m extensions.benchmark.loading --model FOLDER --tuner full --ranks 1 2 4

Processes load the model as `litft finetune --trainer.strategy fsdp` does, on the CPU with gloo. While they do, the
memory that they take beyond what they had before (proportional set size, in which a page that two processes share
counts half in each) is summed over them every few milliseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

GB = 1e9


def measure(
    model: str, tuner: str, ranks: int, precision: str = "bf16-mixed", first_pass: bool = True
) -> dict[str, float]:
    """Load, and write `final/`, in several processes.

    Args:
        model: a folder or an alias.
        tuner: full, lora or qlora.
        ranks: number of processes.
        precision: Lightning's name.
        first_pass: run the model once, as `litft finetune` does to find out about its head: each process then gathers
            what lies outside of the layers, and two layers.

    Returns:
        `copy`: bytes of the whole model as it is loaded; `load`: the peak over all processes above what they had
        before; `held`: the most that a process holds of the weights; `seconds`; `write`: the most that a process takes
        while the result is written, above what it had before; `largest`: of the files written.
    """
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
        common["OMP_NUM_THREADS"] = "1"
        line = [sys.executable, "-m", "extensions.benchmark.loading", "--rank_of", folder, "--model", model]
        line += ["--tuner", tuner, "--precision", precision, "--ranks", str(ranks)]
        line += ["--first_pass"] * first_pass
        started = [subprocess.Popen(line, env={**common, "RANK": str(rank)}) for rank in range(ranks)]
        try:
            _wait(folder, "ready", ranks, started)
            before = sum(_proportional(process.pid) for process in started)
            (Path(folder) / "go").touch()
            peak = 0.0
            while len(list(Path(folder).glob("loaded-*"))) < ranks:
                peak = max(peak, sum(_proportional(process.pid) for process in started))
                if any(process.poll() for process in started):
                    raise RuntimeError("a process failed")
                time.sleep(0.005)
            codes = [process.wait(600) for process in started]
        finally:
            for process in started:
                process.kill()
        if any(codes):
            raise RuntimeError("a process failed")
        said = [Path(folder) / f"found-{rank}" for rank in range(ranks)]
        found: list[dict[str, float]] = [json.loads(path.read_text()) for path in said]
        most = {key: max(one[key] for one in found) for key in found[0]}
        return {"load": peak - before, **most}


def _wait(folder: str, what: str, count: int, started: list[Any]) -> None:
    while len(list(Path(folder).glob(f"{what}-*"))) < count:
        if any(process.poll() for process in started):
            raise RuntimeError("a process failed")
        time.sleep(0.02)


def _proportional(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (OSError, ProcessLookupError):
        return 0.0
    return next((float(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:")), 0.0)


def _peak(reset: bool = False) -> float:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return next(float(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def _rank_of(folder: Path, args: argparse.Namespace) -> None:
    import torch
    from torch import distributed

    import litft
    from litft.models.mesh import Parallel, Sizes
    from litft.models.parts import local

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    tuner = {"full": litft.Full, "lora": litft.LoRA, "qlora": litft.QLoRA}[args.tuner]()
    method = litft.SFT(args.model, tuner, fast_loss=args.first_pass, fast_lora=args.first_pass)
    method.tokenizer, method.config, method.cannot_pack  # noqa: B018 - read before anything is counted
    parallel = Parallel.make(Sizes(distributed.get_world_size()), torch.device("cpu"))
    distributed.barrier()
    (folder / f"ready-{rank}").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    began = time.perf_counter()
    method.build(args.precision, "cpu", parallel)
    seconds = time.perf_counter() - began
    (folder / f"loaded-{rank}").touch()
    tensors = list(method.net.parameters())
    distributed.barrier()
    before = _peak(reset=True)
    method.save(folder / "final")
    written = _peak() - before
    distributed.barrier()
    files = [path.stat().st_size for path in (folder / "final").glob("*.safetensors")]
    found = {
        "copy": sum(p.numel() * p.element_size() for p in tensors),
        "held": sum(local(p).numel() * p.element_size() for p in tensors),
        "seconds": seconds,
        "write": written,
        "largest": max(files),
    }
    (folder / f"found-{rank}").write_text(json.dumps(found))
    distributed.destroy_process_group()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tuner", default="full", choices=["full", "lora", "qlora"])
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--first_pass", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rank_of", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        _rank_of(args.rank_of, args)
        return
    print("| ranks | model | host, loaded | and run once | held a rank | loading | writing, a rank | largest file |")
    print("|---|---|---|---|---|---|---|---|")
    for ranks in args.ranks:
        m = measure(args.model, args.tuner, ranks, args.precision, first_pass=False)
        run = measure(args.model, args.tuner, ranks, args.precision)["load"]
        print(
            f"| {ranks} | {m['copy'] / GB:.2f} GB | {m['load'] / GB:.2f} GB ({m['load'] / m['copy']:.2f} copies)"
            f" | {run / GB:.2f} GB | {m['held'] / GB:.2f} GB | {m['seconds']:.1f} s"
            f" | {m['write'] / GB:.2f} GB | {m['largest'] / GB:.2f} GB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
