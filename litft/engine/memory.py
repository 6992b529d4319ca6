"""How much memory a run will take, and the cheapest way to make it fit.

What the layers keep for the backward pass is not guessed from a formula: two short passes of the model at hand, without
a backward pass, show what each layer keeps a token, whatever its architecture, tuner and attention. The rest is
counted:

    peak = weights + optimizer's states + 16-bit copies of learning weights
           + the greater of   what is kept + logits        at the end of the forward pass (and gradients, from the
                                                            second micro-batch of a step on)
                              gradients + a layer's work   at the end of the backward pass
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from litft.engine.kept import Kept
from litft.losses import distillation
from litft.losses.linear_cross_entropy import BLOCK, CHUNK
from litft.models.recompute import Offload, Recompute, recomputed


@dataclass(frozen=True)
class Choice:
    """How memory is saved.

    Attributes:
        recompute: what runs again in the backward pass.
        offload: what waits in the host's memory.
        small_states: the optimizer's moments are kept in 8 bits.
    """

    recompute: Recompute = "none"
    offload: Offload = "none"
    small_states: bool = False


@dataclass(frozen=True)
class Facts:
    """What else a run's memory depends on; sizes in bytes.

    Attributes:
        weights: as they are stored.
        layer: those of the greatest decoder layer.
        loading: what is in memory beside the weights while they are read.
        learning: number of weights that learn.
        gradients: of those that are alive at the same time.
        moments: bytes of the optimizer's state a weight.
        small: of them, those in tensors too small for 8-bit moments.
        head: number of weights of the head.
        head_learns: whether they learn.
        tied: whether they are the embedding's too.
        vocabulary: rows of the head.
        item: bytes of a number in what is computed.
        tokens: slots of the largest micro-batch.
        targets: trained tokens in it.
        several: whether a step has more than one.
        buckets: whether DDP keeps gradients a second time.
        fused: whether the loss goes without all logits at once.
        distributions: how many distributions over the vocabulary it compares at each target; 0 where it looks at the
            target's probability alone.
        experts: whether layers are mixtures of experts.
        compiled: whether the layers are compiled.
        trains_base: whether the model's own weights learn.
        device: cpu or cuda.
        rest: of the weights, those outside of decoder layers.
        gathered: what processes that share weights hold besides their own part at a time.
        exchange: gradients on their way to the others.
    """

    weights: int
    layer: int
    loading: int
    learning: int
    gradients: int
    moments: float
    small: int
    head: int
    head_learns: bool
    tied: bool
    vocabulary: int
    item: int
    tokens: int
    targets: int
    several: bool
    buckets: bool
    fused: bool
    distributions: int
    experts: bool
    compiled: bool
    trains_base: bool
    device: str
    rest: int = 0
    gathered: float = 0.0
    exchange: float = 0.0


@dataclass(frozen=True)
class Sharing:
    """How processes share a model.

    Attributes:
        shard: over how many its weights are cut.
        tensor: how many share its layers' products.
        context: how many share the tokens of a micro-batch.
        offload: whether weights, gradients and the optimizer's states lie in the host's memory.
        hold: whether gradients stay whole until the last micro-batch of a step.
        gathered: whether layers stay gathered between their forward and their backward pass.
    """

    shard: int = 1
    tensor: int = 1
    context: int = 1
    offload: bool = False
    hold: bool = False
    gathered: bool = False


def share(facts: Facts, measured: Kept, sharing: Sharing) -> tuple[Facts, Kept]:
    """What is left to one process of facts about the whole model.

    Args:
        facts: of one device that has all of the model.
        measured: of the whole model's layers.
        sharing: by whom.
    """
    shard, tensor = sharing.shard, sharing.tensor
    layers = (facts.weights - facts.rest) / tensor
    bytes_a_weight = 4 if facts.trains_base else 2  # as stored; a frozen base is gathered as it is
    layer = facts.layer / tensor * (facts.item / bytes_a_weight if facts.trains_base else 1.0)
    learning = facts.learning / tensor / shard
    exchange = facts.layer / tensor / bytes_a_weight * (4 + facts.item) if facts.trains_base else 0.0
    exchange += 4.0 * facts.learning / tensor if sharing.hold else 0.0
    on_host = sharing.offload and facts.device == "cuda"
    cut = dataclasses.replace(
        facts,
        weights=0 if on_host else round((layers + facts.rest) / shard),
        learning=0 if on_host else round(learning),
        gradients=0 if on_host else round(facts.gradients / tensor / shard),
        small=round(facts.small / shard),
        tokens=-(-facts.tokens // sharing.context),
        targets=-(-facts.targets // sharing.context),
        buckets=False,
        gathered=facts.rest + (len(measured.layers) if sharing.gathered else 2) * layer,
        exchange=exchange,
    )
    whole = 4.0  # of a layer's input are kept by its norms and sums, which each process makes all of
    kept = [
        min(a, whole * b) + max(0.0, a - whole * b) / tensor
        for a, b in zip(measured.layers, measured.inputs, strict=True)
    ]
    products = [product / tensor for product in measured.products]
    return cut, dataclasses.replace(measured, layers=kept, products=products, constant=0.0)


OVERHEAD = {"cpu": 150e6, "cuda": 600e6}
"""Bytes of everything else: tokenizer, plan, kernels and their workspaces; on a GPU cuBLAS's among them."""
COMPILED = 4 / 3
"""A compiled layer keeps its input and about so many times the results of its products (measured: 1.38 full, 1.36
LoRA, on a Llama-like layer); the rest is cheap and is computed again."""
PLAIN_LOSS = 16.0
"""Bytes a logit where all are there at once: themselves, in fp32, their log-softmax, and gradients of these."""
DISTRIBUTION = 22.0
"""Bytes a logit for each distribution that is compared."""
EXPERTS = 3.0
"""How many times what a layer of experts keeps its backward pass takes beside that, to sort tokens by expert and back
(measured on a qwen3_moe)."""
SMALL_TENSOR = 4096
"""Weights of a tensor below which bitsandbytes keeps moments in fp32."""


def predict(measured: Kept, facts: Facts, choice: Choice) -> dict[str, float]:
    """The peak, and what it is made of, in bytes.

    Args:
        measured: of `litft.engine.kept.measure`.
        facts: of the run.
        choice: how memory is saved.

    Returns:
        `weights`, `optimizer`, `gradients`, `activations`, `logits`, `other`, their sum `step`, `loading`, and `peak`.
    """
    host = choice.offload == "parameters"
    again = set(recomputed(range(len(measured.layers)), "full" if choice.offload != "none" else choice.recompute))
    kept, work = measured.outside, 0.0
    for index, (layer, products, inputs) in enumerate(
        zip(measured.layers, measured.products, measured.inputs, strict=True)
    ):
        # experts may fail to compile, and keep more where they don't
        whole = min(layer, inputs + COMPILED * products) if facts.compiled and not facts.experts else layer
        if index in again:
            work = max(work, whole)
            kept += 0 if choice.offload == "activations" else inputs
            kept += products if choice.recompute == "selective" and choice.offload == "none" else 0
        else:
            kept += whole
    gradients = float(facts.layer if host and facts.trains_base else facts.gradients)  # or they go back to the host
    moments = (
        2.03 * (facts.learning - facts.small) + 8.0 * facts.small
        if choice.small_states
        else facts.moments * facts.learning
    )
    weights = min(facts.weights, facts.weights - facts.layer * (len(measured.layers) - 2)) if host else facts.weights
    head_gradient = (4.0 + 4.0 * facts.tied) * facts.head if facts.head_learns else 0.0
    logits = facts.item * min(float(facts.targets) * facts.vocabulary, BLOCK) + 12.0 * CHUNK.get(facts.device, 0)
    if facts.distributions:
        logits = facts.distributions * DISTRIBUTION * min(float(facts.targets) * facts.vocabulary, distillation.BLOCK)
    logits += facts.item * facts.head if facts.head_learns and facts.item < 4 else 0.0
    if not facts.fused:
        logits = PLAIN_LOSS * facts.targets * facts.vocabulary
    copies = measured.constant * (2 / len(measured.layers) if host and measured.layers else 1)
    before = gradients if facts.several else 0.0
    work *= facts.tokens  # once the logits are gone
    sorting = EXPERTS * max(measured.layers) * facts.tokens if facts.experts else 0.0
    work += facts.exchange
    ahead = before + kept * facts.tokens + max(logits, head_gradient + work)
    back = gradients + head_gradient + work
    parts = {
        "weights": weights + facts.gathered,
        "optimizer": 0.0 if host and facts.trains_base else moments,
        "gradients": before if ahead > back else gradients,
        "activations": kept * facts.tokens if ahead > back else work,
        "logits": max(logits, head_gradient + work) if ahead > back else head_gradient,
        "other": copies + sorting + OVERHEAD[facts.device] + (float(facts.gradients) if facts.buckets else 0.0),
    }
    step = sum(parts.values())
    loading = facts.weights + facts.loading + OVERHEAD["cpu"] if facts.device == "cpu" else 0.0
    return {**parts, "step": step, "loading": loading, "peak": max(step, loading)}


EVERY = (8, 4, 3, 2)


def candidates(facts: Facts, recompute: Any, offload: Any, small_states: bool | None) -> list[tuple[float, Choice]]:
    """Ways to save memory, each with the time it costs as a share of the step's, cheapest first.

    Measured on a CPU with SmolLM2-135M: all layers again 16 to 33% (full tuning) and 33 to 50% (LoRA), where counting
    products says 33 and 50%; selectively 5 to 11%, and nothing gained with adapters. Moments in 8 bits cost little time
    but round, so they come after what gives the same numbers. What offloading costs is not yet measured.

    Args:
        facts: of the run.
        recompute: what the user said; `auto` leaves it open.
        offload: the same; `parameters` has to be said before the model goes to its device.
        small_states: the same; None leaves it open.
    """
    once = 1 / 3 if facts.trains_base else 1 / 2  # a forward pass of a step's products
    ways: dict[Any, float] = {"none": 0.0, **{n: once / n for n in EVERY}, "full": once}
    if facts.trains_base:
        ways["selective"] = 0.1
    if recompute != "auto":
        ways = {recompute: ways.get(recompute, once / recompute if isinstance(recompute, int) else 0.1)}
    moving: dict[Offload, float] = {"none": 0.0, "activations": 0.15, "parameters": 2.0}
    open_to: list[Offload] = ["none", "activations"] if facts.device == "cuda" and "full" in ways else ["none"]
    places = {place: moving[place] for place in (open_to if offload == "auto" else [offload])}
    states = [False, True] if small_states is None else [small_states]
    found = []
    for (way, time), (place, more), small in itertools.product(ways.items(), places.items(), states):
        if place == "none" or way in ("full", recompute):
            found.append((time + more, Choice(way, place, small)))
    return sorted(found, key=lambda pair: (pair[1].small_states, pair[0]))


def cheapest(
    measured: Kept, facts: Facts, room: float, options: Iterable[tuple[float, Choice]]
) -> tuple[Choice, dict[str, float]]:
    """The first choice whose peak fits the room, or the one with the lowest peak where none does."""
    predictions = [(choice, predict(measured, facts, choice)) for _, choice in options]
    fitting = [found for found in predictions if found[1]["peak"] <= room]
    return fitting[0] if fitting else min(predictions, key=lambda found: found[1]["peak"])


@dataclass
class MemoryPlan:
    """What was predicted and chosen.

    Attributes:
        choice: how memory is saved.
        parts: of `predict`.
        room: bytes there are; infinite where nobody says.
        baseline: bytes that the process had before it loaded the model; the prediction is on top of them.
        ways_out: what to change to take less.
    """

    choice: Choice
    parts: dict[str, float]
    room: float
    baseline: float = 0.0
    ways_out: str = ""

    @property
    def fits(self) -> bool:
        """Whether the predicted peak is within the room."""
        return self.total <= self.room

    @property
    def total(self) -> float:
        """What the process will take, all in all."""
        return self.parts["peak"] + self.baseline

    @property
    def known(self) -> bool:
        """Whether anybody said how much memory there is."""
        return math.isfinite(self.room)

    def summary(self) -> dict[str, Any]:
        """For run.json and `--dry_run --json`; sizes in GB (1e9 bytes)."""
        return {
            "predicted_gb": round(self.total / 1e9, 3),
            "before_gb": round(self.baseline / 1e9, 3),
            "available_gb": round(self.room / 1e9, 3) if self.known else None,
            "fits": self.fits,
            "recompute": self.choice.recompute,
            "offload": self.choice.offload,
            "states_in_8_bits": self.choice.small_states,
            "parts_gb": {k: round(v / 1e9, 3) for k, v in self.parts.items() if k != "peak"},
        }

    def __str__(self) -> str:
        """A line for the console."""
        text = f"memory about {self.total / 1e9:.1f} GB" + (f" of {self.room / 1e9:.1f}" if self.known else "")
        saved = {
            "none": "",
            "selective": "all but products and attention runs again in the backward pass",
            "full": "layers run again in the backward pass",
        }.get(self.choice.recompute, f"every {self.choice.recompute}. layer runs again in the backward pass")  # type: ignore[arg-type]
        ways = [saved] if saved else []
        if self.choice.offload != "none":
            ways.append(f"{self.choice.offload} wait in the host's memory")
        if self.choice.small_states:
            ways.append("the optimizer's moments are kept in 8 bits")
        text += f": {', '.join(ways)}" if ways else ""
        return text if self.fits else f"{text}\n       that is more than there is; {self.ways_out}"


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(words in str(error) for words in ("can't allocate memory", "not enough memory", "std::bad_alloc"))
