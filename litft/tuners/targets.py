"""Which modules of a model a LoRA adapts: `all-linear`, names, a regex; never a router, never a tied head."""

from __future__ import annotations

import difflib
import re
from collections import Counter

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from litft.errors import UserError
from litft.tuners.quant import Int8Linear

# Classes and names that transformers' models give to what picks experts; `gate_proj` and the like are not among them.
_ROUTER_CLASS = re.compile(r"Router|TopKGating", re.IGNORECASE)
_ROUTER_NAME = re.compile(r"(.*_)?router(_.*)?|gate|shared_expert_gate|wg")


def is_linear(module: nn.Module) -> bool:
    """Whether a low-rank update fits around the module: `nn.Linear` (quantised ones too) and GPT-2's `Conv1D`."""
    return isinstance(module, (nn.Linear, Conv1D, Int8Linear))


def find_targets(model: PreTrainedModel, targets: str | list[str]) -> list[str]:
    """Names of the linear modules to adapt, in model order.

    Args:
        model: the model before any wrapping.
        targets: `all-linear`: every linear layer of the backbone but routers; a list: module names or their endings
            after a dot; any other string: a regex that has to match the whole name (both as in PEFT).

    Raises:
        UserError: nothing matches, or something that can't be adapted does.
    """
    modules = dict(model.named_modules())
    if isinstance(targets, str) and targets.lower() == "all-linear":
        outside = heads(model)
        return [n for n, m in modules.items() if is_linear(m) and n not in outside and not is_router(modules, n)]
    if isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise UserError(f"targets {targets!r} is not a valid regular expression: {error}") from error
        names = [name for name in modules if name and pattern.fullmatch(name)]
        if not names:
            raise UserError(
                f"targets: the regex {targets!r} matches no whole module name (endings go in a list: [{targets}])"
                f"{_nearest(targets, modules)}"
            )
    else:
        names = [name for name in modules if any(has_ending(name, target) for target in targets)]
        for target in targets:
            if not any(has_ending(name, target) for name in names):
                raise UserError(f"targets: no module is called {target!r}{_nearest(target, modules)}")
    for name in names:
        _check_target(model, modules, name)
    return names


def has_ending(name: str, ending: str) -> bool:
    """Whether `name` is `ending` or ends with it after a dot."""
    return name == ending or name.endswith(f".{ending}")


def matches_pattern(pattern: str, name: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern means the module called `name`: PEFT's rule."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def find_parameters(model: PreTrainedModel, targets: list[str]) -> dict[str, list[str]]:
    """Names of the stacked expert weights to adapt, by the module that owns them, in the order of that module.

    Raises:
        UserError: nothing matches, or something that is not a stack `(experts, ..., ...)` does.
    """
    modules = dict(model.named_modules())
    found: dict[str, list[str]] = {}
    for target in targets:
        hits = [name for name, _ in model.named_parameters() if has_ending(name, target)]
        if not hits:
            stacks = {name: modules[name.rpartition(".")[0]] for name in stacked_weights(model)}
            raise UserError(f"target_parameters: no parameter is called {target!r}{_nearest(target, stacks)}")
    for name, param in model.named_parameters():
        if not any(has_ending(name, target) for target in targets):
            continue
        owner, _, leaf = name.rpartition(".")
        if is_router(modules, owner):
            raise UserError(f"target_parameters: {name} belongs to a router; routers are never adapted, leave it out")
        if param.ndim != 3 or not param.is_floating_point():
            raise UserError(
                f"target_parameters: {name} has shape {tuple(param.shape)}, not (experts, ..., ...)\n"
                "reach linear layers with targets"
            )
        found.setdefault(owner, []).append(leaf)
    return found


def stacked_weights(model: PreTrainedModel) -> dict[str, int]:
    """Sizes of the weights that are stacks of matrices (fused experts), which no linear layer owns, by name."""
    modules = dict(model.named_modules())
    return {
        name: param.numel()
        for name, param in model.named_parameters()
        if param.ndim == 3 and not isinstance(modules[name.rpartition(".")[0]], (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    }


def summarise(sizes: dict[str, int]) -> dict[str, int]:
    """Add up sizes over layers: `...layers.3.mlp.experts.down_proj` counts under `mlp.experts.down_proj`."""
    total: Counter[str] = Counter()
    for name, size in sizes.items():
        total[re.split(r"\.\d+\.", name)[-1]] += size
    return dict(total)


def heads(model: PreTrainedModel) -> set[str]:
    """Names of the linear modules outside the backbone: the output head, a reward model's or classifier's score."""
    backbone, output = model.base_model, model.get_output_embeddings()
    inside = set() if backbone is model else {id(module) for module in backbone.modules()}
    return {
        name
        for name, module in model.named_modules()
        if is_linear(module) and (module is output or (inside and id(module) not in inside))
    }


def new_heads(model: PreTrainedModel) -> list[str]:
    """Heads that a language model does not come with (`score`, `classifier`): random at first, so trained in full."""
    output = model.get_output_embeddings()
    return sorted(name for name in heads(model) if model.get_submodule(name) is not output)


def is_router(modules: dict[str, nn.Module], name: str) -> bool:
    """Whether the module decides which experts see a token, by its class, its parents' or its name."""
    parts = name.split(".")
    if _ROUTER_NAME.fullmatch(parts[-1]):
        return True
    return any(_ROUTER_CLASS.search(type(modules[".".join(parts[:i])]).__name__) for i in range(1, len(parts) + 1))


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the embedding and the output head share one weight."""
    from litft.tuners.layers import Adapter

    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if output is None or isinstance(output, Adapter) or isinstance(embedding, Adapter):
        return False
    return output.weight is embedding.weight


def _check_target(model: PreTrainedModel, modules: dict[str, nn.Module], name: str) -> None:
    module = modules[name]
    if is_router(modules, name):
        raise UserError(f"targets: {name} is a router; routers are never adapted, leave it out")
    if (module is model.get_output_embeddings() or module is model.get_input_embeddings()) and is_tied(model):
        raise UserError(
            f"targets: {name} shares its weight with the {'embedding' if is_linear(module) else 'output head'}, "
            "so a low-rank update of one would be lost or change both\n"
            "leave it out, or train copies of both with modules_to_save"
        )
    if isinstance(module, nn.Embedding):
        raise UserError(
            f"targets: {name} is an embedding; train it whole with modules_to_save, or some rows with trainable_rows"
        )
    if name in new_heads(model):
        raise UserError(f"targets: {name} is a new head and is trained in full anyway; leave it out")
    if not is_linear(module):
        raise UserError(f"targets: {name} is a {type(module).__name__}; only linear layers can be adapted")


def _nearest(wanted: str, modules: dict[str, nn.Module]) -> str:
    """'; did you mean ...', from the last parts of the names."""
    leaves = sorted({re.split(r"\.\d+\.", name)[-1] for name, module in modules.items() if name and _owns(module)})
    leaf = re.split(r"[.*\\]+", wanted.strip("$^"))[-1]
    short = {name.rpartition(".")[2]: name for name in leaves}
    close = difflib.get_close_matches(leaf, list(short), n=4, cutoff=0.5) or list(short)
    return f"\nnearest: {', '.join(short[name] for name in close[:8])}" if close else ""


def _owns(module: nn.Module) -> bool:
    return is_linear(module) or any(param.ndim == 3 for param in module.parameters(recurse=False))
