"""A model whose linear layers are stored in 8 or 4 bits, for plain transformers to load."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from litft.engine.signals import tidied
from litft.errors import UserError
from litft.export.card import CARD, with_note
from litft.export.final import new_folder
from litft.export.hf import Progress, check_disk, write_model, write_settings
from litft.models.quiet import quiet

if TYPE_CHECKING:
    from litft.evaluate.losses import Documents
    from litft.models.resolve import ModelSource

Form = Literal["int8", "int4", "nf4"]
GROUP = 32
"""Weights that share a scale in int4."""
_GROUPS = {"int4": GROUP, "nf4": 64}

FORMS: dict[str, str] = {
    "int8": "torchao, a scale a row: 1 byte a weight",
    "int4": f"torchao, a scale and a zero point for {GROUP} weights: 4-bit values, but 1 byte each on disk",
    "nf4": "bitsandbytes, as QLoRA stores its base: 0.52 bytes a weight",
}


@dataclass(frozen=True)
class Quantised:
    """A quantised folder, and what it costs.

    Attributes:
        folder: where.
        before: loss a trained token, in nats, of the model as it is stored.
        after: of the folder, read again.
        tokens: trained tokens of the rows that were measured on.
        bytes_before: of the weights' files.
        bytes_after: of the folder's.
        layers: number of quantised layers.
        left: weights in stacks of experts, which stay as they are.
    """

    folder: Path
    before: float
    after: float
    tokens: int
    bytes_before: int
    bytes_after: int
    layers: int
    left: int = 0


def quantize(
    source: ModelSource,
    out: Path,
    *,
    to: Form,
    documents: Documents,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Quantised:
    """Write a quantised model folder; an adapter is merged into its 16-bit base first.

    Linear layers are quantised but for the output head; embeddings, norms and stacks of experts stay as they are. Loss
    is measured on the folder as transformers reads it again.

    Args:
        source: of `resolve`.
        out: of `new_output`.
        to: the form.
        documents: rows to measure the loss on, with this model's tokenizer (`litft.evaluate.losses`).
        trust_remote_code: run the Python code that the model brings.
        progress: called with rows that were measured, and their number.

    Returns:
        Where it lies and what it costs.

    Raises:
        UserError: a library is missing, or the model has no layers that can be quantised so.
        Failed: an adapter could not be merged faithfully.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from litft.export.weights import stored_dtype
    from litft.models.load import load_tokenizer
    from litft.tuners.targets import stacked_weights

    settings = settings_for(to)
    code: Any = {"trust_remote_code": trust_remote_code}
    report = progress or (lambda more, total=None: None)
    report(0, 2 * int(documents.used.sum()))
    tokens = int(documents.trained[documents.used].sum())
    tokenizer = load_tokenizer(source, **code)
    with _merged(source, out, code) as folder:
        dtype = stored_dtype(folder) or torch.bfloat16
        check_shapes(folder, to)
        before = _loss(folder, documents, report, code)
        with quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, quantization_config=settings, use_safetensors=True, **code
            )
        layers = sum(map(_is_quantised, model.parameters()))
        if not layers:
            raise UserError(f"{source.name}: has no linear layers that --to {to} quantises\nmend: another --to")
        left = sum(stacked_weights(model).values())
        with new_folder(out) as new:
            with quiet():
                model.save_pretrained(new)
            write_settings(source, tokenizer, model.config, None, new)
            del model
            after = _loss(new, documents, report, code)
            card = new / CARD
            if card.is_file():
                losses = f"{before / tokens:.4f} before, {after / tokens:.4f} after"
                said = f"By {FORMS[to]}. Loss on {tokens:,} held-out tokens: {losses}."
                card.write_text(
                    with_note(card.read_text(encoding="utf-8"), f"Quantised to {to}", said), encoding="utf-8"
                )
        size = _size(folder)
    return Quantised(out, before / tokens, after / tokens, tokens, size, _size(out), layers, left)


def settings_for(to: Form) -> Any:
    """What transformers is told for a form.

    Raises:
        UserError: the library that does it is missing.
    """
    import torch

    if to == "nf4":
        from transformers import BitsAndBytesConfig

        from litft.tuners.quant import bitsandbytes

        bitsandbytes()
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    try:
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup
        from torchao.quantization.quant_primitives import MappingType
    except ImportError as error:
        raise UserError(f"--to {to} needs torchao ({error})\nmend: pip install 'litft[torchao]'") from error
    from transformers import TorchAoConfig

    if to == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig(version=2))
    # Of torchao's forms of int4 the one that can be saved and run on any device. Those that pack two values into a byte
    # are made for one kind of device and need it when they are made (0.18).
    return TorchAoConfig(
        IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, "int4"),  # noqa: B009 - stubs lack it
            granularity=PerGroup(GROUP),
            mapping_type=MappingType.ASYMMETRIC,
        )
    )


def check_shapes(folder: Path, to: Form) -> None:
    """Refuse a model whose rows can't be cut into groups.

    Raises:
        UserError: naming a weight.
    """
    from litft.models.stored import stored_tensors

    if to not in _GROUPS:
        return
    for name, tensor in stored_tensors(folder).items():
        stays = name.startswith("lm_head") or "embed" in name or ".experts." in name
        if len(tensor.shape) == 2 and not stays and tensor.shape[1] % _GROUPS[to]:
            raise UserError(
                f"--to {to}: {name} has rows of {tensor.shape[1]} weights, which {_GROUPS[to]} does not divide\n"
                f"mend: --to int8{' or nf4' if tensor.shape[1] % _GROUPS['nf4'] == 0 else ''}"
            )


@contextlib.contextmanager
def _merged(source: ModelSource, out: Path, code: Any) -> Iterator[Path]:
    """A folder with the whole model in 16 bits: the source's own, or for an adapter a temporary one."""
    if source.adapter is None:
        yield source.folder
        return
    import torch

    from litft.export.weights import stored_dtype

    check_disk(source, out, stored_dtype(source.folder) or torch.bfloat16)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tidied(), tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
        yield write_model(source, Path(work) / "merged", **code).folder


def _loss(folder: Path, documents: Documents, report: Progress, code: Any) -> float:
    """The sum over all trained tokens, on the CPU, in the dtype in which the model is stored."""
    from litft.evaluate.losses import row_losses
    from litft.export.weights import stored_dtype
    from litft.infer.load import load_for_inference

    bundle = load_for_inference(folder, device="cpu", dtype=stored_dtype(folder), **code)
    return float(row_losses(bundle, documents, advance=report).sum())


def _is_quantised(parameter: Any) -> bool:
    """Whether a parameter is one of bitsandbytes' or torchao's."""
    kind = type(parameter) if type(parameter).__module__ != "torch.nn.parameter" else type(parameter.data)
    return kind.__module__.partition(".")[0] in ("bitsandbytes", "torchao")


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
