"""A model's weights as they leave, an adapter folded in, one tensor at a time: the whole model is never in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from litft.export.weights import exported_config, stored_dtype
from litft.models.skeleton import skeleton
from litft.tuners import LoRA
from litft.tuners.layers import Adapter, LoRAExperts, LoRALinear, TrainableRows, TrainedCopy
from litft.tuners.peft_format import adapter_tensors, plain_name, read_tensors, tuner_options

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from litft.models.resolve import ModelSource
    from litft.models.stored import Saved


@dataclass
class MergedWeights:
    """The weights of a model under the names that its files have.

    Attributes:
        config: as it should stand on disk, for these weights; its `dtype` is the one in which the base is stored.
        shapes: name to shape, in the order of the model; of tied weights the first.
        changed: names of the weights in which an adapter was folded.
    """

    config: PretrainedConfig
    shapes: dict[str, tuple[int, ...]]
    changed: set[str] = field(default_factory=set)
    _stored: dict[str, Saved] = field(default_factory=dict, repr=False)
    _adapters: dict[str, Adapter] = field(default_factory=dict, repr=False)
    _own: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _tied: dict[str, str] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def read(self, name: str) -> Tensor:
        """One weight on the CPU: as it is stored, or with its update added in fp32 (and not rounded)."""
        adapter, leaf = self._adapter_of(name)
        if isinstance(adapter, TrainedCopy):
            return adapter.parameters_by_name()[leaf].detach()
        base = self._base(name)
        if adapter is None or not _changes(adapter, leaf):  # it may be a new weight, and not updated
            return base
        with _holding(adapter.base_layer, {leaf: base}):
            return _updated(adapter, leaf)

    @contextmanager
    def adapted(self, name: str) -> Iterator[LoRALinear | None]:
        """The layer whose weight this is, in fp32 and with its adapter beside it; None for any other weight."""
        adapter, leaf = self._adapter_of(name)
        if not isinstance(adapter, LoRALinear) or leaf != "weight":
            yield None
            return
        owner = name.removesuffix(leaf)
        names = [leaf for leaf, parameter in adapter.base_layer.named_parameters() if parameter is not None]
        with _holding(adapter.base_layer, {leaf: self._base(owner + leaf) for leaf in names}):
            yield adapter

    def _base(self, name: str) -> Tensor:
        """A weight as it is without an adapter."""
        if name in self._own:
            return self._own[name]
        return _grown(self._stored[self._tied.get(name, name)].whole(), self.shapes[name])

    def _adapter_of(self, name: str) -> tuple[Adapter | None, str]:
        """The adapter around the module that owns a weight, and the weight's name in that module."""
        owner, _, leaf = name.rpartition(".")
        while owner:
            if owner in self._adapters:
                return self._adapters[owner], leaf
            owner, _, last = owner.rpartition(".")
            leaf = f"{last}.{leaf}"
        return None, name


@contextmanager
def _holding(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Inside the context a module that has no memory holds these parameters, in fp32."""
    kept = {name: module._parameters[name] for name in values}
    for name, value in values.items():
        module._parameters[name] = nn.Parameter(value.float(), requires_grad=False)
    try:
        yield
    finally:
        module._parameters.update(kept)


def _updated(adapter: Adapter, leaf: str) -> Tensor:
    if isinstance(adapter, LoRALinear):
        weight = adapter.full_weight()
        return weight.T.contiguous() if adapter.transposes else weight
    if isinstance(adapter, LoRAExperts):
        return adapter.updated(leaf, torch.float32)
    assert isinstance(adapter, TrainableRows)
    return adapter.weight


def _grown(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A weight with rows for added tokens, at the mean of the old ones; those that were trained replace them."""
    if tuple(weight.shape) == shape:
        return weight
    mean = weight.mean(0, dtype=torch.float32).to(weight.dtype)
    return torch.cat([weight, mean.expand(shape[0] - len(weight), *weight.shape[1:])])


def merged_weights(source: ModelSource, tokenizer: PreTrainedTokenizerBase, **options: Any) -> MergedWeights | None:
    """Open a model's files, and its adapter's where there is one.

    Args:
        source: of `resolve`.
        tokenizer: of `load_tokenizer`; tokens that were added in training have rows to come with the adapter.
        options: `trust_remote_code`.

    Returns:
        None where that can't be done tensor by tensor: the model's files have other names than its weights in memory
        (transformers converts them, as for many mixtures of experts), or the adapter needs the whole weights (PiSSA's
        start). `load_model` and `merge_adapter` do it then.

    Raises:
        UserError: the adapter does not fit the model, or is of an unsupported kind.
    """
    lora = None if source.adapter is None else LoRA(**{**tuner_options(source.adapter), "dropout": 0.0})
    bare = skeleton(source, dtype=torch.float32, **options)
    if bare is None or (lora is not None and lora.init == "pissa"):
        return None
    model, stored = bare
    tied = _ties(model)
    if any(not _equal(stored, name, other) for name, other in tied.items()):
        return None  # transformers then goes by the files, not by the configuration
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    if source.adapter is not None and len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = exported_config(model, stored_dtype(source.folder) or torch.bfloat16)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weights = MergedWeights(config, shapes, _stored=stored)
    if lora is None or source.adapter is None:
        return weights

    lora.apply(model)
    weights._own = _fill(lora, model, source.adapter)
    weights._adapters = {name: module for name, module in model.named_modules() if isinstance(module, Adapter)}
    copied = {name for name, module in weights._adapters.items() if isinstance(module, TrainedCopy)}
    for name, other in tied.items():
        if {name.rpartition(".")[0], other.rpartition(".")[0]} & copied:  # one of a pair was trained: no pair any more
            weights._tied[name] = other
            weights.shapes[name] = weights.shapes[other]
            config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    weights.changed = {name for name in weights.shapes if _changes(*weights._adapter_of(name))}
    weights.changed |= weights._own.keys() & shapes.keys()
    return weights


def _fill(lora: LoRA, model: Any, folder: Path) -> dict[str, Tensor]:
    """Give an adapter around a skeleton its tensors; returns whole weights of the base that it brings."""
    lora.load(model, folder)  # checks names and shapes, and fills what has memory
    state = read_tensors(folder)
    into = adapter_tensors(model)
    keys = {id(parameter): key for key, parameter in into.items() if parameter.is_meta and key in state}
    every = model.named_parameters(remove_duplicate=False)
    values = {name: state[keys[id(parameter)]].float() for name, parameter in every if id(parameter) in keys}
    model.load_state_dict(values, strict=False, assign=True)
    for module in model.modules():
        if isinstance(module, TrainableRows):
            module.rows = torch.tensor(lora.trainable_rows)
    return {plain_name(key): tensor for key, tensor in state.items() if key not in into}


def _ties(model: Any) -> dict[str, str]:
    """Names of weights that are other weights of the model, and whose."""
    first: dict[int, str] = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def _equal(stored: dict[str, Saved], name: str, other: str) -> bool:
    """Whether a weight that need not be stored is absent, or the same as the one it is tied to."""
    return name not in stored or torch.equal(stored[name].whole(), stored[other].whole())


def _changes(adapter: Adapter | None, leaf: str) -> bool:
    if isinstance(adapter, LoRAExperts):
        return leaf in adapter.lora_A
    if isinstance(adapter, TrainableRows):  # a head whose rows PEFT didn't train has none in the file
        return leaf == "weight" and not adapter.trainable_tokens_delta.is_meta
    if isinstance(adapter, LoRALinear):
        return leaf == "weight"
    return adapter is not None
