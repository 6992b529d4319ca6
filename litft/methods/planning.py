"""How a run would fit on devices that aren't here, from the model's configuration alone.

The model is built of tensors without memory, and measured as a real one is: what its layers keep for the backward pass
is counted by running them, which takes no time to speak of where nothing is computed.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from litft.data.plan import MICRO_BATCH, MicroBatch
from litft.engine.kept import Kept
from litft.engine.memory import Choice, Facts, Sharing, candidates, cheapest, share
from litft.engine.room import MARGIN
from litft.errors import UserError
from litft.methods.memory import facts_of, measure_layers, sharing_of
from litft.methods.refusals import refuse
from litft.models import attention
from litft.models.causal_lm import CausalLM
from litft.models.compiled import layers_of
from litft.models.load import load_config, ready_to_train
from litft.models.mesh import Sizes
from litft.models.quiet import quiet
from litft.models.resolve import resolve
from litft.models.scorer import Scorer
from litft.tuners import LoRA, QLoRA
from litft.tuners.low_rank import share_inputs

if TYPE_CHECKING:
    from litft.methods.base import Method

PACKED = {"nf4": 0.52, "int8": 1.01}
"""Bytes of a quantised weight, scales included."""
MOST_DEVICES = 4096


@dataclass(frozen=True)
class Way:
    """One way to share the model among the devices.

    Attributes:
        name: as flags.
        sharing: what it comes to.
    """

    name: str
    sharing: Sharing | None


@dataclass
class Fit:
    """What a way takes on each device.

    Attributes:
        way: as flags.
        bytes: of the peak.
        parts: what they are made of.
        choice: how memory is saved.
        fits: whether that is within the device's memory.
        host_bytes: in the machines' memory, over all of them.
    """

    way: str
    bytes: float
    parts: dict[str, float]
    choice: Choice
    fits: bool
    host_bytes: float = 0.0

    def __str__(self) -> str:
        """A line of the table."""
        how = {"none": "", "full": "layers run again", "selective": "layers run again in part"}
        again = how.get(str(self.choice.recompute), f"every {self.choice.recompute}. layer runs again")
        notes = [again] if again else []
        if self.choice.offload != "none":
            notes.append(f"{self.choice.offload} wait in the host's memory")
        if self.choice.small_states:
            notes.append("moments in 8 bits")
        ends = ["fits" if self.fits else "too much", *notes]
        return f"  {self.way:<58}{self.bytes / 1e9:>8.1f} GB  {', '.join(ends)}"


@dataclass
class DevicePlan:
    """All ways, and what to do.

    Attributes:
        model: name and size.
        devices: how many.
        memory_gb: of each.
        tokens: of a micro-batch on each.
        fits: the ways, fastest first.
        advice: what to type, or what to change.
    """

    model: str
    devices: int
    memory_gb: float
    tokens: int
    fits: list[Fit]
    advice: str

    def __str__(self) -> str:
        """For the console."""
        head = f"devices {self.devices} of {self.memory_gb:g} GB, micro-batches of {self.tokens:,} tokens on each"
        return "\n".join([f"model   {self.model}", head, *map(str, self.fits), self.advice])

    def summary(self) -> dict[str, Any]:
        """For `--json`."""
        ways = [
            {
                "way": fit.way,
                "predicted_gb": round(fit.bytes / 1e9, 3),
                "fits": fit.fits,
                "recompute": fit.choice.recompute,
                "offload": fit.choice.offload,
                "states_in_8_bits": fit.choice.small_states,
                "parts_gb": {key: round(value / 1e9, 3) for key, value in fit.parts.items()},
            }
            for fit in self.fits
        ]
        facts = {"model": self.model, "devices": self.devices, "device_memory_gb": self.memory_gb}
        return {**facts, "tokens_per_batch": self.tokens, "ways": ways, "advice": self.advice}


def plan_devices(method: Method, devices: int, memory_gb: float, tokens: int | None, strategy: Any) -> DevicePlan:
    """Predict the memory that a run takes on each of several GPUs, and say what to choose.

    Args:
        method: of the run; its model is not loaded, a folder with a config.json will do.
        devices: how many GPUs.
        memory_gb: of each, in units of 1e9 bytes.
        tokens: of a micro-batch; 4096 by default.
        strategy: an `FSDP` whose options are to hold, or None.

    Raises:
        UserError: numbers that mean nothing, or a model that can't be shared so.
    """
    if devices < 1:
        raise UserError(f"--plan.devices {devices}: must be at least 1")
    if memory_gb <= 0:
        raise UserError(f"--plan.device_memory_gb {memory_gb}: must be above 0")
    tokens = tokens or MICRO_BATCH
    facts, measured = _without_memory(method, tokens)
    room = memory_gb * 1e9 * MARGIN["cuda"]

    def fit(way: Way) -> Fit:
        own, layers = (facts, measured) if way.sharing is None else share(facts, measured, way.sharing)
        if way.sharing is None:
            own = dataclasses.replace(own, buckets=devices > 1)
        small = False if way.sharing else None
        options = candidates(own, method.recompute, "none" if method.offload == "auto" else method.offload, small)
        choice, parts = cheapest(layers, own, room, options)
        whole = facts.weights + facts.gradients + facts.moments * facts.learning
        host = float(whole) if way.sharing and way.sharing.offload else 0.0
        return Fit(way.name, parts["peak"], parts, choice, parts["peak"] <= room, host)

    fits = [fit(way) for way in _ways(method, devices, strategy)]
    size = f"{method.path}: {method.applied.total / 1e9:.2f}B weights, {method.tuner.name} tuning"
    return DevicePlan(size, devices, memory_gb, tokens, fits, _advice(method, devices, tokens, fits, fit))


def _ways(method: Method, devices: int, strategy: Any) -> list[Way]:
    if strategy is not None:
        sizes = Sizes(devices, strategy.tensor, strategy.context, strategy.replicate)
        sizes.check()
        refuse(method, SimpleNamespace(strategy=SimpleNamespace(sizes=sizes), precision="bf16-mixed"))
        options = {"tensor_parallel_size": sizes.tensor, "context_parallel_size": sizes.context}
        options |= {"replicate": sizes.replicate}
        name = "fsdp" + "".join(f", {key} {value}" for key, value in options.items() if value > 1)
        name += ", cpu_offload" if strategy.cpu_offload else ""
        return [Way(name, sharing_of(strategy, sizes, sizes.tensor))]
    if devices == 1:
        return [Way("one device", None), Way("fsdp, cpu_offload", Sharing(1, offload=True))]
    return [
        Way("ddp (all weights on each device)", None),
        Way(f"fsdp (weights cut over {devices})", Sharing(devices)),
        Way("fsdp, cpu_offload", Sharing(devices, offload=True)),
    ]


def _advice(method: Method, devices: int, tokens: int, fits: list[Fit], fit: Any) -> str:
    good = next((found for found in fits if found.fits), None)
    if good is not None:
        flags = {"ddp": "ddp", "fsd": "fsdp", "one": "auto"}[good.way[:3]]
        for option in good.way.split(", ")[1:]:  # as they were planned with
            key, _, value = option.partition(" ")
            flags += f" --trainer.strategy.{key} {value if value.isdigit() else 'true'}"
        host = good.host_bytes / 1e9
        where = f" (the machines' own memory holds {host:,.0f} GB between them)" if host else ""
        machines = f" on {devices // 8} machines of 8" if devices > 8 and devices % 8 == 0 else ""
        each = 8 if machines else devices
        return f"choose: --trainer.devices {each} --trainer.strategy {flags}{machines}{where}"
    ways = []
    more = devices * 2
    while more <= MOST_DEVICES and not fit(Way("", Sharing(more))).fits:
        more *= 2
    if more <= MOST_DEVICES:
        ways.append(f"{more} devices with fsdp")
    if tokens > 1024:
        ways.append(f"--data.tokens_per_batch {tokens // 2}")
    smaller = {"full": "litft finetune lora", "lora": "litft finetune qlora"}.get(method.tuner.name)
    return "nothing fits; to change: " + ", ".join([*ways, *([smaller] if smaller else []), "a smaller model"])


def _frozen_bytes(path: str, dtype: torch.dtype, trust_remote_code: bool) -> int:
    """Of a model of which nothing learns: what products read is in bf16, the rest as in the trained model."""
    from transformers import AutoModelForCausalLM

    config = load_config(resolve(path, weights=False, trust_remote_code=trust_remote_code))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    embedding: Any = model.get_input_embeddings()
    linears = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)} - {id(embedding.weight)}
    return sum(p.numel() * (2 if id(p) in linears else p.element_size()) for p in model.parameters())


def _without_memory(method: Method, tokens: int) -> tuple[Facts, Kept]:
    """Facts about the whole model on one GPU, in bf16, and what its layers keep."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    trusted = method.trust_remote_code
    method.source = resolve(
        method.path, revision=method.revision, weights=False, trust_remote_code=trusted, scores=method.scores
    )
    if method.cannot_pack is not None:
        raise UserError(f"--plan.devices: rows of this model can't be packed: {method.cannot_pack}\nmend: try it there")
    method.compute_dtype, method.run_device, method.parallel = torch.bfloat16, torch.device("cuda"), None
    method.balance = None
    masters = method.tuner.trains_base and method.optimizer_name != "adamw_bf16"
    dtype = torch.float32 if masters else torch.bfloat16
    here = torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True), quiet():
        if method.scores:
            method.config.num_labels = 1
        auto = AutoModelForSequenceClassification if method.scores else AutoModelForCausalLM
        model = auto.from_config(
            method.config, dtype=dtype, attn_implementation=attention.register(), trust_remote_code=False
        )
        ready_to_train(model)
        linears = [m for layer in layers_of(model) for m in layer.modules() if isinstance(m, nn.Linear)]
        packed = sum(linear.weight.numel() for linear in linears)
        tuner = method.tuner
        method.applied = LoRA.apply(tuner, model) if isinstance(tuner, LoRA) else tuner.apply(model)
        if isinstance(tuner, LoRA):
            share_inputs(model)
        model.train()
        method.net = Scorer(model) if method.scores else CausalLM(model, fast_loss=False)
        method.beside = sum(_frozen_bytes(path, dtype, trusted) for path in method.frozen_beside)
        with torch.autocast("cpu", torch.bfloat16):
            measured = measure_layers(method, layers_of(model), here)
        batch = MicroBatch(slots=tokens, targets=tokens, several=True)
        facts = facts_of(method, batch, torch.device("cuda"))
    facts = dataclasses.replace(facts, fused=True, buckets=False, compiled=False)
    if isinstance(tuner, QLoRA):
        less = packed * (2 - PACKED[tuner.quant])
        share_of_layer = less / max(1, len(layers_of(model)))
        facts = dataclasses.replace(
            facts, weights=round(facts.weights - less), layer=round(facts.layer - share_of_layer)
        )
    return facts, measured
