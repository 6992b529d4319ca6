"""A model as a Hugging Face folder that plain transformers loads; an adapter merged into its base, or kept as one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from litft.errors import Failed, UserError
from litft.export.card import derived_card, gives_scores
from litft.export.final import (
    clean_tokenizer,
    generation_settings,
    new_folder,
    own_settings,
    padding_token,
    save_text_files,
    template_stops,
)
from litft.export.weights import exported_config, full_state_dict, save_weights, split, stored_dtype, write_index

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from litft.export.verify import Check
    from litft.models.resolve import ModelSource

Progress = Callable[..., None]
"""Called with how many more steps are done, and with their number where only then it is known."""

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""What `--dtype` may be, and torch's name for it."""


@dataclass(frozen=True)
class Written:
    """A folder that was written.

    Attributes:
        folder: where.
        dtype: of the weights.
        weights: number of them.
        merged: number of those in which an adapter was folded; None where the model was loaded whole.
        check: how it was checked.
    """

    folder: Path
    dtype: torch.dtype
    weights: int
    merged: int | None
    check: Check


def export_hf(
    source: ModelSource,
    out: Path,
    *,
    dtype: str | None = None,
    adapter: Literal["merge", "keep"] | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write a Hugging Face folder.

    Args:
        source: of `resolve`.
        out: of `new_output`.
        dtype: bf16, fp16 or fp32; None is the one in which the model (or the adapter, where it is kept) is stored.
        adapter: what becomes of an adapter; merged where nobody says.
        trust_remote_code: run the Python code that the model brings.
        progress: called as the work goes on.

    Returns:
        Lines for the user: what was written and how it was checked.

    Raises:
        UserError: the adapter doesn't fit the model, or can't be merged.
        Failed: what was written doesn't answer as the model does.
    """
    if adapter == "keep":
        keep_adapter(source, out, dtype=dtype, trust_remote_code=trust_remote_code)
        return [f"{out}: the adapter, as PEFT loads it", f"its base: {source.base_name}"]
    written = write_model(source, out, dtype=dtype, trust_remote_code=trust_remote_code, progress=progress)
    return describe(source, written)


def describe(source: ModelSource, written: Written) -> list[str]:
    """Lines about a folder that was written."""
    size = sum(file.stat().st_size for file in written.folder.iterdir())
    lines = [f"{written.folder}: {size / 1e6:,.0f} MB in {_name(written.dtype)}"]
    if source.adapter is not None:
        how = "" if written.merged is None else f"; {written.merged} of {written.weights} weights changed"
        stored = stored_dtype(source.folder)
        lines.append(f"base: {source.base_name}{'' if stored is None else f' ({_name(stored)})'}{how}")
        if trained_over := quantised_in_training(source.adapter):
            lines.append(f"trained over that base in {trained_over}, and merged into it as it was before")
    if written.merged is None:
        lines.append("the model was loaded whole: its weights could not be read and merged one by one")
    return [*lines, *written.check.lines()]


def write_model(
    source: ModelSource,
    out: Path,
    *,
    dtype: str | torch.dtype | None = None,
    shard_bytes: float = 5e9,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write a model folder, an adapter merged: added in fp32 and rounded once; complete and checked, or not at all.

    Weights are read, merged and written one by one. Where that can't be (`merged_weights`), the model is loaded whole.

    Args:
        source: of `resolve`.
        out: of `new_output`.
        dtype: of the weights; None is the one in which the base is stored.
        shard_bytes: of the largest file, but for a weight that is larger.
        trust_remote_code: run the Python code that the model brings.
        progress: called as the work goes on.

    Returns:
        What was written.

    Raises:
        UserError: the adapter doesn't fit the model, or the model the disk.
        Failed: what was written doesn't answer as the model does.
    """
    import torch

    from litft.export.merged import merged_weights
    from litft.export.verify import PASSES, verify
    from litft.models.load import load_tokenizer

    report = progress or (lambda more, total=None: None)
    if isinstance(dtype, str):
        dtype = getattr(torch, DTYPES[dtype])
    as_stored = stored_dtype(source.folder) or torch.bfloat16
    target: Any = dtype or as_stored
    code: Any = {"trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(source, **code)
    weights = None if gives_scores(source.adapter or source.folder) else merged_weights(source, tokenizer, **code)
    check_disk(source, out, target)
    with new_folder(out) as new:
        if weights is None:
            count, merged, config = _write_whole(source, tokenizer, new, target, as_stored, shard_bytes, code)
        else:
            count, merged, config = len(weights.shapes), len(weights.changed), weights.config
            report(0, count + PASSES)
            _write_one_by_one(weights, new, target, shard_bytes, report)
        write_settings(source, tokenizer, config, target, new)
        if trust_remote_code:
            for file in source.folder.glob("*.py"):
                shutil.copy(file, new)
        check = verify(source, tokenizer, new, target, weights=weights, progress=report, **code)
    return Written(out, target, count, merged, check)


def check_disk(source: ModelSource, out: Path, dtype: torch.dtype) -> None:
    """Refuse to begin on a model that the disk has no room for.

    Raises:
        UserError: saying how much is needed, and how much there is.
    """
    from litft.models.stored import stored_tensors

    need = dtype.itemsize * sum(math.prod(tensor.shape) for tensor in stored_tensors(source.folder).values())
    above = next(folder for folder in out.parents if folder.is_dir())
    if (free := shutil.disk_usage(above).free) < need:
        raise UserError(
            f"--out {out}: takes {need / 1e9:,.1f} GB, and the disk has {free / 1e9:,.1f} GB free\n"
            "mend: make room, or name a folder on another disk"
        )


def _write_one_by_one(weights: Any, folder: Path, dtype: torch.dtype, shard_bytes: float, report: Progress) -> None:
    from litft.models.stored import write_tensors

    layout = {name: (dtype, shape) for name, shape in weights.shapes.items()}
    files = split(layout, shard_bytes)

    def tensors(names: list[str]) -> Any:
        for name in names:
            yield weights.read(name).to(dtype)
            report(1)

    for file, names in files.items():
        with open(folder / file, "wb") as stream:
            write_tensors(stream, {name: layout[name] for name in names}, tensors(names), {})
    write_index(folder, files, layout)


def _write_whole(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype,
    stored: torch.dtype,
    shard_bytes: float,
    code: Any,
) -> tuple[int, int | None, PretrainedConfig]:
    """As `write_model`, with the whole model in memory: in its own dtype where that is the one to write."""
    import torch

    from litft.models.load import grow, load_model
    from litft.tuners import merge_adapter
    from litft.tuners.peft_format import tuner_options

    pissa = source.adapter is not None and tuner_options(source.adapter)["init"] == "pissa"
    as_it_is = dtype == stored and not pissa  # whose start comes out of the weights in fp32
    scores = gives_scores(source.adapter or source.folder)
    model = load_model(source, dtype=dtype if as_it_is else torch.float32, scores=scores, **code)
    if source.adapter is not None:
        grow(model, tokenizer)
        merge_adapter(model, source.adapter)
    config = exported_config(model, dtype)
    state = full_state_dict(model, dtype)
    save_weights(model, state, config, folder, shard_bytes)
    return len(state), None, config


def write_settings(
    source: ModelSource,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    dtype: torch.dtype | None,
    folder: Path,
) -> None:
    """Write config.json, generation_config.json, the tokenizer and the card of a model folder.

    Args:
        source: that it is made from.
        tokenizer: of `load_tokenizer`.
        config: of the weights; None of the arguments is changed but for its dtype and stop tokens.
        dtype: of the weights; None leaves what the configuration says.
        folder: where to.
    """
    stops = template_stops(tokenizer)
    generation = None
    if dtype is not None:
        config.dtype = dtype
    config.use_cache = config.get_text_config().use_cache = True
    if not gives_scores(source.adapter or source.folder):
        generation = generation_settings(own_settings(source, config), tokenizer, stops)
        config.eos_token_id = generation.eos_token_id
    elif source.adapter is not None:
        tokenizer.pad_token = padding_token(tokenizer, stops)
        config.pad_token_id = config.get_text_config().pad_token_id = tokenizer.pad_token_id
    config.save_pretrained(folder)
    save_text_files(clean_tokenizer(tokenizer, stops), generation, folder, partial(derived_card, source))


def keep_adapter(source: ModelSource, out: Path, *, dtype: str | None = None, trust_remote_code: bool = False) -> None:
    """Write an adapter folder as PEFT and vLLM load it: its tensors, tokenizer and settings, and where its base is.

    Args:
        source: an adapter.
        out: of `new_output`.
        dtype: bf16, fp16 or fp32; None is the one in which it is stored.
        trust_remote_code: run the Python code that the base brings.

    Raises:
        UserError: it is a whole model.
        Failed: it holds infinities or NaN.
    """
    import torch
    from safetensors.torch import save_file

    from litft.models.load import load_config, load_tokenizer
    from litft.tuners.peft_format import CONFIG, WEIGHTS, read_config, read_tensors

    if source.adapter is None:
        raise no_adapter(source)
    tensors = read_tensors(source.adapter)
    if dtype is not None:
        tensors = {name: tensor.to(getattr(torch, DTYPES[dtype])) for name, tensor in tensors.items()}
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise Failed(f"{source.adapter}: {broken[0]} holds infinities or NaN; nothing was written")
    settings = read_config(source.adapter) | {"base_model_name_or_path": source.base_name, "revision": source.revision}
    tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
    config = load_config(source, trust_remote_code=trust_remote_code)
    stops = template_stops(tokenizer)
    with new_folder(out) as new:
        save_file(tensors, new / WEIGHTS, {"format": "pt"})
        (new / CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copymode(new / CONFIG, new / WEIGHTS)
        generation = generation_settings(own_settings(source, config), tokenizer, stops)
        save_text_files(clean_tokenizer(tokenizer, stops), generation, new, partial(derived_card, source))


def no_adapter(source: ModelSource) -> UserError:
    """What is said where a whole model is to be kept as an adapter."""
    return UserError(f"--adapter keep: {source.name} is a whole model, there is no adapter\nmend: leave --adapter out")


def quantised_in_training(adapter: Path) -> str | None:
    """How the base was stored while an adapter was trained (nf4, int8), where its run says so."""
    import yaml

    run = adapter.parent / "config.yaml"
    try:
        tuner = yaml.safe_load(run.read_text(encoding="utf-8"))["model"]["tuner"]
        is_qlora = str(tuner["class_path"]).rpartition(".")[2] == "QLoRA"
        return str(tuner["init_args"].get("quant", "nf4")) if is_qlora else None
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        return None


def _name(dtype: torch.dtype) -> str:
    names = {f"torch.{long}": short for short, long in DTYPES.items()}
    return names.get(str(dtype), str(dtype).removeprefix("torch."))
