"""A LoRA adapter as a GGUF file, which llama.cpp adds to its base model when it loads (`--lora`)."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from litft.errors import UserError
from litft.export.final import new_folder
from litft.export.gguf import name_of, write_tensors
from litft.export.gguf_families import family_of
from litft.export.hf import no_adapter

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

    from litft.models.resolve import ModelSource

DTYPES = ("f16", "bf16", "f32", "q8_0")
"""How an adapter's matrices can be stored; the first is the default."""
_A = ".lora_A.weight"
_MEND = "mend: leave --adapter out, which merges it"


def export_adapter(
    source: ModelSource,
    out: Path,
    *,
    dtype: str,
    trust_remote_code: bool = False,
    progress: Callable[..., None] | None = None,
) -> list[str]:
    """Write an adapter as `out/NAME-lora-DTYPE.gguf`.

    Args:
        source: of `resolve`, with an adapter.
        out: a folder that is not there yet.
        dtype: one of `DTYPES`.
        trust_remote_code: run the Python code that the model brings.
        progress: called with how many tensors were written since, and their total.

    Returns:
        Lines for the user.

    Raises:
        UserError: no adapter, or one that llama.cpp can't add: it is to be merged then.
    """
    from gguf import GGUFType, GGUFWriter, Keys, LlamaFileType

    from litft.models.load import load_config

    if source.adapter is None:
        raise no_adapter(source)
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: an adapter is small and stored as {', '.join(DTYPES)}")
    config = load_config(source, trust_remote_code=trust_remote_code)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    family = family_of(config, tied=tied)
    alpha, pairs = read_pairs(source.adapter)
    if tied and "lm_head" in pairs:
        raise UserError(f"{source.adapter}: adapts an output matrix that is also the embedding\n{_MEND}")
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        theirs = family.name(f"{name}.weight")
        tensors[f"{theirs}.lora_a"] = a
        tensors[f"{theirs}.lora_b"] = family.layout(f"{name}.weight", b)

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    with new_folder(out) as folder:
        file = folder / f"{name_of(source)}-lora-{dtype}.gguf"
        writer = GGUFWriter(file, family.arch)
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_name(name_of(source))
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(LlamaFileType["ALL_F32" if dtype == "f32" else f"MOSTLY_{dtype.upper()}"])
        stored = {name: _stored_as(shape, dtype) for name, shape in shapes.items()}
        write_tensors(writer, shapes, stored, iter(tensors.items()), progress)
    half = sum(kind.name == "F16" for kind in stored.values()) if dtype == "q8_0" else 0
    return [
        f"{out / file.name}",
        *([f"{half} matrices are f16: their rows are no multiple of 32 long"] if half else []),
        f"its base, once: litft export {shlex.quote(source.base_name)} --to gguf --dtype f16 --out BASE",
        f"try it: llama-cli -m BASE/*.gguf --lora {shlex.quote(str(out / file.name))}",
    ]


def read_pairs(adapter: Path) -> tuple[float, dict[str, tuple[Tensor, Tensor]]]:
    """The low-rank updates of an adapter as llama.cpp adds them: W x + alpha / r * B (A x).

    Args:
        adapter: PEFT's folder.

    Returns:
        alpha, and A of shape (r, in) and B of shape (out, r) by the name of the module. Where a module's scale is not
        alpha / r (rsLoRA, an alpha of its own), its B holds the difference.

    Raises:
        UserError: it holds more than low-rank updates.
    """
    from litft.tuners.lora import LoRA
    from litft.tuners.peft_format import plain_name, read_tensors

    lora = LoRA.from_folder(adapter)
    beyond = {
        "DoRA's magnitudes": lora.dora,
        "modules trained as a whole (modules_to_save)": lora.modules_to_save,
        "trained rows of the embedding": lora.trainable_rows,
        "updates of experts (target_parameters)": lora.target_parameters,
        "an update of weights that PiSSA changed": lora.init == "pissa",
    }
    state = read_tensors(adapter)
    whole = [plain_name(key) for key in state if ".lora_" not in key]
    if what := next((what for what, there in beyond.items() if there), f"the weight {whole[0]}" if whole else None):
        raise UserError(f"{adapter}: holds {what}, which llama.cpp can't add to a base model\n{_MEND}")
    pairs = {}
    for key, a in state.items():
        if not key.endswith(_A):
            continue
        b, name = state[key.removesuffix(_A) + ".lora_B.weight"], plain_name(key.removesuffix(_A))
        factor = lora.scale_of(name) * a.shape[0] / lora.alpha
        pairs[name] = (a, b if factor == 1 else b.float() * factor)
    return float(lora.alpha), pairs


def _stored_as(shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType as Type

    return Type.F16 if dtype == "q8_0" and shape[-1] % 32 else Type[dtype.upper()]
