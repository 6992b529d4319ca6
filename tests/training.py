"""Training runs of tiny models, and what tests ask of them: the losses of every step and the weights at the end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything
from torch import Tensor


@dataclass
class Trace:
    """What a run did, a list entry an optimizer step, over all ranks."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    micro_batches: list[int] = field(default_factory=list)
    val_losses: list[dict[str, float]] = field(default_factory=list)
    figures: list[dict[str, float]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    modes: set[bool] = field(default_factory=set)
    method: Any = None
    data: Any = None
    trainer: Any = None

    def state(self) -> dict[str, Any]:
        """What can be saved."""
        return {k: v for k, v in vars(self).items() if k not in ("method", "data", "trainer", "modes")}


class Tracer(Callback):
    """Fills a `Trace`."""

    def __init__(self) -> None:
        self.trace = Trace()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.trace.lrs.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.trace.rows.append(batch["rows"])
        self.trace.micro_batches.append(len(batch["micro_batches"]))
        self.trace.modes |= {module.training for module in pl_module.modules()}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.trace.losses.append(float(trainer.strategy.reduce(outputs["loss"].clone(), reduce_op="mean")))
        self.trace.norms.append(float(pl_module.grad_norm))
        self.trace.figures.append(pl_module.measures.means(trainer.strategy))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.trace.val_losses.append(pl_module.val_losses)


def train(
    model: Path,
    rows: Path | list[str],
    *,
    kind: str = "SFT",
    tuner: Any = None,
    method: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    change: Callable[[Any], None] | None = None,
    seed: int = 1,
    **data: Any,
) -> Trace:
    """Fine-tune through the real Trainer path; fp32, SGD, constant learning rate, one epoch, no validation by default.

    Args:
        model: the model's folder.
        rows: the training file or files.
        kind: name of the method in `litft`.
        tuner: full by default.
        method: its arguments.
        trainer: arguments of `Trainer`.
        callbacks: besides the tracer.
        change: called with the method when its model is built.
        seed: of everything.
        data: arguments of `ChatData`, or of `PreferenceData` where the method is trained on such rows.
    """
    import litft
    from litft import Full
    from litft.models.parts import local, whole
    from litft.tuners.base import trainable_parameters

    seed_everything(seed, verbose=False)
    options: dict[str, Any] = {"optimizer": "sgd", "lr": 0.1, "schedule": "constant", "warmup": 0, "clip": 0.0} | (
        method or {}
    )
    cls = getattr(litft, kind)
    sft = cls(path=str(model), tuner=tuner or Full(), **options)
    files = [str(row) for row in rows] if isinstance(rows, list) else str(rows)
    reader = litft.ChatData if cls.rows == "chats" else litft.PreferenceData
    chat = reader(files, **({"val_fraction": 0.0} | data))
    limits = trainer or {}
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "check_val_every_n_epoch": None,
        "val_check_interval": 10**9,
        "precision": "32-true",
    }
    if not {"max_epochs", "max_steps"} & limits.keys():
        quiet["max_epochs"] = 1
    tracer = Tracer()
    runner = Trainer(**(quiet | limits), callbacks=[tracer, *callbacks])
    if change is not None:
        from litft.methods.base import Method

        build = sft.build

        def built(*args: Any, **kw: Any) -> Method:
            build(*args, **kw)
            change(sft)
            return sft

        sft.build = built  # type: ignore[method-assign]
    runner.fit(sft, datamodule=chat)
    trace = tracer.trace
    trace.weights = {name: whole(p).clone() for name, p in trainable_parameters(sft.net.model)}
    trace.held = {
        "weights": sum(local(p).numel() * p.element_size() for p in sft.net.parameters()),
        "moments": sum(
            local(value).numel() * value.element_size()
            for state in runner.optimizers[0].state.values()
            for value in state.values()
            if isinstance(value, Tensor) and value.ndim
        ),
    }
    trace.method, trace.data, trace.trainer = sft, chat, runner
    return trace


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The greatest difference between two sets of weights."""
    assert a.keys() == b.keys() and a
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def moved(trace: Trace, model: Path) -> float:
    """How far the weights of a full run went from where they began, so that no comparison is one of nothing."""
    from transformers import AutoModelForCausalLM

    start = dict(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).named_parameters())
    return max(float((trace.weights[name] - start[name]).abs().max()) for name in trace.weights)
