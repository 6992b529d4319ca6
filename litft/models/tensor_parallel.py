"""Tensor parallelism: the products of each layer shared by several processes (Shoeybi et al. 2019, arXiv:1909.08053).

Which layers are cut how is transformers' plan for the model. Weights are cut to plain local tensors, so that everything
that works on a layer (adapters, kernels, FSDP) works on its part. A layer cut by columns gives a part of its output
features, one cut by rows takes a part of its input features and gives a part of a sum.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from litft.errors import UserError
from litft.models.collectives import copy_to, reduce_from
from litft.models.parts import Cut

if TYPE_CHECKING:
    from litft.models.mesh import Parallel

COLUMNS, ROWS, PARTIAL = "colwise", "rowwise", "replicated_with_grad_allreduce"
WHOLE = ("embedding_rowwise", "embedding_colwise", "colwise_gather_output", "colwise_rep", "replicate")
"""Of embeddings and heads, which every process has whole: FSDP cuts them, and only trained tokens meet the head."""


def check(config: Any, size: int) -> None:
    """Refuse a model that can't be shared by so many processes; before it is loaded.

    Args:
        config: the model's.
        size: of the group.

    Raises:
        UserError: its plan has what litft doesn't do, or its heads don't divide.
    """
    text = config.get_text_config()
    plan = getattr(text, "base_model_tp_plan", None)
    flag = f"--trainer.strategy.tensor_parallel_size {size}"
    if not plan or not {COLUMNS, ROWS} & set(plan.values()):
        raise UserError(f"{flag}: transformers has no tensor-parallel plan for {text.model_type}\nmend: leave it out")
    if odd := sorted(set(plan.values()) - {COLUMNS, ROWS, PARTIAL, *WHOLE}):
        raise UserError(
            f"{flag}: the plan for {text.model_type} cuts layers as litft can't ({', '.join(odd)})\nmend: leave it out"
        )
    heads = {"attention heads": "num_attention_heads", "key-value heads": "num_key_value_heads"}
    for what, name in {**heads, "features in its feed-forward layers": "intermediate_size"}.items():
        count = getattr(text, name, None)
        if any(number % size for number in (count if isinstance(count, list) else [count or 0])):
            most = text.num_attention_heads
            fitting = [n for n in range(2, most + 1) if not any((getattr(text, k, 0) or 0) % n for k in heads.values())]
            could = f"; {', '.join(map(str, fitting[:4]))} would do" if fitting else ""
            raise UserError(f"{flag}: does not divide the model's {count} {what}{could}\nmend: leave it out")


def plan_of(model: Any) -> dict[str, str]:
    """Names of the model's modules and how each is cut."""
    prefix = f"{model.base_model_prefix}." if model.base_model_prefix else ""
    plan = model.config.get_text_config().base_model_tp_plan or {}
    patterns = {re.escape(prefix + name).replace(r"\*", r"\d+"): style for name, style in plan.items()}
    found = {}
    for name, _ in model.named_modules():
        for pattern, style in patterns.items():
            if re.fullmatch(pattern, name):
                found[name] = style
    return found


def cut_up(model: Any, parallel: Parallel) -> None:
    """Cut a model's layers, in place: after its tuner has been applied, before FSDP.

    Args:
        model: a transformers model; every process of the group has the same.
        parallel: with the group.
    """
    from litft.tuners.layers import LoRALinear
    from litft.tuners.targets import is_linear

    group, size, rank = parallel.tensor_group, parallel.sizes.tensor, parallel.rank_in("tensor")
    plan = plan_of(model)
    for parameter in model.parameters():
        parameter.cut = Cut(None, rank, size, group)
    for name, style in plan.items():
        module = model.get_submodule(name)
        if style == PARTIAL:
            for parameter in module.parameters():
                parameter.cut = Cut(None, rank, size, group, partial=True)
            continue
        if style not in (COLUMNS, ROWS):
            continue
        dim = 0 if style == COLUMNS else 1
        linear: Any = module.base_layer if isinstance(module, LoRALinear) else module
        _cut(linear, "weight", dim, rank, size, group)
        if style == COLUMNS:
            _cut(linear, "bias", 0, rank, size, group)
            linear.out_features //= size
        else:
            linear.in_features //= size
            _sum_outputs(module, linear, rank, group)
        if isinstance(module, LoRALinear):
            _cut(module, "lora_B" if style == COLUMNS else "lora_A", dim, rank, size, group)
            other = module.lora_A if style == COLUMNS else module.lora_B
            other.cut = Cut(None, rank, size, group, partial=True)  # type: ignore[attr-defined]
    columns = [name for name, style in plan.items() if style == COLUMNS]
    _refuse_unplanned(model, plan, columns)
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in columns):
        children = [name for name in columns if name.rpartition(".")[0] == parent]
        others = [
            n for n, m in model.get_submodule(parent).named_children() if is_linear(m) and f"{parent}.{n}" not in plan
        ]
        for name in children if others else [parent]:
            _copy_input(model.get_submodule(name), group)


def _refuse_unplanned(model: Any, plan: dict[str, str], columns: list[str]) -> None:
    """Refuse weights between cut layers that the plan leaves out: each process would have a part of their gradient.

    Raises:
        UserError: naming one.
    """
    from litft.tuners.layers import Adapter
    from litft.tuners.targets import is_linear

    for parent in dict.fromkeys(name.rpartition(".")[0] for name in columns):
        for leaf, module in model.get_submodule(parent).named_children():
            name = f"{parent}.{leaf}"
            known = any(planned == name or planned.startswith(f"{name}.") for planned in plan)
            if known or is_linear(module) or isinstance(module, Adapter) or next(module.parameters(), None) is None:
                continue
            kind = model.config.model_type
            raise UserError(
                f"--trainer.strategy.tensor_parallel_size: transformers' plan for {kind} says nothing of {name}\n"
                "mend: leave it out"
            )


def _cut(module: nn.Module, name: str, dim: int, rank: int, size: int, group: Any) -> None:
    whole = getattr(module, name, None)
    if whole is None:
        return
    part = whole.detach().chunk(size, dim)[rank].clone(memory_format=torch.contiguous_format)
    parameter = nn.Parameter(part, requires_grad=whole.requires_grad)
    parameter.cut = Cut(dim, rank, size, group)  # type: ignore[attr-defined]
    setattr(module, name, parameter)


def _copy_input(module: Any, group: Any) -> None:
    """Sum the gradients of what a layer cut by columns takes, or its parent, which feeds such layers only."""

    def copied(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args and isinstance(args[0], Tensor):
            return (copy_to(args[0], group), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": copy_to(kwargs["hidden_states"], group)}

    module.register_forward_pre_hook(copied, with_kwargs=True)


def _sum_outputs(module: nn.Module, linear: Any, rank: int, group: Any) -> None:
    """Sum what the processes make of their parts, and add the bias once."""

    def summed(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        if linear.bias is not None and rank:  # whose gradient each process has whole
            output = output - linear.bias.detach().to(output.dtype)
        return reduce_from(output, group)

    module.register_forward_hook(summed)
