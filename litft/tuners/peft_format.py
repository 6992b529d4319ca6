"""PEFT's adapter folders: adapter_config.json and adapter_model.safetensors, written and read."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Container, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from litft.errors import UserError
from litft.models.parts import whole
from litft.tuners import targets
from litft.tuners.base import canonical, copy_exactly, logger
from litft.tuners.layers import Adapter, LoRAExperts, LoRALinear, TrainableRows, TrainedCopy
from litft.tuners.quant import is_quantised
from litft.tuners.targets import matches_pattern

if TYPE_CHECKING:
    from litft.tuners.lora import LoRA

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
_ROWS = "token_adapter.trainable_tokens_delta"

# Fields that change nothing about what the tensors mean once their names are known.
_NEUTRAL = {
    *("auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode"),
    *("layers_pattern", "layers_to_transform", "loftq_config", "megatron_core", "peft_type", "peft_version"),
    *("qalora_group_size", "revision", "runtime_config", "target_modules", "task_type"),
}
_UNDERSTOOD = {
    *("alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "modules_to_save", "r"),
    *("rank_pattern", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora"),
}
# Starts that leave the base model as it is, so that an adapter is just its A and B.
_PLAIN_INITS = {True, False, None, "default", "gaussian", "eva", "orthogonal"}


def named_adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """The adapters in a model, under the canonical names of the modules they stand in for."""
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            yield canonical(name), module


def adapter_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learning parameters by their keys in adapter_model.safetensors; a shared one once."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in named_adapters(model):
        for suffix, param in _suffixes(module):
            if id(param) not in seen:
                found[f"{_PREFIX}{name}.{suffix}"] = param
                seen.add(id(param))
    return found


def plain_name(key: str) -> str:
    """The name that a weight with this key in adapter_model.safetensors has in the model without an adapter."""
    return key.removeprefix(_PREFIX).replace(".token_adapter.base_layer.", ".").replace(".base_layer.", ".")


def _suffixes(module: Adapter) -> Iterator[tuple[str, nn.Parameter]]:
    if isinstance(module, LoRALinear):
        yield "lora_A.weight", module.lora_A
        yield "lora_B.weight", module.lora_B
        if module.lora_magnitude_vector is not None:
            yield "lora_magnitude_vector", module.lora_magnitude_vector
    elif isinstance(module, LoRAExperts):
        # PEFT nests one wrapper a parameter, the first one innermost.
        for depth, leaf in enumerate(reversed(list(module.lora_A))):
            yield f"{'base_layer.' * depth}lora_A.weight", module.lora_A[leaf]
            yield f"{'base_layer.' * depth}lora_B.weight", module.lora_B[leaf]
    elif isinstance(module, TrainedCopy):
        yield from module.parameters_by_name().items()
    elif isinstance(module, TrainableRows):
        yield _ROWS, module.trainable_tokens_delta


def save(tuner: LoRA, model: PreTrainedModel, folder: Path | None, base: str, revision: str | None) -> None:
    """See `LoRA.save`. Gathers sharded tensors, so with several processes all have to call it."""
    tensors = {key: _whole(param) for key, param in adapter_tensors(model).items()}
    growth = 1
    if tuner.init == "pissa":
        growth = 2
        tensors.update(_difference_to_start(model))
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    config = adapter_config(tuner, model, base, revision, growth)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors lets nobody but the owner read, whatever the umask


def _whole(param: Tensor) -> Tensor:
    return whole(param).cpu()


def _difference_to_start(model: nn.Module) -> dict[str, Tensor]:
    """PiSSA took B0 A0 out of the base: on the original base the update is B A - B0 A0, an adapter of rank 2r."""
    found = {}
    for name, module in named_adapters(model):
        if isinstance(module, LoRALinear) and module.initial_A is not None and module.initial_B is not None:
            key = f"{_PREFIX}{name}."
            found[f"{key}lora_A.weight"] = torch.cat([_whole(module.lora_A), module.initial_A.cpu()])
            found[f"{key}lora_B.weight"] = torch.cat([_whole(module.lora_B), -module.initial_B.cpu()], dim=1)
    return found


def adapter_config(
    tuner: LoRA, model: PreTrainedModel, base: str, revision: str | None, growth: int = 1
) -> dict[str, Any]:
    """The content of adapter_config.json; ranks and alphas grow together so that the scale stays."""
    alpha_growth = math.sqrt(growth) if tuner.rslora else growth

    def alpha(value: float) -> float:
        value *= alpha_growth
        return int(value) if float(value).is_integer() else value

    adapters = dict(named_adapters(model))
    linears = [name for name, module in adapters.items() if isinstance(module, LoRALinear)]
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": tuner.r * growth,
        "lora_alpha": alpha(tuner.alpha),
        "lora_dropout": tuner.dropout,
        "bias": "none",
        "init_lora_weights": True,
        "use_rslora": tuner.rslora,
        "use_dora": tuner.dora,
        "fan_in_fan_out": any(module.transposes for module in adapters.values() if isinstance(module, LoRALinear)),
        "target_modules": _shortest_names(model, linears, set(adapters)),
        "target_parameters": tuner.target_parameters or None,
        "modules_to_save": [name for name, module in adapters.items() if isinstance(module, TrainedCopy)] or None,
        "trainable_token_indices": _token_indices(tuner, adapters),
        "rank_pattern": {name: r * growth for name, r in tuner.rank_pattern.items()},
        "alpha_pattern": {name: alpha(value) for name, value in tuner.alpha_pattern.items()},
    }


def _task_type(model: PreTrainedModel) -> str | None:
    kinds = {"ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS"}
    for ending, kind in kinds.items():
        if type(model).__name__.endswith(ending):
            return kind
    return "CAUSAL_LM" if model.get_output_embeddings() is not None else None


def _shortest_names(model: nn.Module, adapted: list[str], adapters: set[str]) -> list[str]:
    """Last parts of the names (what servers look for) if those mean just these modules, else the full names."""
    leaves = {name.rpartition(".")[2] for name in adapted}
    meant = {
        name
        for name in map(canonical, (name for name, _ in model.named_modules()))
        if name.rpartition(".")[2] in leaves and not any(name.startswith(f"{adapter}.") for adapter in adapters)
    }
    return sorted(leaves) if meant == set(adapted) else sorted(adapted)


def _token_indices(tuner: LoRA, adapters: dict[str, Adapter]) -> list[int] | dict[str, list[int]] | None:
    if not tuner.trainable_rows:
        return None
    rows = {name: module for name, module in adapters.items() if isinstance(module, TrainableRows)}
    if len({id(module.trainable_tokens_delta) for module in rows.values()}) == 1:
        return tuner.trainable_rows  # one embedding, or a tied pair: PEFT finds it
    return dict.fromkeys(rows, tuner.trainable_rows)


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a folder.

    Raises:
        UserError: there is none, or it is not JSON.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder}: no adapter here ({CONFIG} is missing)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object")
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder's adapter, on the CPU.

    Raises:
        UserError: there are none, they are pickled, or the file is broken.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLE).exists():
            raise UserError(
                f"{folder}: the adapter is a pickle ({PICKLE}), which can run code when it is loaded; refused\n"
                "if you trust it, load it with peft and save it again with save_pretrained"
            )
        raise UserError(f"{folder}: no adapter weights here ({WEIGHTS} is missing)")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: can't be read, the file is cut short or damaged ({error})") from error
    # Older PEFT wrote the magnitude as a module.
    tensors = {key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): t for key, t in tensors.items()}
    return {key: tensor for key, tensor in tensors.items() if not _is_twin(key, tensors)}


def _is_twin(key: str, keys: Container[str]) -> bool:
    """Whether this is a weight of a module trained as a whole that PEFT wrote under a second name.

    It does so for resized embeddings: with the wrapper's names, and what the weight was before.
    """
    plain = key.replace(".modules_to_save.", ".").replace(".original_module.", ".")
    return plain != key and plain in keys


def tuner_options(folder: Path) -> dict[str, Any]:
    """The arguments of the `LoRA` that a saved adapter belongs to.

    Raises:
        UserError: it is another kind of adapter, or uses something that is not supported, by name.
    """
    config = read_config(folder)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{folder}: a {kind} adapter; only LoRA adapters (DoRA, rsLoRA included) are supported")
    unsupported = [key for key, value in config.items() if value and key not in _NEUTRAL | _UNDERSTOOD]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if config.get("ensure_weight_tying") and not config.get("modules_to_save"):
        unsupported.remove("ensure_weight_tying")  # rows of a tied pair always move together here
    init = config.get("init_lora_weights", True)
    if init not in _PLAIN_INITS and init != "pissa":
        unsupported.append(f"init_lora_weights: {init}")
    if unsupported:
        raise UserError(f"{folder / CONFIG}: not supported: {', '.join(sorted(unsupported))}; merge it with peft first")
    keys = [key.removeprefix(_PREFIX) for key in read_tensors(folder)]
    if any("lora_embedding_" in key for key in keys):
        raise UserError(f"{folder}: low-rank updates of an embedding are not supported; merge it with peft first")
    rows = config.get("trainable_token_indices")
    if isinstance(rows, dict):
        if len({tuple(ids) for ids in rows.values()}) != 1:
            raise UserError(
                f"{folder / CONFIG}: trainable_token_indices differ between modules, which is not supported"
            )
        rows = next(iter(rows.values()))
    return {
        "r": config["r"],
        "alpha": config.get("lora_alpha", 8),
        "dropout": config.get("lora_dropout", 0.0),
        "targets": _targets(config, keys),
        "rslora": bool(config.get("use_rslora")),
        "dora": bool(config.get("use_dora")),
        "init": "pissa" if init == "pissa" else "default",
        "target_parameters": list(config.get("target_parameters") or []) or None,
        "modules_to_save": _saved_modules(config, keys) or None,
        "trainable_rows": rows,
        "rank_pattern": _patterns(config, "rank_pattern", keys),
        "alpha_pattern": _patterns(config, "alpha_pattern", keys),
    }


def _targets(config: dict[str, Any], keys: list[str]) -> str | list[str]:
    """The configured targets; where layers are picked by number or left out, the names that have tensors."""
    wanted = config.get("target_modules")
    if wanted and not any(config.get(key) for key in ("exclude_modules", "layers_to_transform")):
        return wanted
    owners = {target.rpartition(".")[0] for target in config.get("target_parameters") or []}
    return [name for name in _adapted(keys) if not any(targets.has_ending(name, owner) for owner in owners)]


def _adapted(keys: list[str]) -> list[str]:
    """Names of the modules that have an A, nested wrappers of one module taken as one."""
    names = {key.removesuffix(".lora_A.weight") for key in keys if key.endswith(".lora_A.weight")}
    return sorted({name.split(".base_layer")[0] for name in names})


def _patterns(config: dict[str, Any], field: str, keys: list[str]) -> dict[str, Any] | None:
    """The ranks or alphas that differ; PEFT keeps patterns in the file that match nothing, which mean nothing."""
    leaves = {target.rpartition(".")[2] for target in config.get("target_parameters") or []}
    names = _adapted(keys)
    names += [f"{name}.{leaf}" for name in names for leaf in leaves]
    patterns = config.get(field) or {}
    return {key: value for key, value in patterns.items() if any(matches_pattern(key, name) for name in names)} or None


def _saved_modules(config: dict[str, Any], keys: list[str]) -> list[str]:
    """Full names of the modules saved as a whole, by PEFT's rule: the name ends with a listed one."""
    wanted, found = tuple(config.get("modules_to_save") or ()), []
    for key in keys:
        parts = key.split(".")
        for i in range(1, len(parts)):
            name = ".".join(parts[:i])
            if wanted and "lora_" not in key and "token_adapter" not in key and name.endswith(wanted):
                found.append(name)
                break
    return list(dict.fromkeys(found))


def load(tuner: LoRA, model: PreTrainedModel, folder: Path) -> None:
    """See `LoRA.load`."""
    state = read_tensors(folder)
    into = adapter_tensors(model)
    rows = [state[key] for key in into if key.endswith(_ROWS) and key in state]
    for key in [key for key in state.keys() - into.keys() if key.endswith(_ROWS)]:
        if any(torch.equal(state[key], other) for other in rows):  # of a tied pair PEFT may write the rows twice
            del state[key]
    base = {
        key: param
        for key in state.keys() - into.keys()
        if (param := _base_parameter(model, plain_name(key))) is not None
    }
    if tuner.init == "pissa" and _doubled(state, into):
        raise UserError(
            f"{folder}: an adapter saved from a PiSSA start has twice the rank and fits the original model\n"
            "go on with it as LoRA.from_folder(...) makes it"
        )
    # PEFT trains only the embedding's rows unless told; the head's then stay as they are.
    absent = {key for key in into.keys() - state.keys() if key.endswith(_ROWS) and _is_head(model, key)}
    copy_exactly({key: param for key, param in {**into, **base}.items() if key not in absent}, state, "adapter")
    if base:
        logger.info("the adapter brought whole weights of its own: %s", ", ".join(sorted(base)))


def _base_parameter(model: nn.Module, name: str) -> nn.Parameter | None:
    """A frozen weight that PEFT stored beside the adapter (an embedding that was resized, a targeted head)."""
    owner, _, leaf = name.rpartition(".")
    for candidate in (name, f"{owner}.base_layer.{leaf}"):
        try:
            param = model.get_parameter(candidate)
        except AttributeError:
            continue
        if not param.requires_grad and not is_quantised(model.get_submodule(candidate.rpartition(".")[0])):
            return param
    return None


def _doubled(state: dict[str, Tensor], into: dict[str, nn.Parameter]) -> bool:
    ranks = [
        (state[key].shape[0], into[key].shape[0]) for key in into if key in state and key.endswith("lora_A.weight")
    ]
    return bool(ranks) and all(saved == 2 * here for saved, here in ranks)


def _is_head(model: PreTrainedModel, key: str) -> bool:
    name = key.removeprefix(_PREFIX).removesuffix(f".{_ROWS}")
    return model.get_submodule(name) is model.get_output_embeddings()
