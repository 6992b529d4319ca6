"""How long saving holds training up, against one plain copy of the same state to the host's memory.

python -m extensions.benchmark.saving --data F [--tuner full,lora] [--saves N]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything

from litft import SFT, ChatData, Full, LoRA
from litft.engine.background import size_of
from litft.engine.checkpoint_files import newest
from litft.engine.checkpoints import Checkpoints
from litft.engine.run import run
from litft.engine.samples import Samples


class Timed(Checkpoints):
    """Times each save, and right before it the copying of the same tensors, one after the other."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.pauses: list[float] = []
        self.copies: list[float] = []
        self.waits: list[float] = []

    def save(self, trainer: Trainer, now: bool = False, alone: bool = False) -> None:
        """Time it, where training goes on after it."""
        began = time.perf_counter()
        self._say_failure(trainer)  # waits for the one before
        self.waits.append(time.perf_counter() - began)
        if not now:
            states = [s for o in trainer.optimizers for s in o.state.values()]
            moments = [t for s in states for t in s.values() if isinstance(t, torch.Tensor)]
            tensors = [p.detach() for p in trainer.lightning_module.trainable_parameters()] + moments
            began = time.perf_counter()
            copy = [t.to("cpu", copy=True) for t in tensors]
            self.copies.append(time.perf_counter() - began)
            self.bytes = size_of(copy)
            del copy
        began = time.perf_counter()
        super().save(trainer, now, alone)
        if not now:
            self.pauses.append(time.perf_counter() - began)


class Pace(Callback):
    """The time of each step, saves left out."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin."""
        self._began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """End."""
        self.steps.append(time.perf_counter() - self._began)


def measure(tuner: str, data: str, saves: int) -> str:
    """One run with a save every third step."""
    seed_everything(0, verbose=False)
    checkpoints, pace = Timed(every_steps=3, every_minutes=None), Pace()
    trainer = Trainer(
        max_steps=3 * saves + 2,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        precision="bf16-mixed",
        callbacks=[checkpoints, Samples(count=0), pace],
    )
    with tempfile.TemporaryDirectory() as folder:
        chats = ChatData(data, val_fraction=0.0, tokens_per_step=2048)
        tuners: dict[str, Any] = {"full": Full, "lora": LoRA}
        run(trainer, SFT(tuner=tuners[tuner](), compile=False), chats, Path(folder), val_every_n_steps=0)
        file = newest(Path(folder) / "checkpoints")
        size = file.stat().st_size if file else 0
    ratios = [pause / copy for pause, copy in zip(checkpoints.pauses, checkpoints.copies, strict=True)]
    beside = [s for i, s in enumerate(pace.steps[3:]) if i % 3 == 0]
    alone = [s for i, s in enumerate(pace.steps[3:]) if i % 3 == 2]
    middle = statistics.median
    return (
        f"{tuner}: {checkpoints.bytes / 1e6:.0f} MB of tensors, {size / 1e6:.0f} MB on disk, {len(ratios)} saves\n"
        f"  pause {1e3 * middle(checkpoints.pauses):.0f} ms, one copy {1e3 * middle(checkpoints.copies):.0f} ms, "
        f"pause over copy {middle(ratios):.2f} (worst {max(ratios):.2f})\n"
        f"  a step beside the writing {middle(beside):.2f} s, without it {middle(alone):.2f} s; "
        f"waiting for the save before: {1e3 * max(checkpoints.waits):.0f} ms at most"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tuner", default="full,lora")
    parser.add_argument("--saves", type=int, default=8)
    options = parser.parse_args()
    print(torch.__version__, torch.get_num_threads(), "threads,", "cuda" if torch.cuda.is_available() else "cpu")
    for name in options.tuner.split(","):
        print(measure(name, options.data, options.saves), flush=True)
