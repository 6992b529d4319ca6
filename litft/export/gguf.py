"""A model as one GGUF file, for llama.cpp and what is built on it, and a LoRA adapter as another."""

from __future__ import annotations

import math
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from litft.errors import Failed, UserError
from litft.export.final import as_ids, generation_settings, new_folder, own_settings, template_stops
from litft.export.gguf_families import family_of
from litft.export.gguf_tokenizer import Vocabulary, vocabulary

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from litft.models.resolve import ModelSource

Progress = Callable[..., None]

DTYPES = ("q8_0", "f16", "bf16", "f32", "q4_0", "q4_1", "q5_0", "q5_1")
"""How weights can be stored; the first is the default."""
_FILE_TYPES = {"f32": "ALL_F32"}  # others: MOSTLY_...
_BLOCK = 32  # weights that share a scale, in all quantised types here
_AT_ONCE = 2**24  # weights converted at a time, so that a large embedding needs no second copy in fp32


@dataclass
class Weights:
    """A model's weights by transformers' names, read one at a time.

    Attributes:
        config: of the model as it leaves (tokens may have been added, ties cut).
        shapes: by name; of tied weights the first.
        read: gives one weight on the CPU.
    """

    config: PretrainedConfig
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


def export_gguf(
    source: ModelSource,
    out: Path,
    *,
    dtype: str | None = None,
    adapter: Literal["merge", "keep"] | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write a model, an adapter merged in, as `out/NAME-DTYPE.gguf`; or the adapter alone.

    Args:
        source: of `resolve`.
        out: a folder that is not there yet.
        dtype: one of `DTYPES`; None is q8_0, and f16 for an adapter that is kept.
        adapter: "merge" (the default) or "keep", for llama.cpp's `--lora` with the base as GGUF beside it.
        trust_remote_code: run the Python code that the model brings.
        progress: called with how many weights were written since, and their total.

    Returns:
        Lines for the user: what was written, and what llama.cpp does otherwise.

    Raises:
        UserError: an architecture, a tokenizer or an adapter that llama.cpp does not compute, by name.
        Failed: the weights don't fit the dtype.
    """
    if adapter == "keep":
        from litft.export.gguf_adapter import export_adapter

        return export_adapter(source, out, dtype=dtype or "f16", trust_remote_code=trust_remote_code, progress=progress)
    with new_folder(out) as folder:
        name = name_of(source)
        file = folder / f"{name}-{dtype or DTYPES[0]}.gguf"
        lines = write_gguf(
            source, file, dtype=dtype or DTYPES[0], trust_remote_code=trust_remote_code, progress=progress
        )
    return [f"{out / file.name}", *lines, f"try it: llama-cli -m {shlex.quote(str(out / file.name))}"]


def write_gguf(
    source: ModelSource,
    file: Path,
    *,
    dtype: str,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write a model, an adapter merged in, to a GGUF file.

    Args:
        source: of `resolve`.
        file: to write.
        dtype: one of `DTYPES`.
        trust_remote_code: run the Python code that the model brings.
        progress: called with how many weights were written since, and their total.

    Returns:
        Lines for the user: size, and what llama.cpp does otherwise.

    Raises:
        UserError: what llama.cpp does not compute.
        Failed: the weights don't fit the dtype.
    """
    from gguf import GGML_QUANT_VERSION, GGUFType, GGUFWriter, LlamaFileType

    from litft.models.load import load_config, load_tokenizer

    options = {"trust_remote_code": trust_remote_code}
    config = load_config(source, **options)
    family_of(config, tied=True)  # before anything long: what can't be written at all
    tokenizer = load_tokenizer(source, **options)
    stops = stop_ids(source, tokenizer, config)
    weights = open_weights(source, tokenizer, **options)
    tied = "lm_head.weight" not in weights.shapes
    family = family_of(weights.config, tied=tied)
    rows = weights.shapes["model.embed_tokens.weight"][0]
    words = vocabulary(tokenizer, rows, stops)
    plan = [(name, family.name(name)) for name in weights.shapes]
    head = "token_embd.weight" if tied else "output.weight"

    writer = GGUFWriter(file, family.arch)
    writer.add_type(GGUFType.MODEL)
    writer.add_name(shown_name(name_of(source), words))
    writer.add_file_type(LlamaFileType[_FILE_TYPES.get(dtype, f"MOSTLY_{dtype.upper()}")])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    family.describe(writer, rows)
    words.describe(writer)
    stored = {theirs: stored_as(theirs, weights.shapes[name], dtype, head) for name, theirs in plan}
    extra = dict(family.extra())
    shapes = {theirs: weights.shapes[name] for name, theirs in plan} | {n: tuple(t.shape) for n, t in extra.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from extra.items()
        for name, theirs in plan:
            yield theirs, family.layout(name, weights.read(name))

    order = [*extra, *stored]
    write_tensors(writer, {name: shapes[name] for name in order}, stored, tensors(), progress)
    return [_size(file), *_fallbacks(stored, dtype, head), *family.notes, *words.notes]


def open_weights(source: ModelSource, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Weights:
    """A model's weights, an adapter merged into them in fp32: tensor by tensor where its files allow that."""
    from litft.export.merged import merged_weights

    lazy = merged_weights(source, tokenizer, **options)
    if lazy is not None:
        return Weights(lazy.config, lazy.shapes, lazy.read)
    from litft.export.weights import exported_config
    from litft.models.load import load_model
    from litft.tuners.lora import merge_adapter

    model: Any = load_model(source, dtype=torch.float32, **options)
    if source.adapter is not None:
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        merge_adapter(model, source.adapter)
    live = dict(model.named_parameters())
    config = exported_config(model, torch.float32)
    return Weights(config, {name: tuple(p.shape) for name, p in live.items()}, lambda name: live[name].detach())


def stop_ids(source: ModelSource, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> list[int]:
    """Every token that ends an answer, as `litft generate` stops on them; a trained one first."""
    settings = own_settings(source, config)
    return as_ids(generation_settings(settings, tokenizer, template_stops(tokenizer)).eos_token_id)


def name_of(source: ModelSource) -> str:
    """A short name that can be a file's: the run's, the folder's or the repository's."""
    typed = Path(source.name).expanduser()
    folder = (source.adapter or source.folder) if typed.exists() else typed
    name = folder.parent.name if folder.name == "final" else folder.name
    return re.sub(r"[^\w.-]+", "-", name).strip("-") or "model"


def shown_name(name: str, words: Vocabulary) -> str:
    """`general.name`, from which llama.cpp also tells whether special tokens strip blanks, as those of Phi-3 do."""
    says = any(text in name.lower() for text in ("phi-3", "phi3"))
    if words.strips:
        return name if says else f"Phi-3 {name}"
    return name.lower().replace("phi-3", "phi 3").replace("phi3", "phi 3") if says else name


def stored_as(name: str, shape: tuple[int, ...], dtype: str, head: str) -> GGMLQuantizationType:
    """The type of one tensor in a file of a dtype.

    As llama.cpp's converter has it: norms, biases and factors stay fp32; rows that are no multiple of 32 long can't be
    quantised and are fp16. The output matrix is q8_0 in files of 4 and 5 bits, where its errors cost most.
    """
    from gguf import GGMLQuantizationType as Type

    if len(shape) < 2 or name.endswith("_norm.weight"):
        return Type.F32
    if dtype in ("f32", "f16", "bf16"):
        return Type[dtype.upper()]
    if shape[-1] % _BLOCK:
        return Type.F16
    return Type.Q8_0 if name == head else Type[dtype.upper()]


def write_tensors(
    writer: GGUFWriter,
    shapes: dict[str, tuple[int, ...]],
    stored: dict[str, GGMLQuantizationType],
    tensors: Iterator[tuple[str, Tensor]],
    progress: Progress | None,
) -> None:
    """Write header, metadata and tensors, no two of which are ever in memory.

    Args:
        writer: with the metadata in it.
        shapes: by name, in the order of `tensors`.
        stored: type by name; fp32 where nothing is said.
        tensors: name and values, in any floating-point dtype.
        progress: called with how many tensors were written since, and their total.

    Raises:
        UserError: the disk has no room for them.
        Failed: a weight is not finite, or too large for fp16.
    """
    from gguf import GGMLQuantizationType as Type
    from gguf.quants import quant_shape_to_byte_shape

    for name, shape in shapes.items():
        kind = stored.get(name, Type.F32)
        if kind in (Type.F32, Type.F16):
            size = math.prod(shape) * (4 if kind == Type.F32 else 2)
            writer.add_tensor_info(name, shape, np.dtype(np.float32 if kind == Type.F32 else np.float16), size)
        else:
            bytes_shape = quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(name, bytes_shape, np.dtype(np.uint8), math.prod(bytes_shape), raw_dtype=kind)
    _check_disk(writer)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors:
            writer.write_tensor_data(_converted(name, tensor, stored.get(name, Type.F32)))
            if progress is not None:
                progress(1, len(shapes))
    finally:
        writer.close()


def _check_disk(writer: GGUFWriter) -> None:
    need = sum(tensor.nbytes for part in writer.tensors for tensor in part.values())
    assert writer.path is not None
    if (free := shutil.disk_usage(writer.path.parent).free) < need:
        raise UserError(
            f"the file takes {need / 1e9:,.1f} GB, and the disk has {free / 1e9:,.1f} GB free\n"
            "mend: make room, name another --out, or a smaller --dtype"
        )


def _converted(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    from gguf.quants import quantize

    rows = tensor.reshape(-1, tensor.shape[-1])
    parts = []
    for part in rows.split(max(1, _AT_ONCE // rows.shape[1])):
        values = part.float().numpy()
        with np.errstate(over="ignore", invalid="ignore"):
            parts.append(quantize(values, kind))
        if not np.isfinite(values).all():
            raise Failed(f"the weight {name} holds infinities or NaN: training went wrong before this")
        if parts[-1].dtype == np.float16 and not np.isfinite(parts[-1]).all():
            raise Failed(f"the weight {name} has values beyond fp16's range\nmend: --dtype bf16 or f32")
    joined = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return joined.reshape(*tensor.shape[:-1], joined.shape[-1])


def _size(file: Path) -> str:
    return f"{file.stat().st_size / 1e6:,.0f} MB"


def _fallbacks(stored: dict[str, GGMLQuantizationType], dtype: str, head: str) -> Iterator[str]:
    from gguf import GGMLQuantizationType as Type

    if dtype in ("f32", "f16", "bf16"):
        return
    half = [name for name, kind in stored.items() if kind == Type.F16]
    if half:
        yield f"{len(half)} weights are f16, such as {half[0]}: their rows are no multiple of {_BLOCK} long"
    if dtype != "q8_0" and stored[head] == Type.Q8_0:
        yield f"{head} is q8_0"
