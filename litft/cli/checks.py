"""Flags that a run can't follow, with the reason and what to set instead."""

from __future__ import annotations

import re
from typing import Any

from litft.errors import UserError

CUTS = "would cut through the planned optimizer steps"
KEPT: dict[str, tuple[tuple[Any, ...], str, str]] = {
    "accumulate_grad_batches": (
        (1,),
        CUTS,
        "it follows from data.tokens_per_step and data.tokens_per_batch; set those",
    ),
    "gradient_clip_val": ((None,), "is not used: the optimizer step clips by itself", "set model.clip"),
    "gradient_clip_algorithm": ((None,), "is not used: model.clip clips by the global norm", "set model.clip"),
    "limit_train_batches": ((None, 1.0), CUTS, "set trainer.max_steps"),
    "overfit_batches": ((0.0,), CUTS, "make a file of the few rows and set trainer.max_epochs"),
    "fast_dev_run": ((False,), CUTS, "set trainer.max_steps, or use --dry_run"),
    "val_check_interval": ((None,), CUTS, "set --val_every_n_steps, in optimizer steps"),
    "check_val_every_n_epoch": ((1,), CUTS, "set --val_every_n_steps, in optimizer steps"),
    "reload_dataloaders_every_n_epochs": ((0,), CUTS, "the plan does that"),
}
"""Trainer flags that stay as they are: the values allowed, the reason, and what to set instead."""
STRATEGIES = {
    r"ddp_?(spawn|fork|notebook)": "its processes end with the training, before final/ is written",
    r"(fsdp\w|deepspeed|model_?parallel)": "litft cuts weights up in its own way, which is torch's FSDP2",
    r"(single_?)?xla|single_?tpu": "litft does not train on TPUs",
}
"""Beginnings of the names, and of the class names, of strategies that are refused."""
KNOWN = r"auto$|ddp|fsdp|single|deepspeed|model_?parallel|xla|dp|hpu"
"""Beginnings of all names that Lightning knows."""
CALLBACKS = {
    "GradientAccumulationScheduler": f"{CUTS}; mend: set data.tokens_per_step",
    "StochasticWeightAveraging": "needs an optimizer step that Trainer makes; mend: leave it out",
}


def check_trainer(config: Any) -> None:
    """Refuse flags that a run can't follow, with the reason and what to set instead.

    Raises:
        UserError: for the first of them.
    """
    trainer = config.trainer
    for key, (allowed, reason, mend) in KEPT.items():
        value = trainer.get(key)
        if not any(value == one and type(value) in (type(one), float if one == 0 else type(one)) for one in allowed):
            raise UserError(f"--trainer.{key} {reason}; mend: {mend}")
    strategy, arguments = _class_of(trainer.strategy)
    if isinstance(trainer.strategy, str) and "." not in strategy and not re.match(KNOWN, strategy, re.IGNORECASE):
        raise UserError(
            f"--trainer.strategy {strategy}: is none of auto, ddp, fsdp\nmend: one of those, or a class path"
        )
    for pattern, reason in STRATEGIES.items():
        method = arguments.get("start_method", "popen")
        if re.match(pattern, strategy, re.IGNORECASE) or re.match(pattern, f"ddp_{method}"):
            raise UserError(f"--trainer.strategy {strategy}: {reason}\nmend: --trainer.strategy auto, ddp or fsdp")
    for callback in trainer.callbacks if isinstance(trainer.callbacks, list) else [trainer.callbacks]:
        name, _ = _class_of(callback)
        if name in CALLBACKS:
            raise UserError(f"--trainer.callbacks {name}: {CALLBACKS[name]}")
    precision = str(trainer.precision)
    if precision.endswith("true") and not precision.startswith(("32", "64")):
        raise UserError(
            f"--trainer.precision {precision} rounds away what is learnt\n"
            "(updates below 1/256 of a weight); mend: bf16-mixed trains fp32 weights and computes in bf16"
        )
    every, seed = trainer.log_every_n_steps, config.seed_everything
    if every is not None and every < 1:
        raise UserError(f"--trainer.log_every_n_steps {every}: must be at least 1 optimizer step")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed_everything {seed}: must be at least 0 and below 2^32")
    if config.val_every_n_steps is not None and config.val_every_n_steps < 0:
        raise UserError(f"--val_every_n_steps {config.val_every_n_steps}: must be at least 0")
    if config.patience is not None and config.patience < 1:
        raise UserError(f"--patience {config.patience}: must be at least 1 validation")
    if config.json and not config.dry_run:
        raise UserError("--json goes with --dry_run: it prints the plan; a run's facts are in its run.json")


def _class_of(said: Any) -> tuple[str, Any]:
    """Name, and arguments where there are any, of what may be a class path or a short name."""
    if said is None or isinstance(said, str):
        return str(said).rpartition(".")[2], {}
    return str(said.get("class_path", "")).rpartition(".")[2], said.get("init_args") or {}
