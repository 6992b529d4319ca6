"""What one arm of a race is told, what it hands back, and the clock that all arms share."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "lightning", "transformers", "peft", "trl", "litgpt", "bitsandbytes")


@dataclass
class Job:
    """The work of one arm.

    Args:
        arm: name of a module in `extensions.benchmark.arms`.
        model: folder of a transformers model with its tokenizer.
        rows: a file of encoded rows, see `read_rows`.
        source: the file they were encoded from.
        tuner: full, lora or qlora (r 16, alpha 32, every linear layer of the backbone).
        steps: optimizer steps.
        rows_per_step: of arms that count rows.
        tokens_per_step: of arms that count tokens.
        lr: constant learning rate.
        device: cpu or cuda.
        setting: what of the arm's grid is used.
        groups: the rows of each step, for the reference.
        lrs: the learning rate of each step, for the reference; empty: `lr`.
        clip: the gradient norm to clip to, for the reference; 0 doesn't clip.
        seed: of everything random.
    """

    arm: str
    model: str
    rows: str
    source: str = ""
    tuner: str = "full"
    steps: int = 20
    rows_per_step: int = 16
    tokens_per_step: int = 4096
    lr: float = 2e-5
    device: str = "cpu"
    setting: dict[str, Any] = field(default_factory=dict)
    groups: list[list[int]] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    clip: float = 1.0
    seed: int = 0


@dataclass
class Result:
    """What an arm measured.

    Attributes:
        seconds: of each optimizer step.
        losses: of each step, a trained token's mean.
        groups: the rows of each step.
        lrs: the learning rate of each step where it isn't the job's.
        clip: what gradients were clipped to.
        tokens: real tokens of each step, and `trained` those in the loss.
        peak_gb: greatest memory of the process, on the GPU where there is one.
        versions: of the libraries.
        notes: anything else, by name.
        error: why there is nothing else.
    """

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    groups: list[list[int]] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    clip: float = 1.0
    tokens: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    peak_gb: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    def rate(self, warm_up: int, what: str = "tokens") -> float:
        """Tokens a second: the median over the steps after the first `warm_up`."""
        counted = getattr(self, what)[warm_up:]
        rates = sorted(n / s for n, s in zip(counted, self.seconds[warm_up:], strict=True))
        middle = len(rates) // 2
        return rates[middle] if len(rates) % 2 else (rates[middle - 1] + rates[middle]) / 2


def read_rows(path: str | Path) -> list[tuple[list[int], list[int]]]:
    """Encoded rows: token ids and labels (-100 where not trained), one JSON object a line."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [(row["input_ids"], row["labels"]) for row in rows]


class Recorder:
    """Times steps and finds out which rows each was made of.

    Args:
        job: what is run.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.result = job, Result()
        self.rows = read_rows(job.rows)
        self.index = {tuple(ids): i for i, (ids, _) in enumerate(self.rows)}
        self._seen: list[tuple[Any, Any, Any]] = []
        self._steps: list[list[tuple[Any, Any, Any]] | list[int]] = []
        self._start = 0.0

    def begin(self) -> None:
        """A step begins."""
        self._synchronize()
        self._seen, self._start = [], time.perf_counter()

    def end(self, loss: float | None = None, group: list[int] | None = None) -> None:
        """The step has ended; its loss, and the rows in it where nobody watches, may be told."""
        self._synchronize()
        self.result.seconds.append(time.perf_counter() - self._start)
        self._steps.append(self._seen if group is None else group)
        if loss is not None:
            self.result.losses.append(loss)

    def add(self, seconds: float, loss: float, group: list[int]) -> None:
        """A step that somebody else timed."""
        self.result.seconds.append(seconds)
        self.result.losses.append(loss)
        self._steps.append(group)

    def watch(self, model: Any) -> None:
        """Look at what reaches a transformers model: padded rows, or rows packed with restarting positions."""

        def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._seen.append((kwargs["input_ids"], kwargs.get("attention_mask"), kwargs.get("position_ids")))

        model.register_forward_pre_hook(look, with_kwargs=True)

    def _rows(self, seen: list[Any]) -> list[int]:
        """The rows of a step, from what reached the model."""
        if not seen or isinstance(seen[0], int):
            return seen
        found = []
        for ids, mask, positions in seen:
            if mask is not None and mask.dim() == 2:
                for row, real in zip(ids.tolist(), mask.sum(1).tolist(), strict=True):
                    found.append(self.index[tuple(row[:real])])
            else:
                starts = [i for i, position in enumerate(positions[0].tolist()) if position == 0] + [ids.shape[1]]
                row = ids[0].tolist()
                found += [self.index[tuple(row[a:b])] for a, b in pairwise(starts)]
        return found

    def _synchronize(self) -> None:
        if self.job.device == "cuda":
            import torch

            torch.cuda.synchronize()

    def finish(self, **notes: Any) -> Result:
        """The result, its memory and versions filled in."""
        found = self.result
        found.groups = [self._rows(step) for step in self._steps]
        for group in found.groups:
            found.tokens.append(sum(len(self.rows[i][0]) for i in group))
            found.trained.append(sum(label != -100 for i in group for label in self.rows[i][1][1:]))
        found.peak_gb = _peak_gb()
        if self.job.device == "cuda":
            import torch

            found.peak_gb = torch.cuda.max_memory_allocated() / 1e9
        for library in LIBRARIES:
            try:
                found.versions[library] = metadata.version(library)
            except metadata.PackageNotFoundError:
                continue
        found.notes |= notes
        return found


def _peak_gb() -> float:
    """Peak resident size of this process (`ru_maxrss` begins at that of the one that started it)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    line = next((line for line in lines if line.startswith("VmHWM")), None)
    if line:
        return int(line.split()[1]) * 1024 / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def run_arm(job: Job, python: str = sys.executable, timeout: float = 7200) -> Result:
    """Run an arm in a process of its own.

    Args:
        job: the work.
        python: the interpreter, for peers that live in an environment of their own.
        timeout: in seconds.
    """
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "extensions.benchmark.job", json.dumps(asdict(job))]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Result(error=f"took more than {timeout:.0f} s")
    line = next((line for line in reversed(done.stdout.splitlines()) if line.startswith("RESULT ")), None)
    if line is None:
        last = [text for text in (done.stderr or done.stdout).splitlines() if text.strip()][-1:]
        return Result(error=(last or ["no output"])[0][:300])
    return Result(**json.loads(line.removeprefix("RESULT ")))


def main(argv: list[str]) -> None:
    """The process of an arm: read a job, run it, print the result as the last line."""
    import importlib

    job = Job(**json.loads(argv[0]))
    run: Callable[[Job, Recorder], Result] = importlib.import_module(f"extensions.benchmark.arms.{job.arm}").run
    print("RESULT " + json.dumps(asdict(run(job, Recorder(job)))))


if __name__ == "__main__":
    main(sys.argv[1:])
