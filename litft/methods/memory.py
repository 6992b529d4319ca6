"""What of a method decides how much memory a run takes, and the plan that follows."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litft.data.batch import Batch, pack_documents, pad_documents
from litft.data.plan import MicroBatch
from litft.engine.kept import Kept, measure
from litft.engine.memory import SMALL_TENSOR, Facts, MemoryPlan, Sharing, candidates, cheapest, share
from litft.engine.room import room_on
from litft.errors import UserError
from litft.methods.compiling import wants_compiling
from litft.models.compiled import layers_of
from litft.models.parts import stored
from litft.models.recompute import all_kept, keep_less
from litft.models.shard import let_go
from litft.tuners.quant import storage_bytes

if TYPE_CHECKING:
    from litft.methods.base import Method
    from litft.models.mesh import Sizes

MOMENTS = {"sgd": 0.0, "adamw_bf16": 4.0}
"""Bytes a weight of optimizers that keep others than two fp32 moments."""
SMALLEST_BATCH = 256
"""Tokens of a micro-batch below which nobody is sent."""
EIGHT_BITS = ("adamw_8bit", "paged_adamw_8bit")


def check_keys(recompute: Any, offload: str, memory_gb: float | None) -> None:
    """Refuse values that mean nothing.

    Raises:
        UserError: naming the flag.
    """
    if isinstance(recompute, int) and recompute < 1:
        raise UserError(f"--model.recompute {recompute}: a number says every how many layers, so at least 1")
    if offload in ("activations", "parameters") and recompute not in ("auto", "full"):
        raise UserError(
            f"--model.offload {offload}: runs every layer again in the backward pass\n"
            "mend: leave --model.recompute out, or set it to full"
        )
    if memory_gb is not None and memory_gb <= 0:
        raise UserError(f"--model.memory_gb {memory_gb}: must be above 0")


def keep_on_host(method: Method, device: torch.device) -> bool:
    """Leave the layers' weights in the host's memory, where that is asked for or nothing else will do.

    Called before the model goes to its device.

    Raises:
        UserError: it is asked for where it can't be.
    """
    asked = method.offload == "parameters"
    if device.type != "cuda":
        if method.offload not in ("auto", "none"):
            raise UserError(f"--model.offload {method.offload}: the run is on the CPU, there is nowhere else to go")
        return False
    if not asked and (method.offload != "auto" or _least(method) <= _room(method, device)):
        return False
    reason = ""
    if any(getattr(p, "quant_state", None) is not None for p in method.net.parameters()):
        reason = "not with nf4 weights\nmend: --model.tuner.quant int8"
    elif ranks_of(method) > 1:
        reason = "on one device only: DDP wants all weights on its GPU\nmend: --trainer.devices 1"
    if reason and asked:
        raise UserError(f"--model.offload parameters: {reason}")
    if reason:
        return False
    keep_less(_layers(method), "full", "parameters")
    return True


def plan_memory(method: Method) -> MemoryPlan | None:
    """Predict the peak on the run's device, choose, and make the layers keep less where need be.

    Args:
        method: its model built, and best on that device already.

    Returns:
        None where the size of a micro-batch isn't known, in a loop that took no plan; what was said is done then.
    """
    layers, on_host, device = _layers(method), method.offloaded, method.run_device
    fixed = method.recompute if method.recompute != "auto" else "none"
    if method.micro_batch is None or not layers:
        if layers and not on_host:
            keep_less(layers, "full" if method.offload == "activations" else fixed, _said(method.offload))
        return None
    facts = facts_of(method, method.micro_batch, device)
    now: torch.device = stored(method.net.model.get_input_embeddings()).device  # a Fabric script moves it later
    if method.parallel:  # whose parts may lie in the host's memory
        now = device
    with torch.autocast(now.type, method.compute_dtype, enabled=method.compute_dtype is not None):
        measured = measure_layers(method, layers, now)
    sharing = method.sharing
    if parallel := method.parallel:  # whose layers tensor parallelism has cut already
        sharing = sharing_of(parallel, parallel.sizes, tensor=1)
    if sharing:
        facts, measured = share(facts, measured, sharing)
    small = None
    if method.optimizer_name != "auto":
        small = method.optimizer_name in EIGHT_BITS
    elif find_spec("bitsandbytes") is None or method.parallel:
        small = False
    offload = "parameters" if on_host else method.offload
    options = candidates(facts, "full" if on_host else method.recompute, offload, small)
    room = _room(method, device)
    before = method.resident_before if device.type == "cpu" else 0.0
    choice, parts = cheapest(measured, facts, room - before, options)
    if not on_host:
        keep_less(layers, choice.recompute, choice.offload)
    plan = method.memory = MemoryPlan(choice, parts, room, before)
    plan.ways_out = ways_out(method, tried=True)
    return plan


def ways_out(method: Method, tried: bool = False) -> str:
    """What to change to take less memory, from the cheapest on; what is done already is left out.

    Args:
        method: of the run.
        tried: leave out as well what the plan was free to choose and didn't, since it doesn't lower the peak.
    """
    choice = method.memory.choice if method.memory else None
    size = method.micro_batch.slots if method.micro_batch else None
    ways = [] if size else ["a smaller --data.tokens_per_batch"]
    if size and size > SMALLEST_BATCH:
        ways.append(f"--data.tokens_per_batch {max(SMALLEST_BATCH, size // 2)} (now {size})")
    if not (tried and method.recompute == "auto") and (choice.recompute if choice else method.recompute) != "full":
        ways.append("--model.recompute full")
    in_8_bits = method.optimizer_name in EIGHT_BITS or (choice is not None and choice.small_states)
    if method.tuner.trains_base and not in_8_bits and not (tried and method.optimizer_name == "auto"):
        ways.append("--model.optimizer adamw_8bit")
    smaller = {"full": "litft finetune lora", "lora": "litft finetune qlora"}
    ways.append(smaller.get(method.tuner.name, "a smaller model"))
    return "to take less: " + ", ".join(ways) + ", a smaller --data.max_length"


def trainer_of(method: Method) -> Any:
    """The Trainer, where one drives the method."""
    from lightning import Trainer

    try:
        trainer = method.trainer
    except RuntimeError:
        return None
    return trainer if isinstance(trainer, Trainer) else None


def ranks_of(method: Method) -> int:
    """Processes of the run, under Trainer or in a loop of one's own."""
    trainer = trainer_of(method)
    if trainer is not None:
        return int(trainer.world_size)
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _said(offload: str) -> Any:
    return "none" if offload == "auto" else offload


def _layers(method: Method) -> list[Any]:
    layers = layers_of(method.net.model)
    if not layers and (method.recompute not in ("auto", "none") or method.offload not in ("auto", "none")):
        raise UserError("--model.recompute, --model.offload: this model has no decoder layers that litft knows of")
    return layers


def _room(method: Method, device: torch.device) -> float:
    """The least that any process of the run has."""
    trainer = trainer_of(method)
    here = trainer.num_devices if trainer is not None else ranks_of(method)
    room = method.memory_gb * 1e9 if method.memory_gb else room_on(device, 1 if device.type == "cuda" else here)
    if trainer is not None and torch.distributed.is_initialized():
        room = float(trainer.strategy.reduce(torch.tensor(room, device=device, dtype=torch.float64), reduce_op="min"))
    return room


def _least(method: Method) -> float:
    """Bytes that training takes on the device whatever is recomputed, the moments in 8 bits."""
    learning = sum(p.numel() for p in method.trainable_parameters())
    copies = 2.0 if method.tuner.trains_base and method.compute_dtype is not None else 0.0
    return storage_bytes(method.net) + learning * (4 + 2.03 + copies)


def sharing_of(how: Any, sizes: Sizes, tensor: int) -> Sharing:
    """How processes share a model.

    Args:
        how: an `FSDP`, or a `Parallel` made of it.
        sizes: of the groups.
        tensor: processes that share products of the layers as they are measured.
    """
    gathered = not how.reshard_after_forward
    return Sharing(sizes.shard, tensor, sizes.context, how.cpu_offload, how.hold_gradients, gathered)


def facts_of(method: Method, batch: MicroBatch, device: torch.device) -> Facts:
    """What of a run decides its memory, for a device that has all of the model.

    Args:
        method: its model built, or a skeleton of it.
        batch: the largest micro-batch.
        device: where it will run.
    """
    model: Any = method.net.model
    learning = list(method.trainable_parameters())
    bytes_of = [p.numel() * p.element_size() for p in learning]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    matrix = stored(head)
    if matrix is None:
        matrix = stored(embedding)
    item = 2 if method.compute_dtype is not None else 4
    return Facts(
        weights=storage_bytes(method.net) + method.beside,
        layer=max(storage_bytes(layer) for layer in layers_of(model)),
        loading=method.loading_bytes,
        learning=sum(p.numel() for p in learning),
        gradients=max(bytes_of) if method.step_in_backward else sum(bytes_of),
        moments=MOMENTS.get(method.optimizer_name, 8.0),
        small=sum(p.numel() for p in learning if p.numel() < SMALL_TENSOR),
        head=matrix.numel(),
        head_learns=head is not None and any(p.requires_grad for p in head.parameters()),
        tied=matrix is stored(embedding),
        vocabulary=matrix.shape[0],
        item=item,
        tokens=-(-batch.slots // 64) * 64,
        targets=1 if method.scores else batch.targets,  # a score's product is next to nothing
        several=batch.several,
        buckets=ranks_of(method) > 1,
        fused=method.net.head is not None or method.scores,
        distributions=method.distributions,
        experts=any(p.ndim > 2 for p in model.parameters()),
        compiled=wants_compiling(method, device),
        trains_base=method.tuner.trains_base,
        device="cuda" if device.type == "cuda" else "cpu",  # other accelerators share the host's memory
        rest=storage_bytes(method.net) + method.beside - sum(map(storage_bytes, layers_of(model))),
    )


def measure_layers(method: Method, layers: list[Any], device: torch.device) -> Kept:
    """What each layer keeps for the backward pass, on whatever device the model is now."""

    def batch(documents: Any) -> Batch:
        packs = method.cannot_pack is None
        made = pack_documents(documents, 1.0) if packs else pad_documents(documents, 1.0, 0)
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in made.items()}

    with all_kept(layers):
        kept = measure(method.net.model, layers, method.probe, batch)
    let_go(method.net)
    return kept
