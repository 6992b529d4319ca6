"""A full model's weights and configuration as an ordinary Hugging Face folder."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litft.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

# What torch.compile, activation checkpointing and FSDP1 put into the names of the modules they wrap.
_WRAPPER = re.compile(r"(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside torch.compile's or DDP's wrapper (or the model itself)."""
    from transformers import PreTrainedModel

    while not isinstance(model, PreTrainedModel):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            raise TypeError(f"no transformers model in {type(model).__name__}")
        model = inner
    return model


def full_state_dict(model: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """All weights on the CPU under the names that the plain model has, ready for `save_pretrained`.

    Sharded weights are gathered one at a time and kept on rank 0 only, so no other rank ever holds the whole model;
    every rank must call this. Tied weights stay one tensor under their several names, which is how transformers
    recognises them and stores them once.

    Args:
        model: the model; compiled, checkpointed and sharded modules may be in it.
        dtype: of the floating-point parameters; None leaves each as it is. Buffers are never cast.

    Returns:
        Name to tensor; empty on every rank but 0.
    """
    import torch
    from torch import distributed

    from litft.models.parts import whole

    keep = not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0
    state: dict[str, Tensor] = {}
    stored: dict[int, Tensor | None] = {}  # by the identity of the live parameter, which tied names share
    for name, live in model.state_dict(keep_vars=True).items():
        if id(live) not in stored:
            value = whole(live)
            if isinstance(live, torch.nn.Parameter) and value.is_floating_point():
                value = value.to(dtype or value.dtype)
            stored[id(live)] = value.cpu() if keep else None
        if (kept := stored[id(live)]) is not None:
            state[_WRAPPER.sub("", name)] = kept
    return state


def stream_weights(model: nn.Module, dtype: torch.dtype, folder: Path | None, shard_bytes: float = 5e9) -> None:
    """Write a sharded model's weights as Hugging Face's files, of which no process ever holds more than a tensor.

    Every rank calls this.

    Args:
        model: with the names that its files are to have.
        dtype: of the stored parameters.
        folder: where to, in the process that writes; None in others.
        shard_bytes: of the largest file, but for a tensor that is larger.
    """
    from torch import nn

    from litft.models.parts import part_of, whole
    from litft.models.stored import write_tensors

    live: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not any(tensor is other for other in live.values()):  # of tied ones the first
            live[_WRAPPER.sub("", name)] = tensor
    layout = {
        name: (dtype if isinstance(t, nn.Parameter) and t.is_floating_point() else t.dtype, part_of(t).shape)
        for name, t in live.items()
    }
    files = split(layout, shard_bytes)
    for file, names in files.items():
        gathered = (whole(live[name]).to(layout[name][0]) for name in names)
        if folder is None:
            for _ in gathered:
                pass
            continue
        with open(folder / file, "wb") as stream:
            write_tensors(stream, {name: layout[name] for name in names}, gathered, {})
    if folder is not None:
        write_index(folder, files, layout)


Layout = Mapping[str, "tuple[torch.dtype, tuple[int, ...]]"]
"""Names of weights, and each one's dtype and shape as stored."""


def split(layout: Layout, shard_bytes: float = 5e9) -> dict[str, list[str]]:
    """The names of the files that weights are spread over, and of the weights in each.

    Args:
        layout: of all weights.
        shard_bytes: of the largest file, but for a tensor that is larger.
    """
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, (dtype, shape) in layout.items():
        size = dtype.itemsize * math.prod(shape)
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def write_index(folder: Path, files: Mapping[str, list[str]], layout: Layout) -> None:
    """Write the file that says which of several files holds a weight; one file needs none."""
    if len(files) > 1:
        size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in layout.values())
        index = {name: file for file, names in files.items() for name in names}
        content = {"metadata": {"total_size": size}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def exported_config(model: PreTrainedModel, dtype: torch.dtype) -> PretrainedConfig:
    """The model's configuration as it should stand on disk: a copy, without what only training wanted.

    `use_cache` is True, `dtype` is that of the stored weights, `vocab_size` counts the rows of the embedding (tokens
    may have been added), and the tie flag says whether input and output embeddings really are one weight.
    """
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    config.use_cache = text.use_cache = True
    if hasattr(config, "quantization_config"):  # weights read from GGUF, say: what is written is not quantised
        del config.quantization_config
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    text.vocab_size = embedding.weight.shape[0]
    if head is not None:
        config.tie_word_embeddings = text.tie_word_embeddings = head.weight is embedding.weight
    return config


def save_weights(
    model: PreTrainedModel, state: dict[str, Tensor], config: PretrainedConfig, folder: Path, shard_bytes: float = 5e9
) -> None:
    """Write safetensors under the names the family is published with, and config.json.

    Args:
        model: the live model; left as it was.
        state: of `full_state_dict`.
        config: of `exported_config`.
        folder: where to; exists.
        shard_bytes: of the largest file, but for a tensor that is larger.
    """
    from transformers import GenerationConfig

    # save_pretrained also writes the model's own two configurations, notes the live dtype in the one and refuses
    # to write the other where a published file is inconsistent: both are written by us, so it gets stand-ins.
    live, generates = model.config, hasattr(model, "generation_config")
    own: Any = model.generation_config if generates else None
    model.config = copy.deepcopy(config)
    if generates:
        model.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, state_dict=state, max_shard_size=int(shard_bytes))
    finally:
        model.config = live
        if generates:
            model.generation_config = own
    config.save_pretrained(folder)


def stored_dtype(folder: Path) -> torch.dtype | None:
    """The floating-point dtype in which a model folder stores most of its weights; None where it has no safetensors.

    Read from the headers of the files: `dtype` in config.json is only what somebody once wrote there.

    Raises:
        UserError: a file is no safetensors file.
    """
    from collections import Counter

    import torch
    from safetensors import SafetensorError, safe_open

    known = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
    elements: Counter[torch.dtype] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    entry = tensors.get_slice(name)
                    if entry.get_dtype() in known:
                        elements[known[entry.get_dtype()]] += math.prod(entry.get_shape())
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: can't be read as safetensors: {error}\nfetch or copy the model again") from error
    return elements.most_common(1)[0][0] if elements else None
