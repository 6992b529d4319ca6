"""A model without its weights, and its weights read straight into the parts that a process keeps.

So that no process ever holds the whole: what is read is what is kept, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from litft.models.load import load_config, ready_to_train
from litft.models.parts import cuts_kept, put
from litft.models.quiet import quiet
from litft.models.stored import Saved, stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from litft.models.resolve import ModelSource


def skeleton(
    source: ModelSource, *, dtype: torch.dtype, attn_implementation: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, dict[str, Saved]] | None:
    """The model with its weights on the meta device, and where each weight lies.

    Args:
        source: of `resolve`.
        dtype: of every parameter.
        attn_implementation: transformers' name.
        trust_remote_code: run the Python code that the model brings.

    Returns:
        None where files and model don't name the same tensors: transformers has to convert them, or something is wrong
        with them, which `load_model` finds out.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = load_config(source, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None):
        return None
    try:
        stored = stored_tensors(source.folder)
    except (SafetensorError, OSError):
        return None
    options = {"attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code}
    with quiet(), _on_meta():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    persistent = model.state_dict().keys()
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    tied = persistent - wanted.keys()
    if any(tuple(stored[name].shape) != shape if name in stored else True for name, shape in wanted.items()):
        return None
    if stored.keys() - wanted.keys() - tied or any(p.dtype != dtype for p in model.parameters()):
        return None
    if any(name in persistent for name, _ in model.named_buffers()):  # which would have to be read as well
        return None
    ready_to_train(model)
    return model, stored


@contextmanager
def _on_meta() -> Iterator[None]:
    """Inside the context parameters have no memory; buffers, such as rotary frequencies, are real."""

    def no_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return parameter
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    handle = register_module_parameter_registration_hook(no_memory)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def fill(model: nn.Module, stored: dict[str, Saved], device: torch.device) -> None:
    """Give parameters memory for the part that this process has, and read it.

    Args:
        model: a skeleton, cut up, its tuner applied.
        stored: where its weights lie.
        device: for parameters; those that aren't the model's own have memory already.
    """
    missing = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    with cuts_kept(model):
        model._apply(lambda tensor: _with_memory(tensor, device))
    for name, parameter in model.named_parameters():
        if name in missing:
            put(parameter, stored[name.replace(".base_layer.", ".")])


def _with_memory(tensor: Tensor, device: torch.device) -> Any:
    return torch.empty_like(tensor, device=device) if tensor.is_meta else tensor
