"""What the tuners' tests share: an adapter with every weight moved, ids that hit learning rows, logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tiny import IM_END, VOCAB, save_tiny, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from litft.export.final import save_final
from litft.models.load import add_tokens
from litft.tuners import LoRA

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def perturb(model: torch.nn.Module, scale: float = 0.1) -> None:
    """Move every learning weight, so that no factor is zero and no magnitude is the norm it started from."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param += scale * torch.randn(param.shape, generator=generator)


def ids(rows: int = 2, length: int = 12) -> torch.Tensor:
    x = torch.randint(8, VOCAB, (rows, length), generator=torch.Generator().manual_seed(2))
    x[:, 3], x[:, 8] = 5, 7  # the rows that learn in some cases
    return x


@torch.no_grad()
def logits(model: torch.nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    return model.eval()(ids() if x is None else x).logits.float()


def trained(family: str, **options: Any) -> tuple[Any, LoRA]:
    model, tuner = tiny_model(family), LoRA(**{"r": 4, "alpha": 12, **options})
    torch.manual_seed(3)
    tuner.apply(model)
    perturb(model)
    return model, tuner


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def run_of(
    folder: Path, family: str = "llama", *, tokens: list[str] | None = None, tuner: type[LoRA] = LoRA, **options: Any
) -> Path:
    """A run folder with an adapter, every weight of it moved, on a bf16 base."""
    shape = options.pop("shape", {})
    base = save_tiny(folder / "base", family, dtype=torch.bfloat16, **shape)
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        AutoTokenizer.from_pretrained(base),
    )
    if tokens:
        options["trainable_rows"] = add_tokens(model, tokenizer, tokens)
    lora = tuner(**{"r": 4, "alpha": 12, **options})
    torch.manual_seed(3)
    lora.apply(model)
    perturb(model)
    save_final(model, lora, tokenizer, folder / "run" / "final", base=str(base), stop_ids={IM_END})
    return folder / "run"


def with_peft(run: Path) -> torch.Tensor:
    """The logits of base and adapter as PEFT puts them together, in fp32."""
    base = json.loads((run / "final" / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return logits(PeftModel.from_pretrained(model, run / "final"))
