"""What `vllm serve` takes as it is: a Hugging Face folder, or an adapter folder where vLLM can run the adapter."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from litft.errors import Failed, UserError
from litft.export.hf import Progress, describe, keep_adapter, no_adapter, write_model
from litft.models.resolve import read_json
from litft.tuners.peft_format import CONFIG, WEIGHTS, read_config, read_tensors, tuner_options

if TYPE_CHECKING:
    from litft.models.resolve import ModelSource

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be (`MaxLoRARanks` in vllm/config/lora.py)."""

UNMEASURED = "written for vLLM by its documentation; serving with it was not measured here"


def export_vllm(
    source: ModelSource,
    out: Path,
    *,
    dtype: str | None = None,
    adapter: Literal["merge", "keep"] | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write the folder that vLLM takes, and say how it is served.

    Args:
        source: of `resolve`.
        out: of `new_output`.
        dtype: bf16, fp16 or fp32; None is the one in which the model, or the adapter, is stored.
        adapter: merge it, or keep it to be served beside its base; None keeps it where vLLM can run it.
        trust_remote_code: run the Python code that the model brings.
        progress: called as the work goes on.

    Returns:
        Lines for the user, the command to serve it among them.

    Raises:
        UserError: an adapter is to be kept that vLLM can't run, or is one that litft doesn't know.
        Failed: what was written isn't what the model is.
    """
    if source.adapter is None and adapter == "keep":
        raise no_adapter(source)
    if source.adapter is not None:
        tuner_options(source.adapter)
    reasons = [] if source.adapter is None else beyond_vllm(source.adapter)
    if reasons and adapter == "keep":
        raise UserError(
            f"{source.name}: vLLM can't run this adapter beside its base: {', '.join(reasons)}\nmend: --adapter merge"
        )
    if source.adapter is not None and not reasons and adapter != "merge":
        keep_adapter(source, out, dtype=dtype, trust_remote_code=trust_remote_code)
        check_adapter(out)
        rank = served_rank(read_config(out)["r"])
        flags = f"--enable-lora --lora-modules {shlex.quote(f'{out.name}={out}')} --max-lora-rank {rank}"
        return [
            f"{out}: the adapter",
            f"vllm serve {shlex.quote(source.base_name)} {flags}",
            f"requests name the model {out.name!r}; {UNMEASURED}",
        ]
    written = write_model(source, out, dtype=dtype, trust_remote_code=trust_remote_code, progress=progress)
    check_model(out)
    why = [f"merged, because vLLM does not run {', '.join(reasons)} beside a base"] if reasons else []
    return [*describe(source, written), *why, f"vllm serve {shlex.quote(str(out))}", UNMEASURED]


def beyond_vllm(adapter: Path) -> list[str]:
    """What an adapter has that vLLM doesn't run beside a base (`PEFTHelper` in vllm/lora/peft_helper.py).

    Patterns of ranks and alphas are not refused there but ignored, which would scale the updates wrongly.
    """
    config = read_config(adapter)
    unsupported = {
        "use_dora": "DoRA",
        "modules_to_save": "whole trained modules (modules_to_save)",
        "trainable_token_indices": "trained embedding rows",
        "target_parameters": "adapted expert stacks (target_parameters)",
        "rank_pattern": "ranks that differ between modules",
        "alpha_pattern": "alphas that differ between modules",
    }
    found = [what for key, what in unsupported.items() if config.get(key)]
    if config.get("r", 0) > RANKS[-1]:
        found.append(f"rank {config['r']} (at most {RANKS[-1]})")
    if config.get("bias", "none") != "none":
        found.append("trained biases")
    if config.get("init_lora_weights") == "pissa":
        found.append("an update of weights that PiSSA changed")
    if not found and (adapter / WEIGHTS).is_file() and any(map(_is_odd, read_tensors(adapter))):
        found.append("weights of the base that lie with the adapter (of added tokens, say)")
    return found


def _is_odd(key: str) -> bool:
    return not key.endswith((".lora_A.weight", ".lora_B.weight"))


def served_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` that holds an adapter of this rank."""
    return next(allowed for allowed in RANKS if allowed >= rank)


def check_model(folder: Path) -> None:
    """Make sure that a folder has what vLLM looks for.

    Raises:
        Failed: something is missing.
    """
    _require(folder, "config.json", "tokenizer_config.json", "generation_config.json")
    config = read_json(folder / "config.json")
    if not config.get("architectures") or "quantization_config" in config:
        raise Failed(f"{folder / 'config.json'}: names no architecture, or claims a quantisation")
    if not any(folder.glob("model*.safetensors")):
        raise Failed(f"{folder}: has no model*.safetensors")


def check_adapter(folder: Path) -> None:
    """Make sure that a folder has what vLLM looks for in an adapter, under the names that it knows.

    Raises:
        Failed: something is missing.
    """
    _require(folder, CONFIG, WEIGHTS)
    if odd := list(filter(_is_odd, read_tensors(folder))):
        raise Failed(f"{folder / WEIGHTS}: {odd[0]} is no LoRA weight that vLLM knows")


def _require(folder: Path, *names: str) -> None:
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise Failed(f"{folder}: lacks {', '.join(missing)}, without which vLLM does not start")
