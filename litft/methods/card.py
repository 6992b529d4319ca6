"""What the model card says of a training, from the method and its Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litft.engine.identity import DIGITS
from litft.export.card import Training, is_repo_id

if TYPE_CHECKING:
    from litft.methods.base import Method

TUNER = ("r", "alpha", "dropout", "rslora", "dora", "init", "targets")
"""Options of a tuner that a reader of the card may want to know."""


def training_of(
    method: Method,
    losses_before: Mapping[str, float] | None = None,
    losses_after: Mapping[str, float] | None = None,
) -> Training:
    """The facts about a method's training that are known when it is saved.

    Args:
        method: that was trained, under a Trainer or a loop of one's own.
        losses_before: held-out losses; those of the Trainer's records where None.
        losses_after: of the weights that are saved; those at the Trainer's last step where None.
    """
    trainer: Any = getattr(method, "_trainer", None)
    data = getattr(trainer, "datamodule", None)
    settings: dict[str, Any] = {"learning rate": method.lr, "schedule": method.schedule_name, "warmup": method.warmup}
    settings |= {"optimizer": method.optimizer_name, "weight decay": method.weight_decay, "clipping": method.clip}
    settings |= {name: value for name in TUNER if (value := getattr(method.tuner, name, None)) not in (None, False)}
    found = Training(type(method).__name__, method.tuner.name, settings)
    if data is not None and getattr(data, "plan", None) is not None:
        summary = data.summary()
        settings |= {"tokens a step": summary["tokens_per_step"], "longest row": summary["max_length"]}
        settings |= {"packing": str(summary["packing"]).lower(), "trained on": data.train_on, "seed": data.run_seed}
        settings["precision"] = str(trainer.precision)
        found.data, found.fingerprint = summary, data.fingerprint[:DIGITS]
        found.datasets = [name for name in data.train_files if is_repo_id(name) and not Path(name).exists()]
    records = [c for c in getattr(trainer, "callbacks", []) if hasattr(c, "losses_at")]
    if records and losses_after is None:
        losses_before, losses_after = records[0].losses_before, records[0].losses_at.get(trainer.global_step)
    found.losses_before, found.losses_after = losses_before or {}, losses_after or {}
    return found
