"""A run in a process of its own: prints the peak that was predicted and the one that was measured, as JSON.

python memory_run.py '{"model": FOLDER, "data": FILE, "tuner": "lora", ...}'
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from lightning import Trainer, seed_everything

from litft import ChatData, Full, LoRA, QLoRA
from litft.cli.finetune import _quiet


def peak() -> int:
    """Peak resident size in bytes; `ru_maxrss` would begin at that of the process that started this one."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def main(run: dict) -> None:
    """Three optimizer steps."""
    import litft.engine.run
    import litft.models.load
    import litft.models.resolve

    _quiet()
    imported = peak()
    seed_everything(1, verbose=False)
    tuner = {"full": Full, "lora": LoRA, "qlora": QLoRA}[run["tuner"]]()
    options = {"compile": "false", **run.get("method", {})}
    if run.get("kind") == "Distill":
        options["teacher"] = run["model"]
    method = getattr(litft, run.get("kind", "SFT"))(run["model"], tuner, **options)
    batch = run.get("batch", 4096)
    data = ChatData(run["data"], val_fraction=0.0, tokens_per_batch=batch, tokens_per_step=run.get("step", batch))
    trainer = Trainer(
        accelerator=run.get("accelerator", "cpu"),
        devices=run.get("devices", 1),
        strategy="ddp" if run.get("devices", 1) > 1 else "auto",
        max_steps=3,
        precision=run.get("precision", "bf16-mixed"),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(method, datamodule=data)
    if trainer.is_global_zero:
        taken = torch.cuda.max_memory_allocated() if trainer.strategy.root_device.type == "cuda" else peak() - imported
        found = {"measured": taken, "predicted": method.memory.parts["peak"]}
        print(json.dumps({**found, "steps": trainer.global_step, **method.memory.summary()}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
