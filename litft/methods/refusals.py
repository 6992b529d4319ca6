"""What doesn't go together, method by tuner by strategy: one table, which the tests walk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from litft.errors import UserError
from litft.models import context_parallel, tensor_parallel
from litft.models.mesh import Sizes
from litft.tuners import QLoRA

if TYPE_CHECKING:
    from litft.methods.base import Method

TP, CP = "--trainer.strategy.tensor_parallel_size", "--trainer.strategy.context_parallel_size"


@dataclass(frozen=True)
class Refusal:
    """A combination that can't be.

    Attributes:
        what: it, as flags.
        meets: whether a run is one; method, sizes of its groups, precision.
        reason: why not.
        mend: what to do.
    """

    what: str
    meets: Callable[[Any, Sizes, str], Any]
    reason: str
    mend: str

    def __str__(self) -> str:
        """The error."""
        return f"{self.what}: {self.reason}\nmend: {self.mend}"


TABLE = (
    Refusal(
        "--trainer.strategy fsdp with --trainer.precision 16-mixed",
        lambda method, sizes, precision: precision.startswith("16"),
        "loss scaling doesn't know of weights that are cut up",
        "--trainer.precision bf16-mixed or 32-true",
    ),
    Refusal(
        "--trainer.strategy fsdp with --model.optimizer adamw_8bit",
        lambda method, sizes, precision: "8bit" in method.optimizer_name,
        "bitsandbytes' optimizers take whole tensors",
        "leave the optimizer out: its moments are cut up as the weights are",
    ),
    Refusal(
        "--trainer.strategy fsdp with --model.step_in_backward",
        lambda method, sizes, precision: method.step_in_backward,
        "gradients are exchanged layer by layer, and whole only then",
        "leave it out: gradients are cut up as the weights are",
    ),
    Refusal(
        "--trainer.strategy fsdp with --model.offload parameters",
        lambda method, sizes, precision: method.offload == "parameters",
        "weights that are cut up have their own way to the host's memory",
        "--trainer.strategy.cpu_offload true",
    ),
    Refusal(
        "--trainer.strategy fsdp with --model.float8",
        lambda method, sizes, precision: method.float8,
        "not tried yet",
        "leave one of them out",
    ),
    Refusal(
        f"{TP} with qlora",
        lambda method, sizes, precision: sizes.tensor > 1 and isinstance(method.tuner, QLoRA),
        "packed weights can't be cut by columns",
        "lora, or fsdp without it",
    ),
    Refusal(
        f"{TP} with --model.tuner.dora",
        lambda method, sizes, precision: sizes.tensor > 1 and getattr(method.tuner, "dora", False),
        "the lengths of cut rows would have to be exchanged in each pass",
        "leave one of them out",
    ),
    Refusal(
        f"{TP} with --model.tuner.init pissa",
        lambda method, sizes, precision: sizes.tensor > 1 and getattr(method.tuner, "init", "") == "pissa",
        "what the adapter started from isn't cut",
        "leave one of them out",
    ),
    Refusal(
        f"{CP} with --model.balance_experts",
        lambda method, sizes, precision: sizes.context > 1 and method.balance_experts,
        "the router sees a part of each document",
        "leave one of them out",
    ),
    Refusal(
        f"{CP} with distill, reward, --model.label_smoothing or --model.neftune",
        lambda method, sizes, precision: sizes.context > 1 and _looks_at_whole_documents(method),
        "each process has a part of the tokens, and these look at whole documents or at logits",
        "leave one of them out",
    ),
    Refusal(
        "--trainer.strategy fsdp with --model.sync_reference",
        lambda method, sizes, precision: getattr(method, "sync_reference", 0),
        "checkpoints in parts hold what learns, not a reference that moves",
        "leave one of them out",
    ),
    Refusal(
        "--trainer.strategy fsdp with --model.offload_reference or offload_teacher",
        lambda method, sizes, precision: (
            getattr(method, "offload_reference", False) or getattr(method, "offload_teacher", False)
        ),
        "weights that are cut up have their own way to the host's memory",
        "--trainer.strategy.cpu_offload true",
    ),
)


def _looks_at_whole_documents(method: Method) -> bool:
    names = ("teacher_path", "scores", "label_smoothing", "neftune")
    return any(getattr(method, name, None) for name in names if name != "label_smoothing" or method.rows == "chats")


def refuse(method: Method, trainer: Any) -> None:
    """Refuse what can't be, before the model is loaded.

    Args:
        method: of the run.
        trainer: Trainer or Fabric.

    Raises:
        UserError: what, why, and what to do.
    """
    sizes: Sizes | None = getattr(trainer.strategy, "sizes", None)
    if sizes is None:
        return
    precision = getattr(trainer, "precision", None) or trainer.strategy.precision.precision
    for refusal in TABLE:
        if refusal.meets(method, sizes, str(precision)):
            raise UserError(str(refusal))
    if sizes.tensor > 1:
        tensor_parallel.check(method.config, sizes.tensor)
    if sizes.context > 1:
        context_parallel.check(method.config, sizes, method.cannot_pack)
